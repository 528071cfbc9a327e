"""Base weights in 4 bits for LoRA: which layers, loading them one at a time, and what stays as it is.

model folder → structure on meta → each weight: read, quantized on the device → model, with the `Weights` of its folder
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.errors import InputError, first_line
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.expert_notes import ROUTER
from bigbatch.lm.model.meta_model import replace_parameters
from bigbatch.lm.model.nf4 import Nf4Linear, check_kernels, load_kernels
from bigbatch.lm.model.weights import Weights, empty_copy, empty_model
from bigbatch.lm.text import plural
from bigbatch.memory.limit import describe_bytes

NAMED = 3  # tensors that a note names

Values = dict[str, Callable[[], Tensor]]


def weights_dtype_of(config: TrainConfig, device_spec: DeviceSpec) -> torch.dtype:
    """Return the dtype of the weights that are not trained.

    That of all parameters, but bfloat16 for what stays unquantized in a quantized model that computes in bfloat16:
    these weights are not trained, so nothing is gained by more bits.
    """
    if config.quantize is not None and device_spec.precision == "bf16":
        return torch.bfloat16
    return device_spec.weights_dtype


@dataclass(frozen=True)
class QuantizedBase:
    """A model with frozen weights in 4 bits, and where the values are that they were quantized from.

    Attributes:
        model: On its device, without adapters.
        weights: By the names that the parameters had before.
        dtype: Of the weights, before they were quantized.
        names: The names by parameter, or by layer for those in 4 bits.
    """

    model: Any
    weights: Weights
    dtype: torch.dtype
    names: dict[nn.Module | Tensor, str]

    def frozen_values(self, adapted: Any) -> Values:
        """Return how to read the values before they were quantized, by the names without quantization.

        Args:
            adapted: The model, or peft's wrapper of it.
        """
        found: Values = {}
        for name, module in adapted.named_modules():
            if isinstance(module, Nf4Linear):
                found[f"{name}.weight"] = partial(self._read, self.names[module])
        for name, parameter in adapted.named_parameters():
            if parameter in self.names and not parameter.requires_grad:
                found[name] = partial(self._read, self.names[parameter])
        return found

    def _read(self, name: str) -> Tensor:
        return self.weights.read_whole(name).to(self.dtype)


def load_quantized(config: TrainConfig, device_spec: DeviceSpec) -> QuantizedBase:
    """Load a model by its name with its linear layers in 4 bits; the device holds one unquantized weight at a time.

    Raises:
        InputError: As `bigbatch.lm.model.pretrained.load_model` and `check_kernels` raise it, or the model has no
            linear layer, or does not fit on the device.
    """
    dtype, device = weights_dtype_of(config, device_spec), device_spec.device
    check_kernels(device, dtype)
    return quantize_weights(*empty_model(config.model, dtype=dtype), config, dtype=dtype, device=device)


def quantize_copy(model: Any, config: TrainConfig, device_spec: DeviceSpec) -> Any:
    """Copy a model on the CPU to the device of a run, with its linear layers in 4 bits."""
    check_kernels(device_spec.device, next(model.parameters()).dtype)
    dtype = weights_dtype_of(config, device_spec)
    return quantize_weights(*empty_copy(model), config, dtype=dtype, device=device_spec.device).model


def quantize_outline(model: Any, config: TrainConfig) -> None:
    """Replace the linear layers of a model on the meta device by layers in 4 bits, in place.

    Raises:
        InputError: bitsandbytes is missing, or the model has no linear layer.
    """
    load_kernels()
    for name, layer in quantized_layers(model, config).items():
        _replace(model, name, Nf4Linear(layer.weight, layer.bias, double=_is_double(config)))


def quantized_layers(model: Any, config: TrainConfig) -> dict[str, nn.Linear]:
    """Return the layers whose weights are stored in 4 bits, by name.

    All linear layers but the output layer, routers of experts, and those whose weight another module has too.

    Raises:
        InputError: There are none.
    """
    owners: dict[Tensor, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    head = model.get_output_embeddings()
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and owners[module.weight] == 1
        and not ROUTER.search(f"{name}.weight")
    }
    if not found:
        raise InputError(
            f"--quantize {config.quantize} is not supported for {config.model}: a {type(model).__name__} has no linear "
            "layers of torch below its output layer. Leave it out."
        )
    return found


@torch.no_grad()
def quantize_weights(
    model: Any, weights: Weights, config: TrainConfig, *, dtype: torch.dtype, device: torch.device
) -> QuantizedBase:
    """Load the weights of a model on the meta device, one at a time, and quantize those of its linear layers.

    Raises:
        InputError: A weight cannot be read, or does not fit on the device.
    """
    layers = quantized_layers(model, config)
    names: dict[nn.Module | Tensor, str] = {}
    loaded: dict[nn.Parameter, nn.Parameter] = {}

    def read(name: str) -> Tensor:
        return weights.read_whole(name).to(device=device, dtype=dtype)

    quantized = {layer.weight for layer in layers.values()}
    try:
        for name, parameter in model.named_parameters():
            if parameter not in quantized:
                loaded[parameter] = nn.Parameter(read(name), requires_grad=False)
                names[loaded[parameter]] = name
        replace_parameters(model, loaded)
        for name, layer in layers.items():
            replacement = Nf4Linear(read(f"{name}.weight"), layer.bias, double=_is_double(config))
            names[replacement] = f"{name}.weight"
            _replace(model, name, replacement)
        model = model.to(device)
    except Exception as error:
        weights.close()
        raise InputError(
            f"the weights of {config.model} cannot be loaded onto {device}: {first_line(error)}."
        ) from error
    return QuantizedBase(model, weights, dtype, names)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _is_double(config: TrainConfig) -> bool:
    return config.quantize == "nf4-double"


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of parameters of a model, and of its trained ones; those in 4 bits count once each."""
    stored = {p for module in model.modules() if isinstance(module, Nf4Linear) for p in module.stored()}
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters() if p not in stored]
    total = sum(size for size, _ in sizes) + sum(
        module.out_features * module.in_features for module in model.modules() if isinstance(module, Nf4Linear)
    )
    return total, sum(size for size, is_trained in sizes if is_trained)


