"""Gradient sums in host memory: backward copies each gradient there, and the update streams the sums to the device.

backward   gradient ──copy──▶ added to the sum by a thread of the host
update     sums of a chunk ──copy──▶ beside its state, scaled there, in ``.grad`` during its step
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bigbatch.errors import InputError, WindowStateError
from bigbatch.gradients.sum_store import SumStore
from bigbatch.offload.host_adder import HostAdder
from bigbatch.offload.state_chunk import ChunkSums, StateChunk, lay_out
from bigbatch.offload.transfers import Transfers

NORM_BLOCK = 2**16
"""Elements whose norm is computed at once: of 1.3 · 10⁸, torch's norm on the CPU was 0.6 % too low, and 3 · 10⁻⁸ from
the norms of blocks (torch 2.13)."""

SUM = "gradient sum"
"""In the place of a name of the state."""


class HostSums(SumStore):
    """The gradient sums of one window after the other, in memory that stays allocated and pinned.

    Args:
        transfers: Copy gradients from the device.

    Attributes:
        float32: Sums of the parameters that have received a gradient, in the dtype of their sums.
        adder: Adds gradients.
    """

    moves_all = True

    def __init__(self, transfers: Transfers) -> None:
        super().__init__()
        self._transfers = transfers
        self.adder = HostAdder(transfers)
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
        self.adder.prepare()
        self._totals = {}
        for chunk in chunks:
            wanted = [p for p in chunk.parameters if p.requires_grad]
            if chunk.sums is None or not chunk.sums.holds(wanted, self.dtype_of):
                chunk.sums = self._allocate(wanted)
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
            WindowStateError: The sum cannot be used: its gradient was added in part, or an earlier one was not.
        """
        if gradient.layout is not torch.strided:
            raise InputError(
                f"the gradient of a parameter of shape {tuple(parameter.shape)} is sparse, and "
                'offload="gradients" sums whole tensors in host memory: use sparse=False, or pass offload="master".'
            )
        total, known = self._total_of(parameter), self.float32.get(parameter)
        values = _in_memory_order(_laid_out_as(gradient, total))
        self.adder.add(_in_memory_order(total.data), values, replaces=known is None)
        if known is None:
            self.float32[parameter] = total
        else:
            torch.autograd.graph.increment_version(total)  # the thread writes without one
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
            WindowStateError: A gradient was not added, and the sums are not discarded.
        """
        if discards:
            self.adder.discard()
            self._factor = 1.0
        else:
            self.adder.wait()

    def norm_parts(self, gradients: list[Tensor]) -> list[Tensor]:
        """Return tensors with the 2-norm of these sums: norms of blocks in the place of large ones."""
        return [_norms_of_blocks(total) if total.numel() > NORM_BLOCK else total for total in gradients]

    def scale(self, factor: float) -> None:
        """Let the update multiply the sums by a factor, on the device."""
        self._factor *= factor

    @property
    def host_bytes(self) -> int:
        """Staging memory; that of the sums is counted by chunk."""
        return self.adder.host_bytes

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


def _norms_of_blocks(total: Tensor) -> Tensor:
    values = _in_memory_order(total)
    whole = len(values) // NORM_BLOCK * NORM_BLOCK
    norms = torch.linalg.vector_norm(values[:whole].view(-1, NORM_BLOCK), dim=1)
    return torch.cat([norms, torch.linalg.vector_norm(values[whole:]).reshape(1)])
