"""How gradients cross ranks: in one process, under DDP or none, under FSDP2 and HSDP. The only collectives.

    open a window: defer → micro-batches → vote (one small gather) → reduce → update → restore

Ranks may hold different samples, items and micro-batches, or none. What each brings is summed, and the sum divided once
by the items of all ranks: no mean of means.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigbatch.distributed.window_vote import Number, as_tensor

if TYPE_CHECKING:
    from bigbatch.gradients.gradient_sums import GradientSums


class SyncPolicy(Enum):
    """When gradients cross ranks.

    A replicated model (DDP) knows ``LAST`` alone: its sums cross once, when all micro-batches have been added.

    Attributes:
        LAST: With the last micro-batch of a window. Least communication; a sharded model keeps whole gradients until
            then.
        EVERY: With every micro-batch. A sharded model then keeps its shards of the gradients alone.
        SHARD: HSDP: between the ranks that shard with every micro-batch, between the replicas with the last.
    """

    LAST = "last"
    EVERY = "every"
    SHARD = "shard"


class GradientSync:
    """One process: nothing crosses anything. What there is to override for more.

    Attributes:
        size: Ranks that hold different data.
        rank: Of this process among them.
        model: What it was made of.
        module: The model itself, without what it is wrapped in.
        gradient_divide_factor: What the gradients were divided by on their way across ranks.
        runs_in_lockstep: Whether every rank has to run as many micro-batches as every other.
        parameters_are_wrapped: Whether graphs end in other tensors than the parameters.
        syncs_in_backward: Whether the next backward brings gradients across ranks.
        zero_gradient: Whether the next backward is for the sake of the other ranks alone: the gradient that enters the
            model is then zero, whatever the loss made of it.
    """

    size = 1
    rank = 0
    gradient_divide_factor = 1.0
    runs_in_lockstep = False
    parameters_are_wrapped = False
    syncs_in_backward = False
    zero_gradient = False

    def __init__(self, model: nn.Module, module: nn.Module | None = None) -> None:
        self.model = model
        self.module = model if module is None else module

    def start_window(self) -> None:
        """Defer whatever would cross ranks by itself, for one window."""

    def end_window(self) -> None:
        """Put back what `begin` found."""

    def before_microbatch(self, *, is_last: bool) -> None:
        """Prepare for the forward and backward of one micro-batch."""

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Stand around the backward of one micro-batch."""
        yield

    def all_gather(self, values: Sequence[Number]) -> list[list[float]]:
        """Give the values of every rank, as many on each. Collective; waits for the device."""
        return [[float(value) for value in values]]

    def reduce(self, sums: "GradientSums", reached: Sequence[bool]) -> bool:
        """Bring across what has not crossed in backward, of the parameters that any rank reached. Collective.

        Returns:
            Whether there was anything to bring.
        """
        return False

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Compute the 2-norm of whole gradients, 0-d. Collective where they are sharded."""
        return torch.nn.utils.get_total_norm(gradients)

    def broadcast_text(self, text: str, *, source: int = 0) -> str:
        """Give the text of one rank to all. Collective."""
        return text


class MultiRankSync(GradientSync):
    """Several ranks: what they all reach one another by.

    Args:
        model: As for `GradientSync`.
        module: As for `GradientSync`.
        group: The ranks that hold different data.
    """

    def __init__(self, model: nn.Module, module: nn.Module | None, group: Any) -> None:
        super().__init__(model, module)
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self._device = collective_device(group, self.module)

    def gather(self, values: Sequence[Number]) -> list[list[float]]:
        """Give the values of every rank, as many on each. Collective; waits for the device."""
        own = as_tensor(values, self._device)
        everyone = own.new_empty(self.size, len(own))
        dist.all_gather(list(everyone.unbind()), own, group=self.group)
        rows: list[list[float]] = everyone.tolist()  # waits for the device
        return rows

    def tell(self, text: str, *, source: int = 0) -> str:
        """Give the text of one rank to all. Collective; waits for the device."""
        data = text.encode()
        size = torch.tensor([len(data)], device=self._device)
        dist.broadcast(size, group=self.group, group_src=source)
        received = torch.zeros(int(size.item()), dtype=torch.uint8, device=self._device)
        if self.rank == source:
            received.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(received, group=self.group, group_src=source)
        return bytes(received.tolist()).decode()


def collective_device(group: Any, module: nn.Module) -> torch.device:
    """Give the device whose tensors a group can carry: that of the model where it can, else the host."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    carried = [entry.partition(":")[0] for entry in str(dist.get_backend_config(group)).split(",")]  # "cpu:gloo,…"
    return device if device.type in carried else torch.device(carried[0])
