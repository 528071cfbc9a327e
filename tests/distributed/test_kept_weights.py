"""Sharded models: weights that stay gathered for a window, and that are gathered in the dtype of the computation."""

from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bigbatch.lm.distributed.ranks import casts_weights_under_autocast
from support.gloo_processes import run

from .kept_weights_cases import abandon, dtypes_in_forward, gradients, llama, train

MODULES, MICROBATCHES = 5, 6


def test_weights_are_gathered_once_a_window_and_updates_are_the_same_bits() -> None:
    kept, freed = (run(train, 2, keeps) for keeps in (True, False))
    for (weights, gathers, between), (expected, gathers_before, between_before) in zip(kept, freed, strict=True):
        assert weights == expected
        assert between == between_before
        # the last layer is gathered with the model, whose weights FSDP does not free after forward
        assert gathers_before[1] >= MICROBATCHES * (MODULES - 1)
        assert gathers[1] == gathers[2] <= MODULES


@pytest.mark.slow
def test_abandoned_window_frees_gathered_weights() -> None:
    kept, freed = (run(abandon, 2, keeps) for keeps in (True, False))
    for weights, expected in zip(kept, freed, strict=True):
        assert weights == expected


@pytest.mark.slow
def test_gradients_with_bfloat16_weights_are_as_close_as_under_autocast() -> None:
    expected, sharded, narrow, once = (
        torch.tensor([*chain(*run(gradients, 2, how)[0])]).double()
        for how in ("replicated", "sharded", "bfloat16", "bfloat16 once")
    )
    assert F.cosine_similarity(sharded, expected, dim=0) > 0.99999
    for found in (narrow, once):
        assert F.cosine_similarity(found, expected, dim=0) > 0.9999
        assert abs(found.norm() / expected.norm() - 1) < 0.01


def test_layers_are_gathered_in_bfloat16() -> None:
    assert run(dtypes_in_forward, 2) == [{torch.bfloat16}] * 2


def test_weights_that_autocast_does_not_cast_stay_as_they_are() -> None:
    class Decay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.ones(3))

    assert casts_weights_under_autocast(llama().model.layers[0])
    assert not casts_weights_under_autocast(nn.Sequential(nn.Linear(2, 2), Decay()))
