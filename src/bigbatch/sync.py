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

from bigbatch.vote import Number, as_tensor

if TYPE_CHECKING:
    from bigbatch.accumulate import GradientSums

BUCKET_BYTES = 25 * 2**20  # of gradients that cross together; as many as DDP takes
BUCKETS_IN_FLIGHT = 4


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


class Sync:
    """One process: nothing crosses anything. What there is to override for more.

    Attributes:
        size: Ranks that hold different data.
        rank: Of this process among them.
        model: What it was made of.
        module: The model itself, without what it is wrapped in.
        averaged_over: What the gradients were divided by on their way across ranks.
        needs_equal_counts: Whether every rank has to run as many micro-batches as every other.
        hides_leaves: Whether graphs end in other tensors than the parameters.
        crosses: Whether the next backward brings gradients across ranks.
        is_silent: Whether the next backward is for the sake of the other ranks alone: the gradient that enters the
            model is then zero, whatever the loss made of it.
    """

    size = 1
    rank = 0
    averaged_over = 1.0
    needs_equal_counts = False
    hides_leaves = False
    crosses = False
    is_silent = False

    def __init__(self, model: nn.Module, module: nn.Module | None = None) -> None:
        self.model = model
        self.module = model if module is None else module

    def begin(self) -> None:
        """Defer whatever would cross ranks by itself, for one window."""

    def end(self) -> None:
        """Put back what `begin` found."""

    def before(self, *, is_last: bool) -> None:
        """Prepare for the forward and backward of one micro-batch."""

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Stand around the backward of one micro-batch."""
        yield

    def gather(self, values: Sequence[Number]) -> list[list[float]]:
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

    def tell(self, text: str, *, source: int = 0) -> str:
        """Give the text of one rank to all. Collective."""
        return text


class Spread(Sync):
    """Several ranks: what they all reach one another by.

    Args:
        model: As for `Sync`.
        module: As for `Sync`.
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


