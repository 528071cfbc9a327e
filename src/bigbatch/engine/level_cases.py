"""What every level of offload needs for a batch on this rank: bytes on card and host, and seconds where they decide.

prediction, card → the micro-batch of each level → peaks → seconds, if several levels fit → LevelCase
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from bigbatch.autotune.peak_prediction import PredictionError
from bigbatch.autotune.problem import TuningProblem
from bigbatch.autotune.time_model import TimeModel
from bigbatch.engine.card_target import CardTarget
from bigbatch.engine.level_prediction import LevelPrediction
from bigbatch.engine.level_times import time_microbatches, window_seconds
from bigbatch.engine.microbatch_size import MicrobatchSize
from bigbatch.errors import InputError, first_line
from bigbatch.offload.level_choice import LevelCase
from bigbatch.offload.levels import Offload, reaches


def predicted_cases(
    problem: TuningProblem,
    target: CardTarget,
    levels: Sequence[Offload],
    narrow: Sequence[str],
    size: int | None,
    *,
    integer_sums: bool,
) -> list[LevelCase]:
    """Return what levels need on this rank; none without samples."""
    if not problem.num_samples:
        return []
    try:
        prediction = LevelPrediction(problem, target.device, levels=levels, narrow=narrow, integer_sums=integer_sums)
        return level_cases(prediction, target, size)
    except PredictionError as error:
        raise InputError(
            f'offload="auto" predicts the memory of every level, and that is not possible here: {first_line(error)}. '
            'Pass a level, such as offload="optimizer".'
        ) from error


def requested_size(problem: TuningProblem, size: MicrobatchSize, quantum: int | None) -> int | None:
    """Return the size of the micro-batches of a batch; None if it is to be chosen.

    Args:
        problem: The step.
        size: As requested.
        quantum: Samples that are computed by themselves, whatever the micro-batch is; else None.
    """
    if quantum is None and size.requested == "auto":
        return None
    amount = size.limit if quantum is None else quantum * problem.longest_sample
    return max(problem.longest_sample, min(amount, problem.whole_batch_size))


def level_cases(
    prediction: LevelPrediction,
    target: CardTarget,
    size: int | None,
    measure: Callable[..., TimeModel | None] = time_microbatches,
) -> list[LevelCase]:
    """Return what the levels of a prediction need, lower ones first.

    Args:
        prediction: Of one batch.
        target: The card.
        size: The micro-batch that was requested; None to use the largest that fits at each level, and to compare times.
        measure: As `time_microbatches`.
    """
    problem, limits = prediction.problem, target.limits
    cases, sizes = [], {}
    for level in prediction.levels:
        least = prediction.peak_bytes(level, problem.longest_sample if size is None else size)
        own = size if size is not None else prediction.largest_size(level, limits.card_bytes)
        case = LevelCase(level, least, prediction.peak_bytes(level, own), prediction.needs(level).host_bytes)
        cases.append(case)
        if limits.fits(case):
            sizes[level] = own
    if size is not None or len(sizes) < 2 or sizes.get(prediction.levels[0], 0) >= problem.whole_batch_size:
        return cases  # higher levels need no less time
    keeps_sums = any(not reaches(level, "master") for level in sizes)
    timing = measure(problem, max(sizes.values()), keeps_sums=keeps_sums)
    if timing is None:
        return cases
    return [_timed(case, prediction, timing, sizes, target) for case in cases]


def _timed(
    case: LevelCase, prediction: LevelPrediction, timing: TimeModel, sizes: Mapping[Offload, int], target: CardTarget
) -> LevelCase:
    if case.level not in sizes:
        return case
    window_s = window_seconds(
        prediction.problem,
        timing,
        sizes[case.level],
        state=prediction.state,
        level=case.level,
        card=target.card,
    )
    return replace(case, window_s=window_s)
