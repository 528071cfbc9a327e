"""Matrix products that compute the weight gradient of a linear layer in the dtype of its sum.

    y = x Wᵀ + b,  x [rows, in],  ∂loss/∂y [rows, out]     →     ∂loss/∂W = (∂loss/∂y)ᵀ x,  [out, in]

The ordinary path of a bfloat16 product and a float32 sum is three passes: a bfloat16 result, its cast, and an addition.
Here the product adds its float32 accumulator to the sum, which is one pass, and one rounding fewer.
"""

import torch
from torch import Tensor

_HALF = frozenset({torch.bfloat16, torch.float16})


def weight_gradient(output_gradient: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of a weight, rounded once, to ``dtype``.

    Args:
        output_gradient: ``[rows, out]``.
        inputs: ``[rows, in]``, of the same dtype.
        dtype: That of the operands, or float32 for operands in bfloat16 or float16.
    """
    if _multiplies_wide(output_gradient, dtype):
        return torch.mm(output_gradient.t(), inputs, out_dtype=dtype)
    if output_gradient.dtype == dtype:
        return torch.mm(output_gradient.t(), inputs)
    total = inputs.new_zeros(output_gradient.shape[1], inputs.shape[1], dtype=dtype)
    _add_in_parts_(total, output_gradient, inputs)
    return total


def add_weight_gradient_(total: Tensor, output_gradient: Tensor, inputs: Tensor) -> None:
    """Add the gradient of a weight to its sum, within the product.

    If an operand cannot be allocated, the sum is unchanged.

    Args:
        total: ``[out, in]``, in float32 or in the dtype of the operands. Its version counter is increased.
        output_gradient: As for `weight_gradient`.
        inputs: As for `weight_gradient`.
    """
    version = total._version
    if _multiplies_wide(output_gradient, total.dtype):
        torch.addmm(total, output_gradient.t(), inputs, out_dtype=total.dtype, out=total)
    elif output_gradient.dtype == total.dtype:
        total.addmm_(output_gradient.t(), inputs)
    else:
        _add_in_parts_(total, output_gradient, inputs)
    if total._version == version:  # inside an operator torch does not count writes
        torch.autograd.graph.increment_version(total)


def _add_in_parts_(total: Tensor, output_gradient: Tensor, inputs: Tensor) -> None:
    """Add a product of converted operands: as many rows at a time as are no larger than the sum."""
    width, height = total.shape
    size = min(len(inputs), max(1, total.numel() // (width + height)))
    left, right = total.new_empty(size, width), total.new_empty(size, height)
    for start in range(0, len(inputs), size or 1):  # nothing is allocated from here on: all parts are added, or none
        part = slice(start, start + size)
        number = len(inputs[part])
        left[:number].copy_(output_gradient[part])
        right[:number].copy_(inputs[part])
        total.addmm_(left[:number].t(), right[:number])


def add_rows_(total: Tensor, places: Tensor, rows: Tensor) -> None:
    """Add rows to a sum, ``total[places[i]] += rows[i]`` for each i, in the same order in every run.

    Args:
        total: ``[out, in]``.
        places: int ``[rows]``; places may repeat.
        rows: ``[rows, in]``, of any floating dtype.
    """
    total.index_put_((places,), rows.to(total.dtype), accumulate=True)


def _multiplies_wide(operand: Tensor, dtype: torch.dtype) -> bool:
    """Return whether cuBLAS has a product of these operands with a result in ``dtype``."""
    if dtype is not torch.float32 or operand.dtype not in _HALF or not operand.is_cuda:
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(operand.device) >= (8, 0)
