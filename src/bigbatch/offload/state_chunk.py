"""A part of an optimizer's state that is copied as one: some parameters of a group, in one flat buffer of host memory.

state of each parameter → entries with offsets → views of the host buffer, or of memory of the device
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bigbatch.errors import InputError

if TYPE_CHECKING:
    from torch.optim import Optimizer

MASTER = "master weight"
"""In the place of a name of the state: the float32 value of a parameter that is bfloat16 on the device."""

_ALIGNMENT = 256  # bytes: of an allocation on CUDA


class StateEntry(NamedTuple):
    """One tensor of the state.

    Attributes:
        parameter, name: Its place: ``optimizer.state[parameter][name]``.
        offset: In bytes, in the buffer.
        dtype, shape, stride: Its layout.
    """

    parameter: Tensor
    name: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Memory of the tensor."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def view(self, buffer: Tensor) -> Tensor:
        """Return the tensor as a view of a buffer, uint8."""
        part = buffer[self.offset : self.offset + self.num_bytes].view(self.dtype)
        return part.as_strided(self.shape, self.stride, part.storage_offset())

    def host_view(self, buffer: Tensor) -> Tensor:
        """Return the tensor as memory of a buffer in host memory, but with a storage of its own.

        ``torch.save`` writes whole storages, and refuses tensors of several dtypes in one.
        """
        if not self.num_bytes:
            return torch.empty(self.shape, dtype=self.dtype)
        memory: Any = (ctypes.c_char * self.num_bytes).from_address(buffer.data_ptr() + self.offset)
        memory.owner = buffer  # lives as long as the tensor
        return torch.frombuffer(memory, dtype=self.dtype).as_strided(self.shape, self.stride)

    def has_layout_of(self, value: Tensor) -> bool:
        """Return whether a tensor can be copied to this one without a change of layout."""
        return value.dtype == self.dtype and value.shape == self.shape


@dataclass(frozen=True, eq=False)
class ChunkSums:
    """Gradient sums of the parameters of a chunk, in one buffer of host memory.

    Attributes:
        entries: One for each parameter.
        host: The buffer.
        views: The sums in host memory, in the order of ``entries``.
    """

    entries: tuple[StateEntry, ...]
    host: Tensor
    views: tuple[Tensor, ...]

    def totals(self) -> dict[Tensor, Tensor]:
        """Return the sums by parameter."""
        return {entry.parameter: view for entry, view in zip(self.entries, self.views, strict=True)}

    def holds(self, parameters: Sequence[Tensor], dtype_of: Callable[[Tensor], torch.dtype]) -> bool:
        """Return whether there is a sum for exactly these parameters as they are."""
        return len(parameters) == len(self.entries) and all(
            entry.parameter is parameter and entry.dtype is dtype_of(parameter) and entry.shape == parameter.shape
            for entry, parameter in zip(self.entries, parameters, strict=True)
        )


@dataclass(eq=False)
class StateChunk:
    """Parameters of one group whose state is in one buffer.

    Attributes:
        group: Of the optimizer.
        parameters: Consecutive ones of the group.
        entries: Tensors of their state that are streamed.
        host: The buffer in host memory; None before there is any state.
        views: The tensors in host memory, in the order of ``entries``.
        masters: float32 values of the parameters that are bfloat16 on the device.
        sums: Their gradient sums; None if these are on the device.
    """

    group: dict[str, Any]
    parameters: tuple[Tensor, ...]
    entries: tuple[StateEntry, ...] = ()
    host: Tensor | None = None
    views: tuple[Tensor, ...] = ()
    masters: dict[Tensor, Tensor] = field(default_factory=dict)
    sums: ChunkSums | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffer."""
        return 0 if self.host is None else self.host.nbytes

    @property
    def host_bytes(self) -> int:
        """Host memory, and what the chunk needs of the device: state, then gradient sums."""
        return self.num_bytes + (0 if self.sums is None else self.sums.host.nbytes)

    def holds(self, optimizer: "Optimizer") -> bool:
        """Return whether the streamed state of an optimizer is exactly in this buffer."""
        found = streamed_state(optimizer, self)
        return len(found) == len(self.views) and all(
            value is view and entry.name == name and entry.parameter is parameter
            for (parameter, name, value), entry, view in zip(found, self.entries, self.views, strict=True)
        )

    def show(self, optimizer: "Optimizer", views: Sequence[Tensor]) -> None:
        """Let the optimizer's state refer to other memory, with views in the order of ``entries``."""
        for entry, view in zip(self.entries, views, strict=True):
            if entry.name == MASTER:
                self.masters[entry.parameter] = view
            else:
                optimizer.state[entry.parameter][entry.name] = view