def quantization_note(model: nn.Module) -> str:
    """Return a sentence about the layers in 4 bits, with their bytes, and about the largest tensors that are not."""
    layers = [module for module in model.modules() if isinstance(module, Nf4Linear)]
    stored = {p for layer in layers for p in layer.stored()}
    count = sum(layer.out_features * layer.in_features for layer in layers)
    others = sorted(_others(model, stored), key=lambda pair: -pair[1])
    text = (
        f"{plural(len(layers), 'linear layer')} with {count:,} weights in 4 bits take "
        f"{describe_bytes(sum(p.nbytes for p in stored))}"
    )
    if not others:
        return text
    dtypes = " and ".join(sorted({str(p.dtype).removeprefix("torch.") for _, _, p in others}))
    largest = ", ".join(f"{name} {describe_bytes(size)}" for name, size, _ in others[:NAMED])
    return f"{text}; unquantized, in {dtypes}: {describe_bytes(sum(size for _, size, _ in others))}, most in {largest}"


def _others(model: nn.Module, stored: set[Tensor]) -> Iterator[tuple[str, int, Tensor]]:
    """Yield name, bytes and a tensor of the frozen parameters that are not in 4 bits; those of layers together."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and parameter not in stored:
            kind = ".".join(part for part in name.split(".") if not part.isdigit() and part not in _WRAPPERS)
            groups.setdefault(kind, []).append(parameter)
    for kind, tensors in groups.items():
        yield kind, sum(tensor.nbytes for tensor in tensors), tensors[0]


_WRAPPERS = ("base_model", "base_layer", "model", "weight")
