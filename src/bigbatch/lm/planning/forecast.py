"""What a run is going to need, before anything is spent: from the configuration, the data and a limit.

    configuration → a model without weights → the peak of a step → the micro-batch that fits → the first update's plan

No weights are read and no GPU is needed. Where the run could begin here and now, the time of an update is measured too,
with random weights.
"""

from dataclasses import dataclass

from bigbatch.autotune.peak_prediction import Prediction, PredictionError
from bigbatch.batching.plan import Plan
from bigbatch.batching.token_groups import DEFAULT_COST
from bigbatch.errors import BigbatchError, InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.model.setup import compiles_layers
from bigbatch.lm.planning.data_statistics import DataStatistics, measure_data
from bigbatch.lm.planning.device_target import PlanTarget, resolve_target
from bigbatch.lm.planning.estimator import FASTEST, LARGEST, MemorySaving, RunEstimator
from bigbatch.lm.training.setup import ProgressCallback


def _make_estimator(config: TrainConfig, target: PlanTarget, data: DataStatistics) -> tuple[TrainConfig, RunEstimator]:
    """Plan at the first level of recomputation at which the longest sequence fits, where training would choose it."""
    estimator = RunEstimator(config, target, data)
    if config.gradient_checkpointing != "auto" or estimator.limit != "auto":
        return config, estimator
    for mode in ("selective", "full"):
        if estimator.fits(estimator.predict(data.longest).peak_bytes):
            break
        more = config.model_copy(update={"gradient_checkpointing": mode})
        try:
            found = RunEstimator(more, target, data)
        except InputError:  # the model cannot have it
            break
        if mode == "full" and not found.fits(found.predict(data.longest).peak_bytes):
            break  # then what helps is told beside what is needed without
        config, estimator = more, found
    return config, estimator


def _notes(config: TrainConfig, asked: TrainConfig, target: PlanTarget) -> list[str]:
    """Say what a user would not expect of the figures."""
    notes = []
    if config.gradient_checkpointing != asked.gradient_checkpointing:
        layers = "all layers are" if config.gradient_checkpointing == "full" else "every second layer is"
        notes.append(f"{layers} computed anew in backward: the longest sequence does not fit otherwise")
    if target.device.type == "cuda" and compiles_layers(config, target.device):
        notes.append(
            "training compiles the layers there, which keep less than is predicted here, operation by operation"
        )
    return notes


@dataclass(frozen=True)
class Forecast:
    """What a run is going to need.

    Attributes:
        config: With every default written out.
        target: What it is planned for.
        num_parameters: Of the model.
        num_trained: Those of them that are trained.
        num_updates: Of the run; about, where they are counted in tokens or not all documents were measured.
        unit: What ``size`` counts: ``"tokens"`` or ``"samples"``.
        size: The most of a micro-batch; a sequence that is longer is one by itself.
        longest: Tokens of the longest sequence.
        reason: Why that size, in a few words.
        prediction: The peak at the fullest micro-batch of that size.
        fits: Whether it is within the memory; None where that is not known.
        plan: The micro-batches of the first update.
        memory_savings: What would lower the peak, the least first: one setting more, or several where it takes them to
            fit.
        update_s: Seconds of an update, where they were measured.
        untimed: Why not, where they were not.
        notes: Sentences about what was estimated.
    """

    config: TrainConfig
    target: PlanTarget
    num_parameters: int
    num_trained: int
    num_updates: int
    unit: str
    size: int
    longest: int
    reason: str
    prediction: Prediction
    fits: bool | None
    plan: Plan
    memory_savings: tuple[MemorySaving, ...]
    update_s: float | None
    untimed: str | None
    notes: tuple[str, ...]


def forecast(config: TrainConfig, *, progress: ProgressCallback) -> Forecast:
    """Predict memory, micro-batches and, where possible, time of a run.

    Raises:
        InputError: Something that the configuration names is not there or not usable.
        BigbatchError: The memory of this model cannot be predicted.
    """
    config = config.resolved()
    target = resolve_target(config)
    data = measure_data(config, progress=progress)
    config = config.model_copy(update={"precision": target.device_spec.precision, "max_length": data.max_length})
    progress("predicting the memory")
    try:
        asked = config
        config, estimator = _make_estimator(config, target, data)
        size, reason = estimator.microbatch()
        timed, untimed = None, estimator.why_untimed(size)
        if untimed is None:
            progress("timing an update with random weights")
            timed = estimator.measure(size)
            untimed = "it does not fit after all" if timed is None else None
        if timed is not None and reason == LARGEST:
            size, reason = timed.size, FASTEST
        prediction = estimator.predict(size)
        progress("looking for what would help")
        memory_savings = estimator.memory_savings(size)
    except PredictionError as error:
        raise BigbatchError(
            f"the memory of {config.model} cannot be predicted: {error}. bigbatch train finds the micro-batch by "
            "trying, where it is to run."
        ) from error
    return Forecast(
        config=config,
        target=target,
        num_parameters=estimator.num_parameters,
        num_trained=estimator.num_trained,
        num_updates=data.num_updates,
        unit=estimator.unit,
        size=size,
        longest=data.longest,
        reason=reason,
        prediction=prediction,
        fits=estimator.fits(prediction.peak_bytes),
        plan=estimator.plan(size, DEFAULT_COST if timed is None else timed.cost),
        memory_savings=tuple(memory_savings),
        update_s=None if timed is None else timed.seconds,
        untimed=untimed,
        notes=(*data.notes, *target.notes, *_notes(config, asked, target)),
    )
