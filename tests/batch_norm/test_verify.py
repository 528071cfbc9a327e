"""`verify` of models with batch norm: exact over the whole batch, and the sentence without it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigbatch
from batch_norm.models import Batch, Small, classify, images, norms, plain, resnet, rows, squares


def test_exact_norms_verify_as_exact() -> None:
    model = resnet()
    before = [value.clone() for value in model.state_dict().values()]
    found = bigbatch.verify(model, classify, images(), microbatch=[1, 3, 4, 10, 11], batch_norm="exact")
    assert found.exact
    assert found.relative_error <= 1e-14
    assert all(map(torch.equal, model.state_dict().values(), before))
    assert all(not norm._forward_hooks for norm in norms(model))


def test_plain_norms_name_the_answer() -> None:
    found = bigbatch.verify(resnet(), classify, images(), microbatch=4)
    assert not found.exact
    (cause,) = found.causes
    assert cause == (
        "BatchNorm in training mode (stem.1: BatchNorm2d, blocks.0.norm1: BatchNorm2d, blocks.0.norm2: BatchNorm2d and "
        "6 more): it normalizes by the mean and variance of the micro-batch, so samples influence each other. Pass "
        'batch_norm="exact" to bigbatch.Engine, set it to eval mode, or use GroupNorm or LayerNorm.'
    )


def test_other_causes_are_named_beside_exact_norms() -> None:
    model = Small(lambda m, x: m.drop(plain(m, x)), drop=nn.Dropout(0.5))
    (cause,) = bigbatch.verify(model, squares, rows(), microbatch=4, batch_norm="exact").causes
    assert cause.startswith("dropout (drop: Dropout)")


def test_mean_as_loss_is_named_beside_exact_norms() -> None:
    def mean(model: Any, batch: Batch) -> tuple[Tensor, int]:
        return (model(batch[0]) - batch[1]).square().mean(), len(batch[0])

    found = bigbatch.verify(Small(plain), mean, rows(12), microbatch=4, batch_norm="exact")
    assert not found.exact
    assert "mean" in found.causes[0]


def test_module_that_mixes_samples_is_named_beside_exact_norms() -> None:
    class Centered(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    model = Small(lambda m, x: plain(m, m.center(m.first(x))), center=Centered())
    (cause,) = bigbatch.verify(model, squares, rows(), microbatch=4, batch_norm="exact").causes
    assert cause.startswith("the module 'center' (Centered) mixes samples")


def test_cut_that_cannot_run_is_named() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        return model.last(model.norm(model.first(x))) if len(x) > 3 else model.last(model.first(x))

    found = bigbatch.verify(Small(forward), squares, rows(), microbatch=4, batch_norm="exact")
    assert found.causes == (
        "micro-batches of 4 cannot run, although larger ones can: InputError: micro-batch 3 reaches the end, and "
        "micro-batch 1 reaches the batch norm 'norm': batch_norm=\"exact\" needs every micro-batch to run the same "
        "batch norms in the same order. Take branches that depend on the data out of the model, or leave batch_norm= "
        "out.",
    )


def test_coupled_loss_is_refused() -> None:
    coupled = bigbatch.Coupled(lambda model, batch: model(batch[0]), lambda _model, features: features.square().mean())
    with pytest.raises(bigbatch.InputError, match="is not supported for a Coupled loss"):
        bigbatch.verify(Small(plain), coupled, rows(), batch_norm="exact")


def test_is_trial_inside_micro_batches() -> None:
    answers = set()

    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, int]:
        answers.add(bigbatch.is_trial())
        return squares(model, batch)

    bigbatch.verify(Small(plain), loss_fn, rows(), microbatch=4, batch_norm="exact")
    assert answers == {True}
