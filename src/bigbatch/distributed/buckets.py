"""Buckets: tensors that are all-reduced together."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 25 * 2**20  # of gradients that are reduced together, as in DDP


class Bucket:
    """Gradients that are all-reduced together.

    Args:
        tensors: On one device. Those in host memory are reduced on the device of messages.
        group: The ranks.
        message_device: On which the backend of the group exchanges messages.
    """

    def __init__(self, tensors: list[Tensor], group: Any, message_device: torch.device) -> None:
        self._tensors, self._group = tensors, group
        alone = len(tensors) == 1 and tensors[0].is_contiguous()
        self._flat = tensors[0] if alone else torch.cat([tensor.reshape(-1) for tensor in tensors])
        if self._flat.device.type == "cpu":
            self._flat = self._flat.to(message_device)

    def send(self) -> None:
        """Start the all-reduce."""
        self._work = dist.all_reduce(self._flat, group=self._group, async_op=True)

    @property
    def is_complete(self) -> bool:
        """Whether the all-reduce has ended."""
        return bool(self._work.is_completed())

    def wait(self) -> None:
        """Wait for the all-reduce, on the device if the backend can."""
        self._work.wait()

    def finish(self) -> None:
        """Wait for the all-reduce, and copy the sums back."""
        self.wait()
        if self._flat is not self._tensors[0]:
            flat = self._flat.reshape(-1).to(self._tensors[0].device)
            parts = torch.split(flat, [tensor.numel() for tensor in self._tensors])
            torch._foreach_copy_(self._tensors, [p.view_as(t) for p, t in zip(parts, self._tensors, strict=True)])


def grouped_tensors(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group tensors by device and dtype, in order, up to `BUCKET_BYTES` each; the same on every rank."""
    groups = grouped([((tensor.device, tensor.dtype), tensor.nbytes) for tensor in tensors])
    return [[tensors[index] for index in indices] for indices in groups]


def grouped(sizes: Sequence[tuple[tuple[torch.device, torch.dtype], int]]) -> list[list[int]]:
    """Group the indices of pairs of a kind and a number of bytes."""
    buckets: list[list[int]] = []
    filled: dict[tuple[torch.device, torch.dtype], tuple[list[int], int]] = {}
    for index, (kind, num_bytes) in enumerate(sizes):
        bucket, total = filled.get(kind, ([], BUCKET_BYTES))
        if total + num_bytes > BUCKET_BYTES:
            bucket, total = [], 0
            buckets.append(bucket)
        bucket.append(index)
        filled[kind] = bucket, total + num_bytes
    return buckets
