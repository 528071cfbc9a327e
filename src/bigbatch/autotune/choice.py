"""Choose the fastest micro-batch size that fits in memory.

predict one sample → run it, to correct the prediction → the largest size that fits, by prediction
→ time sizes up to it → the smallest size within 2 % of the fastest
"""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from torch import Tensor

from bigbatch.autotune.microbatch_choice import MicrobatchChoice as MicrobatchChoice
from bigbatch.autotune.microbatch_choice import Trial as Trial
from bigbatch.autotune.peak_prediction import PeakPredictor, Prediction, PredictionError, state_of
from bigbatch.autotune.probe import Probe, probe
from bigbatch.autotune.problem import TuningProblem as TuningProblem
from bigbatch.autotune.search import SIZES_PER_DOUBLING, largest_below, sizes_between
from bigbatch.autotune.time_model import TimeModel
from bigbatch.errors import MemoryLimitError
from bigbatch.memory.allocation_tracker import AllocationTracker, MemoryCategory, storages
from bigbatch.memory.limit import describe_bytes
from bigbatch.memory.usage import MemoryBudget, free_cached_memory, is_out_of_memory
from bigbatch.preserve import preserved
from bigbatch.trials.loss_modules import modules_used_by

SPEED_TOLERANCE = 1.02  # largest time of the chosen size relative to the fastest
MAX_PROBING_S = 20.0
LOOK_AHEAD, LOOK_AHEAD_S = 8, 0.3  # times a size that is not faster: kernels of CPUs for few rows are slow; seconds
MAX_PREDICTION_ERROR = 0.1  # relative: above it, peaks are measured instead of predicted
NEGLIGIBLE_BYTES = 2**16
SMALLEST_GAIN = 1.1  # of a size over the largest that was run, to be tried after a larger one did not fit


def choose(problem: TuningProblem, budget: MemoryBudget) -> MicrobatchChoice:
    """Choose the smallest micro-batch size within 2 % of the fastest that fits.

    Runs some micro-batches, for less than half a minute, and discards their gradients. Parameters, gradients, buffers,
    random states, and whatever else hangs on the model and on the modules that ``loss_fn`` uses are restored.

    Args:
        problem: The training step.
        budget: The memory that it may use.

    Raises:
        MemoryLimitError: A single sample does not fit.
        ValueError: The batch is empty.
    """
    if not problem.num_samples:
        raise ValueError("the batch is empty: auto-tuning runs some of its samples.")
    gradients = [(parameter, parameter.grad) for parameter in problem.parameters]  # may be others than the model's
    try:
        with preserved(problem.model, *modules_used_by(problem.loss_fn), parameters=False):
            failure = problem.prediction_obstacle
            if failure is None:
                try:
                    return _Search(problem, budget).choose()
                except PredictionError as error:
                    failure = str(error)
            return _Search(problem, budget, prediction_failure=failure).choose()
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


