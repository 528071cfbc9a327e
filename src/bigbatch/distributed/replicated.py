"""Replicated models, in DDP or plain: gradient sums are all-reduced once a window."""

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigbatch.distributed.gradient_sync import Microbatch, MultiRankSync
from bigbatch.types import Terms

if TYPE_CHECKING:
    from bigbatch.gradients.gradient_sums import GradientSums

BUCKET_BYTES = 25 * 2**20  # of gradients that are reduced together, as in DDP
BUCKETS_IN_FLIGHT = 4


class Replicated(MultiRankSync):
    """A model that every rank holds whole, in ``DistributedDataParallel`` or plain.

        engine = bigbatch.Engine(model, optimizer, loss_fn, sync=bigbatch.Replicated(model))

    Gradient sums are all-reduced once a window, in the dtype that they are summed in (float32 for bfloat16 parameters),
    in buckets of 25 MiB. DDP's own reduction, which averages over ranks within backward, is disabled while a window is
    open. For a plain model the constructor broadcasts the parameters and buffers of the first rank, as DDP does.

    Args:
        model: On its device; the same on every rank.
        group: Ranks that hold different data; by default those of the DDP wrapper, or all. NCCL for CUDA, gloo for CPU.

    The constructor is collective for a plain model.

    Raises:
        TypeError: The model is sharded.
    """

    def __init__(self, model: nn.Module, *, group: Any = None) -> None:
        from torch.distributed.fsdp import FSDPModule

        if any(isinstance(module, FSDPModule) for module in model.modules()):
            raise TypeError("the model is sharded by fully_shard: leave sync= out, or pass a bigbatch.SyncPolicy.")
        wrapper = ddp_wrapper(model)
        if wrapper is None:
            super().__init__(model, model, group)
        else:
            super().__init__(model, wrapper.module, wrapper.process_group)
        self._wrapper = wrapper
        self._is_deferred = False
        self._padding_microbatch: Any = None
        if wrapper is None:
            self._broadcast_from_first_rank([*self.module.parameters(), *self.module.buffers()])

    @property
    def needs_padding_microbatch(self) -> bool:
        """Whether the ranks run in lockstep, and no padding micro-batch was set."""
        return self.runs_in_lockstep and self._padding_microbatch is None

    def run_in_lockstep(self) -> None:
        """Run the same number of micro-batches on all ranks from the next window on."""
        self.runs_in_lockstep = self.size > 1

    @property
    def padding_microbatch(self) -> Any:
        """The micro-batch that is run in place of missing ones; None if none was set."""
        return self._padding_microbatch

    def set_padding_microbatch(self, microbatch: Any) -> None:
        """Set the micro-batch that is run in place of missing ones, on the device."""
        self._padding_microbatch = microbatch

    def turns(
        self, own: Sequence[Any], max_num_microbatches: int, should_abandon: Callable[[], bool]
    ) -> Generator[Microbatch, None, bool]:
        """Yield this rank's micro-batches; in lockstep also padding, as many as any rank has, even if it abandons."""
        if not self.runs_in_lockstep:
            return (yield from super().turns(own, max_num_microbatches, should_abandon))
        is_abandoned = False
        for index in range(max_num_microbatches):
            is_abandoned = should_abandon() or is_abandoned
            counts = index < len(own)
            yield Microbatch(own[index] if counts else self._padding_microbatch, counts)
        return is_abandoned

    def loss_to_differentiate(self, loss: Tensor | None, terms: Terms) -> Tensor | None:
        """Return the loss; in lockstep, one without items too, whose backward other ranks may wait for."""
        if loss is not None or not self.runs_in_lockstep:
            return loss
        return sum(loss_sum for loss_sum, _ in terms.values())  # type: ignore[return-value]

    def start_window(self) -> None:
        """Disable DDP's reduction, and its broadcast of buffers in a forward that other ranks may not run."""
        if self._wrapper is not None and not self._is_deferred:
            self._is_deferred = True
            _DeferredReduction.of(self._wrapper).acquire(self._wrapper)

    def end_window(self) -> None:
        """Restore DDP's flags when no other window over the same model is open."""
        if self._wrapper is not None and self._is_deferred:
            self._is_deferred = False
            _DeferredReduction.of(self._wrapper).release(self._wrapper)

    def reduce(self, sums: "GradientSums", has_gradient: Sequence[bool]) -> bool:
        """All-reduce the sums, and broadcast the batch norm statistics of the first rank, as DDP does. Collective."""
        sums.fill_missing_with_zeros(has_gradient)
        in_flight: list[_Bucket] = []
        for tensors in _buckets(sums.tensors()):
            if len(in_flight) == BUCKETS_IN_FLIGHT:
                in_flight.pop(0).finish()
            in_flight.append(_Bucket(tensors, self.group, self._message_device))
        for bucket in in_flight:
            bucket.finish()
        sums.mark_unmodified()
        norms = [m for m in self.module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
        self._broadcast_from_first_rank([buffer for module in norms for buffer in module.buffers(recurse=False)])
        return True

    def _broadcast_from_first_rank(self, tensors: Sequence[Tensor]) -> None:
        """Copy these tensors of the first rank to every other one. Collective."""
        if self.size == 1:
            return
        with torch.no_grad():
            for same in _buckets([tensor.detach() for tensor in tensors]):
                flat = torch.cat([tensor.reshape(-1) for tensor in same]).to(self._message_device)
                dist.broadcast(flat, group=self.group, group_src=0)
                for tensor, part in zip(same, torch.split(flat, [t.numel() for t in same]), strict=True):
                    tensor.copy_(part.view_as(tensor))


class _DeferredReduction:
    """Disables DDP's own reduction while any window over a model is open, of any accumulator; kept on the wrapper."""

    # The last flag is private: with static_graph=True the very first backward reduces, whatever the first two flags
    # say, until this one records that it did.
    _FLAGS = {  # noqa: RUF012
        "require_backward_grad_sync": False,
        "require_forward_param_sync": False,
        "_static_graph_delay_allreduce_enqueued": True,
    }

    def __init__(self) -> None:
        self._num_open = 0
        self._found: dict[str, bool] = {}

    @classmethod
    def of(cls, wrapper: nn.Module) -> "_DeferredReduction":
        """Return the one of a wrapper."""
        found: _DeferredReduction = vars(wrapper).setdefault("_bigbatch_deferred_reduction", cls())
        return found

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
    """Gradients that are being all-reduced together.

    Args:
        tensors: On one device. Those in host memory are reduced on the device of messages.
        group: The ranks.
        message_device: On which the backend of the group exchanges messages.
    """

    def __init__(self, tensors: list[Tensor], group: Any, message_device: torch.device) -> None:
        self._tensors = tensors
        alone = len(tensors) == 1 and tensors[0].is_contiguous()
        self._flat = tensors[0] if alone else torch.cat([tensor.reshape(-1) for tensor in tensors])
        if self._flat.device.type == "cpu":
            self._flat = self._flat.to(message_device)
        self._work = dist.all_reduce(self._flat, group=group, async_op=True)

    def finish(self) -> None:
        """Wait for the all-reduce, on the device if the backend can, and copy the sums back."""
        self._work.wait()
        if self._flat is not self._tensors[0]:
            flat = self._flat.reshape(-1).to(self._tensors[0].device)
            parts = torch.split(flat, [tensor.numel() for tensor in self._tensors])
            torch._foreach_copy_(self._tensors, [p.view_as(t) for p, t in zip(parts, self._tensors, strict=True)])


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group tensors by device and dtype, in order, up to `BUCKET_BYTES` each; the same on every rank."""
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


def ddp_wrapper(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """Return the DDP wrapper of a model, compiled or not; None without one."""
    model = getattr(model, "_orig_mod", model)
    return model if isinstance(model, nn.parallel.DistributedDataParallel) else None
