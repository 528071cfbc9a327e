"""Inputs of checkpointed layers in host memory: copied there in forward, and back one layer ahead in backward.

    forward   input of a layer ──copy──▶ host     while the layer computes; freed on the device one layer later
    backward  host ──copy──▶ device               while the layer after it is recomputed and differentiated

A copy changes no bit, so that gradients are those of activation checkpointing without it.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bigbatch.offload.host_buffers import HostBuffers
from bigbatch.offload.transfers import Transfers, make_transfers

MAX_LEAVING = 2
"""Inputs on the device whose copies to the host may be in progress, that of the running layer included. Before the next
layer runs, the computation waits for the copy of the oldest, and its memory is free."""


class LayerInputs:
    """Runs checkpointed layers whose inputs are in host memory from their forward to their backward.

        inputs = LayerInputs()
        for layer in layers:
            hidden = inputs.run(checkpoint, layer is not layers[-1], layer, hidden, mask)
        loss(hidden).backward()

    The first positional argument of a layer is its input: only that is copied, if it is contiguous. Host memory stays
    allocated, and pinned, for later micro-batches. Inputs of a graph that is dropped, such as that of a micro-batch
    that ran out of memory, are dropped with it.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[torch.device, bool], _Place] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerInputs":
        """Return one without memory, for the layers of a copied model."""
        return LayerInputs()

    @property
    def host_bytes(self) -> int:
        """Host memory that is allocated."""
        return sum(place.buffers.num_bytes for place in self._places.values())

    @property
    def transfers(self) -> list[Transfers]:
        """The transfers of each device so far."""
        return [place.transfers for place in self._places.values()]

    def release(self) -> None:
        """Free the host memory that no graph uses."""
        for place in self._places.values():
            place.reclaim()
            place.buffers.release()

    def run(
        self, checkpointed: Callable[..., Any], leaves: bool, layer: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Run a layer by ``checkpointed(function, *args, **kwargs)``, which runs the function again in backward.

        Args:
            checkpointed: `torch.utils.checkpoint.checkpoint` without reentrance.
            leaves: Whether the input leaves the device. That of the last layer is needed first.
            layer: Runs the layer.
            args: Of the layer, its input first.
            kwargs: Of the layer.

        Raises:
            RuntimeError: The first argument is no tensor; or a CUDA graph is being captured, which would replay the
                copies of this micro-batch.
            torch.OutOfMemoryError: The device or the host has too little memory.
        """
        if not torch.is_grad_enabled():
            return checkpointed(layer, *args, **kwargs)
        if not args or not isinstance(args[0], Tensor):
            raise RuntimeError(
                "a layer is called without its input as the first positional argument, which checkpointing with "
                "offload copies to the host: use full activation checkpointing."
            )
        hidden = args[0]
        if hidden.is_cuda and not isinstance(hidden, FakeTensor) and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("inputs of layers in host memory are not captured in CUDA graphs")
        saved = self._place_of(hidden).save(hidden, leaves=leaves)
        device = hidden.new_empty(0)  # checkpoint finds the device, for random states and autocast, by tensors
        return checkpointed(partial(_run_with_input, layer), saved, device, *args[1:], **kwargs)

    def _place_of(self, tensor: Tensor) -> "_Place":
        key = tensor.device, isinstance(tensor, FakeTensor)
        if key not in self._places:
            self._places[key] = _Place(_WithoutData(key[0]) if key[1] else make_transfers(key[0]))
        return self._places[key]


def _run_with_input(
    layer: Callable[..., Any], saved: "_SavedInput", _device: Tensor, /, *args: Any, **kwargs: Any
) -> Any:
    return layer(saved.take(), *args, **kwargs)


class _Input:
    """An input that is in host memory, on the device, or between the two."""

    def __init__(self, tensor: Tensor) -> None:
        self.like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        self.on_device: Tensor | None = tensor
        self.version = tensor._version
        self.buffer: Tensor | None = None  # None if it stays on the device
        self.host: Tensor | None = None
        self.leaving: Any = None  # copy to the host; while on_device is the input itself
        self.arriving: Any = None  # copy to on_device

    @property
    def is_on_host_only(self) -> bool:
        return self.host is not None and self.on_device is None


class _SavedInput:
    """An argument of checkpoint in the place of the input of a layer; lives as long as the graph of the layer."""

    def __init__(self, place: "_Place", entry: _Input, hidden: Tensor) -> None:
        self._place, self._entry = place, entry
        self._first: Tensor | None = hidden
        self._kept = hidden.detach() if entry.host is None else None
        self._requires_grad = hidden.requires_grad

    def take(self) -> Tensor:
        """Return the input: in forward itself, in backward a tensor with its values."""
        if self._first is not None:
            first, self._first = self._first, None
            return first
        tensor = self._place.load(self._entry, self._kept)
        return tensor.detach().requires_grad_(self._requires_grad)

    def __del__(self) -> None:
        self._place.dropped.append(self._entry)  # in any thread; the next call that copies frees it


class _Place:
    """The inputs on one device and their host memory."""

    def __init__(self, transfers: Transfers) -> None:
        self.transfers = transfers
        self.buffers = HostBuffers(transfers, is_limited=not isinstance(transfers, _WithoutData))
        self.dropped: deque[_Input] = deque()  # of graphs that are gone
        self._inputs: list[_Input] = []  # of graphs that exist, in the order of their forwards
        self._leaving: deque[_Input] = deque()

    def save(self, hidden: Tensor, *, leaves: bool) -> _SavedInput:
        """Start to copy an input to the host, or keep it."""
        self.reclaim()
        while len(self._leaving) > (MAX_LEAVING - 1 if leaves else 0):
            self._free_on_device(self._leaving.popleft())
        source = hidden.detach()  # a reference to the graph would keep it alive
        entry = _Input(source)
        if leaves and hidden.is_contiguous() and hidden.numel():
            self._send(entry, source)
        else:
            entry.on_device = None  # held by what is returned
        self._inputs.append(entry)
        return _SavedInput(self, entry, hidden)

    def _send(self, entry: _Input, source: Tensor) -> None:
        buffer = self.buffers.take(source.nbytes)
        try:
            host = buffer[: source.nbytes].view(source.dtype).as_strided(source.shape, source.stride())
            entry.leaving = self.transfers.to_host(host, source)
        except BaseException:
            self.buffers.put(buffer)
            raise
        entry.host, entry.buffer = host, buffer
        self._leaving.append(entry)

    def _free_on_device(self, entry: _Input) -> None:
        """Let the computation wait for the copy to the host; what is allocated later may be in the memory of the input.

        No event of the allocator is needed (``record_stream``), and how much memory is in use does not depend on time.
        """
        self.transfers.use(entry.leaving)
        tensor, entry.on_device, entry.leaving = entry.on_device, None, None
        _check_unchanged(entry, tensor)

    def load(self, entry: _Input, kept: Tensor | None) -> Tensor:
        """Return an input on the device, and start to copy the one before it there."""
        self.reclaim()
        if kept is not None:
            _check_unchanged(entry, kept)
            tensor = kept
        else:
            tensor = self._arrived(entry)
        position = len(self._inputs) - 1 - self._inputs[::-1].index(entry)
        if position and self._inputs[position - 1].is_on_host_only:
            self._fetch(self._inputs[position - 1])
        return tensor

    def _arrived(self, entry: _Input) -> Tensor:
        if entry.is_on_host_only:
            self._fetch(entry)
        tensor = entry.on_device
        assert tensor is not None, "was fetched, or has not left"
        if entry in self._leaving:
            self._leaving.remove(entry)
            self._free_on_device(entry)
        else:
            self.transfers.use(entry.arriving)
            entry.arriving = entry.on_device = None
        return tensor

    def _fetch(self, entry: _Input) -> None:
        """Start to copy an input to the device."""
        assert entry.host is not None, "it left the device"
        like = entry.like
        target = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self.transfers.device)
        entry.arriving = self.transfers.to_device(target, entry.host, after=[self.transfers.computed()])
        entry.on_device = target

    def reclaim(self) -> None:
        """Free what belongs to graphs that are gone: after its copies, whether they were used or not."""
        while self.dropped:
            entry = self.dropped.popleft()
            self._inputs.remove(entry)
            if entry in self._leaving:
                self._leaving.remove(entry)
                self.transfers.use(entry.leaving)
            elif entry.on_device is not None:
                self.transfers.use(entry.arriving)
            entry.on_device = None
            if entry.buffer is not None:
                self.buffers.put(entry.buffer)


def _check_unchanged(entry: _Input, tensor: Tensor | None) -> None:
    """Refuse an input that was written to in place, as autograd does: its copy may have the values before or after."""
    if tensor is not None and tensor._version != entry.version:
        raise RuntimeError(
            "the input of a checkpointed layer was modified by an inplace operation after the layer, "
            "which is recomputed from it: use a mode of activation checkpointing that does not recompute it."
        )


class _WithoutData(Transfers):
    """Transfers of fake tensors: a prediction counts what is on the device, and host memory is on the device "meta"."""

    def host_memory(self, num_bytes: int) -> Tensor:
        """Return memory that is not counted, uint8 ``[num_bytes]``."""
        return torch.empty(num_bytes, dtype=torch.uint8, device="meta")

    def _copy_to_device(self, target: Tensor, source: Tensor, after: Any) -> Any:
        return None

    def _copy_to_host(self, target: Tensor, source: Tensor) -> Any:
        return None
