"""Copies of float32 weights in the dtype of autocast, made once for a window instead of in every micro-batch."""

from collections.abc import Mapping
from operator import attrgetter, methodcaller

import torch
from torch import Tensor

from bigbatch.errors import WindowStateError
from bigbatch.memory.usage import is_out_of_memory

NUM_CHECKED = 2  # windows in which copies are compared with their weights by value

_VERSION, _DATA_PTR = attrgetter("_version"), methodcaller("data_ptr")


class WeightCopies:
    """Narrow copies of weights, equal to ``weight.to(dtype)`` to the bit; they stay in place for captured CUDA graphs.

        copies = WeightCopies()
        copies.allocate({weight: torch.bfloat16})
        copies.refresh()            # before each micro-batch: writes them if a weight has changed
        copies.mark_stale()         # after an update: optimizers may write without a new version

    Attributes:
        obstacle: Why there are none, in a few words; None if nothing prevents them.
        num_allocations: How often they were allocated.
    """

    def __init__(self) -> None:
        self.obstacle: str | None = None
        self.num_allocations = 0
        self._dtypes: dict[Tensor, torch.dtype] = {}
        self._copies: list[Tensor] = []
        self._by_weight: dict[Tensor, Tensor] = {}
        self._written: tuple[list[int], list[int]] | None = None  # versions and addresses that the copies are of
        self._num_unchecked = NUM_CHECKED

    def get(self, weight: Tensor) -> Tensor | None:
        """Return the copy of a weight; None if it has none."""
        return self._by_weight.get(weight)

    @property
    def num_bytes(self) -> int:
        """Memory of the copies."""
        return sum(copy.numel() * copy.element_size() for copy in self._copies)

    def is_for(self, dtypes: Mapping[Tensor, torch.dtype]) -> bool:
        """Return whether the copies are those of these weights in these dtypes."""
        return self._dtypes == dtypes

    def allocate(self, dtypes: Mapping[Tensor, torch.dtype]) -> None:
        """Replace all copies by those of these weights, to be written by `refresh`; none if they do not fit."""
        self.free()
        if self.obstacle is not None:
            return
        try:
            copies = [torch.empty_like(w, dtype=dtype, requires_grad=False) for w, dtype in dtypes.items()]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.obstacle = "they do not fit in memory"
            return
        self._dtypes, self._copies = dict(dtypes), copies
        self._by_weight = dict(zip(dtypes, copies, strict=True))
        self.num_allocations += 1

    def free(self) -> None:
        """Free all copies; they may be allocated again."""
        self._dtypes, self._copies, self._by_weight, self._written = {}, [], {}, None

    def forbid(self, reason: str) -> None:
        """Free all copies, and allocate none any more; ``reason`` is a few words."""
        self.free()
        self.obstacle = reason

    def mark_stale(self) -> None:
        """Write all copies at the next `refresh`."""
        self._written = None

    def refresh(self) -> None:
        """Write the copies if they are stale, or any weight has changed since, by its version or address."""
        if self._copies and self._written != (state := self._state()):
            with torch.no_grad():
                torch._foreach_copy_(self._copies, list(self._by_weight))
            self._written = state

    def _state(self) -> tuple[list[int], list[int]]:
        return list(map(_VERSION, self._by_weight)), list(map(_DATA_PTR, self._by_weight))

    def check(self) -> None:
        """Compare the copies with their weights by value, in the first windows. Waits for the device.

        Raises:
            WindowStateError: A weight was written to within the window without a new version.
        """
        if not self._copies or not self._num_unchecked or self._written != self._state():
            return
        self._num_unchecked -= 1
        with torch.no_grad():
            for weight, copy in self._by_weight.items():
                if not torch.allclose(weight.to(copy.dtype), copy, rtol=0.0, atol=0.0, equal_nan=True):
                    raise WindowStateError(
                        f"a weight of shape {tuple(weight.shape)} was changed within a window through .data, which "
                        f"torch does not record, and micro-batches used its copy in {_short(copy.dtype)}: write to "
                        "the weight itself under torch.no_grad(), or pass fuse_gradients=False."
                    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
