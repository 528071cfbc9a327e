"""Estimates of a plan: peak memory by micro-batch size, the size that fits, memory savings, and time of an update.

Models are created on the device ``meta``, without weights; only `RunEstimator.measure` creates one that runs.
"""

import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, Literal

import torch

from bigbatch.autotune.peak_prediction import PeakPredictor, Prediction, PredictionError
from bigbatch.autotune.problem import FULL_ENOUGH
from bigbatch.autotune.search import largest_below
from bigbatch.batching.plan import Cost, Plan, TokenBudget, plan
from bigbatch.batching.token_groups import DEFAULT_COST, group_by_tokens, round_down_row, round_up_row
from bigbatch.errors import InputError, MemoryLimitError, first_line
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.pair_batches import collate_pairs, placeholder_samples
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.packed_rows import MIN_ROW_PLACES
from bigbatch.lm.model.quantization import count_parameters, quantize_copy, quantize_outline, weights_dtype_of
from bigbatch.lm.model.setup import ModelOutline, outline_model, set_up_model
from bigbatch.lm.model.task_models import task_model_from_config
from bigbatch.lm.objectives.setup import outline_objective, set_up_objective
from bigbatch.lm.planning.data_statistics import DataStatistics
from bigbatch.lm.planning.device_target import PlanTarget
from bigbatch.lm.training.engine_factory import make_engine, make_predictor
from bigbatch.lm.training.microbatch_limits import microbatch_of
from bigbatch.lm.training.optimizer import make_optimizer
from bigbatch.lm.training.window_routing import run_update

PROBE_OPERATIONS = {"cpu": 3e11, "cuda": 1e15}  # of one update: seconds on two cores, and on an H100
PROBE_UPDATES = 10  # limit of a measurement, in updates of that size
MEMORY_SAVINGS: dict[str, dict[str, Any]] = {
    "--gradient-checkpointing full": {"gradient_checkpointing": "full"},
    "--precision bf16-weights": {"precision": "bf16-weights"},
    "--lora-rank 16": {"lora_rank": 16, "lora_alpha": 32.0},
    "--quantize nf4": {"quantize": "nf4"},
}

ASKED = "as asked"
FIXED = "fixed by --deterministic"
LARGEST = "the largest that fits"
FASTEST = "the fastest that fits"
LEAST = "the longest sequence alone"


@dataclass(frozen=True)
class MemorySaving:
    """Predicted peak memory under other settings.

    Attributes:
        flags: The settings, as on the command line.
        peak_bytes: Peak with the same micro-batch.
        fits: Whether the peak is within the memory; None if the memory is unknown.
    """

    flags: str
    peak_bytes: int
    fits: bool | None


@dataclass(frozen=True)
class UpdateTiming:
    """A measurement of an update on this machine.

    Attributes:
        size: Limit of a micro-batch, as configured or as chosen.
        cost: Cost model of micro-batches at that size.
        seconds: Time of an update.
    """

    size: int
    cost: Cost
    seconds: float


