"""Undo what a forward writes to parameters, with copies of only those that it writes to.

A momentum encoder, or a layer that normalizes its weights, writes to parameters in its forward. Copies of all
parameters would need as much host memory as the model.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bigbatch.trials.tensor_state import TensorState


class ParameterWrites(TorchDispatchMode):
    """Dispatch mode that copies a parameter to the host before the first operation that writes to its storage.

        with ParameterWrites.restored(parameters) as writes:
            with writes:
                run_once()
            run_again()             # not watched, and as fast as ever: writes to the same parameters are undone too

    Args:
        parameters: Dense tensors; those of other kinds are ignored.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._states: list[TensorState] = []
        self._unwritten: dict[int, list[Tensor]] = {}  # by address of the storage
        for parameter in dict.fromkeys(parameters):
            if TensorState.of(parameter, copied=False).alias is not None and parameter.numel():
                self._unwritten.setdefault(_address(parameter), []).append(parameter)

    @classmethod
    @contextmanager
    def restored(cls, parameters: Iterable[Tensor]) -> Iterator[Self]:
        """Yield a mode, and on exit restore the parameters that were written to under it."""
        writes = cls(parameters)
        try:
            yield writes
        finally:
            for state in writes._states:
                state.restore()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            for position, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._save(args[position] if position < len(args) else kwargs.get(argument.name))
        return func(*args, **kwargs)

    def _save(self, written: Any) -> None:
        for value in written if isinstance(written, list | tuple) else (written,):
            if isinstance(value, Tensor) and TensorState.of(value, copied=False).alias is not None:
                self._states += map(TensorState.of, self._unwritten.pop(_address(value), ()))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
