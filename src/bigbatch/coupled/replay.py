"""What a second forward of the same micro-batch needs to be the same: random states, and buffers that it reads."""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RandomStates:
    """States of the global generators of torch, Python and NumPy. No wait for a device."""

    on_cpu: Tensor
    on_cuda: list[Tensor]
    python: Any
    numpy: Any = field(default=None)

    @classmethod
    def now(cls, devices: Sequence[torch.device]) -> "RandomStates":
        """Return the present states.

        Args:
            devices: CUDA devices.
        """
        numpy = sys.modules.get("numpy")
        return cls(
            torch.get_rng_state(),
            [torch.cuda.get_rng_state(device) for device in devices],
            random.getstate(),
            None if numpy is None else numpy.random.get_state(),
        )

    def set(self, devices: Sequence[torch.device]) -> None:
        """Set the generators to these states."""
        torch.set_rng_state(self.on_cpu)
        for device, state in zip(devices, self.on_cuda, strict=True):
            torch.cuda.set_rng_state(state, device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def equals(self, other: "RandomStates") -> bool:
        """Return whether no generator was used in between."""
        return (
            torch.equal(self.on_cpu, other.on_cpu)
            and all(map(torch.equal, self.on_cuda, other.on_cuda))
            and self.python == other.python
            and _numpy_equal(self.numpy, other.numpy)
        )


def _numpy_equal(left: Any, right: Any) -> bool:
    if left is None or right is None:
        return left is right
    return left[2:] == right[2:] and bool((left[1] == right[1]).all())


@dataclass(frozen=True)
class ReplayState:
    """State before the forward of one micro-batch.

    Attributes:
        random: Random states; the same object as of the micro-batch before if it drew no numbers.
        buffers: Values of the buffers that a forward changes; None for statistics that no forward reads.
    """

    random: RandomStates
    buffers: list[Tensor | None]


class Replay:
    """Saves and restores what the forwards of a model depend on.

    The first forward shows which buffers a forward changes, and only those are saved before later ones. Repeated when
    the model changes between training and evaluation mode.

    Args:
        modules: The model, and others that run: their buffers, and the random states of their CUDA devices.

    Attributes:
        draws: Whether the forwards since `start` drew random numbers.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._devices = sorted({p.device for module in modules for p in module.parameters() if p.is_cuda}, key=str)
        self._checked_in_training: list[bool] | None = None
        self._buffers: list[Tensor] = []
        self._statistics: set[int] = set()  # ids of running statistics of norms, which training only writes
        self._last: RandomStates | None = None
        self._is_first = True
        self.draws = False

    @property
    def writes_buffers(self) -> bool:
        """Whether a forward changes buffers."""
        return bool(self._buffers)

    def start(self) -> None:
        """Start a window."""
        self.draws, self._last, self._is_first = False, None, True
        if self._checked_in_training != self._modes():
            self._checked_in_training = None
            self._buffers = list({id(b): b for module in self._modules for b in module.buffers()}.values())
            inside = [each for module in self._modules for each in module.modules()]
            norms = [m for m in inside if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
            self._statistics = {id(buffer) for norm in norms for buffer in norm.buffers(recurse=False)}

    def save(self) -> ReplayState:
        """Return the present state."""
        states = RandomStates.now(self._devices)
        if self._last is not None and states.equals(self._last):
            states = self._last
        self._last = states
        return ReplayState(states, [buffer.detach().clone() for buffer in self._buffers])

    def note_forward(self, before: ReplayState) -> None:
        """Note what a forward that began in this state has changed.

        Statistics are kept only of the first forward of the window, from where all forwards may be repeated.
        """
        self.draws = self.draws or not RandomStates.now(self._devices).equals(before.random)
        if self._checked_in_training is None:
            self._checked_in_training = self._modes()
            # By value: batch norm writes its statistics without a new version. Waits for the device, this once.
            pairs = zip(self._buffers, before.buffers, strict=True)
            changed = [copy is not None and not torch.equal(buffer, copy) for buffer, copy in pairs]
            before.buffers[:] = compress(before.buffers, changed)
            self._buffers = list(compress(self._buffers, changed))
        if not self._is_first:
            before.buffers[:] = [
                None if id(buffer) in self._statistics else copy
                for buffer, copy in zip(self._buffers, before.buffers, strict=True)
            ]
        self._is_first = False

    def replay(self, state: ReplayState) -> None:
        """Set what a forward reads: random states if the forwards draw numbers, and buffers."""
        if self.draws:
            state.random.set(self._devices)
        self._write_buffers(state)

    def rollback(self, state: ReplayState) -> None:
        """Undo what was done since a state."""
        state.random.set(self._devices)
        self._last = state.random
        self._write_buffers(state)

    def _modes(self) -> list[bool]:
        return [module.training for module in self._modules]

    def _write_buffers(self, state: ReplayState) -> None:
        with torch.no_grad():
            for buffer, copy in zip(self._buffers, state.buffers, strict=True):
                if copy is not None:
                    buffer.copy_(copy)
