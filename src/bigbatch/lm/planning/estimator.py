"""The figures of a plan: peaks by size of the micro-batch, the size that fits, what would help, an update's time.

Models are made on the device ``meta``, without weights; only `Desk.measure` makes one that runs.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from bigbatch.autotune.peak_prediction import PeakPredictor, Prediction, PredictionError
from bigbatch.autotune.problem import FULL_ENOUGH
from bigbatch.autotune.search import largest_below
from bigbatch.batching.plan import Cost, Plan, TokenBudget, plan
from bigbatch.batching.token_groups import DEFAULT_COST, group_by_tokens, round_down_row, round_up_row
from bigbatch.engine.engine import Engine
from bigbatch.errors import InputError, MemoryLimitError, first_line
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.causal_attention import NAME, has_full_attention, looks_causal, use_causal_attention
from bigbatch.lm.model.causal_lm_loss import CausalLMLoss
from bigbatch.lm.model.chunked_loss import ChunkedCausalLMLoss, find_lm_head, worth_chunking
from bigbatch.lm.model.decoder_layers import uses_randomness
from bigbatch.lm.model.packed_rows import MIN_ROW_PLACES
from bigbatch.lm.model.pretrained import model_from_config
from bigbatch.lm.model.setup import layers_of, set_up_model, with_lora
from bigbatch.lm.planning.data_statistics import DataStatistics
from bigbatch.lm.planning.device_target import PlanTarget
from bigbatch.lm.training.optimizer import make_optimizer
from bigbatch.types import Layout

PROBE_OPERATIONS = {"cpu": 3e11, "cuda": 1e15}  # in one update: seconds on two cores, and on a card of today
PROBE_UPDATES = 10  # that measuring may take in all
MEMORY_SAVINGS: dict[str, dict[str, Any]] = {
    "--gradient-checkpointing full": {"gradient_checkpointing": "full"},
    "--precision bf16-weights": {"precision": "bf16-weights"},
    "--lora-rank 16": {"lora_rank": 16, "lora_alpha": 32.0},
}

ASKED = "as asked"
LARGEST = "the largest that fits"
FASTEST = "the fastest that fits"
LEAST = "the longest sequence alone"


@dataclass(frozen=True)
class MemorySaving:
    """What other settings would make of the peak.

    Attributes:
        flags: The settings, as on the command line.
        peak_bytes: Of the same micro-batch.
        fits: Whether that is within the memory; None where that is not known.
    """

    flags: str
    peak_bytes: int
    fits: bool | None


@dataclass(frozen=True)
class UpdateTiming:
    """What a measurement on this machine found.

    Attributes:
        size: The most of a micro-batch, as asked or as chosen.
        cost: What the cut of a batch is weighed by at that size.
        seconds: Of an update.
    """

    size: int
    cost: Cost
    seconds: float


class RunEstimator:
    """Works out the figures of one configuration; sizes are in the unit of its micro-batch."""

    def __init__(self, config: TrainConfig, target: PlanTarget, data: DataStatistics) -> None:
        self._config = config
        self._target = target
        self._data = data
        self.unit = "samples" if isinstance(config.microbatch, int) else "tokens"
        self.layout: Layout = "padded"
        model = self._model(config, torch.device("meta"))
        self.layout = self._layout_of(model)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._predictor = self._make_predictor(config, model)
        self._predicted: dict[tuple[int, int], Prediction] = {}

    def microbatch(self) -> tuple[int, str]:
        """Give the size of the micro-batch and why: as asked, else the largest that fits."""
        config, longest = self._config, self._data.longest
        if config.token_budget is not None:
            if config.token_budget < longest:
                raise InputError(
                    f"--token-budget {config.token_budget} is less than the longest sequence, which has {longest} "
                    f"tokens and is never cut: pass --token-budget {longest} or more, or a smaller --max-length."
                )
            return config.token_budget, ASKED
        if isinstance(config.microbatch, int):
            return config.microbatch, ASKED
        budget = self._target.budget
        assert budget is not None, "find_target() asks for it"
        if not self.fits(self.predict(longest).peak_bytes):
            return longest, LEAST

        def peak_of(rows: int) -> int:
            return self.predict(rows * longest).peak_bytes

        largest = largest_below(peak_of, 1, self._data.most_rows, budget.usable_bytes) * longest
        return (largest if self.layout == "padded" else max(longest, round_down_row(largest))), LARGEST

    def fits(self, peak_bytes: int) -> bool | None:
        """Whether a peak is within the memory."""
        return None if self._target.budget is None else peak_bytes <= self._target.budget.usable_bytes

    def predict(self, size: int) -> Prediction:
        """Predict the peak of a window of micro-batches of a size."""
        for shape in self._worst_cases(size):
            if shape not in self._predicted:
                self._predicted[shape] = self._predictor.predict(self._rows(shape))
        return max((self._predicted[shape] for shape in self._worst_cases(size)), key=lambda found: found.peak_bytes)

    def _worst_cases(self, size: int) -> list[tuple[int, int]]:
        """Rows and tokens of the fullest micro-batches of a size that an update can bring.

        As many as fit of the longest; and, under a limit in tokens, of those that fill it best.
        """
        longest, most_rows = self._data.longest, self._data.most_rows
        if self.layout == "packed":
            tokens = min(size, most_rows) * longest if self.unit == "samples" else max(size, longest)
            return [(1, round_up_row(tokens))]
        if self.unit == "samples":
            return [(min(size, most_rows), longest)]
        shapes = [(min(max(size, longest) // length, most_rows), length) for length in self._data.lengths]
        filled = FULL_ENOUGH * max(rows * length for rows, length in shapes)
        fullest = next((rows, length) for rows, length in shapes if rows * length >= filled)
        return list(dict.fromkeys([shapes[0], fullest]))

    def plan(self, size: int, cost: Cost) -> Plan:
        """Cut the first update into micro-batches of a size, as training would."""
        window = self._data.window
        if self.unit == "samples":
            return plan(window, microbatch_size=size, layout=self.layout)
        groups = group_by_tokens(window, size, cost=cost, layout=self.layout)
        most = min(max(size, *window), len(window) * max(window))
        return Plan((groups,), window, self.layout, most, None, 1)

    def memory_savings(self, size: int) -> list[MemorySaving]:
        """Predict the same with other settings; those that are set already, or that do not help, are left out.

        One setting more; or, where no single one makes it fit, also the fewest together that do.
        """
        now_bytes = self.predict(size).peak_bytes
        shape = max(self._worst_cases(size), key=lambda shape: self._predicted[shape].peak_bytes)
        found: list[MemorySaving] = []
        for number in range(1, len(MEMORY_SAVINGS) + 1):
            if number > 1 and (self.fits(now_bytes) is not False or any(lever.fits for lever in found)):
                break
            for names in combinations(MEMORY_SAVINGS, number):
                lever = self._memory_saving(names, shape)
                if lever is not None and (lever.peak_bytes < now_bytes if number == 1 else lever.fits):
                    found.append(lever)
        return sorted(found, key=lambda lever: lever.peak_bytes)

    def _memory_saving(self, names: tuple[str, ...], shape: tuple[int, int]) -> MemorySaving | None:
        if any(_is_set(self._config, flags) for flags in names):
            return None
        changes = {name: value for flags in names for name, value in MEMORY_SAVINGS[flags].items()}
        config = self._config.model_copy(update=changes)
        try:
            predictor = self._make_predictor(config, self._model(config, torch.device("meta")))
            peak_bytes = predictor.predict(self._rows(shape)).peak_bytes
        except (InputError, PredictionError):  # the model cannot have it
            return None
        return MemorySaving(" ".join(names), peak_bytes, self.fits(peak_bytes))

    def why_untimed(self, size: int) -> str | None:
        """Say why an update cannot be measured; None where it can."""
        if not self._target.is_local:
            return "that device is not here"
        if not self.fits(self.predict(size).peak_bytes):
            return "it does not fit"
        tokens = sum(self._data.window)
        if self._config.microbatch == "auto":
            tokens += 8 * size  # what choosing takes
        most = PROBE_UPDATES * PROBE_OPERATIONS.get(self._target.device_spec.device.type, 0.0)
        return None if 6.0 * self.num_parameters * tokens < most else "that would take more than some seconds"

    def measure(self, size: int) -> UpdateTiming | None:
        """Run two updates with random weights and samples; None where they do not fit after all."""
        device_spec, config = self._target.device_spec, self._config
        model = self._bare_model(config, device_spec.device)
        run = set_up_model(model, config, device_spec, pad_id=0, longest=self._data.longest)
        chosen: Any = size if self.unit == "samples" else TokenBudget(size)
        engine = Engine(
            run.model,
            make_optimizer(run.model, config, device_spec),
            run.loss_fn,
            microbatch="auto" if config.microbatch == "auto" else chosen,
            memory=config.memory if config.microbatch == "auto" else None,
            collate=run.collate,
            lengths=lambda samples: [len(sample["input_ids"]) for sample in samples],
            layout=run.layout,
            cuda_graphs=run.uses_cuda_graphs,
            max_grad_norm=config.max_grad_norm,
            scaler=device_spec.scaler(),
        )
        window = sorted(self._data.window, reverse=True)
        longest = [self._data.longest] * (self._data.longest > window[0])
        try:
            choice = engine.tune(_samples(window + longest)) if config.microbatch == "auto" else None
            seconds = min(engine.step(_samples(window)).elapsed_s for _ in range(2))
        except MemoryLimitError:
            return None
        if choice is None:
            return UpdateTiming(size, DEFAULT_COST, seconds)
        return UpdateTiming(choice.size, choice.timing.cost(choice.size), seconds)

    def _bare_model(self, config: TrainConfig, device: torch.device) -> Any:
        dtype = DeviceSpec(self._target.device_spec.device, config.precision).weights_dtype
        try:
            return model_from_config(self._data.model_config, dtype=dtype, device=device)
        except Exception as error:  # whatever a model says to numbers that do not go together
            raise InputError(f"the configuration of {config.model} makes no model: {first_line(error)}.") from error

    def _model(self, config: TrainConfig, device: torch.device) -> Any:
        model = self._bare_model(config, device)
        if looks_causal(model) and has_full_attention(model.config, max_length=self._data.max_length):
            use_causal_attention(model)
        if config.lora_rank:
            model = with_lora(model, config)
        if config.gradient_checkpointing not in ("auto", "none"):
            layers_of(model, config)
        return model.train()

    def _layout_of(self, model: Any) -> Layout:
        """Take the layout that training would take, as far as it shows without weights."""
        config, device = self._config, self._target.device
        if config.layout == "packed" or (
            config.layout == "auto"
            and device.type == "cuda"
            and DeviceSpec(device, config.precision).is_half_precision
            and getattr(model.config, "_attn_implementation", None) == NAME
            and not uses_randomness(model)
        ):
            return "packed"
        return "padded"

    def _rows(self, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Make a micro-batch without data."""
        names = ("input_ids", "labels", "attention_mask" if self.layout == "padded" else "position_ids")
        rows = {name: torch.empty(shape, dtype=torch.int64, device="meta") for name in names}
        if self.layout == "packed":
            rows["offsets"] = torch.empty(MIN_ROW_PLACES + 1, dtype=torch.int32, device="meta")
        return rows

    def _make_predictor(self, config: TrainConfig, model: Any) -> PeakPredictor:
        device_spec = DeviceSpec(self._target.device_spec.device, config.precision)
        optimizer = make_optimizer(model, config, DeviceSpec(self._target.device, config.precision))
        return PeakPredictor.from_training(model, optimizer, self._loss(device_spec, model), device=self._target.device)

    def _loss(self, device_spec: DeviceSpec, model: Any) -> CausalLMLoss | ChunkedCausalLMLoss:
        """Take the loss that training would take, as far as it shows without weights."""
        kind = ChunkedCausalLMLoss if worth_chunking(find_lm_head(model)) else CausalLMLoss
        return kind(device_spec, needs_mask=not looks_causal(model), longest=self._data.longest)


def _is_set(config: TrainConfig, flags: str) -> bool:
    name, value = next(iter(MEMORY_SAVINGS[flags].items()))
    now = getattr(config, name)
    return bool(now == value if isinstance(value, str) else now)


def _samples(lengths: list[int]) -> list[dict[str, torch.Tensor]]:
    names = ("input_ids", "labels")
    return [{name: torch.zeros(length, dtype=torch.int64) for name in names} for length in lengths]
