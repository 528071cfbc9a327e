"""The micro-batch that is fastest in the memory that is there.

predict the smallest → run it, for its time and for what the prediction did not know
→ the largest that fits, by prediction → time some in between → the smallest within 2 % of the fastest
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from bigbatch.errors import MemoryLimitError
from bigbatch.limit import describe_bytes
from bigbatch.memory.prediction import Prediction, PredictionError, Rehearsal
from bigbatch.memory.probe import Probe, probe
from bigbatch.memory.timing import Timing
from bigbatch.memory.usage import Room, is_out_of_memory, release_memory
from bigbatch.plan import TokenBudget, plan

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from bigbatch.engine import LossFunction

WITHIN = 1.02  # of the least time: what a smaller micro-batch may cost
CLOSE_ENOUGH = 0.985  # of the memory: where the search for the largest that fits ends
MOST_PREDICTIONS = 6
FINE_ENOUGH = 50  # a share of the size: where the search ends, too
MOST_PROBING_S = 20.0
STEPS_BETWEEN = 4  # sizes compared for each doubling


@dataclass(frozen=True)
class Tried:
    """One size that was run.

    Attributes:
        size: Tokens or samples of a micro-batch, at most.
        per_s: Tokens (samples) of the whole batch in a second at that size, updates not counted.
    """

    size: int
    per_s: float


@dataclass(frozen=True)
class Choice:
    """The micro-batch that ``auto`` chose, and why; ``print(choice)`` says it in a line.

    Attributes:
        size: Tokens, padding included, or samples, that no micro-batch exceeds.
        unit: ``"tokens"`` or ``"samples"``.
        peak_bytes: What an update is expected to need at its peak.
        limit_bytes: What it may need.
        per_s: Tokens (samples) of the batch in a second, updates not counted.
        largest: The largest size that fits.
        tried: The sizes that were run, smallest first.
        timing: What a micro-batch takes by its size.
        unpredicted: Why the memory was found by trying instead of by prediction; None where it was predicted.
    """

    size: int
    unit: str
    peak_bytes: int
    limit_bytes: int
    per_s: float
    largest: int
    tried: tuple[Tried, ...]
    timing: Timing = field(repr=False)
    unpredicted: str | None = None

    @property
    def microbatch(self) -> int | TokenBudget:
        """The choice as `bigbatch.Engine` takes it."""
        return TokenBudget(self.size) if self.unit == "tokens" else self.size

    def __str__(self) -> str:
        smallest = self.tried[0]
        reasons = f"about {self.per_s:,.0f} {self.unit}/s, peak {describe_bytes(self.peak_bytes)} of "
        reasons += describe_bytes(self.limit_bytes)
        if smallest.size < self.size:
            reasons += f"; {smallest.size:,} gave {smallest.per_s:,.0f}/s"
        if self.largest > self.size:
            reasons += f"; up to {self.largest:,} fit and are not 2 % faster"
        return f"at most {self.size:,} {self.unit} a micro-batch: {reasons}"


@dataclass(frozen=True)
class Step:
    """The training step whose micro-batch is to be chosen.

    Attributes:
        model: In training mode, on its device.
        optimizer: Over its parameters.
        loss_fn: As for `bigbatch.Engine`.
        take: Gives the micro-batch of some samples of the batch, on the device.
        num_samples: Samples of the batch.
        lengths: Tokens of each, where the micro-batch is limited in tokens.
    """

    model: nn.Module
    optimizer: "Optimizer"
    loss_fn: "LossFunction"
    take: Callable[[Sequence[int]], Any]
    num_samples: int
    lengths: Sequence[int] | None

    @property
    def parameters(self) -> list[Tensor]:
        """Those of the optimizer."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def held(self) -> list[Tensor]:
        """What is there already: parameters, buffers, and the optimizer's state."""
        return [*self.model.parameters(), *self.model.buffers(), *self.parameters, *_state(self.optimizer)]

    @cached_property
    def longest_first(self) -> list[int]:
        """The samples, longest first."""
        assert self.lengths is not None, "asked for only where tokens are counted"
        return sorted(range(self.num_samples), key=self.lengths.__getitem__, reverse=True)

    @property
    def least(self) -> int:
        """The smallest size: one sample, whichever it is."""
        return 1 if self.lengths is None else max(self.lengths)

    @property
    def most(self) -> int:
        """The size at which the batch is one micro-batch."""
        return self.num_samples if self.lengths is None else self.num_samples * max(self.lengths)

    @property
    def unit(self) -> str:
        """What sizes count."""
        return "samples" if self.lengths is None else "tokens"

    def fullest(self, size: int) -> list[list[int]]:
        """Samples of the fullest micro-batches that a batch of such samples can bring, repeated as often as they fit.

        As many as fit of the longest; and of one of middling length, since they may fill the size better.
        """
        if self.lengths is None:
            return [list(range(size))]
        candidates = (self.longest_first[0], self.longest_first[self.num_samples // 2])
        return [[sample] * (size // self.lengths[sample]) for sample in dict.fromkeys(candidates)]

    def groups(self, size: int) -> Sequence[Sequence[int]]:
        """The batch in micro-batches of at most that size."""
        if self.lengths is None:
            return [range(i, min(i + size, self.num_samples)) for i in range(0, self.num_samples, size)]
        return plan(self.lengths, token_budget=size).microbatches[0]

    def size_of(self, rows: Sequence[int]) -> int:
        """Tokens with padding, or samples, of a micro-batch."""
        return len(rows) if self.lengths is None else len(rows) * max(self.lengths[i] for i in rows)

    @property
    def total(self) -> int:
        """Tokens without padding, or samples, of the batch."""
        return self.num_samples if self.lengths is None else sum(self.lengths)


def choose(step: Step, room: Room) -> Choice:
    """Choose the smallest micro-batch within 2 % of the fastest that fits.

    Runs some micro-batches, for less than half a minute, and throws their gradients away; parameters, random states and
    buffers stay as they are.

    Args:
        step: What is trained.
        room: The memory that is there.

    Raises:
        MemoryLimitError: A single sample does not fit.
        ValueError: The batch is empty.
    """
    if not step.num_samples:
        raise ValueError("the batch is empty: a micro-batch is chosen by trying some of its samples.")
    search = _Search(step, room)
    try:
        search.predict_and_correct()
    except PredictionError as error:
        search.unpredicted = str(error)
    largest = search.largest()
    tried = search.time_up_to(largest)
    sizes = _sizes_between(step.least, tried[-1])
    seconds = {size: search.batch_seconds(size) for size in sizes}
    size = next(size for size in sizes if seconds[size] <= WITHIN * min(seconds.values()))
    return Choice(
        size=size,
        unit=step.unit,
        peak_bytes=search.peak_of(size),
        limit_bytes=room.limit_bytes,
        per_s=step.total / seconds[size],
        largest=largest,
        tried=tuple(Tried(size, step.total / search.batch_seconds(size)) for size in tried),
        timing=search.timing,
        unpredicted=search.unpredicted,
    )


class _Search:
    """Peaks and times by size, found as they are asked for."""

    def __init__(self, step: Step, room: Room) -> None:
        self._step = step
        self._room = room
        self._rehearsal: Rehearsal | None = None
        self._unknown_bytes = 0  # what was measured beyond the prediction
        self._peaks: dict[int, int] = {}
        self._points: dict[int, float] = {}
        self.timing = Timing(())
        self.unpredicted: str | None = None

    def predict_and_correct(self) -> None:
        """Predict the smallest size; on CUDA, learn from running it what the prediction leaves out."""
        step = self._step
        rehearsal = Rehearsal.of(step.model, step.optimizer, step.loss_fn)
        rows = step.fullest(step.least)[0]
        prediction = rehearsal.predict(step.take(rows))
        self._rehearsal = rehearsal
        self._refuse_above(prediction.peak_bytes, prediction)
        if rehearsal.device.type == "cuda":
            state_bytes = sum(map(_num_bytes, _state(step.optimizer)))
            running = max(prediction.phases["forward"], prediction.phases["backward"])
            running -= prediction.parts["optimizer"] - state_bytes
            self._unknown_bytes = self._measure(rows) - running

    def peak_of(self, size: int) -> int:
        """The peak at a size, predicted where that is possible."""
        if size not in self._peaks:
            shapes = self._step.fullest(size)
            if self._rehearsal is None:
                self._peaks[size] = self._measure(shapes[0])
            else:
                predicted = [self._rehearsal.predict(self._step.take(rows)).peak_bytes for rows in shapes]
                self._peaks[size] = max(predicted) + self._unknown_bytes
        return self._peaks[size]

    def largest(self) -> int:
        """Find the largest size that fits."""
        least, most, usable = self._step.least, self._step.most, self._room.usable_bytes
        self._refuse_above(self.peak_of(least), None)
        if self._rehearsal is None:  # nothing is tried that is far from what fitted
            while least < most and self.peak_of(min(most, 2 * least)) <= usable:
                least = min(most, 2 * least)
            most = min(most, 2 * least)
        return largest_below(self.peak_of, least, most, usable)

    def time_up_to(self, largest: int) -> list[int]:
        """Time sizes that double, until they are not faster any more; give them."""
        tried: list[int] = []
        started_s = time.perf_counter()
        best_s, slower = math.inf, 0
        size = self._step.least
        while True:
            groups = self._step.groups(size)
            self._time(groups[len(groups) // 2])
            tried.append(size)
            batch_s = self.batch_seconds(size)
            slower = slower + 1 if batch_s * WITHIN > best_s else 0
            best_s = min(best_s, batch_s)
            if size >= largest or slower == 2 or time.perf_counter() - started_s > MOST_PROBING_S:
                return tried
            size = min(2 * size, largest)

    def batch_seconds(self, size: int) -> float:
        """Seconds of the whole batch in micro-batches of a size, updates not counted."""
        return sum(self.timing.of(self._step.size_of(rows)) for rows in self._step.groups(size))

    def _time(self, rows: Sequence[int]) -> None:
        size = self._step.size_of(rows)
        if size not in self._points:
            self._points[size] = self._probe(rows, measure_memory=False).seconds
            self.timing = Timing(tuple(sorted(self._points.items())))

    def _measure(self, rows: Sequence[int]) -> int:
        try:
            peak_bytes = self._probe(rows, measure_memory=True).peak_bytes
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            peak_bytes = self._room.limit_bytes + 1
        release_memory()  # outside the except block, whose traceback holds tensors
        assert peak_bytes is not None, "CPU and CUDA tell"
        return peak_bytes

    def _probe(self, rows: Sequence[int], *, measure_memory: bool) -> Probe:
        step = self._step
        take = partial(step.take, rows)
        return probe(step.model, step.parameters, step.loss_fn, take, measure_memory=measure_memory)

    def _refuse_above(self, peak_bytes: int, prediction: Prediction | None) -> None:
        if peak_bytes <= self._room.usable_bytes:
            return
        sample = "one sample" if self._step.lengths is None else f"a sample of {self._step.least:,} tokens"
        parts = "" if prediction is None else f" ({describe_parts(prediction)})"
        raise MemoryLimitError(
            f"{sample} needs {describe_bytes(peak_bytes)}{parts}, and {self._room}. Shorten it, or use activation "
            "checkpointing, narrower weights or fewer trained parameters, or give more memory."
        )


def largest_below(peak_of: Callable[[int], int], least: int, most: int, usable_bytes: int) -> int:
    """Find the largest size from ``least``, which fits, to ``most`` whose peak is at most ``usable_bytes``.

    The peak is a maximum of lines over the sizes, so it lies below its chords: where a chord reaches the limit, the
    size fits, and a few steps come within 2 % of the memory.
    """
    low, high = least, most
    if peak_of(high) <= usable_bytes:
        return high
    for _ in range(MOST_PREDICTIONS):
        low_bytes, high_bytes = peak_of(low), peak_of(high)
        if high - low <= max(1, low // FINE_ENOUGH) or low_bytes >= CLOSE_ENOUGH * usable_bytes:
            break
        share = (usable_bytes - low_bytes) / max(1, high_bytes - low_bytes)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        if peak_of(middle) <= usable_bytes:
            low = middle
        else:
            high = middle
    return low


def describe_parts(prediction: Prediction) -> str:
    """Say what the peak consists of, such as "parameters 1.8 GiB, gradients 1.8 GiB"."""
    return ", ".join(f"{name} {describe_bytes(num_bytes)}" for name, num_bytes in prediction.parts.items() if num_bytes)


def _sizes_between(least: int, most: int) -> list[int]:
    sizes = [least]
    while sizes[-1] < most:
        sizes.append(min(most, max(sizes[-1] + 1, round(sizes[-1] * 2 ** (1 / STEPS_BETWEEN)))))
    return sizes


def _state(optimizer: "Optimizer") -> list[Tensor]:
    return [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]


def _num_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() if tensor.is_cuda else 0
