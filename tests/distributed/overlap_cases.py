"""Functions that ranks run in test_overlap.py: windows whose reduction overlaps their last backward."""

import copy
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bigbatch
from bigbatch.accumulation.overlapped_update import OverlappedUpdate
from bigbatch.distributed import buckets, overlap_choice
from bigbatch.rng import random_states, same_random_states
from distributed import updates_cases
from support import distributed_windows as cases
from support import full_batch_reference as ref
from support.failing_ranks import PLACES, SMALL_BUCKET, Soak, overlapping, soak

MESSAGE = "CUDA out of memory. Tried to allocate 20.00 MiB."
NUM_SAMPLES = 12

Deal = Callable[[int, int], Sequence[int]]
"""The rows of a rank, of a number of ranks."""

DEALS: dict[str, Deal] = {
    "equal": lambda rank, size: range(rank, NUM_SAMPLES, size),
    "one each": lambda rank, size: [rank],
    "few and many": lambda rank, size: range(1) if rank == 0 else range(rank, NUM_SAMPLES, size - 1),
    "none on the first": lambda rank, size: range(0) if rank == 0 else range(rank - 1, NUM_SAMPLES, size - 1),
    "none on the last": lambda rank, size: range(0) if rank == size - 1 else range(rank, NUM_SAMPLES, size - 1),
    "none anywhere": lambda rank, size: range(0),
}


class OwnError(Exception):
    """The error of the failing rank."""


class Dropping(updates_cases.Normed):
    """Draws random numbers, and keeps running statistics."""

    def forward(self, tokens: Tensor) -> Tensor:
        return F.dropout(super().forward(tokens), 0.3) + random.random()


class TiedLater(updates_cases.Tied):
    """Ties the head to an embedding whose gradient is not the last one of a backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(ref.VOCABULARY, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        first = self.first(tokens)
        return self.head(torch.tanh(self.hidden(self.norm(self.embedding(tokens) + first))))


class Checkpointed(ref.TokenModel):
    """Runs its layers in a reentrant checkpoint, twice."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(tokens))
        for _ in range(2):
            hidden = checkpoint(lambda values: torch.tanh(self.hidden(values)), hidden, use_reentrant=True)
        return self.head(hidden)


class Heads(ref.TokenModel):
    """Has a head that only the last rank uses."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(8, ref.VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        if not dist.is_initialized() or dist.get_rank() < dist.get_world_size() - 1:
            return super().forward(tokens)
        return self.other(torch.tanh(self.hidden(self.norm(self.embedding(tokens)))))


class Shifted(ref.TokenModel):
    """Has two parameters whose gradients are views of the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.more = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(tokens)) + (self.shift[None] + self.more[None])
        return self.head(torch.tanh(self.hidden(hidden)))


MODELS = {
    **updates_cases.KINDS,
    "shifted": Shifted,
    "dropping": Dropping,
    "checkpointed": Checkpointed,
    "tied later": TiedLater,
    "heads": Heads,
}


@contextmanager
def small_buckets() -> Iterator[None]:
    """Let the sums of the models be several buckets."""
    before, buckets.BUCKET_BYTES = buckets.BUCKET_BYTES, SMALL_BUCKET
    try:
        yield
    finally:
        buckets.BUCKET_BYTES = before


@dataclass
class Run:
    """Some updates on one rank.

    Attributes:
        parameters: By name, after the last one.
        buffers: By name.
        gradients: Of the last one, by name, before clipping; without those that are None.
        norms: Of the gradients of all updates.
        overlapped: Whether each update was.
        sent: Buckets that each update had sent when its last backward had ended.
        noise: The squared norms that the noise scale is estimated from.
        retries: Attempts that ran out of memory, over all updates.
        randoms: States of the random generators at the end.
    """

    parameters: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    overlapped: list[bool] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    noise: dict[str, float] = field(default_factory=dict)
    retries: int = 0
    randoms: Any = None


