"""Gradient sums in host memory: backward and the update stream them through the device.

backward   part of a sum ──copy──▶ its gradient is added there ──copy──▶ host
norm       sums of a chunk ──copy──▶ norm of each
update     sums of a chunk ──copy──▶ beside its state, scaled there, in ``.grad`` during its step
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bigbatch.errors import InputError, MemoryLimitError, WindowStateError, first_line
from bigbatch.gradients.sum_store import SumStore
from bigbatch.offload.arena import Arena
from bigbatch.offload.chunk_sizes import CHUNK_BYTES, SLOT_FACTOR
from bigbatch.offload.state_chunk import ChunkSums, StateChunk, lay_out
from bigbatch.offload.sum_streamer import SumStreamer
from bigbatch.offload.transfers import Transfers

SUM = "gradient sum"
"""In the place of a name of the state."""


class HostSums(SumStore):
    """The gradient sums of one window after the other, in memory that stays allocated and pinned.

    Args:
        transfers: Copies.

    Attributes:
        float32: Sums of the parameters that have received a gradient, in the dtype of their sums.
        streamer: Adds gradients.
    """

    moves_all = True

    def __init__(self, transfers: Transfers) -> None:
        super().__init__()
        self._transfers = transfers
        self.streamer = SumStreamer(transfers)
        self._chunks: list[ChunkSums] = []
        self._totals: dict[Tensor, Tensor] = {}
        self._factor = 1.0

    def __deepcopy__(self, memo: dict[int, object]) -> "HostSums":
        """Return sums without memory: those of a copied window that has ended."""
        return HostSums(self._transfers)

    def prepare(self, chunks: Sequence[StateChunk]) -> None:
        """Allocate the sums of all parameters that require a gradient, between two windows.

        Raises:
            MemoryLimitError: The host has too little memory.
        """
        self._chunks, self._totals = [], {}
        for chunk in chunks:
            wanted = [p for p in chunk.parameters if p.requires_grad]
            if chunk.sums is None or not chunk.sums.holds(wanted, self.dtype_of):
                chunk.sums = self._allocate(wanted)
            self._chunks.append(chunk.sums)
            self._totals.update(chunk.sums.totals())

    def _allocate(self, parameters: Sequence[Tensor]) -> ChunkSums:
        like = [(p, SUM, torch.empty_like(p, dtype=self.dtype_of(p), device="meta")) for p in parameters]
        entries, num_bytes = lay_out(like)
        host = self._transfers.host_memory(num_bytes)
        return ChunkSums(entries, host, tuple(entry.host_view(host) for entry in entries))

    def set_zeros(self, parameter: Tensor) -> None:
        """Set the sum of a parameter to zero."""
        self.float32[parameter] = self._total_of(parameter).zero_()

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Start to add the gradient of a parameter, and clear its ``.grad``.

        Raises:
            InputError: The gradient is sparse.
            RuntimeError: Nothing is added.
            WindowStateError: The sums cannot be used: this gradient was added in part, or an earlier one was.
        """
        if gradient.layout is not torch.strided:
            raise InputError(
                f"the gradient of a parameter of shape {tuple(parameter.shape)} is sparse, and "
                'offload="gradients" sums whole tensors in host memory: use sparse=False, or pass offload="master".'
            )
        total, known = self._total_of(parameter), self.float32.get(parameter)
        values = _in_memory_order(_laid_out_as(gradient, total))
        self.streamer.add(_in_memory_order(total.data), values, replaces=known is None)
        if known is None:
            self.float32[parameter] = total
        else:
            torch.autograd.graph.increment_version(total)  # copies to its data make none
        parameter.grad = None

    def _total_of(self, parameter: Tensor) -> Tensor:
        if (total := self._totals.get(parameter)) is None:
            raise WindowStateError(
                f"a parameter of shape {tuple(parameter.shape)} requires a gradient since the window opened, and "
                'offload="gradients" allocates sums between windows: call requires_grad_() there.'
            )
        return total

    def settle(self, *, discards: bool = False) -> None:
        """Wait until all gradients are added, or until nothing is in progress.

        Raises:
            RuntimeError: The device failed.
            WindowStateError: A gradient was added in part, and the sums are not discarded.
        """
        if discards:
            self.streamer.discard()
            self._factor = 1.0
        else:
            self.streamer.wait()

    def norms(self, totals: Sequence[Tensor]) -> list[Tensor]:
        """Return the 2-norm of each of these sums, 0-d, on the device: with the bits of a sum that is there.

        Raises:
            MemoryLimitError: The device has too little memory.
        """
        transfers, wanted = self._transfers, set(totals)
        found: dict[Tensor, Tensor] = {}
        chunks = [chunk for chunk in self._chunks if not wanted.isdisjoint(chunk.views)]
        try:
            arena = Arena(transfers, [chunk.host.nbytes for chunk in chunks], SLOT_FACTOR * CHUNK_BYTES)
        except torch.OutOfMemoryError as error:
            raise MemoryLimitError(
                f"memory ran out for the norm of the gradient sums ({first_line(error)}): nothing was updated. Leave "
                "more memory for the update: train fewer parameters, or in lower precision."
            ) from error
        try:
            for chunk in chunks:
                place = arena.place(chunk.host.nbytes)
                transfers.use(transfers.to_device(place.memory, chunk.host, after=place.after))
                for entry, total in zip(chunk.entries, chunk.views, strict=True):
                    if total in wanted:
                        found[total] = torch.nn.utils.get_total_norm([entry.view(place.memory)])
                arena.release(place, transfers.computed())
        finally:
            transfers.finish()
        return [found[total] for total in totals]

    def scale(self, factor: float) -> None:
        """Let the update multiply the sums by a factor, on the device."""
        self._factor *= factor

    @contextmanager
    def in_grad(
        self, chunk: StateChunk, memory: Tensor, masters: Mapping[Tensor, Tensor]
    ) -> Iterator[Mapping[Tensor, Tensor]]:
        """Let ``.grad`` of the parameters of a chunk be their scaled sums inside; yield those of master weights.

        Args:
            chunk: Whose sums are on the device.
            memory: With the sums.
            masters: Parameters whose ``.grad`` the caller sets.
        """
        assert chunk.sums is not None, "prepare was called"
        found = {e.parameter: e.view(memory) for e in chunk.sums.entries if e.parameter in self.float32}
        if found and self._factor != 1.0:
            torch._foreach_mul_(list(found.values()), self._factor)
        own = [parameter for parameter in found if parameter not in masters]
        try:
            for parameter in own:
                parameter.grad = found[parameter].to(parameter.dtype)
            yield found
        finally:
            for parameter in own:
                parameter.grad = None


def _laid_out_as(gradient: Tensor, total: Tensor) -> Tensor:
    """Return a gradient whose elements are in the order of its sum in memory."""
    if gradient.stride() == total.stride():
        return gradient
    memory = torch.empty_strided(total.shape, total.stride(), dtype=gradient.dtype, device=gradient.device)
    return memory.copy_(gradient)


def _in_memory_order(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,))
