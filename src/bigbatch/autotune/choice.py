"""The micro-batch that is fastest in the memory that is there.

predict the smallest → run it, for its time and for what the prediction did not know
→ the largest that fits, by prediction → time some in between → the smallest within 2 % of the fastest
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from bigbatch.autotune.peak_prediction import PeakPredictor, Prediction, PredictionError, state_of
from bigbatch.autotune.probe import Probe, probe
from bigbatch.autotune.problem import TuningProblem as TuningProblem
from bigbatch.autotune.search import largest_below
from bigbatch.autotune.time_model import TimeModel
from bigbatch.batching.plan import TokenBudget
from bigbatch.errors import MemoryLimitError
from bigbatch.memory.allocation_tracker import AllocationTracker, MemoryCategory, storages
from bigbatch.memory.limit import describe_bytes
from bigbatch.memory.usage import MemoryBudget, free_cached_memory, is_out_of_memory
from bigbatch.preserve import preserved

SPEED_TOLERANCE = 1.02  # of the least time: what a smaller micro-batch may cost
MAX_PROBING_S = 20.0
MAX_PREDICTION_ERROR = 0.1  # of what is predicted for a micro-batch: where one takes that much more, none is predicted
NEGLIGIBLE_BYTES = 2**16
STEPS_BETWEEN = 4  # sizes compared for each doubling
_OLD_NAMES = {"tried": "trials", "unpredicted": "prediction_failure"}  # in runs of bigbatch 0.1.0


@dataclass(frozen=True)
class Trial:
    """One size that was run.

    Attributes:
        size: Tokens or samples of a micro-batch, at most.
        per_s: Tokens (samples) of the whole batch in a second at that size, updates not counted.
    """

    size: int
    per_s: float


@dataclass(frozen=True)
class MicrobatchChoice:
    """The micro-batch that ``auto`` chose, and why; ``print(choice)`` says it in a line.

    Attributes:
        size: Tokens, padding included, or samples, that no micro-batch exceeds; a longer sample is one by itself.
        longest: Tokens of the longest sample; 1 where samples are counted.
        unit: ``"tokens"`` or ``"samples"``.
        peak_bytes: What an update is expected to need at its peak.
        limit_bytes: What it may need.
        per_s: Tokens (samples) of the batch in a second, updates not counted.
        largest: The largest size that fits.
        trials: The sizes that were run, smallest first.
        timing: What a micro-batch takes by its size.
        prediction_failure: Why the memory was found by trying instead of by prediction; None where it was predicted.
        limited: Whether it was memory that kept the micro-batch from being larger.
    """

    size: int
    longest: int
    unit: str
    peak_bytes: int
    limit_bytes: int
    per_s: float
    largest: int
    trials: tuple[Trial, ...]
    timing: TimeModel = field(repr=False)
    prediction_failure: str | None = None
    limited: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MicrobatchChoice":
        """Return the choice that `dataclasses.asdict` turned into ``values``, read back from JSON or not."""
        values = {_OLD_NAMES.get(name, name): value for name, value in values.items()}
        trials = tuple(Trial(**each) for each in values["trials"])
        points = tuple((int(size), float(seconds)) for size, seconds in values["timing"]["points"])
        return cls(**{**values, "trials": trials, "timing": TimeModel(points)})

    @property
    def microbatch(self) -> int | TokenBudget:
        """The choice as a limit that `bigbatch.Engine` takes, and that the longest sample keeps."""
        return TokenBudget(max(self.size, self.longest)) if self.unit == "tokens" else self.size

    def __str__(self) -> str:
        smallest = self.trials[0]
        reasons = f"about {self.per_s:,.0f} {self.unit}/s, peak {describe_bytes(self.peak_bytes)} of "
        reasons += describe_bytes(self.limit_bytes)
        if smallest.size < self.size:
            reasons += f"; {smallest.size:,} gave {smallest.per_s:,.0f}/s"
        if self.largest > self.size:
            reasons += f"; up to {self.largest:,} fit and are not 2 % faster"
        alone = ", longer samples alone" if self.longest > self.size else ""
        return f"at most {self.size:,} {self.unit} a micro-batch{alone}: {reasons}"


def choose(problem: TuningProblem, budget: MemoryBudget) -> MicrobatchChoice:
    """Choose the smallest micro-batch within 2 % of the fastest that fits.

    Runs some micro-batches, for less than half a minute, and throws their gradients away; parameters, random states and
    buffers stay as they are.

    Args:
        problem: What is trained.
        budget: The memory that is there.

    Raises:
        MemoryLimitError: A single sample does not fit.
        ValueError: The batch is empty.
    """
    if not problem.num_samples:
        raise ValueError("the batch is empty: a micro-batch is chosen by trying some of its samples.")
    gradients = [(parameter, parameter.grad) for parameter in problem.parameters]  # they need not be the model's
    try:
        with preserved(problem.model, parameters=False):
            unpredicted = problem.prediction_obstacle
            if unpredicted is None:
                try:
                    return _Search(problem, budget).choose()
                except PredictionError as error:
                    unpredicted = str(error)
            return _Search(problem, budget, unpredicted=unpredicted).choose()
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


class _Search:
    """Peaks and times by size, found as they are asked for: predicted, or measured where ``unpredicted`` says why."""

    def __init__(self, problem: TuningProblem, budget: MemoryBudget, *, unpredicted: str | None = None) -> None:
        self._problem = problem
        self._budget = budget
        self._unpredicted = unpredicted
        self._predictor: PeakPredictor | None = None
        self._unmade_bytes = 0  # what a window makes and a probe does not: state of the optimizer, copies of buffers
        self._unknown_bytes = 0  # what was measured beyond the prediction
        self._least_bytes = 0  # where nothing but the update is predicted, what that takes
        self._peaks: dict[tuple[int, int, int], float] = {}
        self._points: dict[int, float] = {}
        self._timing = TimeModel(())
        self._pays = True  # whether the last doubling was worth its memory

    def choose(self) -> MicrobatchChoice:
        """Find the largest size that fits, time some up to it, and weigh them."""
        problem = self._problem
        if self._unpredicted is None:
            self._predict_and_correct()
        else:
            self._predict_the_update()
        fits = problem.usable_size(self._largest())
        tried, largest = self._time_up_to(fits)
        sizes = _sizes_between(problem.first_size, tried[-1])
        seconds = {size: self._batch_seconds(size) for size in sizes}
        size = problem.usable_size(
            next(size for size in sizes if seconds[size] <= SPEED_TOLERANCE * min(seconds.values()))
        )
        return MicrobatchChoice(
            size=size,
            longest=problem.longest_sample,
            unit=problem.unit,
            peak_bytes=int(self._peak_of(max(size, problem.longest_sample))),
            limit_bytes=self._budget.limit_bytes,
            per_s=problem.total / self._batch_seconds(size),
            largest=largest,
            trials=tuple(Trial(size, problem.total / self._batch_seconds(size)) for size in tried),
            timing=self._timing,
            prediction_failure=self._unpredicted,
            limited=self._pays and size * 2 ** (1 / STEPS_BETWEEN) > largest and largest < problem.whole_batch_size,
        )

    def _predict_and_correct(self) -> None:
        """Predict one sample, and run it: on CUDA to learn what the prediction leaves out, elsewhere to check it."""
        problem = self._problem
        predictor = self._make_predictor()
        rows = problem.worst_cases(problem.longest_sample)[0]
        prediction = predictor.predict(problem.peek(rows))
        self._refuse_above(prediction.peak_bytes, prediction)
        beyond_bytes = self._measure(rows) + self._unmade_bytes - prediction.forward_backward_bytes
        if math.isinf(beyond_bytes) or predictor.device.type == "cuda":
            self._refuse_above(prediction.peak_bytes + beyond_bytes, prediction)
            self._unknown_bytes = int(beyond_bytes)
        elif beyond_bytes > NEGLIGIBLE_BYTES + MAX_PREDICTION_ERROR * (
            prediction.forward_backward_bytes - prediction.resident_bytes
        ):
            raise PredictionError(
                f"one sample was predicted to need {describe_bytes(prediction.forward_backward_bytes)}, and needed "
                f"{describe_bytes(int(prediction.forward_backward_bytes + beyond_bytes))}"
            )
        self._predictor = predictor

    def _predict_the_update(self) -> None:
        with suppress(PredictionError):
            self._least_bytes = self._make_predictor().predict_update()
        self._unmade_bytes += sum(
            memory.nbytes() for buffer in self._problem.model.buffers() for memory in storages(buffer)
        )

    def _make_predictor(self) -> PeakPredictor:
        problem = self._problem
        predictor = PeakPredictor.from_training(problem.model, problem.optimizer, problem.loss_fn)
        made = AllocationTracker(predictor.device)
        made.track(state_of(problem.optimizer), MemoryCategory.OPTIMIZER)
        self._unmade_bytes = predictor.state_bytes - made.live_bytes.total()
        return predictor

    def _peak_of(self, size: int) -> float:
        """The peak at a size, predicted where that is possible."""
        return max(map(self._peak_of_samples, self._problem.worst_cases(size)))

    def _peak_of_samples(self, rows: Sequence[int]) -> float:
        shape = (rows[0], len(rows), self._problem.size_of(rows))
        if shape not in self._peaks:
            if self._predictor is None:
                self._peaks[shape] = max(self._measure(rows) + self._unmade_bytes, self._least_bytes)
            else:
                predicted = self._predictor.predict(self._problem.peek(rows))
                self._peaks[shape] = predicted.peak_bytes + self._unknown_bytes
        return self._peaks[shape]

    def _largest(self) -> int:
        """Find the largest size that fits: in rows of the longest sample, then by what of a row others can fill."""
        least, usable = self._problem.longest_sample, self._budget.usable_bytes
        self._refuse_above(self._peak_of(least), None)

        def peak_of_rows(rows: int) -> float:
            return self._peak_of(rows * least)

        low, high = 1, self._problem.num_samples
        if self._predictor is None:  # nothing is tried that is far from what fitted
            while low < high and peak_of_rows(min(high, 2 * low)) <= usable:
                low = min(high, 2 * low)
                self._pays = self._still_pays()
                if not self._pays:
                    return low * least
            high = min(high, 2 * low)
        rows = largest_below(peak_of_rows, low, high, usable)
        if rows == self._problem.num_samples:
            return rows * least
        return largest_below(self._peak_of, rows * least, (rows + 1) * least - 1, usable)

    def _still_pays(self) -> bool:
        """Tell whether one of the two largest sizes that were run in the search for the largest was the fastest."""
        if self._problem.prediction_obstacle is None or len(self._points) < 3:
            return True
        seconds = [self._batch_seconds(size) for size in sorted(self._points)]
        return min(seconds[-2:]) * SPEED_TOLERANCE <= min(seconds[:-2])

    def _time_up_to(self, largest: int) -> tuple[list[int], int]:
        """Time sizes that double, until they are not faster any more; give them, and the largest that fits then."""
        tried: list[int] = []
        started_s = time.perf_counter()
        best_s, slower = math.inf, 0
        size = self._problem.first_size
        while True:
            if not self._time(self._typical(size)):
                self._refuse_above(math.inf if not tried else 0, None)
                return tried, tried[-1]
            tried.append(size)
            batch_s = self._batch_seconds(size)
            slower = slower + 1 if batch_s * SPEED_TOLERANCE > best_s else 0
            best_s = min(best_s, batch_s)
            if size >= largest or slower == 2 or time.perf_counter() - started_s > MAX_PROBING_S:
                return tried, largest
            size = min(2 * size, largest)

    def _typical(self, size: int) -> Sequence[int]:
        """The middle one of the micro-batches that are no longer sample alone, where there are such."""
        groups = self._problem.groups(size)
        return groups[(sum(self._problem.size_of(rows) > size for rows in groups) + len(groups)) // 2]

    def _batch_seconds(self, size: int) -> float:
        """Seconds of the whole batch in micro-batches of a size, updates not counted."""
        groups = self._problem.groups(size, self._timing.cost(size))
        return sum(self._timing.of(self._problem.size_of(rows)) for rows in groups)

    def _time(self, rows: Sequence[int]) -> bool:
        """Time a micro-batch; tell whether it fitted."""
        size = self._problem.size_of(rows)
        if size not in self._points:
            if (found := self._probe(rows)) is None:
                return False
            self._note(size, found)
        return True

    def _note(self, size: int, found: Probe) -> None:
        self._points[size] = found.seconds
        self._timing = TimeModel(tuple(sorted(self._points.items())))

    def _measure(self, rows: Sequence[int]) -> float:
        """Run a micro-batch and give its peak; infinite where memory ran out."""
        found = self._probe(rows, held=self._problem.resident_tensors())
        if found is None:
            return math.inf
        assert found.peak_bytes is not None, "it was asked for"
        if self._problem.prediction_obstacle is not None:
            self._note(self._problem.size_of(rows), found)
        return found.peak_bytes

    def _probe(self, rows: Sequence[int], *, held: list[Tensor] | None = None) -> Probe | None:
        problem = self._problem
        try:
            take = partial(problem.batch.take, rows)
            return probe(
                problem.model,
                problem.parameters,
                problem.loss_fn,
                take,
                held=held,
                uses_cuda_graphs=problem.uses_cuda_graphs,
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        free_cached_memory()  # outside the except block, whose traceback holds tensors
        return None

    def _refuse_above(self, peak_bytes: float, prediction: Prediction | None) -> None:
        if peak_bytes <= self._budget.usable_bytes:
            return
        longest = self._problem.longest_sample
        sample = "one sample" if self._problem.lengths is None else f"a sample of {longest:,} tokens"
        needs = f"needs {describe_bytes(int(peak_bytes))}" if math.isfinite(peak_bytes) else "does not fit"
        parts = "" if prediction is None else f" ({describe_parts(prediction)})"
        raise MemoryLimitError(
            f"{sample} {needs}{parts}, and {self._budget}. Shorten it, or use activation checkpointing, narrower "
            "weights or fewer trained parameters, or give more memory."
        )


def describe_parts(prediction: Prediction) -> str:
    """Say what the peak consists of, such as "parameters 1.8 GiB, gradients 1.8 GiB"."""
    return ", ".join(f"{name} {describe_bytes(num_bytes)}" for name, num_bytes in prediction.parts.items() if num_bytes)


def _sizes_between(least: int, most: int) -> list[int]:
    sizes = [least]
    while sizes[-1] < most:
        sizes.append(min(most, max(sizes[-1] + 1, round(sizes[-1] * 2 ** (1 / STEPS_BETWEEN)))))
    return sizes
