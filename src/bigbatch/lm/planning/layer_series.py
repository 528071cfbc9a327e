"""Memory of a model with many equal layers, extrapolated from two models with few of them.

A step over 80 layers takes most of a minute on fake tensors, one over eight some seconds. Every peak of a phase is
linear in the number of layers, as long as layers are equal; that their parameters are is checked.
"""

import copy
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from bigbatch.autotune.peak_prediction import PeakPredictor
from bigbatch.errors import BigbatchError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.model.chunked_loss import ChunkedCausalLMLoss
from bigbatch.lm.model.meta_model import replace_parameters
from bigbatch.lm.model.setup import ModelOutline
from bigbatch.lm.planning.data_statistics import DataStatistics
from bigbatch.lm.planning.device_target import PlanTarget
from bigbatch.lm.planning.estimator import RunEstimator
from bigbatch.lm.training.engine_factory import make_activation_predictor
from bigbatch.offload.narrow_weights import find_narrow_weights

FEW_LAYERS = (4, 8)  # even, for checkpointing in every second layer; with two, the peak is in another operation


class NarrowEstimator(RunEstimator):
    """Estimates of forward and backward with 16-bit weights where autocast would cast them, without optimizer."""

    @cached_property
    def predictor(self) -> PeakPredictor:
        """Of forward and backward, with narrow weights."""
        model = self.outline.model
        narrow = {
            p: nn.Parameter(torch.empty_like(p, dtype=torch.bfloat16), requires_grad=p.requires_grad)
            for p in narrowed_parameters(self.outline)
        }
        replace_parameters(model, narrow)
        return make_activation_predictor(model, self.outline.loss_fn, target=self._target.device)


def narrowed_parameters(outline: ModelOutline) -> list[nn.Parameter]:
    """Return the float32 weights that offload keeps in bfloat16 on the card: those of linear layers under autocast.

    The chunked loss reads the weight of the output layer itself, which stays as it is then.
    """
    model = outline.model
    head = model.get_output_embeddings() if isinstance(outline.loss_fn, ChunkedCausalLMLoss) else None
    own = None if head is None else getattr(head, "weight", None)
    trained = [p for p in model.parameters() if p.requires_grad]
    narrow = find_narrow_weights(model, trained)
    return [p for p in trained if p in narrow and p is not own]


class LayerSeries:
    """Estimates of one configuration, from models with few layers if its layers are equal.

    Args:
        make: Makes the estimator: `RunEstimator` or `NarrowEstimator`.
        config: With every default resolved.
        target: Device and memory.
        data: Its model configuration has all layers.
        num_parameters: Of the whole model.
    """

    def __init__(
        self,
        make: type[RunEstimator],
        config: TrainConfig,
        target: PlanTarget,
        data: DataStatistics,
        *,
        num_parameters: int,
    ) -> None:
        self._num_layers = num_layers(data.model_config)
        self._estimators = self._few(make, config, target, data, num_parameters) or [make(config, target, data)]

    def _few(
        self,
        make: type[RunEstimator],
        config: TrainConfig,
        target: PlanTarget,
        data: DataStatistics,
        num_parameters: int,
    ) -> list[RunEstimator]:
        """Return the estimators of models with few layers; none if the layers differ, or are few anyway."""
        if self._num_layers <= FEW_LAYERS[1]:
            return []
        try:
            configs = [with_layers(data.model_config, number) for number in FEW_LAYERS]
            found = [make(config, target, replace(data, model_config=each)) for each in configs]
        except BigbatchError:  # the settings of such a model depend on the number of its layers
            return []
        if self._extrapolate([each.num_parameters for each in found]) != num_parameters:
            return []
        return found

    def total(self, value_of: Callable[[RunEstimator], float]) -> float:
        """Return a value of the whole model that is linear in the number of layers."""
        return self._extrapolate([value_of(each) for each in self._estimators])

    @property
    def first(self) -> RunEstimator:
        """The smallest of the models."""
        return self._estimators[0]

    def activation_bytes(self, size: int) -> int:
        """Return what forward and backward of a micro-batch allocate at their peak, above what is resident."""
        return max(self._phase_bytes(size, "forward"), self._phase_bytes(size, "backward"))

    def step_bytes(self, size: int) -> int:
        """Return what an update of all parameters together allocates at its peak, above what is resident."""
        return self._phase_bytes(size, "update")

    def _phase_bytes(self, size: int, phase: str) -> int:
        found = [each.predict(size) for each in self._estimators]
        return int(self._extrapolate([each.phases[phase] - each.resident_bytes for each in found]))

    def _extrapolate(self, values: Sequence[float]) -> float:
        if len(values) == 1:
            return values[0]
        few, more = values
        slope = (more - few) / (FEW_LAYERS[1] - FEW_LAYERS[0])
        return few + slope * (self._num_layers - FEW_LAYERS[0])


@dataclass(frozen=True)
class ActivationCurve:
    """Activations by rows of the longest sequence: convex, so that chords between predictions are above it."""

    rows: Sequence[int]
    num_bytes: Sequence[int]

    def at(self, rows: int) -> int:
        """Return the bytes of so many rows."""
        place = min(max(bisect_right(self.rows, rows), 1), len(self.rows) - 1)
        if place == 0:
            return self.num_bytes[0]
        (left, right), (low, high) = self.rows[place - 1 : place + 1], self.num_bytes[place - 1 : place + 1]
        return low + (high - low) * (rows - left) // (right - left)

    def largest(self, limit_bytes: int) -> int:
        """Return the most rows whose activations are within a limit, at least 1."""
        low, high = 1, self.rows[-1]
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.at(middle) <= limit_bytes else (low, middle - 1)
        return low


def num_layers(model_config: Any) -> int:
    """Return the number of layers of a configuration; 0 if it does not say."""
    number = getattr(model_config, "num_hidden_layers", 0)
    return number if isinstance(number, int) else 0


def with_layers(model_config: Any, number: int) -> Any:
    """Return a configuration with another number of layers."""
    changed = copy.deepcopy(model_config)
    changed.num_hidden_layers = number
    kinds = getattr(changed, "layer_types", None)
    if isinstance(kinds, list):
        changed.layer_types = kinds[:number]
    return changed
