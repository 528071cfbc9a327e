"""Largest relative difference, by dtype, between two computations of the same quantity that rounding explains."""

import torch

# Of a whole gradient. A float64 sum of any order stays near 1e-15, and float32 near 1e-6, for the depth of usual
# networks; kernels may differ by shape, so both have room. In bfloat16 and float16 every activation is rounded, to 2⁻⁸
# and 2⁻¹¹ relative, and other shapes round differently: a few units each.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}

# Of a loss and gradient, compiled and in eager mode. Rounding moves a gradient by some hundredths over many layers in
# bfloat16, and by less than a thousandth in float32; a wrong kernel moves it by as much as its own size.
COMPILED_TOLERANCE_HALF, COMPILED_TOLERANCE = 0.1, 1e-3


def tolerance_for(dtype: torch.dtype) -> float:
    """Return the tolerance of a dtype; that of bfloat16 for narrower ones."""
    return TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])


def coarser_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype with the largest rounding error."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
