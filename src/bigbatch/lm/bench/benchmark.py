"""Rounds of timed updates, one per contestant; the gradient of the first is compared with the reference."""

import contextlib
import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bigbatch.errors import InputError, MemoryLimitError, first_line
from bigbatch.lm.bench.entries import ABOUT, OURS, Entry, missing
from bigbatch.lm.bench.flops import matrix_rate, update_flops
from bigbatch.lm.bench.meter import GradientMeter, Meter, Similarity, Timer, reference_gradient
from bigbatch.lm.bench.packed_loop import UnsupportedWorkloadError
from bigbatch.lm.bench.peer import Contestant
from bigbatch.lm.bench.registry import make_contestant
from bigbatch.lm.bench.shared_model import SharedModel
from bigbatch.lm.bench.workload import Workload, count_tokens
from bigbatch.lm.device import DeviceSpec
from bigbatch.memory.limit import parse_memory
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory

if TYPE_CHECKING:
    from bigbatch.lm.training.setup import ProgressCallback


@dataclass(frozen=True)
class ContestantResult:
    """Result of one contestant.

    Attributes:
        name: Its name.
        about: Its description.
        samples: Samples per micro-batch; None if it chooses them.
        speeds: Tokens per second of each round.
        peak_bytes: Peak of memory allocated by torch on the device over all rounds; None without CUDA.
        similarity: Similarity of its first gradient to that of the whole batch.
        problem: Why it has no measurements, in a few words; None if it has.
        notes: Remarks for the reader.
        first_update_s: Seconds until the end of its first update, compilation and tuning included; None for none.
    """

    name: str
    about: str
    samples: int | None
    speeds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    similarity: Similarity | None = None
    problem: str | None = None
    notes: tuple[str, ...] = ()
    first_update_s: float | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """The median over the rounds."""
        return statistics.median(self.speeds) if self.speeds and self.problem is None else None


@dataclass(frozen=True)
class BenchmarkResult:
    """Results of all contestants, with the conditions of the measurement.

    Attributes:
        workload: Model and batch of an update.
        device_spec: Device and precision.
        memory: The memory limit as requested; None for none.
        rounds: Timed updates per contestant.
        num_parameters: Trained parameters of the model.
        num_sequences: Sequences of the global batch.
        num_tokens: Tokens of the global batch.
        rows: One result per entry, in order.
        flops: Floating-point operations of the update, by `update_flops`.
        matrix_flops_per_s: Rate of large matrix products on the device; None if unknown.
    """

    workload: Workload
    device_spec: DeviceSpec
    memory: str | None
    rounds: int
    num_parameters: int
    num_sequences: int
    num_tokens: int
    rows: tuple[ContestantResult, ...]
    flops: int = 0
    matrix_flops_per_s: float | None = None

    @property
    def ours(self) -> ContestantResult | None:
        """The result of bigbatch; None if it did not take part."""
        return next((row for row in self.rows if row.name == OURS), None)

    def ratio(self, row: ContestantResult) -> float | None:
        """Return the throughput of bigbatch divided by that of a row; None if either has none."""
        ours = None if self.ours is None else self.ours.tokens_per_s
        return ours / row.tokens_per_s if ours and row.tokens_per_s else None

    def share(self, row: ContestantResult) -> float | None:
        """Return the share of the device's matrix rate that a row reaches; None if either is unknown."""
        if self.matrix_flops_per_s is None or row.tokens_per_s is None:
            return None
        return row.tokens_per_s * self.flops / self.num_tokens / self.matrix_flops_per_s


def run_benchmark(
    workload: Workload,
    entries: Sequence[Entry],
    *,
    memory: str | None,
    rounds: int,
    progress: "ProgressCallback",
    make: Callable[[Entry], Contestant] | None = None,
) -> BenchmarkResult:
    """Run the update of a workload with every contestant in turn, in each round.

    Args:
        workload: Model and batch of an update.
        entries: The contestants.
        memory: Memory limit of this process on a CUDA device; on the CPU only bigbatch applies it. None for no limit.
        rounds: Timed updates per contestant.
        progress: Receives progress messages.
        make: Creates the contestant of an entry, other than `make_contestant`.

    Raises:
        InputError: The device does not exist, or has less memory.
    """
    device_spec = workload.device_spec()
    with _limited(device_spec, memory):
        progress("creating the model on its device")
        started_s = time.perf_counter()
        stage = SharedModel(workload, memory, progress=progress)
        stage.synchronize()
        progress(f"created the model in {time.perf_counter() - started_s:.1f} s")
        progress("computing the reference gradient, in float32")
        with _unlimited(device_spec):  # not part of the comparison
            reference = reference_gradient(stage)
        runs = [_ContestantRun(entry, make or make_contestant) for entry in entries]
        for number in range(1, rounds + 1):
            for run in runs:
                progress(f"round {number} of {rounds}: {run.title}")
                run.time(stage, reference)
                progress(f"{run.title}: {run.outcome(first=number == 1)}")
    return BenchmarkResult(
        workload=workload,
        device_spec=device_spec,
        memory=memory,
        rounds=rounds,
        num_parameters=sum(parameter.numel() for parameter in stage.parameters),
        num_sequences=len(stage.samples),
        num_tokens=count_tokens(stage.samples),
        rows=tuple(run.row() for run in runs),
        flops=update_flops(stage.model, stage.samples),
        matrix_flops_per_s=matrix_rate(device_spec.device, device_spec.precision),
    )