def make_model(kind: str, dtype: torch.dtype) -> nn.Module:
    """Return a model of `MODELS`."""
    torch.manual_seed(0)
    return MODELS[kind]().to(dtype)


def spread(model: nn.Module, how: str, *, overlap: bool) -> tuple[nn.Module, bigbatch.Replicated]:
    """Replicate a model, plain or in DDP."""
    spread_model = nn.parallel.DistributedDataParallel(model) if how == "ddp" else model
    return spread_model, overlapping(spread_model, overlap=overlap)


def updates(
    how: str,
    kind: str,
    deal: str,
    overlap: bool,
    num_updates: int = 4,
    *,
    dtype: torch.dtype = torch.float64,
    **kind_of: Any,
) -> Run:
    """Run updates of an engine.

    Args:
        how: ``"plain"`` or ``"ddp"``.
        kind: Of `MODELS`.
        deal: Of `DEALS`; the first window, which shows the order, is dealt equally.
        overlap: Whether the reduction overlaps.
        num_updates: How many.
        dtype: Of the parameters.
        kind_of: Settings of the engine.
    """
    model = make_model(kind, dtype)
    spread_model, sync = spread(model, how, overlap=overlap)
    run = Run()
    optimizer = updates_cases.adam(model)

    def record(parameters: Sequence[Tensor]) -> None:
        names = {parameter: name for name, parameter in model.named_parameters()}
        run.gradients = {names[p]: p.grad.clone() for p in parameters if p.grad is not None}

    settings = {"microbatch": 2, "gradient_hook": record, "check": False, "noise": False, **kind_of}
    engine = bigbatch.Engine(spread_model, optimizer, _loss, sync=sync, **settings)
    torch.manual_seed(dist.get_rank())
    random.seed(dist.get_rank())
    with small_buckets(), _counting(run):
        for number, batch in enumerate(ref.batches(num_updates, NUM_SAMPLES)):
            rows = DEALS[deal if number else "equal"](dist.get_rank(), dist.get_world_size())
            report = engine.step(cases.select_rows(batch, rows))
            assert report.syncs == 1
            run.overlapped.append(report.ranks.overlapped)
            run.norms.append(report.grad_norm)
            run.retries += report.retries
    run.parameters = updates_cases.parameters_of(spread_model)
    run.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert ref.hooks_of(model) == 0
    run.noise = engine.accumulator.noise.state_dict() if engine.accumulator.noise is not None else {}
    run.randoms = random_states()
    return run


def _loss(model: nn.Module, batch: ref.Batch) -> tuple[Tensor, int]:
    return updates_cases.loss_in_float32(model, batch) if _is_narrow(model) else ref.loss_and_items(model, batch)


def _is_narrow(model: nn.Module) -> bool:
    return next(model.parameters()).dtype is torch.bfloat16


@contextmanager
def _counting(run: Run) -> Iterator[None]:
    """Count the buckets that were sent before a backward had ended."""
    finish = OverlappedUpdate.finish_reduction

    def counted(pending: OverlappedUpdate) -> None:
        assert pending._reduction is not None
        run.sent.append(pending._reduction._num_sent)
        finish(pending)
        pending.sums._writes.check()  # what is reduced is no write of other code

    OverlappedUpdate.finish_reduction = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        OverlappedUpdate.finish_reduction = finish  # type: ignore[method-assign]


def compared(how: str, kind: str, deal: str, dtype: torch.dtype, settings: dict[str, Any]) -> tuple[Run, Run, float]:
    """Run updates with and without overlap; return both, and the error of the parameters against one process."""
    runs = [updates(how, kind, deal, overlap, dtype=dtype, **settings) for overlap in (True, False)]
    size = dist.get_world_size()
    rows = [row for rank in range(size) for row in DEALS[deal](rank, size)]
    reference = make_model(kind, dtype)
    every = [
        batch if not number else cases.select_rows(batch, rows)
        for number, batch in enumerate(ref.batches(4, NUM_SAMPLES))
    ]
    if kind in ("dropping", "heads") or not rows:
        return runs[0], runs[1], 0.0
    expected = ref.train_reference(reference, updates_cases.adam, every, max_grad_norm=settings.get("max_grad_norm"))
    return runs[0], runs[1], ref.relative_error(runs[0].parameters, expected.parameters)


