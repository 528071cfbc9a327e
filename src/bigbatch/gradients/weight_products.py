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
    left = output_gradient.t()
    if _multiplies_wide(output_gradient, dtype):
        return torch.mm(left, inputs, out_dtype=dtype)
    return torch.mm(left.to(dtype), inputs.to(dtype))


def add_weight_gradient_(total: Tensor, output_gradient: Tensor, inputs: Tensor) -> None:
    """Add the gradient of a weight to its sum, within the product.

    If an operand cannot be allocated, the sum is unchanged.

    Args:
        total: ``[out, in]``, in float32 or in the dtype of the operands. Its version counter is increased.
        output_gradient: As for `weight_gradient`.
        inputs: As for `weight_gradient`.
    """
    version, left = total._version, output_gradient.t()
    if _multiplies_wide(output_gradient, total.dtype):
        torch.addmm(total, left, inputs, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), inputs.to(total.dtype))
    if total._version == version:  # inside an operator torch does not count writes
        torch.autograd.graph.increment_version(total)


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
