"""Gradients that share memory with another tensor, whose value an in-place change of the gradient would change, too.

Autograd stores a gradient without a copy if nothing else refers to the tensor; views of its memory do not count. With
``x + (p[None] + q[None])`` the gradients of p and q are views of the same memory, and both would be divided twice.
"""

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor


def shares_memory(tensor: Tensor) -> bool:
    """Return whether anything else refers to the memory of a dense tensor; False for tensors of other types."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided:
        return False
    return _count_references(tensor) > _references_of_one()


def copy_shared(parameters: Iterable[Tensor]) -> None:
    """Copy those gradients of parameters that share memory. If there is none for a copy, the gradient is dropped."""
    for parameter in parameters:
        if (gradient := parameter.grad) is not None and shares_memory(gradient):
            parameter.grad = None
            parameter.grad = gradient.clone()


def _count_references(tensor: Tensor) -> int:
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # as torch's own CUDA graphs do
    return count


@cache
def _references_of_one() -> int:
    return _count_references(torch.empty(0))
