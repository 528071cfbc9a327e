"""A small model for trials of a large one: the same classes of modules, fewer layers, random weights."""

import copy
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import nn

from bigbatch.lm.model.pretrained import model_from_config


def stand_in(config: Any, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Build the model of a configuration with as few layers as contain every kind of module that it has.

    The random state is restored.

    Args:
        config: Of a transformers causal language model.
        dtype: Of its parameters.
        device: Where it goes. It holds the embeddings, the head and these layers: about as much as a sharded model
            holds unsharded at a time.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return model_from_config(fewest_layers(config), dtype=dtype, device=device)


def fewest_layers(config: Any) -> Any:
    """Return a copy of a configuration with 1, 2, 4, … layers, the fewest that contain every kind of module."""
    config = copy.deepcopy(config)  # building a model writes its dtype into its configuration
    total = getattr(config, "num_hidden_layers", None)
    if not isinstance(total, int):
        return config
    every_kind = _kinds(config)
    layers = 1
    while layers < total:
        cut = _cut(config, layers, total)
        if _kinds(cut) == every_kind:
            return cut
        layers *= 2
    return config


def _cut(config: Any, layers: int, total: int) -> Any:
    cut = copy.deepcopy(config)
    cut.num_hidden_layers = layers
    for name, value in vars(cut).items():
        if isinstance(value, list | tuple) and len(value) == total:  # a setting for each layer, such as layer_types
            setattr(cut, name, value[:layers])
    return cut


def _kinds(config: Any) -> set[Hashable]:
    try:
        model = model_from_config(config, dtype=torch.float32, device=torch.device("meta"))
    except Exception:  # noqa: BLE001 - whatever a model says to so few layers, it wants more
        return set()
    return {(type(module), *_traits(module)) for module in model.modules()}


def _traits(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield the settings by which modules of one class differ: flags, names, and which numbers are given at all."""
    for name, value in sorted(vars(module).items()):
        if isinstance(value, bool | str):
            yield name, value
        elif value is None or isinstance(value, int | float):
            yield name, type(value)
