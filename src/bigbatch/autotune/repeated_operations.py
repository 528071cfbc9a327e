"""Outputs of operations on fake tensors, made from what the same operation returned before for inputs of these shapes.

    run = RepeatedOperations(mode)                     mode: FakeTensorMode
    with mode, AllocationTracker(device, run=run):
        layer(layer(inputs))                           the second layer runs none of its operations

A step repeats few operations in many layers. `FakeTensorMode` remembers outputs as well, but by 17 attributes of each
input, which take most of its time. What is not certain to be repeatable is passed on to it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from types import NoneType
from typing import Any, ClassVar

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

PLAIN_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
)
VALUES = frozenset(
    {int, float, bool, str, NoneType, torch.dtype, torch.device, torch.layout, torch.memory_format}
)  # arguments that are compared as they are; not their subclasses
DEPENDS_ON_MORE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)
MAX_KNOWN = 20_000  # a large model's step has some hundreds of different operations
_UNKNOWN = object()


class RepeatedOperations:
    """Runs each operation of ATen once for inputs of the same shapes, strides and values.

    Outputs are an input that was written to, a view of an input, or new. Operations that read data, change the shape of
    an input, or are not of ATen run every time.

    Args:
        mode: The mode of the fake tensors, which is active.
    """

    _known: ClassVar["dict[tuple[Any, ...], _Outputs | None]"] = {}  # of all modes, as `FakeTensorMode.cache` is

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what an operation returns."""
        key: list[Any] = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        inputs: list[FakeTensor] = []
        if not self._append(args, key, inputs) or not self._append(kwargs.items(), key, inputs) or not inputs:
            return func(*args, **kwargs)
        found = self._known.get(names := tuple(key), _UNKNOWN)
        if isinstance(found, _Outputs):
            return found.make(self._mode, inputs)
        if found is None:
            return func(*args, **kwargs)
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        before = [_description(tensor) for tensor in inputs]
        result = func(*args, **kwargs)
        self._known[names] = _outputs_of(func, inputs, before, result)
        return result

    def _append(self, values: Iterable[Any], key: list[Any], inputs: list[FakeTensor]) -> bool:
        """Append what outputs depend on to the key, and the tensors to the inputs; return False if it is not known."""
        for value in values:
            kind = type(value)
            if kind is FakeTensor:
                if not _is_plain(value) or value.fake_mode is not self._mode:
                    return False
                key.append(_description(value))
                inputs.append(value)
            elif kind in VALUES:
                key += (kind, value)
            elif kind is list or kind is tuple:
                key += (kind, len(value))
                if not self._append(value, key, inputs):
                    return False
            else:
                return False
        return True


def _is_plain(tensor: FakeTensor) -> bool:
    return (
        tensor.dtype in PLAIN_DTYPES
        and tensor.layout is torch.strided
        and tensor.constant is None
        and not tensor.is_neg()
    )


def _description(tensor: FakeTensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.fake_device


@dataclass(frozen=True, slots=True)
class _Output:
    """One output: the input at ``place``, a view of it with the description, new without a place, or a value."""

    place: int | None = None
    description: tuple[Any, ...] | None = None
    value: Any = None

    def make(self, mode: FakeTensorMode, inputs: list[FakeTensor]) -> Any:
        if self.description is None:
            return self.value if self.place is None else inputs[self.place]
        shape, stride, offset, dtype, device = self.description
        if self.place is None:
            meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        else:
            meta = torch.empty(0, dtype=dtype, device="meta")
            meta.set_(inputs[self.place].untyped_storage(), offset, shape, stride)
        return FakeTensor(mode, meta, device)


@dataclass(frozen=True, slots=True)
class _Outputs:
    """The outputs of an operation; ``container`` is the type that it returns them in, None for a single one."""

    outputs: tuple[_Output, ...]
    container: type | None

    def make(self, mode: FakeTensorMode, inputs: list[FakeTensor]) -> Any:
        guard = torch._C._DisableTorchDispatch()
        try:
            made = [output.make(mode, inputs) for output in self.outputs]
        finally:
            del guard
        return made[0] if self.container is None else self.container(made)


def _outputs_of(func: Any, inputs: list[FakeTensor], before: list[Any], result: Any) -> _Outputs | None:
    """Return how to make the outputs again; None if they may depend on more than the shapes of the inputs."""
    if not isinstance(func, OpOverload) or func.namespace != "aten" or any(tag in func.tags for tag in DEPENDS_ON_MORE):
        return None
    if before != [_description(tensor) for tensor in inputs]:
        return None
    container = type(result) if type(result) in (list, tuple) else None
    outputs, new_storages = [], []
    for value in [result] if container is None else result:
        output = _output_of(value, inputs)
        if output is None:
            return None
        if output.place is None and output.description is not None:
            new_storages.append(value.untyped_storage()._cdata)
        outputs.append(output)
    if len(set(new_storages)) < len(new_storages):
        return None
    return _Outputs(tuple(outputs), container)


def _output_of(value: Any, inputs: list[FakeTensor]) -> _Output | None:
    if value is None or type(value) in (int, float, bool):
        return _Output(value=value)
    for place, tensor in enumerate(inputs):
        if value is tensor:
            return _Output(place=place)
    if type(value) is not FakeTensor or not _is_plain(value) or value.requires_grad:
        return None
    storage = value.untyped_storage()
    for place, tensor in enumerate(inputs):
        if tensor.untyped_storage()._cdata == storage._cdata:
            return _Output(place=place, description=_description(value))
    if value.storage_offset() or storage.nbytes() != _bytes_of(value):
        return None
    return _Output(description=_description(value))


def _bytes_of(tensor: FakeTensor) -> int:
    """Return the bytes of the smallest storage for the shape and strides of a tensor."""
    if not tensor.numel():
        return 0
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + sum(steps)) * tensor.element_size()