PARAMETERS = {
    "before any bucket": "head.weight",
    "between buckets": "hidden.weight",
    "the last gradient": "embedding.weight",
}
UNFUSED = {"before any bucket": "head.bias", "between buckets": "hidden.bias", "the last gradient": "norm.weight"}
NUM_SENT = {"the forward": 0, "before any bucket": 0, "between buckets": 2, "the last gradient": 3}


@dataclass
class Failed:
    """A window in which the last rank fails in its last micro-batch, among others that do not fail.

    Attributes:
        kind: Class of its error; empty without one.
        message: Of its error.
        warned: What it warned of.
        num_sent: Buckets that were sent when it failed; on the failing rank.
        retries: Attempts that ran out of memory.
        changed: Whether the window changed parameters, if it raised.
        num_measured: Windows that the noise scale was estimated from.
        run: All that the updates have left.
    """

    kind: str = ""
    message: str = ""
    warned: list[str] = field(default_factory=list)
    num_sent: int = -1
    retries: int = 0
    changed: bool = False
    num_measured: int = 0
    run: Run = field(default_factory=Run)


def failing(
    how: str, place: str, error: str, size: int = 2, kind: str = "dropping", *, at: int = 1, **settings: Any
) -> Failed:
    """Run three updates; the second fails at a place, and is repeated if it raised.

    Args:
        how: As for `updates`.
        place: Of `NUM_SENT`, or ``"taking it"``; empty for no failure.
        error: The class of the error that is raised.
        size: Of micro-batches.
        kind: Of `MODELS`.
        at: The number of the update that fails; 0 is the first one, which does not overlap.
        settings: Of the engine.
    """
    result, run = Failed(), Run()
    model = make_model(kind, torch.float64)
    spread_model, sync = spread(model, how, overlap=True)
    is_armed, calls = False, 0
    most = len(DEALS["equal"](dist.get_rank(), dist.get_world_size())) // size

    def fail(where: str) -> None:
        nonlocal is_armed
        if is_armed and place == where and calls == most:
            is_armed = False
            reduction = getattr(engine.accumulator._open, "_reduction", None)
            result.num_sent = -1 if reduction is None else reduction._num_sent
            errors = {
                "memory": torch.OutOfMemoryError(MESSAGE),
                "keyboard": KeyboardInterrupt(),
                "own": OwnError("bad"),
            }
            raise errors[error]

    def collate(samples: Sequence[ref.Batch]) -> ref.Batch:
        nonlocal calls
        calls += 1
        fail("taking it")
        return cases.pad(samples)

    def loss(model: nn.Module, batch: ref.Batch) -> tuple[Tensor, int]:
        loss, items = ref.loss_and_items(model, batch)
        fail("the forward")
        return loss, items

    for where, name in (UNFUSED if "fuse_gradients" in settings else PARAMETERS).items():
        dict(model.named_parameters())[name].register_hook(lambda _, where=where: fail(where))
    optimizer = updates_cases.adam(model)
    engine = bigbatch.Engine(
        spread_model, optimizer, loss, microbatch=size, sync=sync, check=False, collate=collate, **settings
    )
    torch.manual_seed(dist.get_rank())
    random.seed(dist.get_rank())
    with small_buckets():
        for number, batch in enumerate(ref.batches(3, NUM_SAMPLES)):
            calls = 0
            is_armed = number == at and bool(place) and dist.get_rank() == dist.get_world_size() - 1
            rows = DEALS["equal"](dist.get_rank(), dist.get_world_size())
            own = [cases.select_rows(batch, [row]) for row in rows]
            before = updates_cases.parameters_of(spread_model)
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    report = engine.step(own)
            except BaseException as raised:  # noqa: BLE001 - checked by the test
                result.kind, result.message = type(raised).__name__, str(raised)
                result.changed = any(
                    not torch.equal(before[name], p) for name, p in updates_cases.parameters_of(spread_model).items()
                )
                calls = 0
                report = engine.step(own)
            result.warned += [str(warning.message) for warning in caught]
            result.retries += report.retries
            run.overlapped.append(report.ranks.overlapped)
            run.norms.append(report.grad_norm)
    run.parameters = updates_cases.parameters_of(spread_model)
    run.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    run.randoms = random_states()
    if engine.accumulator.noise is not None:
        result.num_measured = int(engine.accumulator.noise.state_dict()["num_windows"])
    result.run = run
    assert ref.hooks_of(model) == 0
    return result


