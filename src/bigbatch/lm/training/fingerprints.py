"""Fingerprints of tensors, and of the gradients of an update.

Σ_i (2i + 1) · bits_i  modulo 2**64 over the elements of a tensor, folded to 32 bits: exact on every device
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bigbatch.lm.runs.fingerprints import DIGITS

CHUNK = 2**20  # elements that are multiplied at once
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class GradientFingerprints:
    """A ``gradient_hook`` that keeps a fingerprint of each final gradient until it is taken."""

    def __init__(self) -> None:
        self._found: dict[Tensor, int] | None = None

    def __call__(self, parameters: Sequence[Tensor]) -> None:
        """Compute the fingerprints; waits for the device."""
        found = checksums([parameter.grad for parameter in parameters if parameter.grad is not None])
        self._found = dict(zip(parameters, found, strict=True))

    def take(self, parameters: Sequence[Tensor]) -> str | None:
        """Return the fingerprints of the last update in the order of some parameters; None if it was skipped."""
        found, self._found = self._found, None
        return None if found is None else as_text(found.get(parameter, 0) for parameter in parameters)


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """Return a 32-bit checksum of the bits of each tensor; waits for the device."""
    sums = [_checksum(tensor.detach()) for tensor in tensors]
    wide = torch.stack(sums).tolist() if sums else []
    return [(value & 0xFFFFFFFF) ^ (value >> 32 & 0xFFFFFFFF) for value in wide]


def as_text(values: Iterable[int]) -> str:
    """Return checksums as hexadecimal digits."""
    return "".join(f"{value:0{DIGITS}x}" for value in values)


def _checksum(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    weights = torch.arange(1, 2 * min(CHUNK, flat.numel()), 2, device=flat.device)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK].to(torch.int64)
        total += (part * weights[: part.numel()]).sum() + 2 * start * part.sum()
    return total
