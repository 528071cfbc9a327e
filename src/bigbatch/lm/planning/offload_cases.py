"""Memory and time of every level of offload and every checkpointing mode of a run, predicted for any card.

model without weights → ModelState, work of a token → for a memory: largest micro-batch, peak, seconds → Candidates
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import nn

from bigbatch.autotune.peak_prediction import CUDA_LIBRARIES_BYTES
from bigbatch.batching.plan import Plan, TokenBudget
from bigbatch.batching.token_groups import DEFAULT_COST, round_down_row
from bigbatch.errors import InputError
from bigbatch.gradients.sum_store import SumStore
from bigbatch.lm.config.field_types import AUTO_MODES, RECOMPUTED_LAYERS, CheckpointingMode
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.start import starts_narrow
from bigbatch.lm.planning.data_statistics import DataStatistics
from bigbatch.lm.planning.device_target import PlanTarget
from bigbatch.lm.planning.estimator import RunEstimator
from bigbatch.lm.planning.layer_series import (
    ActivationCurve,
    LayerSeries,
    NarrowEstimator,
    narrowed_parameters,
    num_layers,
)
from bigbatch.lm.planning.sharded_memory import ShardedModel
from bigbatch.offload.cards import Card
from bigbatch.offload.choice import Candidate
from bigbatch.offload.costs import ModelState, UpdateTime, WindowWork, inputs_bytes, placement, update_time
from bigbatch.offload.levels import LEVELS, Offload, reaches

MOST_TOKENS = 32_768  # of a micro-batch: larger ones are 2 % faster at most, by what a micro-batch costs by itself
ATTENTION_SHARE = 0.1  # of the rate of products: 11 of 107 ms in W's packed rows on an H200, docs/explanation/speed.md
LAYER_MOVES = 300  # bytes a token, layer and unit of width: norms, residuals, activations, casts; from the same table
LOGIT_MOVES = 24  # bytes a token and word of the vocabulary; from the same table
SLOWER = 1.02  # that a smaller micro-batch of a sharded model may be: it leaves memory for what is not predicted
LEAST_TOKENS = 8_192  # of such a micro-batch: that kernels of fewer leave a GPU idle is not predicted


class OffloadCases:
    """Predicts the candidates of a configuration.

    Args:
        config: With every default resolved, the precision included.
        target: Device; its memory is not read.
        data: Of the whole run.
        num_cards: That share the global batch and, with ``--parallel fsdp``, the model.
        num_shards: Cards that share the model, if those are not all; of a replicated model, 1.
        device_bytes: Memory of the card; by default estimated from the memory that tensors may use.
        levels: Levels to predict; those that change nothing for this model are left out.

    Attributes:
        num_parameters, num_trained: Of the whole model.
        state: Training state of one card.
        tokens: Of one card in the first update.
        unit: Of micro-batches: ``"tokens"`` or ``"samples"``.
        levels: Those that are predicted.
    """

    def __init__(
        self,
        config: TrainConfig,
        target: PlanTarget,
        data: DataStatistics,
        *,
        num_cards: int = 1,
        num_shards: int | None = None,
        device_bytes: int | None = None,
        levels: Sequence[Offload] = LEVELS,
    ) -> None:
        self._config, self._target = config, target
        self._num_shards = (num_shards or num_cards) if config.parallel != "ddp" else 1
        self._is_sharded, self._device_bytes = self._num_shards > 1, device_bytes
        own = sorted(data.window, reverse=True)[::num_cards]
        self._data = replace(data, window=tuple(own), most_rows=-(-data.most_rows // num_cards))
        first = "none" if config.gradient_checkpointing == "auto" else config.gradient_checkpointing
        whole = RunEstimator(self._with_mode(first), target, data)
        self.num_parameters, self.num_trained = whole.num_parameters, whole.num_trained
        self._outline, self._model = whole.outline, whole.outline.model
        self.tokens = sum(own)
        self._series_of: dict[tuple[CheckpointingMode, bool], LayerSeries] = {}
        self._curves: dict[tuple[CheckpointingMode, bool], ActivationCurve] = {}
        self._plans: dict[int, Plan] = {}
        self.unit = whole.unit
        self._layout = whole.layout
        self._size = whole.limit if whole.limit != "auto" else None
        self.state = self._state()
        self.levels = [level for level in levels if self._changes(level)]

    def candidates(self, usable_bytes: int, card: Card, host_bytes: int | None = None) -> list[Candidate]:
        """Predict every level and mode with the largest micro-batch that fits; lower levels first.

        Args:
            usable_bytes: Memory of the card that tensors may use.
            card: Its rates.
            host_bytes: Host memory that one card may use; None if unknown.
        """
        limits = usable_bytes, host_bytes
        return [self._candidate(level, mode, limits, card) for level in self.levels for mode in self._modes]

    def _changes(self, level: Offload) -> bool:
        """Return whether training at a level is possible, and differs from the level before it."""
        if level == "gradients":
            return self._config.precision != "fp16" and not self._config.reproducible
        return bool(self.state.narrowed) or level != "master"

    @property
    def _modes(self) -> Sequence[CheckpointingMode]:
        chosen = self._config.gradient_checkpointing
        if chosen != "auto":
            return (chosen,)
        if not self._can_checkpoint:
            return ("none",)
        return AUTO_MODES

    @cached_property
    def _can_checkpoint(self) -> bool:
        try:
            RunEstimator(self._with_mode("full"), self._target, self._data)
        except InputError:  # not supported by the model
            return False
        return True

    def _candidate(
        self, level: Offload, mode: CheckpointingMode, limits: tuple[int, int | None], card: Card
    ) -> Candidate:
        usable_bytes, most_host_bytes = limits
        needs = placement(self.state, level)
        libraries = CUDA_LIBRARIES_BYTES if self._target.device.type == "cuda" else 0
        fixed = needs.card_bytes + libraries
        device_bytes = self._device_bytes or usable_bytes * 6 // 5  # margins are not usable
        gathered_bytes = self._sharded.window_bytes(device_bytes) if self._is_sharded else 0
        during_window = fixed + needs.window_bytes + gathered_bytes
        curve = self._curve(mode, reaches(level, "master"))
        rows = curve.largest(usable_bytes - during_window)
        if most_host_bytes is not None and mode == "offload":
            of_row = max(1, inputs_bytes(self._work_of(mode), self._data.longest))
            rows = max(1, min(rows, (most_host_bytes - needs.host_bytes) // of_row))
        if self._is_sharded:
            rows = self._rows_that_pay(level, mode, rows, card, device_bytes)
        start_bytes = needs.start_bytes + libraries
        end_bytes = fixed + self._sharded.end_bytes(device_bytes) if self._is_sharded else 0
        peak_bytes = max(during_window + curve.at(rows), fixed + needs.step_bytes, start_bytes, end_bytes)
        size = self._size_of(rows)
        time = self._time(level, mode, size, card, device_bytes)
        tokens = self._series(self._modes[0], narrow=False).first.most_tokens(size)
        host_bytes = needs.host_bytes + inputs_bytes(self._work_of(mode), tokens)
        return Candidate(level, mode, size, peak_bytes, host_bytes, time)

    def _time(self, level: Offload, mode: CheckpointingMode, size: int, card: Card, device_bytes: int) -> UpdateTime:
        plan = self._plan(size)
        work = replace(self._work_of(mode), tokens=plan.padded_tokens, num_microbatches=plan.num_microbatches)
        fabric_bytes = self._sharded.fabric_bytes(device_bytes, num_shards=self._num_shards) if self._is_sharded else 0
        return update_time(self.state, level, work, card, fabric_bytes=fabric_bytes)

    def _work_of(self, mode: CheckpointingMode) -> WindowWork:
        """Return the work of one token in a mode."""
        moved = max(0, len(self._layers) - 1) if mode == "offload" else 0
        return replace(self._work, recomputed=RECOMPUTED_LAYERS[mode], moved_inputs=moved)

    def _size_of(self, rows: int) -> int:
        """Return the size of a micro-batch of so many of the longest sequences, in `unit`."""
        if self._size is not None:
            return self._size.tokens if isinstance(self._size, TokenBudget) else self._size
        tokens = rows * self._data.longest
        return tokens if self._layout == "padded" else max(self._data.longest, round_down_row(tokens))

    def _plan(self, size: int) -> Plan:
        if size not in self._plans:
            self._plans[size] = self._series(self._modes[0], narrow=False).first.plan(size, DEFAULT_COST)
        return self._plans[size]

    def _curve(self, mode: CheckpointingMode, narrow: bool) -> ActivationCurve:
        """Return the activations of a mode; weights that ranks gather in 16 bits are not cast by autocast."""
        narrow = bool(self.state.narrowed) and (narrow or (self._is_sharded and self._sharded.gathers_narrow))
        if (mode, narrow) not in self._curves:
            series = self._series(mode, narrow=narrow)
            if self._size is not None:
                sizes, rows = [self._size_of(1)], [1]
            else:
                most = max(1, min(self._data.most_rows, MOST_TOKENS // self._data.longest))
                # With all layers checkpointed, the peak moves from the layers to their inputs; else it is linear.
                rows = sorted({1, max(1, most // 8), most} if mode in ("full", "offload") else {1, most})
                sizes = [number * self._data.longest for number in rows]
            self._curves[mode, narrow] = ActivationCurve(rows, [series.activation_bytes(size) for size in sizes])
        return self._curves[mode, narrow]

    def _series(self, mode: CheckpointingMode, *, narrow: bool) -> LayerSeries:
        key = mode, narrow and bool(self.state.narrowed)
        if key not in self._series_of:
            make = NarrowEstimator if key[1] else RunEstimator
            config = self._with_mode(mode)
            self._series_of[key] = LayerSeries(
                make, config, self._target, self._data, num_parameters=self.num_parameters
            )
        return self._series_of[key]

    def _with_mode(self, mode: CheckpointingMode) -> TrainConfig:
        return self._config.model_copy(update={"gradient_checkpointing": mode})

    # what the model holds and computes --------------------------------------------------------------------------

    def _state(self) -> ModelState:
        """Count the training state of one card."""
        model = self._model
        trained = [p for p in model.parameters() if p.requires_grad]
        others = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
        mode = self._modes[0]
        series = LayerSeries(
            RunEstimator, self._with_mode(mode), self._target, self._data, num_parameters=self.num_parameters
        )
        self._series_of[mode, False] = series
        wide = 2 if self._config.reproducible else 1  # sums in int64
        narrows = self._config.precision == "bf16" and not self._config.reproducible
        narrow = narrowed_parameters(self._outline) if narrows else []
        narrowed = sum(p.numel() for p in narrow)
        state = ModelState(
            weight_bytes=sum(p.nbytes for p in trained),
            frozen_bytes=sum(tensor.nbytes for tensor in others),
            sum_bytes=wide * SumStore.bytes_of(trained),
            state_bytes=int(series.total(lambda each: each.predictor.state_bytes)),
            narrowed=narrowed,
            num_trained=sum(p.numel() for p in trained),
            largest=max(p.numel() for p in trained),
            largest_state_bytes=series.first.predictor.largest_state_bytes,
            step_bytes=series.step_bytes(self._size_of(1)),
            starts_wide=0 if starts_narrow(self._config, self._config.precision) else narrowed,
        )
        return state.sharded(self._num_shards)

    @cached_property
    def _layers(self) -> list[nn.Module]:
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [module for module in self._model.modules() if isinstance(module, GradientCheckpointingLayer)]

    @cached_property
    def _work(self) -> WindowWork:
        """Return the work of one token; the window's is filled in by size."""
        model_config = self._data.model_config
        width, vocabulary = (getattr(model_config, name, 0) or 0 for name in ("hidden_size", "vocab_size"))
        layers = num_layers(model_config)
        in_layers = {p for layer in self._layers for p in layer.parameters()}
        products = sum(_operations(p) * _active_share(p, model_config) for p in in_layers if p.ndim > 1)
        position = sum(length**2 for length in self._data.window) / (
            2 * sum(self._data.window)
        )  # of a token, on average
        attention = 14 * layers * width * position / ATTENTION_SHARE
        head = self._model.get_output_embeddings()
        weight = None if head is None else getattr(head, "weight", None)
        head_operations = 0 if weight is None else 6 * weight.numel()
        return WindowWork(
            tokens=0,
            num_microbatches=1,
            layer_operations=products + attention,
            layer_moves=LAYER_MOVES * layers * width,
            head_operations=head_operations,
            head_moves=LOGIT_MOVES * vocabulary,
            input_bytes=width * self._model.get_input_embeddings().weight.element_size(),
        )

    # sharded models ----------------------------------------------------------------------------------------------

    @cached_property
    def _sharded(self) -> ShardedModel:
        device_spec = DeviceSpec(self._target.device, self._config.precision)
        is_replicated = self._config.parallel == "hsdp"
        return ShardedModel.of(self._model, self._layers, device_spec, is_replicated=is_replicated)

    def _rows_that_pay(self, level: Offload, mode: CheckpointingMode, most: int, card: Card, device_bytes: int) -> int:
        """Return the fewest rows, of the most and their halves, that are at most 2 % slower than the fastest."""
        least = min(most, -(-LEAST_TOKENS // self._data.longest))
        rows = [max(least, most >> halvings) for halvings in range(most.bit_length())]
        times = {
            each: self._time(level, mode, self._size_of(each), card, device_bytes).total_s for each in reversed(rows)
        }
        return next(each for each, time_s in times.items() if time_s <= SLOWER * min(times.values()))


def _operations(parameter: nn.Parameter) -> int:
    """Return the operations of a matrix for one token: forward, gradient of the input, gradient of the matrix."""
    return (6 if parameter.requires_grad else 4) * parameter.numel()


def _active_share(parameter: nn.Parameter, model_config: Any) -> float:
    """Return the share of a matrix that one token uses: of stacked experts, those that it is routed to."""
    if parameter.ndim < 3:
        return 1.0
    used = getattr(model_config, "num_experts_per_tok", None)
    return min(1.0, used / parameter.shape[0]) if used else 1.0
