"""Models whose parameters are on the meta device, until each rank loads its shards of them.

model folder → structure with parameters on meta, buffers on the CPU → LoRA adapters on the CPU
                                                      → fully_shard → `bigbatch.lm.model.weights.load_shards`
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bigbatch.lm.model.pretrained import model_from_config


def copy_to_meta(model: Any) -> Any:
    """Copy a model with its parameters on the meta device; buffers are copied with their values, ties are kept."""
    copies = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo=dict(copies))


def meta_model_from_config(config: Any, *, dtype: torch.dtype) -> Any:
    """Build the model of a configuration with its parameters on the meta device and its buffers on the CPU."""
    with _parameters_on_meta():
        return model_from_config(config, dtype=dtype, device=torch.device("cpu"))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move every parameter to the meta device when a module registers it; at most one is allocated at a time.

    Under ``torch.device("meta")`` buffers would lose their values too, such as the frequencies of rotary embeddings,
    which no file contains.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # a tied one is registered again as it is
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def replace_parameters(model: nn.Module, replacements: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Replace parameters in all modules that own them, so that tied ones stay tied."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in replacements:
                setattr(module, name, replacements[parameter])


def with_adapters_on_cpu(model: Any, add_adapters: Callable[[Any], Any]) -> Any:
    """Add adapters to a model on the meta device; they are initialised on the CPU, as those of a whole model are.

    peft moves adapters to the device of the layer that they adapt and would lose their values on meta. So meanwhile
    the parameters are on the CPU, where each has the memory of one element.

    Args:
        model: With parameters on the meta device.
        add_adapters: Wraps the model; reads none of its values.
    """
    on_cpu = {
        p: nn.Parameter(torch.empty((), dtype=p.dtype).expand(p.shape), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    replace_parameters(model, on_cpu)
    adapted = add_adapters(model)
    for p, stand_in in on_cpu.items():
        p.requires_grad_(stand_in.requires_grad)
    replace_parameters(adapted, {stand_in: p for p, stand_in in on_cpu.items()})
    return adapted
