"""Track every tensor allocation in a region of code, for real and for fake tensors."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

CUDA_UNIT = 512  # bytes: torch's CUDA allocator rounds each allocation up to a multiple
MAX_READS = 20_000  # of values of fake tensors: a loop that waits for a certain value would never end


class MemoryCategory(Enum):
    """Purpose of an allocation."""

    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"
    LOSS = "loss"


class AllocationTracker(TorchDispatchMode):
    """Dispatch mode that counts the bytes of all tensors created on one device while it is active, and their peak.

        with AllocationTracker(device) as tracker:
            tracker.track(model.parameters(), MemoryCategory.PARAMETERS)
            ...
        tracker.peak_bytes, tracker.parts_at_peak

    A tensor counts from the operation that creates it until its storage is freed. Views count once, with their storage;
    a resized storage counts with its size at the last operation on it. For sparse tensors and wrapper subclasses, the
    tensors inside count. Temporary memory within one kernel is not seen. Adds some microseconds to every operation:
    for measurement, not for training.

    Under `torch._subclasses.FakeTensorMode`, a value that the code reads is 1 or True. More than 20,000 such reads
    raise a RuntimeError, because the code may be looping until the value changes.

    Args:
        device: The device to count, by type and index; without an index, all devices of the type.
        unit: Bytes that each allocation is rounded up to; by default as torch's allocator rounds on that device.
        run: Called with each operation, its arguments and its keyword arguments; returns what the operation returns.

    Attributes:
        category: Category of new allocations, or a function that returns it; see `set_category`.
        live_bytes: Bytes by category now.
        parts_at_peak: Bytes by category at the peak of the total.
        peak_bytes: The peak of the total, in bytes, since the start or the last `reset_peak`.
    """

    def __init__(
        self, device: torch.device, *, unit: int | None = None, run: Callable[[Any, Any, Any], Any] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = run or _run
        self._device = device
        self._unit = unit or (CUDA_UNIT if device.type == "cuda" else 1)
        self._storages: dict[int, _Storage] = {}
        self._total_bytes = 0
        self._num_reads = 0
        self.category: MemoryCategory | Callable[[], MemoryCategory] = MemoryCategory.ACTIVATIONS
        self.live_bytes: Counter[MemoryCategory] = Counter()
        self.parts_at_peak: Counter[MemoryCategory] = Counter()
        self.peak_bytes = 0

    def track(self, tensors: Iterable[Tensor], category: MemoryCategory) -> None:
        """Count tensors that already exist, or move them to another category."""
        for tensor in tensors:
            for storage in self._count_tensor(tensor, category):
                self.live_bytes[storage.category] -= storage.num_bytes
                self.live_bytes[category] += storage.num_bytes
                storage.category = category

    def set_category(self, category: MemoryCategory | Callable[[], MemoryCategory]) -> None:
        """Set the category of new allocations, or a function that returns it."""
        self.category = category

    def reset_peak(self) -> None:
        """Reset the peak to the bytes that are live now."""
        self.peak_bytes = self._total_bytes
        self.parts_at_peak = self.live_bytes.copy()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # two of three operations on fake tensors: faster than by their mode
            return args[0].fake_device if _has_no_data(args[0]) else func(*args)
        if func is torch.ops.aten._local_scalar_dense.default and _has_no_data(args[0]):
            self._count_read()
            return _placeholder(args[0].dtype)
        if func is torch.ops.aten.equal.default and _has_no_data(args[0]):
            self._count_read()
            return True
        if _is_addmm_with_wide_out(func) and _has_no_data(kwargs and kwargs.get("out")):
            return kwargs["out"]  # type: ignore[index]
        result = self._run(func, args, kwargs or {})
        self._count_all(result)
        return result

    def _count_read(self) -> None:
        self._num_reads += 1
        if self._num_reads > MAX_READS:
            raise RuntimeError(f"more than {MAX_READS:,} tensor values were read, perhaps in a loop that waits for one")

    def _count_all(self, result: Any) -> None:
        if isinstance(result, Tensor):
            self._count_tensor(result, self.category)
        elif isinstance(result, tuple | list):
            for part in result:
                self._count_all(part)

    def _count_tensor(
        self, tensor: Tensor, category: MemoryCategory | Callable[[], MemoryCategory]
    ) -> "list[_Storage]":
        """Count storages of a tensor that are new or were resized; return all of its storages on the device."""
        if not _is_on(tensor.device, self._device):
            return []
        return [self._count_storage(memory, category) for memory in storages(tensor)]

    def _count_storage(
        self, memory: torch.UntypedStorage, category: MemoryCategory | Callable[[], MemoryCategory]
    ) -> "_Storage":
        key = memory._cdata
        num_bytes = -(-memory.nbytes() // self._unit) * self._unit
        storage = self._storages.get(key)
        if storage is None:
            # The reference dies with the storage, not with this Python object: torch keeps one object per storage.
            reference = weakref.ref(memory, lambda _: self._free(key))
            storage = _Storage(0, category if isinstance(category, MemoryCategory) else category(), reference)
            self._storages[key] = storage
        if num_bytes != storage.num_bytes:
            self.live_bytes[storage.category] += num_bytes - storage.num_bytes
            self._total_bytes += num_bytes - storage.num_bytes
            storage.num_bytes = num_bytes
            if self._total_bytes > self.peak_bytes:
                self.reset_peak()
        return storage

    def _free(self, key: int) -> None:
        storage = self._storages.pop(key)
        self.live_bytes[storage.category] -= storage.num_bytes
        self._total_bytes -= storage.num_bytes


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


class _Storage:
    __slots__ = ("category", "num_bytes", "reference")

    def __init__(self, num_bytes: int, category: MemoryCategory, reference: "weakref.ref[Any]") -> None:
        self.num_bytes = num_bytes
        self.category = category
        self.reference = reference


def tensors_in(tree: Any) -> list[Tensor]:
    """Return all tensors in nested mappings, lists, tuples and sets; ignore values of other types."""
    found: list[Tensor] = []
    stack = [tree]
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Mapping):
            stack.extend(value.values())
        elif isinstance(value, list | tuple | set):
            stack.extend(value)
    return found


def storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of a tensor: one, or several for sparse tensors and wrapper subclasses.

    Yields nothing for uninitialized parameters of lazy modules and for layouts without an accessible storage.
    """
    if is_lazy(tensor):
        return
    if is_traceable_wrapper_subclass(tensor):
        inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        for value in inner:
            if isinstance(value, Tensor):  # a DTensor of torch 2.13 also names its device mesh
                yield from storages(value)
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


def _is_on(device: torch.device, target: torch.device) -> bool:
    return device.type == target.type and (None in (device.index, target.index) or device.index == target.index)


def _is_addmm_with_wide_out(func: Any) -> bool:
    """Return whether it is ``addmm.dtype_out``, which torch 2.11 cannot run on fake tensors; it allocates nothing."""
    return func is getattr(torch.ops.aten.addmm, "dtype_out", None)


def _has_no_data(tensor: object) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)


def _placeholder(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1