def same_state(first: Run, second: Run) -> bool:
    """Return whether parameters, buffers and random states are the same bits."""
    tensors = [(each.parameters | each.buffers) for each in (first, second)]
    same = all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    return same and same_random_states(first.randoms, second.randoms)


def collectives(overlap: bool) -> tuple[int, int, int]:
    """Return the small and large collectives of a window, and the buckets of its sums."""
    model = ref.make_model()
    engine = bigbatch.Engine(
        model, cases.GradientRecorder(model), _loss, microbatch=2, sync=overlapping(model, overlap=overlap)
    )
    batch = cases.select_rows(ref.ragged_batch(NUM_SAMPLES), DEALS["equal"](dist.get_rank(), 2))
    with small_buckets():
        engine.step(batch)
        cases_of_model = len(buckets.grouped_tensors(list(model.parameters())))
        with cases.CollectiveCounter() as counter:
            engine.step(batch)
    return counter.small["allgather_"], counter.small["allreduce_"] + counter.large["allreduce_"], cases_of_model


def written_batch() -> list[str]:
    """Let a loss write to its batch, in the second of three micro-batches and in the last; return the outcomes."""
    outcomes = []
    for when in (2, 3):
        model = ref.make_model()
        loss = _WritingLoss(when)
        sync = overlapping(model)
        engine = bigbatch.Engine(model, cases.GradientRecorder(model), loss, microbatch=2, sync=sync, check=False)
        batch = cases.select_rows(ref.ragged_batch(NUM_SAMPLES), DEALS["equal"](dist.get_rank(), 2))
        for number in range(3):
            loss.calls, loss.fails = 0, number == 1 and dist.get_rank() == 1
            try:
                outcomes.append(f"overlapped: {engine.step(batch).ranks.overlapped}")
            except Exception as error:  # noqa: BLE001 - checked by the test
                outcomes.append(f"{type(error).__name__}: {error}")
    return outcomes


class _WritingLoss:
    """Writes to its micro-batch in one of its calls, and fails in the third."""

    def __init__(self, when: int) -> None:
        self.when, self.calls, self.fails = when, 0, False

    def __call__(self, model: nn.Module, batch: ref.Batch) -> tuple[Tensor, int]:
        self.calls += 1
        if self.calls == self.when:
            batch["labels"].clamp_(min=ref.IGNORED)
        if self.fails and self.calls == 3:
            raise OwnError("bad")
        return ref.loss_and_items(model, batch)


