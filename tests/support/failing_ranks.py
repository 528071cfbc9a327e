"""Updates on several ranks with a failure on one of them in each window, compared with updates without failures.

draw a place, a rank and an occurrence → windows until one is applied → the same parameters on all ranks, and those of
plain torch on the whole batches in one process
"""

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import bigbatch
from bigbatch.distributed import buckets, overlap_choice, replicated
from support import distributed_windows as cases
from support import full_batch_reference as ref

ROWS = 2  # of a micro-batch
SMALL_BUCKET = 600  # bytes: the sums of the model are five buckets
NUM_BUCKETS, IN_FLIGHT = 5, 2
TOLERANCE = 1e-12  # a window that is lost or applied twice differs by more than 1e-3

IN_MICROBATCH = ("the loss", "the forward", "the backward")
RETRIED = ("memory in the forward", "memory in the backward", "memory in the reduction")
BEFORE_VOTE = ("an abandoned window", "before the vote", "a loss that is not finite")
IN_REDUCTION = ("making a bucket", "launching a bucket", "waiting for a bucket")
AFTER_REDUCTION = ("the gradient hook", "the optimizer")
PLACES = (*IN_MICROBATCH, *RETRIED, *BEFORE_VOTE, *IN_REDUCTION, *AFTER_REDUCTION)
NOT_IN_LOOPS = ("before the vote", *RETRIED)
"""`Engine` only."""


class InjectedError(Exception):
    """The error of the rank that fails."""


@dataclass
class Failure:
    """One failure.

    Attributes:
        place: Of `PLACES`.
        rank: The rank that fails.
        number: Of the micro-batches or buckets of that rank before it.
        in_loop: Whether the windows are those of a loop over an `Accumulator`; else of an `Engine`.
        overlaps: Whether the reduction overlapped the last micro-batch, and the failure was within it.
    """

    place: str
    rank: int
    number: int
    in_loop: bool
    overlaps: bool = False

    @property
    def is_late(self) -> bool:
        """Whether the other ranks have received everything that they need for the update."""
        is_last_wait = self.place == "waiting for a bucket" and self.number >= NUM_BUCKETS - IN_FLIGHT
        return (is_last_wait and not self.overlaps) or self.place in AFTER_REDUCTION

    @property
    def is_healed(self) -> bool:
        """Whether the window is applied at once: it, or its micro-batch, was run again."""
        return self.place in RETRIED or (self.overlaps and self.place in (*IN_MICROBATCH, *IN_REDUCTION))


@dataclass
class Soak:
    """What happened on one rank.

    Attributes:
        failures: All that occurred, in order.
        outcomes: Of the failing windows: the class of the error on this rank, ``"skipped"`` or ``"applied"``.
        differences: Updates after which the parameters differ from those of another rank or of the reference.
        largest_error: Relative difference from the reference, over all updates.
    """

    failures: list[Failure] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    largest_error: float = 0.0


class Injector:
    """Fails once at an armed place."""

    def __init__(self, is_overlapping: Callable[[], bool]) -> None:
        self.place, self.number, self.has_fired, self.overlapped = "", 0, False, False
        self._is_overlapping = is_overlapping

    def arm(self, place: str, number: int) -> None:
        self.place, self.number, self.has_fired = place, number, False

    def is_due(self, place: str) -> bool:
        """Count one occurrence of a place; return whether it fails now."""
        if self.has_fired or place != self.place:
            return False
        self.number -= 1
        self.has_fired = self.number < 0
        self.overlapped = self.has_fired and self._is_overlapping()
        return self.has_fired

    def fire(self, place: str) -> None:
        if self.is_due(place):
            if "memory" in place:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            raise InjectedError(f"in {place}")


