"""The gradient of ragged pairs in any cut against that of the whole batch as one micro-batch, in float64."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bigbatch.distributed.replicated import Replicated
from lm.objectives import cases
from support.process_pool import Pools
from support.tiers import slow, slow_except

TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.make_folder(tmp_path_factory.mktemp("objectives"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", slow_except(cases.OBJECTIVES, "reward", "dpo", "embedding"))
def test_every_cut_gives_gradient_of_whole_batch(folder: Path, name: str, device: str) -> None:
    setup = cases.set_up(folder, name, device=device)
    samples = cases.samples_of(setup)
    assert len({len(row) for sample in samples for row in sample["sequences"]}) > 3, "lengths are ragged"
    whole = cases.whole_gradient(setup, samples)
    for microbatch in range(1, cases.NUM_SAMPLES + 1):
        error = cases.relative_error(cases.gradient(setup, samples, microbatch), whole)
        assert error <= TOLERANCE, microbatch


@pytest.mark.parametrize("name", ["reward", "dpo", "embedding"])
def test_mean_of_microbatch_means_is_another_gradient(folder: Path, name: str) -> None:
    setup = cases.set_up(folder, name)
    samples = cases.samples_of(setup)
    whole = cases.whole_gradient(setup, samples)
    parts = [cases.whole_gradient(setup, samples[start : start + 5]) for start in (0, 5, 10)]
    mean = {key: torch.stack([part[key] for part in parts]).mean(0) for key in whole}
    assert cases.relative_error(mean, whole) > 0.01


@pytest.mark.parametrize("sizes", [[8, 5], slow([13, 0]), slow([1, 12])], ids=str)
@pytest.mark.parametrize("name", ["reward centred", "dpo", "ipo", "embedding", "embedding ragged"])
def test_two_ranks_give_gradient_of_global_batch(folder: Path, pools: Pools, name: str, sizes: list[int]) -> None:
    for error in pools(2).run(error_on_rank, str(folder), name, sizes):
        assert error <= TOLERANCE


def error_on_rank(folder: str, name: str, sizes: list[int]) -> float:
    setup = cases.set_up(Path(folder), name)
    samples = cases.samples_of(setup)
    start = sum(sizes[: dist.get_rank()])
    own = samples[start : start + sizes[dist.get_rank()]]
    found = cases.gradient(setup, own, 3, sync=Replicated(setup.model))
    return cases.relative_error(found, cases.whole_gradient(setup, samples))