def changed_parameters() -> list[bool]:
    """Freeze a layer between windows, and unfreeze it; return which windows overlapped, and check each."""
    model = ref.make_model()
    reference = copy.deepcopy(model)
    optimizer = cases.GradientRecorder(model)
    engine = bigbatch.Engine(model, optimizer, _loss, microbatch=2, sync=overlapping(model), check=False)
    overlapped = []
    with small_buckets():
        for number, batch in enumerate(ref.batches(8, NUM_SAMPLES)):
            for each in (model, reference):
                each.hidden.requires_grad_(number not in (2, 3, 4))
            report = engine.step(cases.select_rows(batch, DEALS["equal"](dist.get_rank(), 2)))
            overlapped.append(report.ranks.overlapped)
            expected = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
            expected |= ref.full_gradient(reference, batch)
            assert ref.relative_error(optimizer.seen[-1], expected) <= 1e-12
    return overlapped


def frozen_inside() -> tuple[bool, float]:
    """Freeze a layer in the last micro-batch of a window on one rank; return whether it overlapped, and its error."""
    model = ref.make_model()
    reference = copy.deepcopy(model)
    optimizer = cases.GradientRecorder(model)
    engine = bigbatch.Engine(model, optimizer, _loss, microbatch=2, sync=overlapping(model), check=False)
    batch = ref.ragged_batch(NUM_SAMPLES)
    own = cases.select_rows(batch, DEALS["equal"](dist.get_rank(), 2))
    with small_buckets():
        engine.step(own)
        calls = 0

        def freezing(module: nn.Module, inputs: Any) -> None:
            nonlocal calls
            calls += 1
            model.hidden.requires_grad_(calls % 3 != 0 or dist.get_rank() == 0)

        model.register_forward_pre_hook(freezing)
        report = engine.step(own)
    parts = [ref.cut(cases.select_rows(batch, DEALS["equal"](rank, 2)), 2) for rank in range(2)]
    expected = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    for rank, own_parts in enumerate(parts):
        for number, part in enumerate(own_parts):
            found = ref.gradients_of(reference, ref.loss_and_items(reference, part)[0] / ref.count(batch))
            for name, gradient in found.items():
                if not (name.startswith("hidden") and rank == 1 and number == 2):
                    expected[name] += gradient
    return report.ranks.overlapped, ref.relative_error(optimizer.seen[-1], expected)


def nan_window() -> tuple[list[str | None], list[bool], bool]:
    """Return NaN losses on one rank in the second window; return why windows were skipped, and which overlapped."""
    model = ref.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    has_nan = False

    def loss(model: nn.Module, batch: ref.Batch) -> tuple[Tensor, int]:
        value, items = ref.loss_and_items(model, batch)
        return (value * float("nan"), items or 1) if has_nan else (value, items)

    engine = bigbatch.Engine(model, optimizer, loss, microbatch=2, sync=overlapping(model), check=False)
    skipped, overlapped, changed = [], [], False
    with small_buckets():
        for number, batch in enumerate(ref.batches(3, NUM_SAMPLES)):
            has_nan = number == 1 and dist.get_rank() == 1
            before = updates_cases.parameters_of(model)
            report = engine.step(cases.select_rows(batch, DEALS["equal"](dist.get_rank(), 2)))
            skipped.append(report.skipped)
            overlapped.append(report.ranks.overlapped)
            if number == 1:
                changed = any(not torch.equal(before[n], p) for n, p in updates_cases.parameters_of(model).items())
    return skipped, overlapped, changed