class _Search:
    """Lazily computed and cached peaks and times by size; measured instead of predicted if prediction has failed."""

    def __init__(self, problem: TuningProblem, budget: MemoryBudget, *, prediction_failure: str | None = None) -> None:
        self._problem = problem
        self._budget = budget
        self._prediction_failure = prediction_failure
        self._predictor: PeakPredictor | None = None
        # Allocated by a window but not by a probe: optimizer state, copies of buffers and of weights.
        self._unprobed_bytes = problem.copies_bytes
        self._correction_bytes = 0  # measured peak of one sample minus its prediction
        self._update_bytes = 0  # predicted peak of the update, if only that is predicted
        self._peaks: dict[tuple[int, int, int], float] = {}
        self._seconds: dict[int, float] = {}
        self._timing = TimeModel(())
        self._speed_increases = True  # whether one of the two largest sizes that were run is the fastest

    def choose(self) -> MicrobatchChoice:
        """Find the largest size that fits, time sizes up to it, and choose among sizes in between by the time model."""
        problem = self._problem
        if self._prediction_failure is None:
            self._predict_and_correct()
        else:
            self._predict_update()
        timed_sizes, largest = self._time_up_to(problem.usable_size(self._find_largest()))
        sizes = sizes_between(problem.first_size, timed_sizes[-1])
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
            trials=tuple(Trial(size, problem.total / self._batch_seconds(size)) for size in timed_sizes),
            timing=self._timing,
            prediction_failure=self._prediction_failure,
            limited=self._speed_increases
            and size * 2 ** (1 / SIZES_PER_DOUBLING) > largest
            and largest < problem.whole_batch_size,
        )

    def _predict_and_correct(self) -> None:
        """Predict one sample and run it: on CUDA to correct the prediction, elsewhere to check it."""
        problem = self._problem
        predictor = self._build_predictor()
        rows = problem.worst_cases(problem.longest_sample)[0]
        prediction = predictor.predict(problem.peek(rows))
        self._raise_above_limit(prediction.peak_bytes, prediction)
        error_bytes = self._measure(rows) + self._unprobed_bytes - prediction.forward_backward_bytes
        if math.isinf(error_bytes) or predictor.device.type == "cuda":
            self._raise_above_limit(prediction.peak_bytes + error_bytes, prediction)
            self._correction_bytes = int(error_bytes)
        elif error_bytes > NEGLIGIBLE_BYTES + MAX_PREDICTION_ERROR * (
            prediction.forward_backward_bytes - prediction.resident_bytes
        ):
            raise PredictionError(
                f"one sample was predicted to need {describe_bytes(prediction.forward_backward_bytes)} but needed "
                f"{describe_bytes(int(prediction.forward_backward_bytes + error_bytes))}"
            )
        self._predictor = predictor
        self._peaks[self._shape_of(rows)] = prediction.peak_bytes + self._correction_bytes

    def _predict_update(self) -> None:
        with suppress(PredictionError):
            self._update_bytes = self._build_predictor().predict_update()
        self._unprobed_bytes += sum(
            memory.nbytes() for buffer in self._problem.model.buffers() for memory in storages(buffer)
        )

    def _build_predictor(self) -> PeakPredictor:
        problem = self._problem
        predictor = PeakPredictor.from_training(
            problem.model,
            problem.optimizer,
            problem.loss_fn,
            copies_bytes=problem.copies_bytes,
            keeps_sums=problem.keeps_sums,
        )
        existing = AllocationTracker(predictor.device)
        existing.track(state_of(problem.optimizer), MemoryCategory.OPTIMIZER)
        self._unprobed_bytes += predictor.state_bytes - existing.live_bytes.total()
        return predictor

    def _peak_of(self, size: int) -> float:
        """Return the largest peak of a micro-batch of a size in bytes, predicted if possible."""
        return max(map(self._peak_of_samples, self._problem.worst_cases(size)))

    def _peak_of_samples(self, rows: Sequence[int]) -> float:
        shape = self._shape_of(rows)
        if shape not in self._peaks:
            if self._predictor is None:
                self._peaks[shape] = max(self._measure(rows) + self._unprobed_bytes, self._update_bytes)
            else:
                predicted = self._predictor.predict(self._problem.peek(rows))
                self._peaks[shape] = predicted.peak_bytes + self._correction_bytes
        return self._peaks[shape]

    def _shape_of(self, rows: Sequence[int]) -> tuple[int, int, int]:
        return rows[0], len(rows), self._problem.size_of(rows)

    def _find_largest(self) -> int:
        """Return the largest size that fits: first in rows of the longest sample, then within the next row."""
        longest, usable = self._problem.longest_sample, self._budget.usable_bytes
        self._raise_above_limit(self._peak_of(longest), None)

        def peak_of_rows(rows: int) -> float:
            return self._peak_of(rows * longest)

        low, high = 1, self._problem.num_samples
        if self._predictor is None:  # sizes are run: double them, rather than run one far above those that fit
            while low < high and peak_of_rows(min(high, 2 * low)) <= usable:
                low = min(high, 2 * low)
                self._speed_increases = self._largest_are_fastest()
                if not self._speed_increases:
                    return low * longest
            high = min(high, 2 * low)
        rows = largest_below(peak_of_rows, low, high, usable)
        if rows == self._problem.num_samples:
            return rows * longest
        return largest_below(self._peak_of, rows * longest, (rows + 1) * longest - 1, usable)

    def _largest_are_fastest(self) -> bool:
        """Return whether one of the two largest sizes that were run for their peak is the fastest."""
        if self._problem.prediction_obstacle is None or len(self._seconds) < 3:
            return True
        seconds = [self._batch_seconds(size) for size in sorted(self._seconds)]
        return min(seconds[-2:]) * SPEED_TOLERANCE <= min(seconds[:-2])

    def _time_up_to(self, largest: int) -> tuple[list[int], int]:
        """Time doubling sizes, until two in a row and one far above are not faster; return them, and the largest."""
        timed_sizes: list[int] = []
        started_s = time.perf_counter()
        best_s, num_slower, looked_ahead = math.inf, 0, self._problem.parameters[0].device.type != "cpu"
        size = self._problem.first_size
        while True:
            if not self._time(self._median_microbatch(size)):  # the prediction was too low: try a size in between
                self._raise_above_limit(math.inf if not timed_sizes else 0, None)
                largest = size = self._problem.usable_size(math.isqrt(timed_sizes[-1] * size))
                if size < SMALLEST_GAIN * timed_sizes[-1]:
                    return timed_sizes, timed_sizes[-1]
                continue
            timed_sizes.append(size)
            batch_s = self._batch_seconds(size)
            num_slower = num_slower + 1 if batch_s * SPEED_TOLERANCE > best_s else 0
            best_s = min(best_s, batch_s)
            slows = num_slower >= 2
            ends = slows and (looked_ahead or self._timing.of(LOOK_AHEAD * size) > LOOK_AHEAD_S)
            if size >= largest or ends or time.perf_counter() - started_s > MAX_PROBING_S:
                return timed_sizes, largest
            size, looked_ahead = min((LOOK_AHEAD if slows else 2) * size, largest), looked_ahead or slows

    def _median_microbatch(self, size: int) -> Sequence[int]:
        """Return the median micro-batch of a size, single oversized samples excluded if there are others."""
        groups = self._problem.groups(size)
        return groups[(sum(self._problem.size_of(rows) > size for rows in groups) + len(groups)) // 2]

    def _batch_seconds(self, size: int) -> float:
        """Return the predicted seconds of the whole batch in micro-batches of a size, without the update."""
        groups = self._problem.groups(size, self._timing.cost(size))
        return sum(self._timing.of(self._problem.size_of(rows)) for rows in groups)

    def _time(self, rows: Sequence[int]) -> bool:
        """Time a micro-batch; return whether it fits."""
        size = self._problem.size_of(rows)
        if size not in self._seconds:
            if (result := self._probe(rows)) is None:
                return False
            self._record_time(size, result)
        return True

    def _record_time(self, size: int, result: Probe) -> None:
        assert result.seconds is not None, "requested by timed="
        self._seconds[size] = result.seconds + self._problem.waiting_s(result.seconds)
        self._timing = TimeModel(tuple(sorted(self._seconds.items())))

    def _measure(self, rows: Sequence[int]) -> float:
        """Run a micro-batch and return its peak in bytes; infinity if it does not fit."""
        problem = self._problem
        equals_timed = problem.prediction_obstacle is not None or (problem.lengths is None and problem.uniform_length)
        result = self._probe(rows, resident=problem.resident_tensors(), timed=equals_timed)
        if result is None:
            return math.inf
        assert result.peak_bytes is not None, "requested by resident="
        if equals_timed:
            self._record_time(problem.size_of(rows), result)
        return result.peak_bytes

    def _probe(self, rows: Sequence[int], *, resident: list[Tensor] | None = None, timed: bool = True) -> Probe | None:
        """Run a micro-batch; return None if it does not fit."""
        problem = self._problem
        try:
            return probe(
                problem.model,
                problem.parameters,
                problem.loss_fn,
                partial(problem.batch.take, rows),
                resident=resident,
                timed=timed,
                uses_cuda_graphs=problem.uses_cuda_graphs,
                keeps_sums=problem.keeps_sums,
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        free_cached_memory()  # outside the except block, whose traceback references tensors
        return None

    def _raise_above_limit(self, peak_bytes: float, prediction: Prediction | None) -> None:
        if peak_bytes <= self._budget.usable_bytes:
            return
        longest = self._problem.longest_sample
        sample = "one sample" if self._problem.lengths is None else f"a sample of {longest:,} tokens"
        needs = f"needs {describe_bytes(int(peak_bytes))}" if math.isfinite(peak_bytes) else "does not fit"
        parts = "" if prediction is None else f" ({describe_parts(prediction)})"
        raise MemoryLimitError(
            f"{sample} {needs}{parts}, but {self._budget}. Shorten it, use activation checkpointing, a narrower dtype "
            "or fewer trained parameters, or raise the memory limit."
        )


def describe_parts(prediction: Prediction) -> str:
    """Format the categories of the peak, such as "parameters 1.8 GiB, gradients 1.8 GiB"."""
    return ", ".join(f"{name} {describe_bytes(num_bytes)}" for name, num_bytes in prediction.parts.items() if num_bytes)
