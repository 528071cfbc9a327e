"""What all contestants share: one model and one optimizer, put back between turns to what they were.

A contestant may wrap the forward, patch modules, hook parameters, or move the model away, as these libraries do.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bigbatch.accumulation.optimizer_state import init_optimizer_state
from bigbatch.lm.bench.workload import Workload
from bigbatch.memory.usage import free_cached_memory


class SharedModel:
    """One model with its optimizer, at the same weights in every turn.

        with stage.turn():
            ...                                     # as if the model had just been made
            stage.reset()                           # the first weights and empty states again, where they are

    Args:
        workload: What the model is made of.
        memory: What the process may use, as the contestants that ask for it take it; None for what is there.

    Raises:
        InputError: The device of the workload is not there.
    """

    def __init__(self, workload: Workload, memory: str | None) -> None:
        self.workload = workload
        self.memory = memory
        self.device_spec = workload.machine()
        self.device = self.device_spec.device
        self.samples = workload.make_samples()
        self.model = workload.make_trained_model(self.device)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=workload.lr, fused=True)
        self._first = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Open a turn, with the optimizer's states there as in a run that goes on; undo whatever was done in it."""
        if self.device.type == "cuda":
            free_cached_memory()
        self.model.to(self.device)  # a peer may have left it elsewhere
        self._found = _ModelSnapshot(self.model)
        init_optimizer_state(self.optimizer)
        self.reset()
        self.forget_peak()
        try:
            yield
        finally:
            self._found.put_back()
            self.optimizer.zero_grad()
            self.optimizer.state.clear()

    def restore_model(self) -> None:
        """Undo what was done to the model in this turn, and go back to the first weights.

        What a library wraps twice need not be what it wraps once: accelerate leaves a model alone that it has prepared
        before, and after Liger Kernel has replaced its forward again, it would run without autocast.
        """
        self._found.put_back()
        self.reset()

    def forget_peak(self) -> None:
        """Count the peak of the device's memory from here."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Hold parameters that are in a narrower dtype in float32 for a while."""
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
        """Go back to the first weights, no gradients, and an optimizer that has taken no step."""
        self.model.to(self.device)
        for parameter, first in zip(self.parameters, self._first, strict=True):
            parameter.copy_(first)
            parameter.grad = None
        for state in self.optimizer.state.values():
            for name, value in state.items():
                state[name] = value.to(self.device).zero_()


class _ModelSnapshot:
    """The attributes of a model's modules, of its configuration, and of the file that its class comes from."""

    def __init__(self, model: nn.Module) -> None:
        code = sys.modules[type(model).__module__]  # Liger Kernel replaces functions in there
        owners: list[Any] = [*model.modules(), model.config, code]
        self._attributes = [(vars(owner), dict(vars(owner))) for owner in owners]
        self._inside = [
            (inside, dict(inside))  # hooks, buffers, submodules
            for module in model.modules()
            for inside in vars(module).values()
            if isinstance(inside, dict)
        ]

    def put_back(self) -> None:
        """Undo what was changed since; the dictionaries stay the ones that they are."""
        for current, found in (*self._attributes, *self._inside):
            for name in current.keys() - found.keys():
                del current[name]
            current.update(found)
