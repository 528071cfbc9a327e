"""All-reduce gradient sums while the last backward of a window completes them, bucket by bucket.

    hook: the sum of a parameter is complete → all of its bucket are? → send it → … → send the rest → wait → vote

All ranks send all buckets in one order, whatever a rank computes: zeros for parameters without a sum, and NaN for what
is left when a rank fails. Nothing is written to ``.grad`` of parameters without a sum before the ranks have voted.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bigbatch.distributed import buckets
from bigbatch.distributed.overlap_choice import sizes_of
from bigbatch.errors import WindowStateError
from bigbatch.gradients.foreign_writes import WindowHook, on_accumulated
from bigbatch.gradients.gradient_sums import GradientSums
from bigbatch.gradients.graph_leaves import shares_memory


class OverlappedReduction:
    """The reduction of one window.

        reduction.begin()
        sums.backward(loss)                 # sends buckets
        reduction.finish()                  # sends the rest, and waits; or send_nan() if anything failed
        # all ranks vote
        reduction.store(has_gradient)

    Memory: the buckets that are sent, up to one more copy of the sums, and zeros for parameters without a sum.

    Args:
        sums: On one device; their last backward shows its leaves, see `GradientSums.shows_leaves`.
        order: Indices of the parameters to send, the same on all ranks.
        group: The ranks.
        message_device: As for `buckets.Bucket`.
    """

    def __init__(self, sums: GradientSums, order: Sequence[int], group: Any, message_device: torch.device) -> None:
        self._sums, self._group, self._message_device = sums, group, message_device
        parameters = [sums.parameters[index] for index in order]
        self._buckets = [[parameters[i] for i in indices] for indices in buckets.grouped(sizes_of(parameters))]
        self._bucket_of = {p: number for number, each in enumerate(self._buckets) for p in each}
        self._incomplete = [set(each) for each in self._buckets]
        self._num_sent = 0
        self._in_flight: list[buckets.Bucket] = []
        self._zeros: dict[Tensor, Tensor] = {}  # the sums of parameters that this rank has not reached
        self._last: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def begin(self) -> None:
        """Send buckets from now on; collective until `finish` or `send_nan`."""
        self._sums.share_memory()
        trained = (parameter for parameter in self._bucket_of if parameter.requires_grad)
        hooked = [parameter for parameter in trained if not self._sums.adds_late(parameter)]
        self._handles = [on_accumulated(parameter, WindowHook(self._on_gradient, parameter)) for parameter in hooked]

    def _on_gradient(self, parameter: Tensor) -> None:
        """Complete the parameter before: this one may have other hooks, which move its gradient to its sum."""
        before, self._last = self._last, parameter
        if before is None or not self._sums.shows_leaves:  # else a parameter may receive several gradients
            return
        number = self._bucket_of[before]
        if number < self._num_sent:
            raise WindowStateError("a parameter received two gradients in one backward, and the first one was sent.")
        self._incomplete[number].discard(before)
        while self._num_sent < len(self._buckets) and not self._incomplete[self._num_sent]:
            self._send_next()

    def _send_next(self) -> None:
        # Aliases without the version of the sums: what is reduced in place is no write of other code.
        tensors = [self._sum_of(parameter).data for parameter in self._buckets[self._num_sent]]
        bucket = buckets.Bucket(tensors, self._group, self._message_device)
        bucket.send()
        self._num_sent += 1
        self._in_flight.append(bucket)
        while self._in_flight[0].is_complete and len(self._in_flight) > 1:
            self._in_flight.pop(0).finish()

    def _sum_of(self, parameter: Tensor) -> Tensor:
        total = self._sums.store.get(parameter)
        if total is None:
            total = torch.zeros_like(parameter, dtype=self._sums.store.dtype_of(parameter), requires_grad=False)
            self._zeros[parameter] = total
        elif total.is_sparse:
            raise TypeError("a gradient is sparse, and cannot be reduced within backward.")
        elif shares_memory(total):
            total = total.clone()
            self._sums.store.set(parameter, total)
        return total

    def finish(self) -> None:
        """Send the other buckets, and wait for all of them: on the device if the backend can.

        Raises:
            WindowStateError: A parameter has a sum that is not sent.
        """
        WindowHook.remove(self._handles)
        for parameter, has in zip(self._sums.parameters, self._sums.has_gradient(), strict=True):
            if has and parameter not in self._bucket_of:
                raise WindowStateError("a parameter that was frozen when the order was learned has a gradient.")
        while self._num_sent < len(self._buckets):
            self._send_next()
        while self._in_flight:
            self._in_flight.pop(0).finish()

    def send_nan(self) -> None:
        """Send NaN in place of what is left; the window must be dropped. No-op after `finish`."""
        WindowHook.remove(self._handles)
        for parameters in self._buckets[self._num_sent :]:
            dtype, size = self._sums.store.dtype_of(parameters[0]), sum(p.numel() for p in parameters)
            on_host = parameters[0].device.type == "cpu"
            device = self._message_device if on_host else parameters[0].device
            dist.all_reduce(torch.full((size,), math.nan, dtype=dtype, device=device), group=self._group)
            self._num_sent += 1
        for bucket in self._in_flight:
            with suppress(Exception):  # it failed before, or now: its values are dropped
                bucket.wait()
        self._in_flight.clear()
        self._zeros.clear()

    def store(self, has_gradient: Sequence[bool]) -> None:
        """Store the sums of parameters that only other ranks have reached.

        Args:
            has_gradient: For each parameter, whether it received a gradient on any rank.
        """
        for parameter, has in zip(self._sums.parameters, has_gradient, strict=True):
            if has and parameter in self._zeros:
                self._sums.store.set(parameter, self._zeros[parameter])
        self._zeros.clear()
        self._sums.mark_unmodified()
