"""Keep the tensors that micro-batches save for their backward in host memory.

Of one micro-batch they are most of its memory, and those of all micro-batches are kept until the backward.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

SMALLEST_BYTES = 65_536  # smaller tensors stay: copying them costs more time than it saves memory


@dataclass(frozen=True)
class _HostCopy:
    values: Tensor
    device: torch.device

    def on_device(self) -> Tensor:
        return self.values.to(self.device, non_blocking=True)


class HostTensors:
    """Moves what one micro-batch saves for its backward to pinned host memory, and back when it is read.

    Copies run on the current stream, in order with the kernels that write and read the values. A tensor that several
    operations save is copied once.

    Args:
        device: Tensors on it are moved.
        resident: Those that stay there, as parameters and buffers do; so do views and casts of parameters.
    """

    def __init__(self, device: torch.device, resident: Iterable[Tensor]) -> None:
        self._kind = device.type
        self._resident = {_storage(tensor) for tensor in resident if tensor.device.type == device.type}
        self._copies: dict[Any, tuple[Any, _HostCopy]] = {}  # by storage and form, with a weak reference to the storage

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Move what is saved inside: the forward of the micro-batch."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._copies.clear()

    @property
    def is_moving(self) -> bool:
        """Whether what an operation saves now is moved: not inside activation checkpoints, which save nothing."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return hooks is not None and hooks[0] == self._pack

    def _pack(self, tensor: Tensor) -> Any:
        if not self._moves(tensor):
            return tensor
        form = (tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.dtype, tensor._version)
        key = (_storage(tensor), form)
        known = self._copies.get(key)
        if known is not None and not known[0].expired():
            return known[1]
        copy = _HostCopy(_to_host(tensor), tensor.device)
        # The address of a storage is not used again as long as there is a weak reference to it.
        self._copies[key] = StorageWeakRef(tensor.untyped_storage()), copy  # type: ignore[no-untyped-call]
        self._copies = {key: entry for key, entry in self._copies.items() if not entry[0].expired()}
        return copy

    def _moves(self, tensor: Tensor) -> bool:
        return (
            tensor.device.type == self._kind
            and type(tensor) is Tensor
            and tensor.layout is torch.strided
            and tensor.nbytes >= SMALLEST_BYTES
            and _storage(tensor) not in self._resident
            and not _is_of_parameter(tensor)
        )


def _unpack(packed: Any) -> Tensor:
    return packed.on_device() if isinstance(packed, _HostCopy) else packed


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _is_of_parameter(tensor: Tensor) -> bool:
    """Return whether it is a view or a cast of a parameter, as autocast makes and shares."""
    node: Any = tensor.grad_fn
    for _ in range(4):
        if node is None or len(node.next_functions) != 1:
            return False
        node = node.next_functions[0][0]
        if type(node).__name__ == "AccumulateGrad":
            return isinstance(node.variable, nn.Parameter)
    return False


def _to_host(tensor: Tensor) -> Tensor:
    """Return a copy in pinned memory with the same strides, or in other memory if none can be pinned."""
    try:
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
    except RuntimeError:  # the system limits how much can be pinned
        return tensor.detach().to("cpu", copy=True)
    return host.copy_(tensor.detach(), non_blocking=True)
