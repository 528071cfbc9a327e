"""Forecast of a run before it starts: memory, micro-batches and time, from configuration, data and a memory limit.

    configuration → model without weights → peak of a step → micro-batch that fits → plan of the first update

No weights are read and no GPU is needed. If the run can start on this machine, an update is timed with random weights.
"""

from dataclasses import dataclass

from bigbatch.autotune.peak_prediction import Prediction, PredictionError
from bigbatch.batching.plan import Plan
from bigbatch.batching.token_groups import DEFAULT_COST
from bigbatch.errors import BigbatchError, InputError
from bigbatch.lm.config.field_types import AUTO_MODES
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.model.setup import compiles_layers
from bigbatch.lm.planning.data_statistics import DataStatistics, measure_data
from bigbatch.lm.planning.device_target import PlanTarget, resolve_target
from bigbatch.lm.planning.estimator import FASTEST, LARGEST, MemorySaving, RunEstimator
from bigbatch.lm.training.setup import ProgressCallback


def _make_estimator(config: TrainConfig, target: PlanTarget, data: DataStatistics) -> tuple[TrainConfig, RunEstimator]:
    """Choose the first checkpointing mode in which the longest sequence fits, if training would choose the mode."""
    estimator = RunEstimator(config, target, data)
    if config.gradient_checkpointing != "auto" or estimator.limit != "auto":
        return config, estimator
    asked = config, estimator
    for mode in AUTO_MODES[1:]:
        if estimator.fits(estimator.predict(data.longest).peak_bytes):
            return config, estimator
        more = config.model_copy(update={"gradient_checkpointing": mode})
        try:
            config, estimator = more, RunEstimator(more, target, data)
        except InputError:  # not supported by the model
            break
    fits = estimator.fits(estimator.predict(data.longest).peak_bytes)
    return (config, estimator) if fits else asked  # nothing fits: report the peak as asked, and the savings


def _notes(config: TrainConfig, asked: TrainConfig, target: PlanTarget) -> list[str]:
    """Return what a user would not expect of the estimates."""
    notes = []
    if config.gradient_checkpointing != asked.gradient_checkpointing:
        layers = "all layers" if config.gradient_checkpointing == "full" else "every second layer"
        notes.append(f"activation checkpointing in {layers}: the longest sequence does not fit without it")
    if config.objective == "dpo":
        notes.append(
            "the reference takes one forward for each pair before the first update, and two numbers for each in memory"
        )
    if target.device.type == "cuda" and config.objective == "sft" and compiles_layers(config, target.device):
        notes.append("on that GPU layers are compiled and need less memory than this eager-mode estimate")
    return notes


@dataclass(frozen=True)
class Forecast:
    """Memory, micro-batches and time of a run.

    Attributes:
        config: With every default resolved.
        target: Device and memory of the run.
        num_parameters: All parameters of the model.
        num_trained: Parameters with ``requires_grad``.
        num_updates: Updates of the run; approximate if the batch is counted in tokens or documents were sampled.
        unit: Unit of ``size``: ``"tokens"`` or ``"samples"``.
        size: Limit of a micro-batch; a longer sequence is a micro-batch of its own.
        longest: Tokens of the longest sequence.
        reason: Why that size, in a few words.
        prediction: The peak with the largest micro-batch of that size.
        fits: Whether the peak is within the memory; None if the memory is unknown.
        plan: The micro-batches of the first update.
        memory_savings: Settings that lower the peak, the lowest peak first: single ones, or the fewest together that
            make it fit.
        update_s: Seconds of an update; None if not measured.
        untimed: Why the update was not measured; None if it was.
        notes: Sentences about the estimates.
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
    """Predict memory, micro-batches and, if possible, time of a run.

    Args:
        config: The configuration of the run.
        progress: Receives progress messages.

    Raises:
        InputError: Something that the configuration names does not exist or is not usable.
        BigbatchError: The memory of this model cannot be predicted.
    """
    config = config.resolved()
    if config.reproducible:  # one quantum is in memory at a time
        config = config.model_copy(update={"microbatch": config.quantum_in_use, "token_budget": None})
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
            untimed = "it ran out of memory" if timed is None else None
        if timed is not None and reason == LARGEST:
            size, reason = timed.size, FASTEST
        prediction = estimator.predict(size)
        progress("predicting memory savings")
        memory_savings = estimator.memory_savings(size)
    except PredictionError as error:
        raise BigbatchError(
            f"the memory of {config.model} cannot be predicted: {error}. Run bigbatch train on the target machine: it "
            "finds the micro-batch by trying sizes."
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
