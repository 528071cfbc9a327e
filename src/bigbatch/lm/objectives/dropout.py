"""Train without the dropout of a model, for objectives that compare two sequences.

The reference of dpo is evaluated without dropout, so with it the margins of the first update would be noise instead of
0; and the two answers of a pair, for dpo and reward, would have other masks. TRL's trainers disable it, too.

modules and their attributes → 0; entries of the configuration, which some models read in forward → 0, and restored
in the saved model
"""

import json
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PretrainedConfig

from bigbatch.lm.files import read_json, write_atomically

OBJECTIVES = ("dpo", "reward")
"""The objectives that are trained without the dropout of the model."""


def disable_dropout(model: Any) -> dict[str, Any] | None:
    """Set every dropout rate of a model without adapters to 0.

    Returns:
        The rates in its configuration before, by name, those of a part in an object; None if nothing was changed: a
        configuration may have rates that the model does not use.
    """
    if not _disable_in_modules(model):
        return None
    return _disable_in_config(model.config)


def write_dropout_rates(folder: Path, rates: dict[str, Any]) -> None:
    """Restore the rates in the configuration of a saved model; no-op for a folder of adapters."""
    path = folder / "config.json"
    if path.is_file():
        content = _with_rates(read_json(path), rates)
        write_atomically(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def _disable_in_modules(model: nn.Module) -> bool:
    """Return whether a rate was above 0, of a dropout module or in an attribute."""
    changed = False
    for module in model.modules():
        is_dropout = isinstance(module, _DropoutNd)
        for name, value in list(vars(module).items()):
            if _is_rate(name, value) or (is_dropout and name == "p" and value > 0):
                setattr(module, name, 0.0)
                changed = True
    return changed


def _disable_in_config(config: PretrainedConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            if inner := _disable_in_config(value):
                found[name] = inner
        elif _is_rate(name, value):
            found[name] = value
            setattr(config, name, 0.0)
    return found


def _is_rate(name: str, value: object) -> bool:
    return "drop" in name and isinstance(value, float) and value > 0


def _with_rates(content: dict[str, Any], rates: dict[str, Any]) -> dict[str, Any]:
    inner = {name: _with_rates(content.get(name, {}), rate) for name, rate in rates.items() if isinstance(rate, dict)}
    return content | rates | inner