def streamed_state(optimizer: "Optimizer", chunk: StateChunk) -> list[tuple[Tensor, str, Tensor]]:
    """Return the tensors of a chunk that are streamed: parameter, name and value, the master weight first.

    Scalars that the optimizer keeps in host memory, such as counts of steps, are not.

    Raises:
        InputError: A value is a list of tensors or a tensor of another class.
    """
    found = []
    for parameter in chunk.parameters:
        if (master := chunk.masters.get(parameter)) is not None:
            found.append((parameter, MASTER, master))
        for name, value in optimizer.state.get(parameter, {}).items():
            _check_value(optimizer, name, value)
            if isinstance(value, Tensor) and _is_streamed(optimizer, chunk.group, parameter, value):
                found.append((parameter, name, value))
    return found


def lay_out(state: Sequence[tuple[Tensor, str, Tensor]]) -> tuple[tuple[StateEntry, ...], int]:
    """Return entries for some tensors, one after the other, and the bytes of a buffer for all of them."""
    entries, offset = [], 0
    for parameter, name, value in state:
        stride = value.stride() if _fills_its_memory(value) else _contiguous_stride(value.shape)
        entry = StateEntry(parameter, name, offset, value.dtype, tuple(value.shape), tuple(stride))
        entries.append(entry)
        offset += -(-entry.num_bytes // _ALIGNMENT) * _ALIGNMENT
    return tuple(entries), offset


def make_chunks(optimizer: "Optimizer", chunk_bytes: int) -> Iterator[StateChunk]:
    """Cut the parameters of an optimizer into chunks.

    Args:
        optimizer: Its groups are cut in order; no chunk contains parameters of two.
        chunk_bytes: Largest state of a chunk of several parameters, if each has twice the bytes of its parameter in
            float32 or wider.
    """
    for group in optimizer.param_groups:
        chunk: list[Tensor] = []
        size = 0
        for parameter in group["params"]:
            state_bytes = 2 * parameter.numel() * max(4, parameter.element_size())
            if chunk and size + state_bytes > chunk_bytes:
                yield StateChunk(group, tuple(chunk))
                chunk, size = [], 0
            chunk.append(parameter)
            size += state_bytes
        if chunk:
            yield StateChunk(group, tuple(chunk))


def _is_streamed(optimizer: "Optimizer", group: Mapping[str, Any], parameter: Tensor, value: Tensor) -> bool:
    if value.ndim or parameter.device.type == "cpu":
        return value.ndim > 0
    on_device = group.get("fused") or group.get("capturable") or isinstance(optimizer, torch.optim.ASGD)
    return bool(on_device) or value.device == parameter.device


def _check_value(optimizer: "Optimizer", name: str, value: Any) -> None:
    if value is None or isinstance(value, bool | int | float | str):
        return
    if type(value) not in (Tensor, torch.nn.Parameter):
        raise InputError(
            f"the state of {type(optimizer).__name__} has {name!r}, a {type(value).__name__}, and offload= streams "
            'plain tensors only: use another optimizer, or offload="none".'
        )


def _fills_its_memory(value: Tensor) -> bool:
    """Return whether the elements of a tensor are its memory without gaps or repeats."""
    expected = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= max(size, 1) if size > 1 else 1
    return True


def _contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
