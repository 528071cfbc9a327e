"""Every allocation of a stretch of code, with or without data behind the tensors."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

CUDA_UNIT = 512  # bytes: what torch's CUDA allocator rounds each allocation up to
MAX_READS = 20_000  # of values that are not there: a loop that waits for one would never end


class MemoryCategory(Enum):
    """What memory is taken for."""

    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"
    LOSS = "loss"


class AllocationTracker(TorchDispatchMode):
    """Counts the bytes of all tensors on one device that are made while it is active, and when they were most.

        with Tracker(device) as tracker:
            tracker.hold(model.parameters(), Part.PARAMETERS)
            ...
        tracker.peak_bytes, tracker.parts_at_peak

    A tensor counts from the operation that makes it until its storage is freed; views count once, with their storage,
    and a storage that is resized counts as large as the last operation on it found it. Of sparse tensors and of
    subclasses that wrap others, what they consist of counts. Memory that a kernel takes and gives back within one
    operation is not seen. Slows every operation down by some microseconds: it is for measuring, not for training.

    Where tensors have no data (`torch._subclasses.FakeTensorMode` around it), a value that the code reads comes out as
    1 or True. Code that reads more than 20,000 of them gets a RuntimeError: it may wait for one to be something else.

    Args:
        device: What is made elsewhere does not count, another device of the same type included; without an index,
            all of a type count.
        unit: Bytes that each allocation is rounded up to; by default what torch's allocator does on that device.

    Attributes:
        part: What allocations are counted as; a value or a function that gives it.
        live_bytes: Bytes by part at this moment.
        parts_at_peak: Bytes by part when they were most in all.
    """

    def __init__(self, device: torch.device, *, unit: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._unit = unit or (CUDA_UNIT if device.type == "cuda" else 1)
        self._storages: dict[int, _Storage] = {}
        self._now = 0
        self._num_reads = 0
        self.part: MemoryCategory | Callable[[], MemoryCategory] = MemoryCategory.ACTIVATIONS
        self.live_bytes: Counter[MemoryCategory] = Counter()
        self.parts_at_peak: Counter[MemoryCategory] = Counter()
        self.peak_bytes = 0

    def track(self, tensors: Iterable[Tensor], category: MemoryCategory) -> None:
        """Count tensors that are there already, or count them as something else from now on."""
        for tensor in tensors:
            for storage in self._see(tensor, category):
                self.live_bytes[storage.part] -= storage.num_bytes
                self.live_bytes[category] += storage.num_bytes
                storage.part = category

    def reset_peak(self) -> None:
        """Forget what was the most, and begin with what there is now."""
        self.peak_bytes = self._now
        self.parts_at_peak = self.live_bytes.copy()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)
        if func is torch.ops.aten._local_scalar_dense.default and _has_no_data(args[0]):
            self._count_read()
            return _placeholder(args[0].dtype)
        if func is torch.ops.aten.equal.default and _has_no_data(args[0]):
            self._count_read()
            return True
        if _fills_what_it_is_given(func) and _has_no_data(kwargs and kwargs.get("out")):
            return kwargs["out"]  # type: ignore[index]
        result = func(*args, **(kwargs or {}))
        self._see_all(result)
        return result

    def _count_read(self) -> None:
        self._num_reads += 1
        if self._num_reads > MAX_READS:
            raise RuntimeError(f"more than {MAX_READS:,} values were read, perhaps in a loop that waits for one")

    def _see_all(self, result: Any) -> None:
        if isinstance(result, Tensor):
            self._see(result, self.part)
        elif isinstance(result, tuple | list):
            for part in result:
                self._see_all(part)

    def _see(self, tensor: Tensor, part: MemoryCategory | Callable[[], MemoryCategory]) -> "list[_Storage]":
        """Count what is new of a tensor, or has another size than before; give all of its storages on the device."""
        if not _is_on(tensor.device, self._device):
            return []
        return [self._count(memory, part) for memory in storages(tensor)]

    def _count(self, memory: torch.UntypedStorage, part: MemoryCategory | Callable[[], MemoryCategory]) -> "_Storage":
        key = memory._cdata
        num_bytes = -(-memory.nbytes() // self._unit) * self._unit
        storage = self._storages.get(key)
        if storage is None:
            # The reference dies with the memory, not with this Python object: torch keeps one object for each memory.
            reference = weakref.ref(memory, lambda _: self._free(key))
            storage = _Storage(0, part if isinstance(part, MemoryCategory) else part(), reference)
            self._storages[key] = storage
        if num_bytes != storage.num_bytes:
            self.live_bytes[storage.part] += num_bytes - storage.num_bytes
            self._now += num_bytes - storage.num_bytes
            storage.num_bytes = num_bytes
            if self._now > self.peak_bytes:
                self.reset_peak()
        return storage

    def _free(self, key: int) -> None:
        storage = self._storages.pop(key)
        self.live_bytes[storage.part] -= storage.num_bytes
        self._now -= storage.num_bytes


class _Storage:
    __slots__ = ("num_bytes", "part", "reference")

    def __init__(self, num_bytes: int, part: MemoryCategory, reference: "weakref.ref[Any]") -> None:
        self.num_bytes = num_bytes
        self.part = part
        self.reference = reference


def tensors_in(tree: Any) -> list[Tensor]:
    """Give the tensors of mappings, lists, tuples and sets in one another; what else there is, is left alone."""
    found: list[Tensor] = []
    todo = [tree]
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Mapping):
            todo.extend(value.values())
        elif isinstance(value, list | tuple | set):
            todo.extend(value)
    return found


def storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Give the memory behind a tensor: one storage; several for sparse tensors and subclasses that wrap tensors.

    None for a parameter that a lazy module has not made yet, and for layouts that tell nothing of their memory.
    """
    if is_lazy(tensor):
        return
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from storages(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        yield from storages(tensor._indices())
        yield from storages(tensor._values())
    elif tensor.layout in _COMPRESSED:
        for part in _COMPRESSED[tensor.layout]:
            yield from storages(getattr(tensor, part)())
    elif tensor.layout is torch.strided:
        yield tensor.untyped_storage()


_BY_ROWS, _BY_COLUMNS = ("crow_indices", "col_indices", "values"), ("ccol_indices", "row_indices", "values")
_COMPRESSED = {
    torch.sparse_csr: _BY_ROWS,
    torch.sparse_bsr: _BY_ROWS,
    torch.sparse_csc: _BY_COLUMNS,
    torch.sparse_bsc: _BY_COLUMNS,
}


def _is_on(device: torch.device, asked: torch.device) -> bool:
    return device.type == asked.type and (None in (device.index, asked.index) or device.index == asked.index)


def _fills_what_it_is_given(func: Any) -> bool:
    """Tell of a product that is added to a wide matrix; torch 2.11 cannot run it without data, and it makes nothing."""
    return func is getattr(torch.ops.aten.addmm, "dtype_out", None)


def _has_no_data(tensor: object) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)


def _placeholder(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1
