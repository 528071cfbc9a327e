"""Functions that ranks run in test_failing_ranks.py: rank 1 fails while gradients are reduced, or after it."""

import torch
import torch.distributed as dist

from support import distributed_windows as cases
from support import full_batch_reference as ref
from support.failing_ranks import FailingRank, copied, failing_reduction, same_state


def _share(num_samples: int = 8) -> ref.Batch:
    return cases.select_rows(ref.ragged_batch(12), range(dist.get_rank(), num_samples, dist.get_world_size()))


def _arm(rank: FailingRank, place: str, number: int = 0) -> None:
    if dist.get_rank() == 1:
        rank.injector.arm(place, number)


def _told(rank: FailingRank, batch: ref.Batch, *, in_loop: bool = False) -> str:
    """Run one window; return its outcome, with the message of an error."""
    rank.message = ""
    outcome = rank.window(batch, in_loop=in_loop)
    return f"{outcome}: {rank.message}" if rank.message else outcome


def in_reduction(place: str, reproducible: bool) -> tuple[str, bool, bool]:
    """Fail at the second bucket; return the error, whether anything changed, and whether the next window is applied."""
    settings = {"reproducible": True, "quantum": 2} if reproducible else {}
    rank = FailingRank("plain", torch.float32 if reproducible else torch.float64, **settings)
    with failing_reduction(rank.injector):
        assert _told(rank, _share()) == "applied"
        before = copied(rank.engine.state_dict())
        _arm(rank, place, 1)
        error = _told(rank, _share())
        is_same = same_state(before, rank.engine.state_dict())
        return error, not is_same, _told(rank, _share()) == "applied"


def in_hook_of_shards() -> tuple[list[str], bool]:
    """Fail in the gradient hook of the second update; return its outcome and the next, and whether it changed state."""
    rank = FailingRank("fsdp")
    rank.engine.sync.set_padding_microbatch(_share())
    assert _told(rank, _share()) == "applied"
    before = [cases.local(p).clone() for p in rank.module.parameters()]
    _arm(rank, "the gradient hook")
    outcome = _told(rank, _share())
    is_same = all(torch.equal(a, cases.local(p)) for a, p in zip(before, rank.module.parameters(), strict=True))
    return [outcome, _told(rank, _share())], not is_same


def in_hook() -> list[str]:
    """Fail in the gradient hook of the second update; return the outcomes until a state is loaded, and of the next."""
    rank = FailingRank("plain")
    assert _told(rank, _share()) == "applied"
    before = copied(rank.engine.state_dict())
    _arm(rank, "the gradient hook")
    outcomes = [_told(rank, _share()) for _ in range(2)] + [_told(rank, _share(), in_loop=True)]
    rank.engine.load_state_dict(before)
    return [*outcomes, _told(rank, _share())]


def scale_after_reduction() -> tuple[float, float]:
    """Fail in a reduction under a gradient scaler; return its scale before and after."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    rank = FailingRank("plain", torch.float32, scaler=scaler)
    with failing_reduction(rank.injector):
        assert _told(rank, _share()) == "applied"
        before = scaler.get_scale()
        _arm(rank, "launching a bucket", 1)
        assert "Error: " in _told(rank, _share())
        after = scaler.get_scale()
        assert _told(rank, _share()) == "applied"
    return before, after


def in_reduction_without_items() -> list[str]:
    """Fail in the reduction of a window whose labels are all ignored; return its outcome and that of the next."""
    rank = FailingRank("plain")
    empty = _share()
    empty["labels"] = torch.full_like(empty["labels"], ref.IGNORED)
    with failing_reduction(rank.injector):
        _arm(rank, "launching a bucket", 1)
        return [_told(rank, empty), _told(rank, _share())]


def torn_loop() -> str:
    """Tear the second update; return the outcome of the next window of a loop."""
    rank = FailingRank("plain")
    assert _told(rank, _share()) == "applied"
    _arm(rank, "within the optimizer")
    _told(rank, _share(), in_loop=True)
    return _told(rank, _share(), in_loop=True)