class Replicated(Spread):
    """The whole model on every rank: under ``DistributedDataParallel``, or plain.

        engine = bigbatch.Engine(model, optimizer, loss_fn, sync=bigbatch.Replicated(model))

    Gradient sums are added up over the ranks once a window, in the dtype that they are summed in (float32 for bfloat16
    parameters), in buckets of 25 MiB. DDP's own reduction, which happens within a backward and averages over ranks, is
    off from the opening of a window to its end. Of a plain model the constructor makes all ranks begin with the
    parameters and buffers of the first, as DDP does; it needs no buckets of its own beside the gradients.

    Args:
        model: On its device; the same on every rank.
        group: Ranks that hold different data; by default those of the DDP wrapper, or all. NCCL for CUDA, gloo for CPU.

    Constructing it is collective for a plain model.

    Raises:
        TypeError: The model is sharded.
    """

    def __init__(self, model: nn.Module, *, group: Any = None) -> None:
        from torch.distributed.fsdp import FSDPModule

        if any(isinstance(module, FSDPModule) for module in model.modules()):
            raise TypeError("the model is sharded by fully_shard: leave sync= out, or pass a bigbatch.SyncPolicy.")
        wrapper = _ddp_of(model)
        if wrapper is None:
            super().__init__(model, model, group)
        else:
            super().__init__(model, wrapper.module, wrapper.process_group)
        self._wrapper = wrapper
        self._is_open = False
        if wrapper is None:
            self._send([*self.module.parameters(), *self.module.buffers()])

    def begin(self) -> None:
        """Keep DDP from reducing, and from sending buffers at a forward that other ranks may not run."""
        if self._wrapper is not None and not self._is_open:
            self._is_open = True
            vars(self._wrapper).setdefault("_bigbatch_deferral", _Deferral()).enter(self._wrapper)

    def end(self) -> None:
        """Put DDP's flags back, when no other window over the same model is open."""
        if self._wrapper is not None and self._is_open:
            self._is_open = False
            vars(self._wrapper)["_bigbatch_deferral"].leave(self._wrapper)

    def reduce(self, sums: "GradientSums", reached: Sequence[bool]) -> bool:
        """Sum gradients over ranks; take the statistics of the first rank's batch norms, as DDP does. Collective."""
        sums.fill(reached)
        in_flight: list[_Bucket] = []
        for tensors in _buckets(sums.tensors()):
            if len(in_flight) == BUCKETS_IN_FLIGHT:
                in_flight.pop(0).finish()
            in_flight.append(_Bucket(tensors, self.group))
        for bucket in in_flight:
            bucket.finish()
        sums.accept()
        learning = [m for m in self.module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
        self._send([buffer for module in learning for buffer in module.buffers(recurse=False)])
        return True

    def _send(self, tensors: Sequence[Tensor]) -> None:
        """Let every rank have these tensors of the first."""
        if self.size == 1:
            return
        with torch.no_grad():
            for same in _buckets([tensor.detach() for tensor in tensors]):
                flat = torch.cat([tensor.reshape(-1) for tensor in same]).to(self._device)
                dist.broadcast(flat, group=self.group, group_src=0)
                for tensor, part in zip(same, torch.split(flat, [t.numel() for t in same]), strict=True):
                    tensor.copy_(part.view_as(tensor))


class _Deferral:
    """DDP's own reduction, off for as long as any window is open, of whatever accumulator; kept on the wrapper."""

    # The last is not among the public settings: with static_graph=True the first backward of all reduces, whatever the
    # first two say, until this flag tells that it has.
    _FLAGS = {  # noqa: RUF012
        "require_backward_grad_sync": False,
        "require_forward_param_sync": False,
        "_static_graph_delay_allreduce_enqueued": True,
    }

    def __init__(self) -> None:
        self._num_open = 0
        self._found: dict[str, bool] = {}

    def enter(self, wrapper: nn.Module) -> None:
        self._num_open += 1
        if self._num_open == 1:
            self._found = {name: vars(wrapper)[name] for name in self._FLAGS if name in vars(wrapper)}
            vars(wrapper).update({name: self._FLAGS[name] for name in self._found})

    def leave(self, wrapper: nn.Module) -> None:
        self._num_open -= 1
        if not self._num_open:
            vars(wrapper).update(self._found)


class _Bucket:
    """Some gradients on their way across ranks."""

    def __init__(self, tensors: list[Tensor], group: Any) -> None:
        self._tensors = tensors
        alone = len(tensors) == 1 and tensors[0].is_contiguous()
        self._flat = tensors[0] if alone else torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._work = dist.all_reduce(self._flat, group=group, async_op=True)

    def finish(self) -> None:
        """Wait until they are summed, on the device where it can; put them back."""
        self._work.wait()
        if self._flat is not self._tensors[0]:
            parts = torch.split(self._flat, [tensor.numel() for tensor in self._tensors])
            torch._foreach_copy_(self._tensors, [p.view_as(t) for p, t in zip(parts, self._tensors, strict=True)])


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group tensors of one device and dtype, in their order, up to so many bytes; the same on every rank."""
    buckets: list[list[Tensor]] = []
    filled: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        bucket, num_bytes = filled.get((tensor.device, tensor.dtype), ([], BUCKET_BYTES))
        if num_bytes + tensor.nbytes > BUCKET_BYTES:
            bucket, num_bytes = [], 0
            buckets.append(bucket)
        bucket.append(tensor)
        filled[tensor.device, tensor.dtype] = bucket, num_bytes + tensor.nbytes
    return buckets


def collective_device(group: Any, module: nn.Module) -> torch.device:
    """Give the device whose tensors a group can carry: that of the model where it can, else the host."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    carried = [entry.partition(":")[0] for entry in str(dist.get_backend_config(group)).split(",")]  # "cpu:gloo,…"
    return device if device.type in carried else torch.device(carried[0])


def _ddp_of(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """Find the wrapper of a model, compiled or not."""
    model = getattr(model, "_orig_mod", model)
    return model if isinstance(model, nn.parallel.DistributedDataParallel) else None


def sync_of(model: nn.Module, sync: "Sync | SyncPolicy | None" = None) -> Sync:
    """Recognise how a model is spread over ranks.

    Args:
        model: Plain, wrapped in ``DistributedDataParallel``, or with `fully_shard` applied to it.
        sync: A policy for a sharded model, or what is to be used instead of what is recognised.

    Raises:
        TypeError: It is spread in a way that cannot be accumulated exactly.
        ValueError: The policy is not one for this model.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(sync, Sync):
        if sync.model is not model:
            raise ValueError(
                f"sync= was made of another object than the model ({type(sync.model).__name__}, and this is a "
                f"{type(model).__name__}): make it of what is passed here."
            )
        return sync
    if sync is not None and not isinstance(sync, SyncPolicy):
        raise TypeError(f"sync is {sync!r}: pass a bigbatch.SyncPolicy, a bigbatch.Replicated(model), or nothing.")
    modules = list(model.modules())
    kinds = {kind.__name__ for module in modules for kind in type(module).__mro__}
    if "FullyShardedDataParallel" in kinds:
        raise TypeError(
            "the model is wrapped in FullyShardedDataParallel, which keeps gradients where a window cannot add to "
            "them. Use torch.distributed.fsdp.fully_shard on the model instead."
        )
    if any(isinstance(module, FSDPModule) for module in modules):
        from bigbatch.sharded import Sharded

        return Sharded(model, policy=sync)
    if sync not in (None, SyncPolicy.LAST):
        raise ValueError(f"sync is {sync}, which is for models that are sharded: leave it out.")
    if _ddp_of(model) is not None:
        return Replicated(model)
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in modules):
        raise TypeError(
            "a part of the model is wrapped in DistributedDataParallel, and the rest is not: wrap the whole model, or "
            "make an accumulator for each part."
        )
    if "DataParallel" in kinds:
        raise TypeError("the model is wrapped in DataParallel: use one process a GPU, and DistributedDataParallel.")
    return Sync(model)