class FailingRank:
    """One rank: its model, the places where it can fail, and the message of its last error.

    Args:
        how: As for `support.distributed_windows.parallelize`.
        dtype: Of the parameters.
        overlap: Whether the reduction overlaps the last backward of each window of the engine but the first.
        settings: Of the engine.
    """

    def __init__(self, how: str, dtype: torch.dtype = torch.float64, *, overlap: bool = False, **settings: Any) -> None:
        self.injector, self.message = Injector(self.is_overlapping), ""
        model, sync = cases.parallelize(ref.make_model(dtype=dtype), how)
        if how in ("plain", "ddp"):
            sync = overlapping(model, overlap=overlap)
        self.module = cases.inner(model)
        self.optimizer = _FailingSGD(self.module.parameters(), lr=0.5, momentum=0.9)
        self.optimizer.injector = self.injector
        self.engine = bigbatch.Engine(
            model,
            self.optimizer,
            self.loss,
            microbatch=ROWS,
            sync=sync,
            gradient_hook=lambda _: self.injector.fire("the gradient hook"),
            check=False,
            **settings,
        )
        for place in ("the backward", "memory in the backward"):
            self.module.hidden.weight.register_hook(lambda _, place=place: self.injector.fire(place))

    def is_overlapping(self) -> bool:
        """Whether the window is reduced within its last micro-batch, which has begun."""
        return getattr(self.engine.accumulator._open, "_reduction", None) is not None

    def loss(self, model: nn.Module, batch: ref.Batch) -> Any:
        """Return loss sum and items, or fail."""
        self.injector.fire("the loss")
        loss, items = ref.loss_and_items(model, batch)
        for place in ("the forward", "memory in the forward"):
            self.injector.fire(place)
        if self.injector.is_due("a loss that is not finite"):
            return loss * float("nan"), items or 1  # of no items, NaN would be left out
        return loss, items

    def window(self, batch: ref.Batch, *, in_loop: bool) -> str:
        """Run one window; return ``"applied"``, ``"skipped"`` or the class of the error."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="the last micro-batch of a window failed")
                report = self._loop(batch) if in_loop else self._step(batch)
        except (InjectedError, bigbatch.BigbatchError) as error:
            self.message = str(error)
            return type(error).__name__
        return "applied" if report.skipped is None else "skipped"

    def _step(self, batch: ref.Batch) -> bigbatch.WindowReport:
        def should_stop() -> bool:
            self.injector.fire("before the vote")
            return False

        abandons = lambda: self.injector.is_due("an abandoned window")  # noqa: E731
        return self.engine.step(batch, should_abandon=abandons, should_stop=should_stop)

    def _loop(self, batch: ref.Batch) -> bigbatch.WindowReport:
        with self.engine.accumulator.window(ref.cut(batch, ROWS)) as window:
            for part in window:
                if self.injector.is_due("an abandoned window"):
                    raise InjectedError("in the loop")
                window.backward(self.loss(self.engine.model, part))
            return window.step()


def overlapping(model: nn.Module, *, overlap: bool = True) -> bigbatch.Replicated:
    """Return the sync of a model whose windows overlap, also after windows that were run again."""
    rest = overlap_choice.FIRST_REST
    overlap_choice.FIRST_REST = 0
    try:
        return bigbatch.Replicated(model, overlap=overlap)
    finally:
        overlap_choice.FIRST_REST = rest


class _FailingSGD(torch.optim.SGD):
    injector: Injector

    def step(self, closure: Any = None) -> Any:
        self.injector.fire("the optimizer")
        result = super().step(closure)
        self.injector.fire("within the optimizer")
        return result


def soak(how: str, num_updates: int, seed: int, places: Sequence[str] = PLACES, *, overlap: bool = False) -> Soak:
    """Apply updates, each with one failure. Collective."""
    draws, result = random.Random(seed), Soak()  # the same draws on all ranks
    rank = FailingRank(how, overlap=overlap)
    reference = ref.make_model()
    whole = torch.optim.SGD(reference.parameters(), lr=0.5, momentum=0.9)
    with failing_reduction(rank.injector):
        if overlap:  # shows the order of the parameters
            batch = ref.ragged_batch(8)
            assert rank.window(cases.select_rows(batch, _dealt(batch)), in_loop=False) == "applied"
            _step(reference, whole, batch)
        for number in range(num_updates):
            batch = ref.ragged_batch(draws.randint(6, 14), seed=draws.randrange(10_000))
            shares = _shares(ref.num_samples(batch), draws)
            failure = _draw(shares, draws, places)
            outcome, failure = _update(rank, cases.select_rows(batch, shares[dist.get_rank()]), failure)
            if failure.place in IN_REDUCTION:
                assert failure.overlaps is (overlap and not failure.in_loop), failure
            result.failures.append(failure)
            result.outcomes.append(outcome)
            _step(reference, whole, batch)
            _compare(rank, reference, whole, f"update {number + 1}, {failure}", result)
    return result


def run_round(how: str, num_updates: int, seed: int, overlap: bool) -> Soak:
    """As `soak`, with failures at all places."""
    return soak(how, num_updates, seed, overlap=overlap)


def _dealt(batch: ref.Batch) -> range:
    return range(dist.get_rank(), ref.num_samples(batch), dist.get_world_size())


def _step(reference: nn.Module, whole: torch.optim.Optimizer, batch: ref.Batch) -> None:
    whole.zero_grad()
    ref.loss_mean(reference, batch).backward()
    whole.step()


def _shares(num_samples: int, draws: random.Random) -> list[list[int]]:
    """Deal the samples; a rank may have none."""
    shares: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    for row in range(num_samples):
        draws.choice(shares[: draws.choice((len(shares), len(shares), 1))]).append(row)
    return shares


def _draw(shares: list[list[int]], draws: random.Random, places: Sequence[str]) -> Failure:
    place, in_loop = draws.choice(places), draws.random() < 0.4
    rank = draws.randrange(len(shares))
    if place in (*IN_MICROBATCH, *RETRIED, *BEFORE_VOTE) and place != "before the vote":
        rank = draws.choice([rank for rank, rows in enumerate(shares) if rows])
        number = draws.randrange(-(-len(shares[rank]) // ROWS))
    else:
        number = draws.randrange(NUM_BUCKETS) if place in IN_REDUCTION else 0
    return Failure(place, rank, number, in_loop and place not in NOT_IN_LOOPS)


def _update(rank: FailingRank, batch: ref.Batch, failure: Failure) -> tuple[str, Failure]:
    """Run windows over one batch until all ranks apply it; return the outcome of the first, and the failure."""
    before = copied(rank.engine.state_dict())
    if dist.get_rank() == failure.rank:
        rank.injector.arm(failure.place, failure.number)
    outcome = rank.window(batch, in_loop=failure.in_loop)
    if dist.get_rank() == failure.rank:
        assert rank.injector.has_fired, failure
    overlapped = torch.tensor(int(rank.injector.overlapped))
    dist.broadcast(overlapped, failure.rank)
    failure = replace(failure, overlaps=bool(overlapped))
    if failure.is_healed:
        assert outcome == "applied", (failure, outcome)
        return outcome, failure
    if failure.is_late:  # the other ranks have applied it: the next vote notices, and nothing changes
        assert rank.window(batch, in_loop=failure.in_loop) == "TornUpdateError", failure
        rank.engine.load_state_dict(before)
    else:
        assert outcome != "applied", failure
        assert same_state(before, rank.engine.state_dict()), (failure, outcome)
    assert rank.window(batch, in_loop=failure.in_loop) == "applied", failure
    return outcome, failure


def _compare(rank: FailingRank, reference: nn.Module, whole: torch.optim.Optimizer, name: str, result: Soak) -> None:
    """Compare parameters and momentum with those of the other ranks, to the last bit, and of the reference."""
    found = _flat(rank.module, rank.optimizer)
    expected = _flat(reference, whole)
    others = [torch.empty_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(others, found)
    error = float((found - expected).norm() / expected.norm())
    result.largest_error = max(result.largest_error, error)
    if error > TOLERANCE or not all(torch.equal(found, other) for other in others):
        result.differences.append(f"{name}: relative error {error:.1e}")


def _flat(module: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    parameters = list(module.parameters())
    momenta = [optimizer.state[p]["momentum_buffer"] for p in parameters]
    return torch.cat([tensor.detach().flatten() for tensor in (*parameters, *momenta)])


def copied(state: Any) -> Any:
    """Copy the tensors of a state."""
    return torch.utils._pytree.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, state)


def same_state(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Compare states, except the size of micro-batches, which may have changed after out-of-memory."""
    first, second = ({key: state[key] for key in ("model", "optimizer")} for state in (before, now))
    leaves = zip(*map(torch.utils._pytree.tree_leaves, (first, second)), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in leaves)


