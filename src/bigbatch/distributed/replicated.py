"""Replicated models, in DDP or plain: gradient sums are all-reduced once a window."""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigbatch.distributed import buckets
from bigbatch.distributed.collective import list_ranks
from bigbatch.distributed.gradient_sync import Microbatch, MultiRankSync
from bigbatch.distributed.overlap_choice import OverlapSetting, make_overlap_choice
from bigbatch.distributed.overlapped_reduction import OverlappedReduction
from bigbatch.errors import RankFailedError
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory
from bigbatch.types import Terms

if TYPE_CHECKING:
    from bigbatch.gradients.gradient_sums import GradientSums

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
        overlap: Whether `Engine` reduces gradients while the last backward of a window runs: True; or ``"auto"``, if
            there are several buckets and the reduction of the first windows took at least 5 % of their time. Only for
            micro-batches that run eagerly. A window in which a rank then fails is run again without, on all ranks; an
            error that does not occur again is a warning. The same bits for two ranks; for more, sums may round
            differently, so ``"auto"`` is off under ``torch.use_deterministic_algorithms(True)``. False: never, the
            default: over NCCL, on 2 NVIDIA H200 with NVLink, windows of 1, 2 and 4 micro-batches took 4.6, 3.5 and
            2.0 % less time with overlap (1.5, 3.0 and 0.9 % with fused layers; `benchmarks/overlap.py`), and a rank
            that fails costs all ranks a window.

    Attributes:
        overlap: The choice: ``order`` is None while windows do not overlap, and ``share`` the part of a window that its
            reduction took; None if no window will overlap.

    The constructor is collective for a plain model.

    Raises:
        TypeError: The model is sharded.
        ValueError: ``overlap`` is something else.
    """

    def __init__(self, model: nn.Module, *, group: Any = None, overlap: OverlapSetting = False) -> None:
        from torch.distributed.fsdp import FSDPModule

        if any(isinstance(module, FSDPModule) for module in model.modules()):
            raise TypeError("the model is sharded by fully_shard: leave sync= out, or pass a bigbatch.SyncPolicy.")
        wrapper = ddp_wrapper(model)
        if wrapper is None:
            super().__init__(model, model, group)
        else:
            super().__init__(model, wrapper.module, wrapper.process_group)
        self.overlap = make_overlap_choice(overlap, self.module, self.size)
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

    def reduce(self, sums: "GradientSums", has_gradient: Sequence[bool], *, has_items: bool = True) -> bool:
        """All-reduce the sums, and broadcast the batch norm statistics of the first rank, as DDP does. Collective.

        If memory runs out, it is freed once, and the bucket is made again. A rank that fails nevertheless sends NaN in
        place of what it has not sent, takes part in `check_reduced`, and raises; no other rank waits for it. A failure
        after the last bucket was sent is noticed in the next vote: the other ranks have applied the update.
        """
        in_flight: list[buckets.Bucket] = []
        num_sent = 0
        try:
            sums.fill_missing_with_zeros(has_gradient)
            for tensors in buckets.grouped_tensors(sums.tensors()):
                if len(in_flight) == BUCKETS_IN_FLIGHT:
                    in_flight.pop(0).finish()
                bucket = self._made_bucket(tensors, in_flight)
                bucket.send()
                num_sent += 1
                in_flight.append(bucket)
            for bucket in in_flight:
                bucket.finish()
        except BaseException:
            in_flight.clear()
            with suppress(Exception):  # the other ranks may have exited
                is_noticed = self._send_nan(sums, has_gradient, num_sent) and has_items
                if is_noticed or sums.store.are_integers:
                    self._exchange_failures(failed=True)
            raise
        if sums.store.are_integers:
            self.check_reduced()
        self.end_reduction(sums)
        return True

    def overlapped_reduction(self, sums: "GradientSums") -> OverlappedReduction:
        """Return the reduction of a window that overlaps its last backward."""
        assert self.overlap is not None, "else no window overlaps"
        assert self.overlap.order is not None, "the ranks agreed on it"
        return OverlappedReduction(sums, self.overlap.order, self.group, self._message_device)

    def end_reduction(self, sums: "GradientSums") -> None:
        """Accept the reduced sums, and broadcast the batch norm statistics of the first rank. Collective."""
        sums.mark_unmodified()
        norms = [m for m in self.module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
        self._broadcast_from_first_rank([buffer for module in norms for buffer in module.buffers(recurse=False)])

    def _made_bucket(self, tensors: list[Tensor], in_flight: list[buckets.Bucket]) -> buckets.Bucket:
        """Return a bucket that is not sent yet; if memory runs out, finish the others and free memory before."""
        try:
            return buckets.Bucket(tensors, self.group, self._message_device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        while in_flight:
            in_flight.pop(0).finish()
        free_cached_memory()
        return buckets.Bucket(tensors, self.group, self._message_device)

    def _send_nan(self, sums: "GradientSums", has_gradient: Sequence[bool], num_sent: int) -> bool:
        """Send NaN, or zeros in place of integers, for all buckets but the first ones; return whether any was left."""
        wanted = [parameter for parameter, has in zip(sums.parameters, has_gradient, strict=True) if has]
        dtypes = [torch.int64 if sums.store.are_integers else sums.store.dtype_of(parameter) for parameter in wanted]
        sizes = [((p.device, dtype), p.numel() * dtype.itemsize) for p, dtype in zip(wanted, dtypes, strict=True)]
        unsent = buckets.grouped(sizes)[num_sent:]
        for indices in unsent:
            (device, dtype), num_bytes = sizes[indices[0]][0], sum(sizes[index][1] for index in indices)
            fill = 0 if sums.store.are_integers else math.nan
            device = self._message_device if sums.store.moves_all else device  # sums in host memory
            flat = torch.full((num_bytes // dtype.itemsize,), fill, dtype=dtype, device=device)
            dist.all_reduce(flat, group=self.group)
        return bool(unsent)

    def check_reduced(self) -> None:
        """Raise a RankFailedError if another rank failed within `reduce`. Collective."""
        if failed := self._exchange_failures(failed=False):
            raise RankFailedError(
                f"{list_ranks(failed)} failed while the gradients of the ranks were added, and the window therefore "
                "changes nothing on any rank: see the error there."
            )

    def _exchange_failures(self, *, failed: bool) -> list[int]:
        return [rank for rank, (flag,) in enumerate(self.all_gather([float(failed)])) if flag]

    def _broadcast_from_first_rank(self, tensors: Sequence[Tensor]) -> None:
        """Copy these tensors of the first rank to every other one. Collective."""
        if self.size == 1:
            return
        with torch.no_grad():
            for same in buckets.grouped_tensors([tensor.detach() for tensor in tensors]):
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


def ddp_wrapper(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """Return the DDP wrapper of a model, compiled or not; None without one."""
    model = getattr(model, "_orig_mod", model)
    return model if isinstance(model, nn.parallel.DistributedDataParallel) else None