def finished(overlap: bool) -> tuple[list[bool], dict[str, Tensor]]:
    """Let other code update the weights; return which windows overlapped, and the last gradient."""
    model = ref.make_model()
    engine = bigbatch.Engine(model, None, _loss, microbatch=2, sync=overlapping(model, overlap=overlap), check=False)
    overlapped = []
    with small_buckets():
        for batch in ref.batches(3, NUM_SAMPLES):
            report = engine.backward(cases.select_rows(batch, DEALS["equal"](dist.get_rank(), 2)))
            overlapped.append(report.ranks.overlapped)
    return overlapped, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def several_optimizers(overlap: bool) -> tuple[list[bool], dict[str, Tensor]]:
    """Train with two optimizers and a loss of two terms; return which windows overlapped, and the parameters."""
    model = ref.make_model()
    heads = torch.optim.AdamW(model.head.parameters(), lr=0.01)
    others = torch.optim.SGD([p for name, p in model.named_parameters() if "head" not in name], lr=0.1)
    engine = bigbatch.Engine(
        model,
        [heads, others],
        cases.terms_and_items,
        microbatch=2,
        max_grad_norm=0.1,
        count_items=cases.count_terms,
        sync=overlapping(model, overlap=overlap),
        check=False,
    )
    overlapped = []
    with small_buckets():
        for batch in ref.batches(4, NUM_SAMPLES):
            report = engine.step(cases.select_rows(batch, DEALS["few and many"](dist.get_rank(), 2)))
            overlapped.append(report.ranks.overlapped)
    return overlapped, updates_cases.parameters_of(model)


def without_overlap(what: str) -> list[bool]:
    """Run windows of a kind that never overlaps; return which did."""
    settings: dict[str, dict[str, Any]] = {
        "lockstep": {"lockstep": True},
        "reproducible": {"reproducible": True, "quantum": 2},
        "offload": {"offload": "gradients"},
        "float16": {},
        "exact batch norm": {"batch_norm": "exact"},
    }
    dtype = {"float16": torch.float16, "reproducible": torch.float32, "offload": torch.float32}.get(what, torch.float64)
    model = ref.make_model(dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = updates_cases.loss_in_float32 if dtype == torch.float16 else ref.loss_and_items
    sync = overlapping(model)
    batch = cases.select_rows(ref.ragged_batch(NUM_SAMPLES), DEALS["equal"](dist.get_rank(), 2))
    with small_buckets():
        if what == "own loop":
            accumulator = bigbatch.Accumulator(model, optimizer, sync=sync)
            reports = []
            for window in accumulator.windows(ref.cut(batch, 1), num_microbatches=2):
                for part in window:
                    window.backward(ref.loss_and_items(model, part))
                reports.append(window.step())
        else:
            engine = bigbatch.Engine(model, optimizer, loss, microbatch=2, sync=sync, check=False, **settings[what])
            reports = [engine.step(batch) for _ in range(3)]
    assert all(report.skipped is None for report in reports)
    return [report.ranks.overlapped for report in reports]


def failing_soak(how: str, num_updates: int, seed: int, places: Sequence[str] = PLACES) -> Soak:
    """Apply updates with a failure in each."""
    return soak(how, num_updates, seed, places, overlap=True)


def chosen(min_share: float) -> tuple[list[bool], float | None, float]:
    """Let seven windows choose; return which overlapped, the share of the reduction, and the error of the last one."""
    before, overlap_choice.MIN_SHARE = overlap_choice.MIN_SHARE, min_share
    try:
        model = ref.make_model()
        optimizer = cases.GradientRecorder(model)
        sync = bigbatch.Replicated(model, overlap="auto")
        engine = bigbatch.Engine(model, optimizer, _loss, microbatch=2, sync=sync, check=False)
        overlapped = []
        with small_buckets():
            for batch in ref.batches(7, NUM_SAMPLES):
                report = engine.step(cases.select_rows(batch, DEALS["equal"](dist.get_rank(), 2)))
                overlapped.append(report.ranks.overlapped)
    finally:
        overlap_choice.MIN_SHARE = before
    assert sync.overlap is not None
    return (
        overlapped,
        sync.overlap.share,
        ref.relative_error(optimizer.seen[-1], ref.full_gradient(ref.make_model(), batch)),
    )


def failing_fused(place: str, error: str) -> Failed:
    """As `failing`, with layers that add to the sums by themselves."""
    return failing("plain", place, error, kind="tokens", fuse_gradients=True, noise=False)


def failing_first() -> Failed:
    """Fail in the first window, which shows the order."""
    return failing("plain", "between buckets", "own", at=0, kind="tokens")
