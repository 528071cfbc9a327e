"""Memory that a rank of a sharded model needs in addition to its own shards: what FSDP gathers, and whole gradients.

model without weights, memory of the device → layers that are gathered, or the whole model for a window → bytes
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bigbatch.distributed.sharded import KEPT_SHARE
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.distributed.ranks import casts_weights_under_autocast

FLOAT32 = 4

MARGIN_PERCENT = 5
"""Of the memory that tensors may use, kept free by the choice of a micro-batch for a sharded model.

An error of the prediction cannot be corrected in place: the run ends with exit code 76 and starts again. Predictions
for replicated models are within 3 % of measurements; peaks of two ranks on the CPU were from 4 % below the prediction
to 0.2 % above it, and 10 to 12 % below it where embeddings were as large as the layers, with torch 2.13
(tests/distributed/test_sharded_choice.py). CUDA, where NCCL has buffers that torch does not count, was not measured.
"""


@dataclass(frozen=True)
class ShardedModel:
    """Parameters of a sharded model, by what FSDP gathers together.

    Attributes:
        layer, trained_layer: Parameters of the largest layer, and those of them that are trained.
        layers: Of all layers.
        rest, trained_rest: Of everything else, which is gathered from the first layer to the last.
        trained_embeddings: Of the input embeddings, whose gradient is computed last; 0 if the output layer shares them.
        trained: Of the whole model.
        stored_width: Bytes of a weight in the shards, and of a gradient outside of layers.
        gathered_width: Bytes of a weight of a layer as it is gathered.
        gradient_width: Bytes of a gradient of a layer as it is reduced.
        is_replicated: Whether machines hold replicas (hsdp), where whole gradients are never kept.
        is_cuda: Whether whole weights may be kept at all.
    """

    layer: int
    trained_layer: int
    layers: int
    rest: int
    trained_rest: int
    trained_embeddings: int
    trained: int
    stored_width: int
    gathered_width: int
    gradient_width: int
    is_replicated: bool
    is_cuda: bool

    @classmethod
    def of(
        cls, model: Any, layers: Sequence[nn.Module], device_spec: DeviceSpec, *, is_replicated: bool
    ) -> "ShardedModel":
        """Count the parameters of a model.

        Args:
            model: Without weights.
            layers: That `fully_shard` is applied to, as in `bigbatch.lm.distributed.ranks`.
            device_spec: Of the run.
            is_replicated: As for the class.
        """
        in_layers = {p for layer in layers for p in layer.parameters()}
        rest = [p for p in model.parameters() if p not in in_layers]
        stored = next(model.parameters()).element_size()
        embeddings = model.get_input_embeddings().weight
        head = model.get_output_embeddings()
        is_own = embeddings.requires_grad and getattr(head, "weight", None) is not embeddings
        gathered = device_spec.gathered_dtype
        is_cast = gathered is not None and all(map(casts_weights_under_autocast, layers))
        return cls(
            layer=max((_count(layer.parameters()) for layer in layers), default=0),
            trained_layer=max((_count(_trained(layer)) for layer in layers), default=0),
            layers=_count(in_layers),
            rest=_count(rest),
            trained_rest=_count(p for p in rest if p.requires_grad),
            trained_embeddings=embeddings.numel() if is_own else 0,
            trained=_count(_trained(model)),
            stored_width=stored,
            gathered_width=gathered.itemsize if gathered is not None and is_cast else stored,
            gradient_width=FLOAT32 if is_cast else stored,
            is_replicated=is_replicated,
            is_cuda=device_spec.device.type == "cuda",
        )

    @property
    def gathers_narrow(self) -> bool:
        """Whether layers are gathered in the dtype in which they compute, so that autocast does not cast them."""
        return self.gathered_width < self.stored_width

    def window_bytes(self, device_bytes: int) -> int:
        """Return the bytes on a rank while micro-batches run, in addition to its shards and to activations.

        weights     two layers and the rest, or all of them and one layer
        gradients   one layer and the rest but for the embeddings, or all of them and one layer

        Args:
            device_bytes: Memory of the device.
        """
        early = 0 if self.keeps_gradients(device_bytes) else self.trained_embeddings
        return self._whole_at_end(device_bytes) - early * self.stored_width

    def end_bytes(self, device_bytes: int) -> int:
        """Return the same at the end of a backward, without activations: the gradients of the rest are copied then."""
        return self._whole_at_end(device_bytes) + self.trained_rest * self.stored_width

    def _whole_at_end(self, device_bytes: int) -> int:
        weights = self.rest * self.stored_width
        if self.keeps_weights(device_bytes):
            weights += (self.layers + self.layer) * self.gathered_width
        else:
            weights += 2 * self.layer * self.gathered_width
        gradients = self.trained_layer * self.gradient_width + self.trained_rest * self.stored_width
        if self.keeps_gradients(device_bytes):
            gradients += (self.trained - self.trained_rest) * self.gradient_width
        return weights + gradients

    def fabric_bytes(self, device_bytes: int, *, num_shards: int) -> int:
        """Return what a rank exchanges for one micro-batch: weights for forward and backward, and gradients.

        What stays whole is exchanged once a window, and not counted.
        """
        weights = 0 if self.keeps_weights(device_bytes) else 2 * self._whole_bytes
        gradients = 0 if self.keeps_gradients(device_bytes) else FLOAT32 * self.trained
        return (weights + gradients) * (num_shards - 1) // num_shards

    def keeps_weights(self, device_bytes: int) -> bool:
        """Return whether gathered weights stay for a window, as `ShardedSync.fits_whole` decides."""
        return self.is_cuda and self._whole_bytes * KEPT_SHARE <= device_bytes

    def keeps_gradients(self, device_bytes: int) -> bool:
        """Return whether gradients are reduced once a window, as `RankContext.parallelize` decides."""
        whole_bytes = self._whole_bytes + FLOAT32 * (self.layers + self.rest)
        return self.is_cuda and not self.is_replicated and whole_bytes * KEPT_SHARE <= device_bytes

    @property
    def _whole_bytes(self) -> int:
        return self.layers * self.gathered_width + self.rest * self.stored_width


def less_margin(usable_bytes: int) -> int:
    """Return the memory that the predicted peak of a rank may use."""
    return usable_bytes * (100 - MARGIN_PERCENT) // 100


def _trained(module: nn.Module) -> Iterable[nn.Parameter]:
    return (p for p in module.parameters() if p.requires_grad)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
