"""Every allocation of a stretch of code, with or without data behind the tensors."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CUDA_UNIT = 512  # bytes: what torch's CUDA allocator rounds each allocation up to


class Part(Enum):
    """What memory is taken for."""

    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"
    LOSS = "loss"


class Tracker(TorchDispatchMode):
    """Counts the bytes of all tensors on one device that are made while it is active, and when they were most.

        with Tracker(device) as tracker:
            tracker.hold(model.parameters(), Part.PARAMETERS)
            ...
        tracker.peak_bytes, tracker.parts_at_peak

    A tensor counts from the operation that makes it until its storage is freed; views count once, with their storage.
    Memory that a kernel takes and gives back within one operation is not seen. Slows every operation down by some
    microseconds: it is for measuring, not for training.

    Where tensors have no data (`torch._subclasses.FakeTensorMode` around it), a value that the code reads comes out as
    1 or True.

    Args:
        device: What is made elsewhere does not count.
        unit: Bytes that each allocation is rounded up to; by default what torch's allocator does on that device.

    Attributes:
        part: What allocations are counted as; a value or a function that gives it.
        live_bytes: Bytes by part at this moment.
        parts_at_peak: Bytes by part when they were most in all.
    """

    def __init__(self, device: torch.device, *, unit: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._type = device.type
        self._unit = unit or (CUDA_UNIT if device.type == "cuda" else 1)
        self._storages: dict[int, _Storage] = {}
        self._now = 0
        self.part: Part | Callable[[], Part] = Part.ACTIVATIONS
        self.live_bytes: Counter[Part] = Counter()
        self.parts_at_peak: Counter[Part] = Counter()
        self.peak_bytes = 0

    def hold(self, tensors: Iterable[Tensor], part: Part) -> None:
        """Count tensors that are there already, or count them as something else from now on."""
        for tensor in tensors:
            if tensor.device.type != self._type:
                continue
            self._count(tensor, part)
            storage = self._storages[tensor.untyped_storage()._cdata]
            self.live_bytes[storage.part] -= storage.num_bytes
            self.live_bytes[part] += storage.num_bytes
            storage.part = part

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
            return _stand_in(args[0].dtype)
        if func is torch.ops.aten.equal.default and _has_no_data(args[0]):
            return True
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._see(result)
        elif isinstance(result, tuple | list):
            for part in result:
                if isinstance(part, Tensor):
                    self._see(part)
        return result

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type == self._type:
            self._count(tensor, self.part)

    def _count(self, tensor: Tensor, part: Part | Callable[[], Part]) -> None:
        try:
            memory = tensor.untyped_storage()
        except NotImplementedError:  # sparse tensors have none; their indices and values are tensors of their own
            return
        key = memory._cdata
        if key in self._storages:
            return
        num_bytes = -(-memory.nbytes() // self._unit) * self._unit
        kind = part if isinstance(part, Part) else part()
        # The reference dies with the memory, not with this Python object: torch keeps one object for each memory.
        self._storages[key] = _Storage(num_bytes, kind, weakref.ref(memory, lambda _: self._free(key)))
        self.live_bytes[kind] += num_bytes
        self._now += num_bytes
        if self._now > self.peak_bytes:
            self.reset_peak()

    def _free(self, key: int) -> None:
        storage = self._storages.pop(key)
        self.live_bytes[storage.part] -= storage.num_bytes
        self._now -= storage.num_bytes


class _Storage:
    __slots__ = ("num_bytes", "part", "reference")

    def __init__(self, num_bytes: int, part: Part, reference: "weakref.ref[Any]") -> None:
        self.num_bytes = num_bytes
        self.part = part
        self.reference = reference


def _has_no_data(tensor: object) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)


def _stand_in(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1
