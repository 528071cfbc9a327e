"""Save the values of one tensor and write them back in place."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

_ORDINARY = (Tensor, nn.Parameter, nn.Buffer)  # not a subclass, whose storage may be elsewhere


@dataclass(frozen=True, eq=False)
class TensorState:
    """The values of a tensor and its relation to autograd at one time.

    Attributes:
        tensor: The tensor.
        alias: Shares the storage that the tensor had; None for kinds of tensors whose storage cannot be rebound.
        values: A copy on the host; None if the values are not restored.
        is_leaf: Whether it had no ``grad_fn``.
        requires_grad: Whether it required a gradient.
    """

    tensor: Tensor
    alias: Tensor | None
    values: Tensor | None
    is_leaf: bool
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor, *, copied: bool = True) -> Self:
        """Save a tensor of any kind.

        Args:
            tensor: A fake or meta tensor has no values, and neither has a parameter of an uninitialized lazy module.
            copied: Whether the values are copied.
        """
        if is_lazy(tensor):
            return cls(tensor, None, None, tensor.is_leaf, tensor.requires_grad)
        has_values = not isinstance(tensor, FakeTensor) and tensor.device.type != "meta"
        is_strided = tensor.layout is torch.strided and not tensor.is_nested
        alias = tensor.detach() if has_values and is_strided and type(tensor) in _ORDINARY else None
        copied = copied and has_values and (is_strided or tensor.layout is torch.sparse_coo)
        values = tensor.detach().to("cpu", copy=True) if copied else None
        return cls(tensor, alias, values, tensor.is_leaf, tensor.requires_grad)

    def restore(self) -> None:
        """Write the values back, if they differ, into the storage that the tensor had, and bind the tensor to it."""
        if is_lazy(self.tensor):
            return
        with torch.inference_mode(self.tensor.is_inference()), torch.no_grad():
            if self.values is not None:
                _write(self.tensor if self.alias is None else self.alias, self.values)
            if self.alias is not None and not _equal(self.tensor, self.alias):
                self.tensor.data = self.alias
        if self.is_leaf and not self.tensor.is_leaf and not self.tensor._is_view():
            self.tensor.detach_()  # written in place by operations that autograd recorded
        if self.tensor.is_leaf and self.tensor.requires_grad != self.requires_grad:
            self.tensor.requires_grad_(self.requires_grad)


def _equal(tensor: Tensor, other: Tensor) -> bool:
    if (tensor.shape, tensor.dtype, tensor.device) != (other.shape, other.dtype, other.device):
        return False
    return tensor.data_ptr() == other.data_ptr() or torch.equal(tensor, other)


def _write(target: Tensor, values: Tensor) -> None:
    """Copy values into a tensor, if they differ."""
    if target.layout is not torch.strided:
        target.copy_(values)
        return
    for dim, (size, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
        if not stride and size > 1:  # expanded: all indices are one element
            target, values = target.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    if not torch.equal(target.cpu(), values):
        target.copy_(values)


def bytes_of(tensor: Tensor) -> int:
    """Return the bytes of the values of a tensor of any kind; 0 where that is not defined."""
    try:
        if tensor.layout is torch.sparse_coo:
            return tensor._values().nbytes + tensor._indices().nbytes
        return tensor.nbytes
    except RuntimeError:
        return 0
