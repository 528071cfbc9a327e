"""Hyperparameters of each ``--optimizer``: which settings it has, and their defaults. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

OptimizerName: TypeAlias = Literal["adamw", "adamw-8bit", "muon", "lion", "adafactor", "sgd"]

TITLES: Mapping[str, str] = MappingProxyType(
    {
        "adamw": "AdamW",
        "adamw-8bit": "AdamW with 8-bit moments",
        "muon": "Muon",
        "lion": "Lion",
        "adafactor": "Adafactor",
        "sgd": "SGD",
    }
)
SETTINGS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "adamw": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8},
        "adamw-8bit": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8},
        "muon": {"momentum": 0.95, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8},
        "lion": {"beta1": 0.9, "beta2": 0.99},
        "adafactor": {},
        "sgd": {"momentum": 0.9},
    }
)
"""The settings that an optimizer has in addition to ``lr`` and ``weight_decay``, with their defaults."""

LR_FACTORS: Mapping[str, float] = MappingProxyType({"adamw": 1.0, "adamw-8bit": 1.0, "muon": 1.0, "lion": 0.2})
"""Default learning rate divided by that of AdamW. Others depend on the scale of the loss or of the weights."""

FINAL_LR_FACTORS: Mapping[str, float] = MappingProxyType({"cosine": 0.1, "linear": 0.0, "wsd": 0.0})
"""Default of ``min_lr`` divided by ``lr``, for each schedule that decays."""

DECAY_PERCENT = 20  # of the updates, at the end of the schedule wsd


def unused_settings(optimizer: str, given: Mapping[str, float | None]) -> list[str]:
    """Return the names of the settings that are given and that an optimizer does not have."""
    return [name for name, value in given.items() if value is not None and name not in SETTINGS[optimizer]]


def group_keys(optimizer: str, settings: Mapping[str, float], lr: float) -> dict[str, object]:
    """Return the keys of an optimizer's parameter groups on which scaling rules depend."""
    if optimizer in ("adamw", "adamw-8bit", "muon"):
        return {"lr": lr, "betas": (settings["beta1"], settings["beta2"]), "eps": settings["eps"]}
    if optimizer == "sgd":
        return {"lr": lr, "momentum": settings["momentum"], "dampening": 0.0}
    return {"lr": lr}
