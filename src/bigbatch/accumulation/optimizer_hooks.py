"""Hooks before the steps of optimizers, which reference their owner weakly."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakMethod

import torch


def hook_before_step(optimizer: Any, hook: "WeakMethod[Any]") -> tuple[Any, Any]:
    """Call a hook before each step of an optimizer; of the inner one if it is a wrapper without hooks.

    Returns:
        The optimizer that is hooked, and the handle; None for both if neither supports hooks.
    """
    target = optimizer
    while isinstance(target, torch.optim.Optimizer):

        def call(stepping: Any, _args: Any, _kwargs: Any) -> None:
            if (method := hook()) is not None:
                method(stepping)

        with suppress(AttributeError):
            return target, target.register_step_pre_hook(call)
        target = getattr(target, "optimizer", None)
    return None, None


def remove_all(handles: Sequence[Any]) -> None:
    """Remove hooks, where there are any."""
    for handle in handles:
        if handle is not None:
            handle.remove()