class RunEstimator:
    """Estimates memory and time of one configuration; sizes are in ``unit``, samples or tokens.

    Attributes:
        unit: ``"samples"`` or ``"tokens"``.
        outline: How training would run the model, without weights.
        layout: Of the micro-batches.
        num_parameters, num_trained: All parameters of the model, and those with ``requires_grad``.
    """

    def __init__(self, config: TrainConfig, target: PlanTarget, data: DataStatistics) -> None:
        self._config = config
        self._target = target
        self._data = data
        self.unit = "samples" if isinstance(config.microbatch, int) else "tokens"
        self.outline = self._outline(config)
        self.layout = self.outline.layout
        self.num_parameters, self.num_trained = count_parameters(self.outline.model)
        self._predicted: dict[tuple[int, int], Prediction] = {}

    @cached_property
    def predictor(self) -> PeakPredictor:
        """Of a training step with the optimizer of the configuration."""
        return self._make_predictor(self.outline, self._config)

    def _make_predictor(self, outline: ModelOutline, config: TrainConfig) -> PeakPredictor:
        budget = self._target.budget
        usable_bytes = None if budget is None else budget.usable_bytes
        return make_predictor(outline, config, target=self._target.device, usable_bytes=usable_bytes)

    @property
    def limit(self) -> int | TokenBudget | Literal["auto"]:
        """The limit of the micro-batch, as training passes it to its engine."""
        return microbatch_of(self._config, longest=self._data.longest)

    def microbatch(self) -> tuple[int, str]:
        """Return the size of the micro-batch and the reason: as configured, else the largest that fits."""
        longest = self._data.longest
        limit = self.limit
        if limit != "auto":
            reason = FIXED if self._config.microbatch == "auto" else ASKED
            return (limit.tokens if isinstance(limit, TokenBudget) else limit), reason
        budget = self._target.budget
        assert budget is not None, "resolve_target() requires it"
        if not self.fits(self.predict(longest).peak_bytes):
            return longest, LEAST

        def peak_of(rows: int) -> int:
            return self.predict(rows * longest).peak_bytes

        largest = largest_below(peak_of, 1, self._data.most_rows, budget.usable_bytes) * longest
        return (largest if self.layout == "padded" else max(longest, round_down_row(largest))), LARGEST

    def fits(self, peak_bytes: int) -> bool | None:
        """Return whether a peak is within the memory; None if the memory is unknown."""
        return None if self._target.budget is None else peak_bytes <= self._target.budget.usable_bytes

    def predict(self, size: int) -> Prediction:
        """Predict the peak of a window with micro-batches of a size."""
        for shape in self._worst_cases(size):
            if shape not in self._predicted:
                self._predicted[shape] = self.predictor.predict(self._rows(shape))
        return max((self._predicted[shape] for shape in self._worst_cases(size)), key=lambda found: found.peak_bytes)

    def _worst_cases(self, size: int) -> list[tuple[int, int]]:
        """Return rows and tokens of the largest micro-batches that a size allows.

        As many of the longest sequences as fit; and, under a limit in tokens, those of the length that fills it best.
        """
        longest, most_rows = self._data.longest, self._data.most_rows
        if self.layout == "packed":
            tokens = min(size, most_rows) * longest if self.unit == "samples" else max(size, longest)
            return [(1, round_up_row(tokens))]
        if self.unit == "samples":
            return [(min(size, most_rows), longest)]
        shapes = [(min(max(size, longest) // length, most_rows), length) for length in self._data.lengths]
        filled = FULL_ENOUGH * max(rows * length for rows, length in shapes)
        largest = next((rows, length) for rows, length in shapes if rows * length >= filled)
        return list(dict.fromkeys([shapes[0], largest]))

    def most_tokens(self, size: int) -> int:
        """Return the most tokens, padding included, of a micro-batch of a size."""
        return max(rows * length for rows, length in self._worst_cases(size))

    def plan(self, size: int, cost: Cost) -> Plan:
        """Split the first update into micro-batches of a size, as training does."""
        window = self._data.window
        if self.unit == "samples":
            return plan(window, microbatch_size=size, layout=self.layout)
        groups = group_by_tokens(window, size, cost=cost, layout=self.layout)
        most = min(max(size, *window), len(window) * max(window))
        return Plan((groups,), window, self.layout, most, None, 1)

    def memory_savings(self, size: int) -> list[MemorySaving]:
        """Predict the peak under other settings; settings that are active already or do not lower it are left out.

        Each setting alone and, if none of them makes the micro-batch fit, the smallest combinations that do.
        """
        now_bytes = self.predict(size).peak_bytes
        shape = max(self._worst_cases(size), key=lambda shape: self._predicted[shape].peak_bytes)
        found: list[MemorySaving] = []
        for number in range(1, len(MEMORY_SAVINGS) + 1):
            if number > 1 and (self.fits(now_bytes) is not False or any(saving.fits for saving in found)):
                break
            for names in combinations(MEMORY_SAVINGS, number):
                saving = self._memory_saving(names, shape)
                if saving is not None and (saving.peak_bytes < now_bytes if number == 1 else saving.fits):
                    found.append(saving)
        return sorted(found, key=lambda saving: saving.peak_bytes)

    def _memory_saving(self, names: tuple[str, ...], shape: tuple[int, int]) -> MemorySaving | None:
        if any(_is_set(self._config, flags) for flags in names):
            return None
        changes = {name: value for flags in names for name, value in MEMORY_SAVINGS[flags].items()}
        if str(changes.get("precision")).startswith("bf16") and not self._target.computes_bf16:
            return None
        config = self._config.model_copy(update=changes)
        if config.quantize is not None and (not config.saves_adapters or self._target.device.type == "mps"):
            return None
        try:
            predictor = self._make_predictor(self._outline(config), config)
            peak_bytes = predictor.predict(self._rows(shape)).peak_bytes
        except (InputError, PredictionError):  # not supported by the model
            return None
        return MemorySaving(" ".join(names), peak_bytes, self.fits(peak_bytes))

    def why_untimed(self, size: int) -> str | None:
        """Return why an update is not measured; None if it can be."""
        if not self._target.is_local:
            return "the device is not in this machine"
        if not self.fits(self.predict(size).peak_bytes):
            return "it does not fit"
        tokens = sum(self._data.window)
        if self.limit == "auto":
            tokens += 8 * size  # cost of tuning
        most = PROBE_UPDATES * PROBE_OPERATIONS.get(self._target.device_spec.device.type, 0.0)
        return None if 6.0 * self.num_parameters * tokens < most else "it would take more than a few seconds"

    def measure(self, size: int) -> UpdateTiming | None:
        """Time two updates with random weights and samples, and return the faster; None if they run out of memory."""
        device_spec, config, limit = self._target.device_spec, self._config, self.limit
        if config.quantize is None:
            model = self._bare_model(config, device_spec.device)
        else:
            model = quantize_copy(self._bare_model(config, torch.device("cpu")), config, device_spec)
        if config.objective == "sft":
            model_setup = set_up_model(model, config, device_spec, pad_id=0, longest=self._data.longest)
        else:
            model_setup = set_up_objective(model, config, device_spec, None, pad_id=0)
        engine = make_engine(
            model_setup,
            make_optimizer(model_setup.model, config, device_spec),
            microbatch="auto" if limit == "auto" else size if self.unit == "samples" else TokenBudget(size),
            memory=config.memory if limit == "auto" else None,
            max_grad_norm=config.max_grad_norm,
            scaler=device_spec.scaler(),
        )
        window = sorted(self._data.window, reverse=True)
        longest = [self._data.longest] * (self._data.longest > window[0])
        try:
            choice = engine.tune(self._samples(window + longest)) if limit == "auto" else None
            seconds = min(run_update(engine, model_setup, self._samples(window))[0].elapsed_s for _ in range(2))
        except MemoryLimitError:
            return None
        if choice is None:
            return UpdateTiming(size, DEFAULT_COST, seconds)
        return UpdateTiming(choice.size, choice.timing.cost(choice.size), seconds)

    def _bare_model(self, config: TrainConfig, device: torch.device) -> Any:
        dtype = weights_dtype_of(config, DeviceSpec(self._target.device_spec.device, config.precision))
        try:
            settings = copy.deepcopy(self._data.model_config)
            return task_model_from_config(config.objective, settings, dtype=dtype, device=device)
        except Exception as error:  # models raise many types for an inconsistent configuration
            raise InputError(f"the configuration of {config.model} makes no model: {first_line(error)}.") from error

    def _outline(self, config: TrainConfig) -> ModelOutline:
        """Decide how training would run the model, without weights."""
        model = self._bare_model(config, torch.device("meta"))
        if config.quantize is not None:
            quantize_outline(model, config)
        device_spec = DeviceSpec(self._target.device_spec.device, config.precision)
        if config.objective != "sft":
            return outline_objective(model, config, device_spec, num_samples=self._data.most_rows)
        return outline_model(
            model,
            config,
            device_spec,
            target=self._target.device,
            longest=self._data.longest,
            max_length=self._data.max_length,
        )

    def _rows(self, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return a micro-batch on the device ``meta``."""
        if self._config.objective != "sft":
            rows, length = shape
            samples = self._samples([length] * rows)
            return {name: tensor.to("meta") for name, tensor in collate_pairs(samples, pad_id=0).items()}
        names = ("input_ids", "labels", "attention_mask" if self.layout == "padded" else "position_ids")
        found = {name: torch.empty(shape, dtype=torch.int64, device="meta") for name in names}
        if self.layout == "packed":
            found["offsets"] = torch.empty(MIN_ROW_PLACES + 1, dtype=torch.int32, device="meta")
        return found

    def _samples(self, lengths: list[int]) -> list[dict[str, Any]]:
        """Return samples of these lengths."""
        if self._config.objective != "sft":
            return placeholder_samples(lengths, self._config.objective, num_parts=self._data.num_parts)
        names = ("input_ids", "labels")
        return [{name: torch.zeros(length, dtype=torch.int64) for name in names} for length in lengths]


def _is_set(config: TrainConfig, flags: str) -> bool:
    name, value = next(iter(MEMORY_SAVINGS[flags].items()))
    now = getattr(config, name)
    return bool(now == value if isinstance(value, str) else now)