class _FailingWork:
    def __init__(self, work: Any, fire: Callable[[str], None]) -> None:
        self._work, self._fire = work, fire

    def wait(self) -> Any:
        result = self._work.wait()
        self._fire("waiting for a bucket")
        return result

    def is_completed(self) -> bool:
        return self._work.is_completed()


@contextmanager
def failing_reduction(injector: Injector) -> Iterator[None]:
    """Use five buckets; let one fail when it is made, before its all-reduce is launched, or when that is waited for."""
    all_reduce, bucket = dist.all_reduce, buckets.Bucket
    limits = buckets.BUCKET_BYTES, replicated.BUCKETS_IN_FLIGHT

    def failing(*words: Any, **options: Any) -> Any:
        injector.fire("launching a bucket")
        return _FailingWork(all_reduce(*words, **options), injector.fire)

    def making(*words: Any) -> Any:
        for place in ("making a bucket", "memory in the reduction"):
            injector.fire(place)
        return bucket(*words)

    dist.all_reduce, buckets.Bucket = failing, making  # type: ignore[misc, assignment]
    buckets.BUCKET_BYTES, replicated.BUCKETS_IN_FLIGHT = SMALL_BUCKET, IN_FLIGHT
    try:
        yield
    finally:
        dist.all_reduce, buckets.Bucket = all_reduce, bucket  # type: ignore[misc]
        buckets.BUCKET_BYTES, replicated.BUCKETS_IN_FLIGHT = limits
