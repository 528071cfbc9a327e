"""Run windows in quanta: each is computed by itself, from the same random numbers, wherever and whenever it runs.

for each quantum: seed(seed, window, its position in the global batch) → forward, backward → integer sums
at the end: do the scales of the sums suit them? if not, all quanta again
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from bigbatch.accumulation.pending_update import PendingUpdate
from bigbatch.accumulation.reproducible_state import ReproducibleState
from bigbatch.accumulation.reproducible_update import ReproducibleUpdate
from bigbatch.deterministic import deterministic_kernels
from bigbatch.distributed.gradient_sync import GradientSync, Microbatch, never
from bigbatch.errors import MemoryLimitError
from bigbatch.execution.oom_retry import OomRetry
from bigbatch.execution.runner import WindowInputs
from bigbatch.rng import random_states, seed_generators, seed_of_quantum, set_random_states


class QuantumRunner(OomRetry):
    """Runs one quantum after the other; one that runs out of memory is run once more, and never split.

    Args:
        model: As for `MicrobatchRunner`.
        device: Of its first parameter.
        sync: Of the model.
        state: Holds the seed and the number of the window.
        quantum: Consecutive samples of the global batch that are computed together.
    """

    runs_again = True

    def __init__(
        self, model: nn.Module, device: torch.device, sync: GradientSync, state: ReproducibleState, quantum: int
    ) -> None:
        super().__init__(model, device)
        self._sync, self._state, self._quantum = sync, state, quantum
        self._first_position = 0  # of this rank's quanta in the global batch
        self._has_ended = False
        self.waits_for_ranks = sync.size > 1

    def begin(self, num_samples: int) -> None:
        """Exchange the samples of all ranks, whose batches are parts of the global batch in their order. Collective.

        Raises:
            ValueError: A rank has no whole number of quanta, or another number of threads.
        """
        own = [float(num_samples), float(torch.get_num_threads()), float(torch.initial_seed() % 2**48)]
        rows = self._sync.all_gather(own) if self._sync.size > 1 else [own]
        counts = [int(row[0]) for row in rows]
        last = max((rank for rank, count in enumerate(counts) if count), default=0)
        for rank, count in enumerate(counts[:last]):
            if count % self._quantum:
                raise ValueError(
                    f"rank {rank} has {count} samples, which are no whole number of quanta of {self._quantum}, and "
                    f"rank {last} has the last samples of the global batch: deal whole quanta to the ranks."
                )
        if len(threads := {int(row[1]) for row in rows}) > 1:
            raise ValueError(
                f"the ranks have {' and '.join(map(str, sorted(threads)))} threads, and sums round differently with "
                "each number: call torch.set_num_threads with the same number on every rank."
            )
        self._state.start(int(rows[0][2]))
        self._first_position = sum(counts[: self._sync.rank]) // self._quantum

    @contextmanager
    def window(self, inputs: WindowInputs) -> Iterator[None]:
        """Run one window with deterministic kernels; random states are those of before when it ends."""
        states = random_states([self._device])
        self._has_ended, self._states = False, states
        try:
            with super().window(inputs), deterministic_kernels():
                yield
        finally:
            if not self._has_ended:
                set_random_states(states, [self._device])

    def run(
        self,
        microbatch: Microbatch,
        pending: PendingUpdate,
        *,
        only: list[torch.Tensor] | None = None,
        is_repeated: bool = False,
    ) -> None:
        """Add the gradient of one quantum; arguments as for `OomRetry.run`.

        Raises:
            MemoryLimitError: It does not fit in memory.
        """
        rows: Sequence[int] = microbatch.content
        position = self._first_position + rows[0] // self._quantum
        state = self._save() if self._buffers else None
        seed = self._state.seed
        assert seed is not None, "set when the window begins"
        seed_generators(seed_of_quantum(seed, self._state.num_windows, position), self._device)
        failure = self._attempt(self.inputs, rows, pending, state, only)
        if failure is None:
            return
        message, only = failure
        if is_repeated:
            raise MemoryLimitError(
                f"samples {rows[0]} to {rows[-1]} of the batch, a quantum, do not fit in memory ({message}): a quantum "
                "is never split, so start a new run with a smaller quantum, or use activation checkpointing."
            )
        self.run(microbatch, pending, only=only, is_repeated=True)

    def end(self, pending: PendingUpdate, should_abandon: Callable[[], bool] = never) -> None:
        """Run all quanta again if the scales of the sums do not suit them. Collective."""
        assert isinstance(pending, ReproducibleUpdate)
        while not pending.end_pass():
            for microbatch in pending.microbatches(should_abandon):
                self.run(microbatch, pending)
        self._has_ended = True
        set_random_states(self._states, [self._device])
