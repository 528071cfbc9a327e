"""Replicated models: gradients are summed over ranks once a window, under DDP or without it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigbatch.distributed.gradient_sync import MultiRankSync

if TYPE_CHECKING:
    from bigbatch.gradients.gradient_sums import GradientSums


BUCKET_BYTES = 25 * 2**20  # of gradients that cross together; as many as DDP takes


BUCKETS_IN_FLIGHT = 4


class Replicated(MultiRankSync):
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
            self._broadcast_from_first_rank([*self.module.parameters(), *self.module.buffers()])

    def begin(self) -> None:
        """Keep DDP from reducing, and from sending buffers at a forward that other ranks may not run."""
        if self._wrapper is not None and not self._is_open:
            self._is_open = True
            vars(self._wrapper).setdefault("_bigbatch_deferral", _DeferredReduction()).enter(self._wrapper)

    def end(self) -> None:
        """Put DDP's flags back, when no other window over the same model is open."""
        if self._wrapper is not None and self._is_open:
            self._is_open = False
            vars(self._wrapper)["_bigbatch_deferral"].leave(self._wrapper)

    def reduce(self, sums: "GradientSums", reached: Sequence[bool]) -> bool:
        """Sum gradients over ranks; take the statistics of the first rank's batch norms, as DDP does. Collective."""
        sums.fill_missing_with_zeros(reached)
        in_flight: list[_Bucket] = []
        for tensors in _buckets(sums.tensors()):
            if len(in_flight) == BUCKETS_IN_FLIGHT:
                in_flight.pop(0).finish()
            in_flight.append(_Bucket(tensors, self.group))
        for bucket in in_flight:
            bucket.finish()
        sums.mark_unmodified()
        learning = [m for m in self.module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
        self._broadcast_from_first_rank([buffer for module in learning for buffer in module.buffers(recurse=False)])
        return True

    def _broadcast_from_first_rank(self, tensors: Sequence[Tensor]) -> None:
        """Let every rank have these tensors of the first."""
        if self.size == 1:
            return
        with torch.no_grad():
            for same in _buckets([tensor.detach() for tensor in tensors]):
                flat = torch.cat([tensor.reshape(-1) for tensor in same]).to(self._device)
                dist.broadcast(flat, group=self.group, group_src=0)
                for tensor, part in zip(same, torch.split(flat, [t.numel() for t in same]), strict=True):
                    tensor.copy_(part.view_as(tensor))


class _DeferredReduction:
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

    def acquire(self, wrapper: nn.Module) -> None:
        self._num_open += 1
        if self._num_open == 1:
            self._found = {name: vars(wrapper)[name] for name in self._FLAGS if name in vars(wrapper)}
            vars(wrapper).update({name: self._FLAGS[name] for name in self._found})

    def release(self, wrapper: nn.Module) -> None:
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


def _ddp_of(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """Find the wrapper of a model, compiled or not."""
    model = getattr(model, "_orig_mod", model)
    return model if isinstance(model, nn.parallel.DistributedDataParallel) else None
