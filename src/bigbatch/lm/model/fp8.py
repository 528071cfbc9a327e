"""Products of linear layers in float8 through torchao: which layers, and how to compute them in bfloat16 instead.

model → linear layers of its decoder layers → torchao's Float8Linear with the same parameters → `Fp8Layers`

    y = float8(s·x) · float8(t·W)ᵀ / (s·t),   s, t: the largest powers of two for which the products are in range

The two products of backward are of the same kind, with gradients in e5m2 and everything else in e4m3. Every tensor has
one scale, computed when it is used ("tensorwise, dynamic"), so that the rounding of activations depends on the other
sequences of a micro-batch. With powers of two, that of one and the same value does only if it is small: at least
1/14,336 of the largest value of its tensor is a normal number of e4m3 at such a scale, with the same four significant
bits. What differs in bfloat16 between two cuts is enlarged, though: a value near the middle of two numbers of float8 is
rounded to either.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.errors import InputError, first_line
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.decoder_layers import repeated_layers
from bigbatch.lm.model.expert_notes import ROUTER

SIZE_UNIT = 16
"""Numbers of inputs and outputs of a layer are multiples of it: torch._scaled_mm multiplies no others."""


@dataclass(frozen=True)
class Fp8Layers:
    """The linear layers of a model with products in float8.

    Attributes:
        layers: Instances of torchao's ``Float8Linear``, a subclass of ``nn.Linear``, by their names in the model.
        num_linear: All linear layers of the model without those of adapters, these included.
        version: Of torchao.
    """

    layers: Mapping[str, nn.Linear]
    num_linear: int
    version: str

    def __str__(self) -> str:
        return f"{len(self.layers):,} of {self.num_linear:,} linear layers (tensorwise, torchao {self.version})"

    @property
    def note(self) -> str:
        """A sentence about the layers, and about what their products change."""
        return (
            f"fp8: {self}; not the update of bf16: the gradient is that of products in fp8, whose rounding depends on "
            "the micro-batch"
        )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Compute the products as an ``nn.Linear`` does within the context: under autocast, in bfloat16."""
        classes = {layer: type(layer) for layer in self.layers.values()}
        for layer in classes:
            layer.__class__ = nn.Linear
        try:
            yield
        finally:
            for layer, kind in classes.items():
                layer.__class__ = kind

    def install(self, model: nn.Module) -> None:
        """Put the layers into the model again, after something has put its linear layers back."""
        for name, layer in self.layers.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)


def use_fp8(
    model: Any, config: TrainConfig, device_spec: DeviceSpec, *, target: torch.device | None = None
) -> Fp8Layers | None:
    """Replace linear layers of a model by layers with products in float8, with the same parameters and names.

    Those of its decoder layers, but not routers of experts, adapters, layers whose weight another module has too, and
    layers whose sizes are no multiples of `SIZE_UNIT`. Embeddings and the output layer are none of them.

    Args:
        model: A transformers language model on any device, or peft's wrapper of one; changed in place.
        config: Of the run.
        device_spec: Its precision decides; nothing changes unless it is fp8.
        target: Device of the run, by default that of ``device_spec``. On another one than CUDA, values are rounded to
            float8 and multiplied in float32; `resolve_device` refuses such runs, except in tests.

    Raises:
        InputError: torchao is missing or cannot be imported, or the model has no such layer.
    """
    if device_spec.precision != "fp8":
        return None
    float8 = load_torchao()
    chosen = {layer for _, layer in convertible_layers(model)}
    if not chosen:
        raise InputError(
            f"--precision fp8 is not supported for {config.model}: its decoder layers have no linear layers of torch "
            f"with multiples of {SIZE_UNIT} inputs and outputs. Use --precision bf16."
        )
    names = [path for path, layer in model.named_modules() if layer in chosen]
    recipe = float8.Float8LinearConfig(
        round_scales_to_power_of_2=True,
        pad_inner_dim=True,  # the tokens of a micro-batch are no multiple of 16
        emulate=(target or device_spec.device).type != "cuda",
    )
    float8.convert_to_float8_training(model, module_filter_fn=lambda layer, _: layer in chosen, config=recipe)
    layers = {path: model.get_submodule(path) for path in names}
    return Fp8Layers(layers, len(linear_layers(model)), version("torchao"))


def convertible_layers(model: Any) -> list[tuple[str, nn.Linear]]:
    """Return the layers that `use_fp8` replaces, with their names."""
    try:
        inside = {module for layer in repeated_layers(model) for module in layer.modules()}
    except ValueError:
        return []
    owners: dict[Tensor, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    return [
        (name, layer)
        for name, layer in linear_layers(model)
        if type(layer) is nn.Linear
        and layer in inside
        and owners[layer.weight] == 1
        and not ROUTER.search(f"{name}.weight")
        and layer.in_features % SIZE_UNIT == 0
        and layer.out_features % SIZE_UNIT == 0
    ]


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Return the linear layers of a model without those of adapters, with their names."""
    found = model.named_modules()
    return [(name, layer) for name, layer in found if isinstance(layer, nn.Linear) and ".lora_" not in name]


def load_torchao() -> Any:
    """Import ``torchao.float8``, without the warnings and logs of its other parts.

    Raises:
        InputError: It is not installed, or does not fit this torch.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao import float8
    except ImportError as error:
        raise InputError(
            f"--precision fp8 needs torchao, which cannot be imported ({first_line(error)}): pip install "
            '"bigbatch[fp8]".'
        ) from error
    finally:
        logging.disable(disabled)
    return float8
