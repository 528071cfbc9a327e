"""Whether windows overlap: where the reduction takes long enough, and the parameters allow it."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bigbatch.distributed import overlap_choice
from bigbatch.distributed.collective import RankGroup
from bigbatch.distributed.overlap_choice import OverlapChoice, make_overlap_choice
from distributed import overlap_cases
from support.process_pool import Pools

LARGE = 4 * 2**20  # elements: 16 MiB, so that two are two buckets


def parameters(number: int = 3, size: int = LARGE) -> list[Tensor]:
    return [nn.Parameter(torch.empty(1).expand(size)) for _ in range(number)]


def run_windows(choice: OverlapChoice, own: list[Tensor], share: float, number: int) -> None:
    for _ in range(number):
        completed = own[::-1] if choice.is_learning else None
        choice.end_window(RankGroup(), own, completed)
        choice.note(share, 1.0)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_requested_overlap_starts_after_one_window():
    choice, own = OverlapChoice(True), parameters(2, size=1)
    assert not choice.is_on
    run_windows(choice, own, 0.0, 1)
    assert choice.is_on
    assert choice.order == [1, 0]


@pytest.mark.parametrize(("share", "is_on"), [(0.049, False), (0.05, True)])
def test_auto_needs_a_twentieth_of_the_window(share: float, is_on: bool):
    choice = OverlapChoice("auto")
    run_windows(choice, parameters(), share, 4)
    assert (choice.is_on, choice.is_learning) == (False, True)
    run_windows(choice, parameters(), share, 1)
    assert (choice.is_on, choice.is_learning, choice.share) == (is_on, False, share)


def test_auto_counts_no_first_window():
    choice, own = OverlapChoice("auto"), parameters()
    run_windows(choice, own, 0.9, 1)
    run_windows(choice, own, 0.01, 4)
    assert choice.share == 0.01


def test_auto_needs_several_buckets():
    choice = OverlapChoice("auto")
    run_windows(choice, parameters(1), 0.9, 1)
    assert not choice.is_learning


@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms_turn_auto_off():
    automatic, requested = OverlapChoice("auto"), OverlapChoice(True)
    for choice in (automatic, requested):
        run_windows(choice, parameters(), 0.9, 6)
    assert (automatic.is_on, requested.is_on) == (False, True)


def test_parameters_on_two_devices_never_overlap():
    choice = OverlapChoice(True)
    run_windows(choice, [*parameters(), nn.Parameter(torch.empty(1, device="meta"))], 0.9, 2)
    assert not choice.is_on
    assert not choice.is_learning


def test_order_has_trained_parameters_only_unfinished_last():
    choice, own = OverlapChoice(True), parameters(4, size=1)
    own[1].requires_grad_(False)
    choice.end_window(RankGroup(), own, [own[2]])
    assert choice.order == [2, 3, 0]


def test_other_parameters_do_not_suit():
    choice, own = OverlapChoice(True), parameters(2, size=1)
    run_windows(choice, own, 0.0, 1)
    assert choice.suits(parameters(2, size=1))
    assert not choice.suits(parameters(3, size=1))
    assert not choice.suits(parameters(2, size=2))
    own[0].requires_grad_(False)
    assert not choice.suits(own)


def test_each_failure_doubles_the_windows_without_overlap():
    choice, own = OverlapChoice(True), parameters(2, size=1)
    run_windows(choice, own, 0.0, 1)
    for number in (overlap_choice.FIRST_REST, 2 * overlap_choice.FIRST_REST):
        choice.rest()
        run_windows(choice, own, 0.0, number - 1)
        assert not choice.is_on
        run_windows(choice, own, 0.0, 1)
        assert choice.is_on


def test_setting_is_checked():
    with pytest.raises(ValueError, match="overlap is") as caught:
        make_overlap_choice("yes", nn.Linear(1, 1), 2)  # type: ignore[arg-type]
    assert str(caught.value) == "overlap is 'yes': pass \"auto\", True or False."


def test_models_that_never_overlap_have_no_choice():
    assert make_overlap_choice(True, nn.Linear(1, 1), 1) is None
    assert make_overlap_choice(False, nn.Linear(1, 1), 2) is None
    assert make_overlap_choice(True, nn.Sequential(nn.SyncBatchNorm(1)), 2) is None
    assert make_overlap_choice(True, nn.Linear(1, 1), 2) is not None


@pytest.mark.parametrize(("min_share", "overlapped"), [(0.0, [False] * 5 + [True] * 2), (1.0, [False] * 7)])
def test_all_ranks_follow_the_first_one(pools: Pools, min_share: float, overlapped: list[bool]) -> None:
    first, second = pools(2).run(overlap_cases.chosen, min_share)
    assert first[:2] == second[:2]
    assert first[0] == overlapped
    assert 0 < first[1] < 1
    assert max(first[2], second[2]) <= 1e-12
