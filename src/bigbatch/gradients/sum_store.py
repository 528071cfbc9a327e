"""Where the gradient sum of each parameter is stored: in ``.grad``, or in float32 if the parameter is narrower."""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

HALF_PRECISION_DTYPES = frozenset({torch.bfloat16, torch.float16})


@dataclass
class SumStore:
    """The sums of parameters, found by parameter.

    Attributes:
        float32: Those of parameters in bfloat16 or float16, undivided. All others are in ``.grad``.
        moves_all: Whether ``float32`` has those of all parameters.
        are_integers: Whether ``float32`` has the sums of all parameters, in int64, which cannot be NaN.
    """

    moves_all: ClassVar[bool] = False

    float32: dict[Tensor, Tensor] = field(default_factory=dict)
    are_integers: bool = False

    @staticmethod
    def dtype_of(parameter: Tensor) -> torch.dtype:
        """Return the dtype in which the gradients of a parameter are summed."""
        return torch.float32 if parameter.dtype in HALF_PRECISION_DTYPES else parameter.dtype

    @staticmethod
    def bytes_of(parameters: Iterable[Tensor]) -> int:
        """Return the memory of the sums of all parameters that require a gradient."""
        trained = (parameter for parameter in parameters if parameter.requires_grad)
        return sum(parameter.numel() * SumStore.dtype_of(parameter).itemsize for parameter in trained)

    def get(self, parameter: Tensor) -> Tensor | None:
        """Return the sum of a parameter; None if it has received no gradient."""
        return self.float32.get(parameter, parameter.grad)

    def set(self, parameter: Tensor, total: Tensor) -> None:
        """Store the sum of a parameter, in the dtype of its sum."""
        if parameter.dtype in HALF_PRECISION_DTYPES:
            self.float32[parameter] = total
        else:
            parameter.grad = total

    def set_zeros(self, parameter: Tensor) -> None:
        """Store zeros as the sum of a parameter."""
        self.set(parameter, torch.zeros_like(parameter, dtype=self.dtype_of(parameter)))

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add the gradient of a parameter whose sum is in ``float32``, and clear its ``.grad``."""
        if (total := self.float32.get(parameter)) is None:
            self.float32[parameter] = gradient.to(torch.float32)
        else:
            total.add_(gradient)
        parameter.grad = None

    def settle(self, *, discards: bool = False) -> None:
        """Wait until all gradients are added, or until the sums can be discarded; called only if ``moves_all``."""

    def named(self, parameters: Sequence[Tensor], names: dict[Tensor, str]) -> dict[str, Tensor]:
        """Return the sums by the names of the parameters, zeros for those that received no gradient."""
        return {
            names[p]: torch.zeros_like(p) if total is None else total.to_dense() if total.is_sparse else total
            for p in parameters
            if p.requires_grad
            for total in [self.get(p)]
        }

    def write_to_grad(self, keep: Container[Tensor] = ()) -> None:
        """Move the float32 sums to ``.grad`` in the dtype of the parameters; each is freed before the next one.

        Args:
            keep: Parameters whose sums stay.
        """
        for parameter in [each for each in self.float32 if each not in keep]:
            parameter.grad = self.float32.pop(parameter).to(parameter.dtype)


class PassingSums(SumStore):
    """Keeps an empty tensor in the place of each sum: measures a micro-batch whose sums are in other memory."""

    moves_all = True

    def set_zeros(self, parameter: Tensor) -> None:
        """Store an empty tensor."""
        self.float32[parameter] = parameter.new_empty(0, dtype=self.dtype_of(parameter), requires_grad=False)

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Drop the gradient of a parameter, and note that there is one."""
        if parameter in self.float32:
            self.float32[parameter].zero_()  # a new version
        else:
            self.set_zeros(parameter)
        parameter.grad = None

    def write_to_grad(self, keep: Container[Tensor] = ()) -> None:
        """Forget the empty tensors: the sums in other memory are not written to ``.grad``."""
        self.float32.clear()