class _ContestantRun:
    """Measurements of one contestant so far, or the reason why it stopped."""

    def __init__(self, entry: Entry, make: Callable[[Entry], Contestant]) -> None:
        self._entry = entry
        self._problem = missing(entry.name)
        self._contestant: Contestant | None = None if self._problem else make(entry)
        self._speeds: list[float] = []
        self._peaks: list[int] = []
        self._similarity: Similarity | None = None

    @property
    def title(self) -> str:
        return self._entry.name if self._entry.samples is None else f"{self._entry.name}:{self._entry.samples}"

    def time(self, stage: SharedModel, reference: Sequence[Tensor]) -> None:
        """Time one update; the first one also compares the gradient, which does not count as time."""
        timer = Timer(stage.device)
        if self._speeds:
            self._take_turn(stage, timer)
        else:
            meter = GradientMeter(stage, reference, timer=timer)
            try:
                self._take_turn(stage, meter)
            finally:
                meter.close()
            self._similarity = meter.similarity
            if self._problem is None and meter.similarity is None:
                self._problem = "its optimizer took no step"
        if timer.elapsed_s is not None:
            self._speeds.append(count_tokens(stage.samples) / timer.elapsed_s)
        if timer.peak_bytes is not None:
            self._peaks.append(timer.peak_bytes)

    def _take_turn(self, stage: SharedModel, meter: Meter) -> None:
        if self._contestant is None or self._problem is not None:
            return
        try:
            with stage.isolated(), _quiet():
                self._contestant.turn(stage, meter)
        except Exception as error:
            self._problem = _describe(error)
            if self._entry.name == OURS and self._problem.startswith("failed"):
                raise
        if self._problem is not None:
            free_cached_memory()  # outside the except block, whose traceback holds tensors

    def outcome(self, *, first: bool) -> str:
        """Describe the round that just ended, the first one with the time until the first update."""
        if self._problem is not None or self._contestant is None:
            return str(self._problem)
        after_s = self._contestant.first_update_s if first else None
        return f"{self._speeds[-1]:,.0f} tokens/s" + (f", first update after {after_s:.1f} s" if after_s else "")

    def row(self) -> ContestantResult:
        return ContestantResult(
            name=self._entry.name,
            about=ABOUT.get(self._entry.name, ABOUT[OURS]),
            samples=self._entry.samples,
            speeds=tuple(self._speeds),
            peak_bytes=max(self._peaks, default=None),
            similarity=self._similarity,
            problem=self._problem,
            notes=() if self._contestant is None else tuple(self._contestant.notes),
            first_update_s=None if self._contestant is None else self._contestant.first_update_s,
        )


def _describe(error: Exception) -> str:
    if is_out_of_memory(error) or isinstance(error, MemoryLimitError):
        return "out of memory"
    if isinstance(error, UnsupportedWorkloadError):
        return str(error)
    return f"failed: {type(error).__name__}: {first_line(error)}"


@contextlib.contextmanager
def _limited(device_spec: DeviceSpec, memory: str | None) -> Iterator[None]:
    """Limit the CUDA memory of this process; restore the limit at the end."""
    if memory is None or device_spec.device.type != "cuda":
        yield
        return
    total_bytes = torch.cuda.get_device_properties(device_spec.device).total_memory
    try:
        limit_bytes = parse_memory(memory).to_bytes(total_bytes)
    except ValueError as error:
        raise InputError(str(error)) from None
    before = torch.cuda.get_per_process_memory_fraction(device_spec.device)
    device_spec.limit_memory(limit_bytes)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device_spec.device)


@contextlib.contextmanager
def _unlimited(device_spec: DeviceSpec) -> Iterator[None]:
    """Remove the CUDA memory limit of this process; restore it at the end."""
    if device_spec.device.type != "cuda":
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction(device_spec.device)
    torch.cuda.set_per_process_memory_fraction(1.0, device_spec.device)
    try:
        yield
    finally:
        free_cached_memory()
        torch.cuda.set_per_process_memory_fraction(before, device_spec.device)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings, logs and prints of libraries."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
