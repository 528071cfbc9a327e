"""Out-of-memory in any part of a coupled window: every sample still counts exactly once."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigbatch
from coupled.models import CASES, NUM_SAMPLES, TOLERANCE, Case, batch, gradient_error, rows_of, towers, whole_batch

CLIP = CASES["clip"]


class LimitedMemory:
    """An encoder that runs out of memory above a number of samples.

    Args:
        first: Samples that fit in the first pass.
        second: Samples that fit in the second pass.
        in_backward: Whether the second pass fails in its backward, after it has added to some parameters.
    """

    def __init__(self, *, first: int = 99, second: int = 99, in_backward: bool = False) -> None:
        self.first, self.second, self.in_backward = first, second, in_backward
        self.sizes: list[tuple[bool, int]] = []

    def __call__(self, model: Any, part: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        size, is_second = len(part["left"]), torch.is_grad_enabled()
        self.sizes.append((is_second, size))
        fits = size <= (self.second if is_second else self.first)
        hidden = model.left[:3](part["left"])
        if not fits and not (is_second and self.in_backward):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        if not fits:
            hidden.register_hook(_fail)
        return model.left[3](hidden), model.right(part["right"])


def _fail(_gradient: Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def engine_of(model: nn.Module, encode: Any, microbatch: int, **options: Any) -> bigbatch.Engine:
    coupled = bigbatch.Coupled(encode, CLIP.loss)
    return bigbatch.Engine(model, None, coupled, microbatch=microbatch, check=False, **options)


@pytest.mark.parametrize("cut", [6, 22])
@pytest.mark.parametrize(
    "limits",
    [{"first": 3}, {"second": 3}, {"second": 3, "in_backward": True}, {"first": 5, "second": 1}],
    ids=str,
)
def test_every_sample_counts_once(limits: dict[str, Any], cut: int) -> None:
    data, model, encode = batch(), towers(), LimitedMemory(**limits)
    report = engine_of(model, encode, cut).backward(data)
    reference, loss = whole_batch(towers(), CLIP, data)
    assert gradient_error(model, reference) <= TOLERANCE
    assert report.loss == pytest.approx(loss, rel=1e-12)
    assert report.retries >= (cut == 6 or "second" in limits)  # a window of one micro-batch has no first pass
    assert report.items == NUM_SAMPLES


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("num_samples", [12, 22])
def test_dropout_starts_window_again_with_smaller_cut(in_backward: bool, num_samples: int) -> None:
    data = batch(num_samples)
    encode = LimitedMemory(second=3, in_backward=in_backward)
    model = towers(dropout=0.3)
    torch.manual_seed(7)
    report = engine_of(model, encode, 12).backward(data)
    after = torch.get_rng_state()
    assert report.retries == (2 if num_samples == 12 else 3)  # 12 → 6 → 3, and 10 → 5 → 3
    seconds = [size for is_second, size in encode.sizes if is_second]
    last = seconds[-report.num_microbatches :]
    reference = towers(dropout=0.3)
    torch.manual_seed(7)
    bounds = [sum(last[:i]) for i in range(len(last) + 1)]
    assert bounds[-1] == num_samples, "the last attempt ran every sample once"
    parts = [CLIP.encode(reference, rows_of(data, slice(a, b))) for a, b in pairwise(bounds)]
    CLIP.loss(reference, tuple(torch.cat(column) for column in zip(*parts, strict=True))).backward()
    assert gradient_error(model, reference) <= TOLERANCE
    assert torch.equal(torch.get_rng_state(), after)


def test_batch_norm_in_encode_and_loss_learns_once_after_restart() -> None:
    data, model, reference = batch(), towers(), towers()
    for each in (model, reference):
        each.right.append(nn.BatchNorm1d(4, momentum=0.3).double())
    barlow = CASES["barlow twins, head with batch norm"].loss
    coupled = bigbatch.Coupled(LimitedMemory(second=6), barlow)
    bigbatch.Engine(model, None, coupled, microbatch=11, check=False).backward(data)
    cuts = [slice(0, 6), slice(6, 11), slice(11, 17), slice(17, 22)]
    parts = [CLIP.encode(reference, rows_of(data, rows)) for rows in cuts]
    barlow(reference, tuple(torch.cat(column) for column in zip(*parts, strict=True))).backward()
    assert gradient_error(model, reference) <= TOLERANCE
    for found, expected in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-12)


def test_next_window_uses_smaller_microbatches() -> None:
    encode = LimitedMemory(second=9)
    engine = engine_of(towers(), encode, 10)
    engine.backward(batch())
    assert engine.microbatch_size.current == 9
    assert engine.backward(batch()).retries == 0


@pytest.mark.parametrize("limits", [{"first": 0}, {"second": 0}], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_sample_that_does_not_fit_is_named(limits: dict[str, Any], dropout: float) -> None:
    model = towers(dropout=dropout)
    engine = engine_of(model, LimitedMemory(**limits), 4)
    with pytest.raises(bigbatch.MemoryLimitError, match="sample 0 of the batch does not fit in memory by itself"):
        engine.backward(batch())
    assert all(p.grad is None for p in model.parameters())


def test_loss_that_does_not_fit_says_so() -> None:
    def loss(_model: Any, _features: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    case = Case(CLIP.encode, loss)
    engine = bigbatch.Engine(towers(), None, bigbatch.Coupled(case.encode, case.loss), microbatch=4)
    with pytest.raises(bigbatch.MemoryLimitError) as caught:
        engine.backward(batch())
    assert str(caught.value) == (
        "the loss of Coupled on the features of 22 samples does not fit in memory (CUDA out of memory), whatever the "
        "micro-batch: use a smaller batch, or compute the loss in blocks of rows with activation checkpointing."
    )
