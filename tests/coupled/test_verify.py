"""`verify`, the check of the first window, and the choice of the micro-batch, for coupled losses."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigbatch
from coupled.models import CASES, TOLERANCE, batch, engine_of, gradient_error, towers, two_towers, whole_batch


def test_verify_shows_every_cut_as_exact() -> None:
    case, model = CASES["barlow twins, head with batch norm"], towers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = bigbatch.verify(model, bigbatch.Coupled(case.encode, case.loss), batch(), microbatch=list(range(1, 23)))
    assert found.exact
    assert found.relative_error <= TOLERANCE
    assert found.cuts[3].mean_of_means_error > 0.1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_verify_names_coupled_as_the_answer() -> None:
    case = CASES["info_nce"]

    def loss_fn(model: Any, part: dict[str, Tensor]) -> tuple[Tensor, int]:
        samples = len(part["left"])
        return case.loss(model, case.encode(model, part)) * samples, samples

    found = bigbatch.verify(towers(), loss_fn, batch())
    assert any("Pass bigbatch.Coupled(encode, loss) as loss_fn" in cause for cause in found.causes)


def test_verify_names_dropout_of_encoder() -> None:
    case = CASES["clip"]
    found = bigbatch.verify(towers(dropout=0.3), bigbatch.Coupled(case.encode, case.loss), batch())
    assert not found.exact
    assert len(found.causes) == 1
    assert found.causes[0].startswith("dropout (left.2: Dropout")


def test_verify_names_module_that_mixes_samples_in_encode() -> None:
    def encode(model: Any, part: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        left, right = two_towers(model, part)
        return model.shared[3](left.new_zeros(len(left), 8) + left.mean()), right

    found = bigbatch.verify(towers(), bigbatch.Coupled(encode, CASES["clip"].loss), batch())
    assert not found.exact


@pytest.mark.parametrize("place", ["encode", "loss"])
def test_first_window_warns_of_batch_norm_in_encode_only(place: str) -> None:
    model = towers()
    if place == "encode":
        model.left.append(nn.BatchNorm1d(4).double())
    case = CASES["barlow twins, head with batch norm"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine_of(model, case, 4).backward(batch(20))
    found = [str(each.message) for each in caught]
    assert any("left.4: BatchNorm1d" in text for text in found) == (place == "encode")
    assert not any("head.1" in text for text in found)


def test_automatic_microbatch_is_chosen_and_exact() -> None:
    case, data, model = CASES["clip"], batch(64), towers()
    engine = engine_of(model, case, "auto", memory="8GiB")
    report = engine.backward(data)
    assert engine.choice is not None
    assert engine.choice.prediction_failure is None
    assert report.items == 64
    assert gradient_error(model, whole_batch(towers(), case, data)[0]) <= TOLERANCE
