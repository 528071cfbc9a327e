"""Items of a window whose backward and optimizer belong to another trainer.

    add(loss_sum, items) per micro-batch → all-reduce once → .grad ×= ranks / items

The trainer sums ∇loss_sum over the micro-batches and averages it over the ranks; the factor makes it Σ ∇loss_sum / Σ
items over both.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bigbatch.distributed.collective import DistributedRankGroup, Number, as_tensor
from bigbatch.gradients.loss_checks import as_count, refuse_loss
from bigbatch.types import Items

GradientVersions: TypeAlias = list[tuple[int, int, int] | None]
"""Identity and versions of each ``.grad``, of a DTensor also the version of its local tensor."""


@dataclass(frozen=True, repr=False)
class AccumulationReport:
    """Counts and loss of one window.

    Attributes:
        num_microbatches: Micro-batches of this rank.
    """

    num_microbatches: int
    _items: Number
    _loss_sum: Number

    def __repr__(self) -> str:
        return f"AccumulationReport(num_microbatches={self.num_microbatches}, items={self.items:g}, loss={self.loss:g})"

    @property
    def items(self) -> float:
        """Items of the window, over all ranks. Waits for the device."""
        return float(self._items)

    @property
    def loss(self) -> float:
        """Σ of the item losses / items, over the window and all ranks; NaN without items. Waits for the device."""
        return float(self._loss_sum) / self.items if self.items else math.nan


@dataclass(frozen=True)
class DataRanks:
    """The ranks that hold different data, whose gradients the trainer averages.

    Attributes:
        size: Number of ranks.
        device: Of this rank.
        group: The process group; None for all ranks.
    """

    size: int
    device: torch.device
    group: Any = None

    def add_up(self, values: Sequence[Number]) -> Sequence[Number]:
        """Return the sums over the ranks; does not wait for the device. Collective if there are several ranks."""
        if self.size == 1:
            return values
        sums = as_tensor(values, DistributedRankGroup(self.group, self.device).device)
        dist.all_reduce(sums, group=self.group)
        return sums.unbind()


class ItemTotals:
    """Items and loss sums of the micro-batches of this rank in the open window.

    Attributes:
        num_microbatches: In the open window; 0 if none is open.
        divisor: What the losses of the open window are to be divided by before backward; the same on all ranks.
    """

    def __init__(self) -> None:
        self.divisor = 1.0
        self.clear()

    def clear(self) -> None:
        """Drop the micro-batches of the open window."""
        self.num_microbatches = 0
        self._items: Items = 0
        self._loss_sum: Number = 0.0

    def add(self, loss_sum: Tensor, items: Items) -> None:
        """Count one micro-batch, checked by `checked_pair`."""
        self.num_microbatches += 1
        self._items = self._items + items
        self._loss_sum = self._loss_sum + (loss_sum.item() if loss_sum.is_cpu else _wide(loss_sum))

    def close(self, ranks: DataRanks, *, prescale: bool = False) -> tuple[AccumulationReport, Number]:
        """End the window; return its report, and the factor of the gradient. Collective if there are several ranks.

        The factor is 0 for a window without items, and NaN if the count is not a finite number of 0 or more.

        Args:
            ranks: The ranks whose micro-batches are in the gradient.
            prescale: Whether the losses of the next window are to be divided by a power of two near the items of this
                one, for float16: gradients then have the range of a mean loss instead of a sum's. Exact, since powers
                of two only move the exponent.
        """
        items, loss_sum = ranks.add_up([self._items, self._loss_sum])
        report = AccumulationReport(self.num_microbatches, items, loss_sum)
        factor = _factor(items, ranks.size * self.divisor)
        if prescale and 0 < report.items < math.inf:  # waits; a GradScaler does so too
            self.divisor = 2.0 ** round(math.log2(report.items / ranks.size))
        self.clear()
        return report, factor


def checked_pair(loss_sum: object, items: object) -> tuple[Tensor, Items]:
    """Return a loss and its items, after checking them. A count on a device is not read.

    Raises:
        TypeError: The loss is no tensor, or the items are no number.
        ValueError: The loss is not 0-d, or NaN with 0 items; or the items are not a finite count of 0 or more.
    """
    if not isinstance(loss_sum, Tensor) or loss_sum.ndim:
        refuse_loss("loss", loss_sum)
    count = as_count("loss", items)
    if not isinstance(count, Tensor) and not count and bool(loss_sum.detach().isnan()):  # waits for the device
        raise ValueError(
            "the loss of a micro-batch with 0 items is nan, a mean over nothing, and its gradient would be too: pass "
            "the sum of the item losses, which is then 0, such as F.cross_entropy(..., reduction='sum')."
        )
    return loss_sum, count


@torch.no_grad()
def multiply_gradients(parameters: Iterable[Tensor], factor: Number) -> None:
    """Multiply every ``.grad`` in place; does not wait for the device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            values = local_values(parameter.grad)
            by_device.setdefault(values.device, []).append(values)
    for device, values_there in by_device.items():
        torch._foreach_mul_(values_there, factor.to(device) if isinstance(factor, Tensor) else factor)


def has_gradient(parameters: Iterable[Tensor]) -> bool:
    """Return whether any ``.grad`` on this rank is not zero. Waits for the device, unless all are None."""
    gradients = (parameter.grad for parameter in parameters)
    return any(bool(local_values(gradient).count_nonzero()) for gradient in gradients if gradient is not None)


def gradient_versions(parameters: Iterable[Tensor]) -> GradientVersions:
    """Return what changes with every write to a ``.grad``; does not wait for the device."""
    gradients = (parameter.grad for parameter in parameters)
    return [
        None
        if gradient is None
        else (id(gradient), gradient._version, gradient.to_local()._version if isinstance(gradient, DTensor) else 0)
        for gradient in gradients
    ]


def local_values(gradient: Tensor) -> Tensor:
    """Return the values of a gradient that are on this rank, as a plain tensor that shares their memory."""
    if isinstance(gradient, DTensor):
        gradient = gradient.to_local()
    return gradient._values() if gradient.is_sparse else gradient


def reached_parameters(loss: Tensor) -> list[Tensor]:
    """Return the parameters that the graph of a loss shows; those inside reentrant checkpoints are hidden."""
    found: list[Tensor] = []
    seen: set[Any] = {loss.grad_fn}
    todo: list[Any] = [loss.grad_fn]
    while todo:
        node = todo.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter):
            found.append(leaf)
        for child, _ in () if node is None else node.next_functions:
            if child not in seen:
                seen.add(child)
                todo.append(child)
    return found


def unique_parameters(groups: Iterable[Iterable[Tensor]]) -> list[Tensor]:
    """Return the parameters of several lists, each once, in order."""
    return list({id(parameter): parameter for group in groups for parameter in group}.values())


def _factor(items: Number, numerator: float) -> Number:
    if not isinstance(items, Tensor):
        return numerator / items if items else 0.0
    is_count = (items >= 0) & items.isfinite()
    factor = torch.where(items == 0, torch.zeros_like(items), numerator / items)
    return torch.where(is_count, factor, torch.full_like(factor, math.nan))


def _wide(loss_sum: Tensor) -> Tensor:
    loss_sum = loss_sum.detach().clone()
    return loss_sum if loss_sum.dtype in (torch.float32, torch.float64) else loss_sum.float()
