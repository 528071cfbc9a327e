"""The model and optimizer that all contestants share, restored to their initial state between turns.

A contestant may wrap the forward, patch modules, hook parameters, or move the model to another device.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bigbatch.accumulation.optimizer_state import init_optimizer_state
from bigbatch.lm.bench.workload import Workload
from bigbatch.memory.usage import free_cached_memory


class SharedModel:
    """One model with its optimizer, with the same weights in every turn.

        with stage.isolated():
            ...                                     # a model in its initial state
            stage.reset()                           # initial weights and zero optimizer states, in place

    Args:
        workload: Provides model and batch.
        memory: Memory limit for contestants that support one; None for no limit.
        progress: Receives what a contestant does before its first update.

    Raises:
        InputError: The device of the workload does not exist.
    """

    def __init__(
        self, workload: Workload, memory: str | None, *, progress: Callable[[str], None] = lambda _: None
    ) -> None:
        self.workload = workload
        self.progress = progress
        self.memory = memory
        self.device_spec = workload.device_spec()
        self.device = self.device_spec.device
        self.samples = workload.make_samples()
        self.model = workload.make_trained_model(self.device)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=workload.lr, fused=True)
        self._first = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Open a turn with allocated optimizer states, as in the middle of a run; undo all changes at the end."""
        if self.device.type == "cuda":
            free_cached_memory()
        self.model.to(self.device)  # a peer may have moved it
        self._snapshot = _ModelSnapshot(self.model)
        init_optimizer_state(self.optimizer)
        self.reset()
        self.reset_peak()
        try:
            yield
        finally:
            self._snapshot.restore()
            self.optimizer.zero_grad()
            self.optimizer.state.clear()

    def restore_model(self) -> None:
        """Undo all changes to the model in this turn, and restore the initial weights.

        Needed before a library wraps the model a second time: accelerate skips a model that it has prepared before,
        which would run without autocast once Liger Kernel has replaced its forward again.
        """
        self._snapshot.restore()
        self.reset()

    def synchronize(self) -> None:
        """Wait until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def reset_peak(self) -> None:
        """Reset the peak memory statistics of the device."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Convert parameters of narrower dtypes to float32; restore them at the end."""
        narrow = [(parameter, parameter.data) for parameter in self.model.parameters() if parameter.itemsize < 4]
        for parameter, data in narrow:
            parameter.data = data.float()
        try:
            yield
        finally:
            for parameter, data in narrow:
                parameter.data = data

    @torch.no_grad()
    def reset(self) -> None:
        """Restore the initial weights, no gradients, and zero optimizer states."""
        self.model.to(self.device)
        for parameter, first in zip(self.parameters, self._first, strict=True):
            parameter.copy_(first)
            parameter.grad = None
        for state in self.optimizer.state.values():
            for name, value in state.items():
                state[name] = value.to(self.device).zero_()


class _ModelSnapshot:
    """Snapshot of the attributes of a model's modules, of its configuration, and of the Python module of its class."""

    def __init__(self, model: nn.Module) -> None:
        code = sys.modules[type(model).__module__]  # Liger Kernel replaces functions in it
        owners: list[Any] = [*model.modules(), model.config, code]
        self._attributes = [(vars(owner), dict(vars(owner))) for owner in owners]
        self._inside = [
            (inside, dict(inside))  # hooks, buffers, submodules
            for module in model.modules()
            for inside in vars(module).values()
            if isinstance(inside, dict)
        ]

    def restore(self) -> None:
        """Restore the attributes in place; the dictionaries keep their identity."""
        for current, found in (*self._attributes, *self._inside):
            for name in current.keys() - found.keys():
                del current[name]
            current.update(found)
