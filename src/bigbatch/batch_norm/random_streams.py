"""Random numbers of their own for micro-batches that take turns.

Without them the numbers that a micro-batch draws would depend on the others, and an activation checkpoint could not
draw the same ones again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class RandomStreams:
    """The generators of torch, with a state for each micro-batch; of Python and NumPy they share one.

    Args:
        devices: CUDA devices whose generators are included.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        indices = [torch.cuda.current_device() if d.index is None else d.index for d in devices]
        self._generators = [torch.default_generator, *(torch.cuda.default_generators[index] for index in indices)]
        self._before = self._states()
        self._of: list[list[Tensor]] = []

    def add(self) -> int:
        """Return the number of a new stream, which depends on the state of the generator of the CPU."""
        seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_(generator=torch.default_generator))
        after = self._states()
        for generator in self._generators:
            generator.manual_seed(seed)
        self._of.append(self._states())
        self._set(after)
        return len(self._of) - 1

    @contextmanager
    def active(self, number: int) -> Iterator[None]:
        """Draw from a stream inside."""
        outside = self._states()
        self._set(self._of[number])
        try:
            yield
        finally:
            self._of[number] = self._states()
            self._set(outside)

    def rollback(self) -> None:
        """Set all generators to where they were when this object was made."""
        self._set(self._before)

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators]

    def _set(self, states: Sequence[Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)
