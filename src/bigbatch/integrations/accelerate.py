"""Exact accumulation with Hugging Face accelerate: `ExactAccelerator`.

accelerator.backward(loss_sum, items=n) → sum over micro-batches → all-reduce the count → .grad = Σ ∇loss_sum / Σ n
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bigbatch.engine.hand_over import is_exact_loss
from bigbatch.errors import InputError
from bigbatch.integrations.accelerate_optimizer import WindowOptimizer
from bigbatch.integrations.item_totals import (
    AccumulationReport,
    DataRanks,
    GradientVersions,
    ItemTotals,
    checked_pair,
    gradient_versions,
    has_gradient,
    multiply_gradients,
    reached_parameters,
    unique_parameters,
)
from bigbatch.types import Items

_UNSUPPORTED = {
    DistributedType.DEEPSPEED: "DeepSpeed keeps gradients outside of .grad",
    DistributedType.MEGATRON_LM: "Megatron-LM runs backward itself",
    DistributedType.XLA: "XLA reduces gradients after backward",
}


class ExactAccelerator(Accelerator):  # type: ignore[misc]
    """An ``Accelerator`` whose windows have the gradient of the whole batch.

        accelerator = ExactAccelerator(gradient_accumulation_steps=4)      # arguments are those of Accelerator
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                loss_sum = F.mse_loss(model(inputs), labels, reduction="sum")
                accelerator.backward(loss_sum, items=labels.numel())
                optimizer.step()
                optimizer.zero_grad()

    At the last `backward` of a window, ``.grad`` becomes Σ ∇loss_sum / Σ items over its micro-batches and all ranks, in
    a shorter last window too. Everything that follows is accelerate's: `clip_grad_norm_`, optimizer, scheduler,
    GradScaler, checkpoints.

    For one process, DDP and FSDP2. A window ends where accelerate synchronizes gradients: with the last block of
    `accumulate`, or with a `backward` outside of `no_sync`. In one process, a window whose last micro-batch has no
    `backward` is divided when it is clipped, unscaled or applied by a prepared optimizer; elsewhere that is refused.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._bigbatch_totals = ItemTotals()
        self._bigbatch_report: AccumulationReport | None = None
        self._bigbatch_stock_is_open = False
        self._bigbatch_num_calls: int | None = None  # of backward(items=...) in this block of accumulate
        self._bigbatch_num_no_sync = 0  # blocks of no_sync that are open
        self._bigbatch_num_joins = 0
        self._bigbatch_checked = False
        self._bigbatch_versions: GradientVersions | None = None  # after a micro-batch; None if .grad does not hold it
        self._bigbatch_wrapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # in DDP

    @property
    def bigbatch_report(self) -> AccumulationReport | None:
        """Items and loss of the last window that ended; None before the first."""
        return self._bigbatch_report

    def prepare_model(self, model: Any, *args: Any, **settings: Any) -> Any:
        """As ``Accelerator.prepare_model``."""
        prepared = super().prepare_model(model, *args, **settings)
        if any(isinstance(module, DistributedDataParallel) for module in prepared.modules()):
            self._bigbatch_wrapped.add(prepared)
        return prepared

    def prepare_optimizer(self, optimizer: Any, device_placement: bool | None = None) -> Any:
        """As ``Accelerator.prepare_optimizer``; the step of the result ends an open window first."""
        placed = self.device_placement if device_placement is None else device_placement
        prepared = super().prepare_optimizer(optimizer, device_placement=False)
        if getattr(prepared, "end_window", None) == self._bigbatch_end_window:
            return prepared
        ours = WindowOptimizer(prepared, self._bigbatch_end_window, device_placement=placed)
        self._optimizers[:] = [ours if other is prepared else other for other in self._optimizers]
        return ours

    @contextmanager
    def accumulate(self, *models: Any) -> Iterator[None]:
        """As ``Accelerator.accumulate``.

        Raises:
            InputError: At the end of a window whose last micro-batch had no `backward`, without a prepared optimizer.
        """
        with super().accumulate(*models):
            self._bigbatch_num_calls = 0
            try:
                yield
                if self.sync_gradients and self._bigbatch_totals.num_microbatches and not self._optimizers:
                    raise InputError(
                        "the last micro-batch of this window had no backward(items=...), and no optimizer was prepared "
                        "whose step divides the gradient: pass the optimizer to accelerator.prepare()."
                    )
            finally:
                self._bigbatch_num_calls = None

    @contextmanager
    def no_sync(self, model: Any) -> Iterator[None]:
        """As ``Accelerator.no_sync``; a `backward` inside does not end the window, in one process neither."""
        with super().no_sync(model):
            self._bigbatch_num_no_sync += 1
            try:
                yield
            finally:
                self._bigbatch_num_no_sync -= 1

    @contextmanager
    def join_uneven_inputs(self, *args: Any, **settings: Any) -> Iterator[None]:
        """As ``Accelerator.join_uneven_inputs``, without ``backward(items=...)`` inside."""
        with super().join_uneven_inputs(*args, **settings):
            self._bigbatch_num_joins += 1
            try:
                yield
            finally:
                self._bigbatch_num_joins -= 1

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """As ``Accelerator.unscale_gradients``, which its clipping calls first; ends an open window before that.

        Raises:
            InputError: The gradient cannot be divided any more, or not on this rank alone.
        """
        if self.sync_gradients and not self._bigbatch_num_no_sync:
            self._bigbatch_end_window()
        super().unscale_gradients(optimizer)

    def backward(self, loss: Tensor, *, items: Items | None = None, **kwargs: Any) -> None:
        """Add the gradient of one micro-batch, and divide by the items of the window if it is the last one.

        Args:
            loss: With ``items``, the 0-d **sum** of the item losses, not divided by anything.
            items: Number of items of the sum: a number, or a tensor of one element on any device. None for what
                ``Accelerator.backward`` does with a mean.
            kwargs: As for ``Accelerator.backward``.

        At the end of a window it is collective. In a window without items the gradient is 0.

        Raises:
            InputError: Micro-batches with and without ``items`` are in one window, one block of `accumulate` calls this
                twice, ``.grad`` is not zero at the start, the loss reaches a parameter that was not prepared, the loss
                is of `Engine.loss` and would be divided, or the distributed type is not supported.
            TypeError: The loss is no tensor, or the items are no number.
            ValueError: The loss is not 0-d, or NaN with 0 items; or the items are not a finite count of 0 or more.
        """
        is_last = self.sync_gradients and not self._bigbatch_num_no_sync
        totals = self._bigbatch_totals
        if is_exact_loss(loss) and (items is not None or self.gradient_accumulation_steps > 1):
            raise InputError(
                "the loss of engine.loss(batch) has the finished gradient of a whole window, which must not be divided"
                ": set gradient_accumulation_steps=1, and call accelerator.backward(loss) without items."
            )
        if items is None:
            if totals.num_microbatches:
                raise _mixed("with", "without")
            super().backward(loss, **kwargs)
            self._bigbatch_stock_is_open = not is_last
            return
        self._bigbatch_check_call(kwargs)
        loss, items = checked_pair(loss, items)
        self._bigbatch_check_gradients()
        self._bigbatch_check_parameters(loss)
        parameters = self._bigbatch_parameters(optimized_only=True)
        before = gradient_versions(parameters) if self.distributed_type == DistributedType.FSDP else None
        super().backward(loss * (self.gradient_accumulation_steps / totals.divisor), **kwargs)
        totals.add(loss, items)
        if is_last:
            self._bigbatch_divide()
        else:
            # FSDP2 may hold gradients back until the last micro-batch, and zero_grad() keeps those
            versions = gradient_versions(parameters)
            self._bigbatch_versions = versions if versions != before else None

    def _bigbatch_divide(self) -> None:
        ranks = DataRanks(self.num_processes, self.device)
        self._bigbatch_report, factor = self._bigbatch_totals.close(ranks, prescale=self.scaler is not None)
        self._bigbatch_checked = True
        multiply_gradients(self._bigbatch_parameters(), factor)

    def _bigbatch_end_window(self) -> None:
        """Divide the gradient of a window whose last micro-batch had no `backward`, or refuse. Not collective."""
        if not self._bigbatch_totals.num_microbatches:
            return
        is_changed, is_dropped = self._bigbatch_compare_gradients()
        if is_dropped:
            self._bigbatch_totals.clear()
            return
        if self.num_processes > 1 or self.distributed_type == DistributedType.FSDP:
            # No collective here: a rank that did call backward is in those of its gradients
            raise InputError(
                "the last micro-batch of this window had no backward(items=...) on this rank, and only this call "
                "averages gradients and adds up items over ranks: call it for the last micro-batch of every window on "
                "every rank, with items=0 and the sum of its losses, 0, if it has no items."
            )
        if is_changed and self.scaler is None:
            raise InputError(
                "the last micro-batch of this window had no backward(items=...), and the gradient was changed before "
                "it was divided: clip with accelerator.clip_grad_norm_() or accelerator.clip_grad_value_(), which "
                "divide first, or call accelerator.unscale_gradients() before you change the gradient."
            )
        self._bigbatch_divide()

    def _bigbatch_compare_gradients(self) -> tuple[bool, bool]:
        """Return whether ``.grad`` changed since the last micro-batch, and whether it was dropped by that.

        Zeros alone do not mean that it was dropped, since a gradient may be 0. Waits for the device if it changed.
        """
        parameters = self._bigbatch_parameters(optimized_only=True)
        is_changed = self._bigbatch_versions not in (None, gradient_versions(parameters))
        return is_changed, is_changed and not has_gradient(parameters)

    def _bigbatch_parameters(self, *, optimized_only: bool = False) -> list[Tensor]:
        optimized = [group["params"] for optimizer in self._optimizers for group in optimizer.param_groups]
        if optimized and optimized_only:
            return unique_parameters(optimized)
        return unique_parameters([*optimized, *(model.parameters() for model in self._models)])

    def _bigbatch_check_call(self, kwargs: dict[str, Any]) -> None:
        reason = _UNSUPPORTED.get(self.distributed_type)
        if self.distributed_type == DistributedType.FSDP and not self.is_fsdp2:
            reason = "FSDP version 1 keeps gradients outside of .grad: set fsdp_version=2"
        parallelism = getattr(self, "parallelism_config", None)
        if parallelism is not None and parallelism.non_data_parallel_size > 1:
            reason = "tensor, context and sequence parallelism give several ranks the same samples"
        if kwargs.get("learning_rate") is not None:
            reason = "an optimizer that steps inside backward (LOMO) has no gradient to divide"
        if self.num_processes > 1 and self._bigbatch_num_joins:
            reason = "ranks that run out of data in join_uneven_inputs do not take part in the count"
        if reason is not None:
            raise InputError(
                f"backward(items=...) is not supported here, since {reason}. Count the items of the window before its "
                "first micro-batch, over all ranks, and call accelerator.backward(loss_sum * "
                "accelerator.gradient_accumulation_steps * ranks / count) without items, where ranks is the number of "
                "ranks that hold different samples."
            )
        if self._bigbatch_stock_is_open:
            raise _mixed("without", "with")
        if self._bigbatch_num_calls is not None:
            self._bigbatch_num_calls += 1
            if self._bigbatch_num_calls > 1:
                raise InputError(
                    "backward(items=...) was called twice in one block of accelerator.accumulate(), and the items of "
                    "the second call may be those of the first: add up the losses, and call it once. For models that "
                    "take turns, make a bigbatch.Accumulator of each."
                )

    def _bigbatch_check_gradients(self) -> None:
        """Check that ``.grad`` holds the micro-batches that were counted."""
        if self._bigbatch_totals.num_microbatches:
            if self._bigbatch_compare_gradients()[1]:
                self._bigbatch_totals.clear()
        elif has_gradient(self._bigbatch_parameters(optimized_only=True)):
            raise InputError(
                "the parameters have a gradient before the first micro-batch of a window, which would be divided by "
                "the items of this one: call optimizer.zero_grad() after optimizer.step(), and run all micro-batches "
                "of a window in accelerator.accumulate(model), or all but the last in accelerator.no_sync(model)."
            )

    def _bigbatch_check_parameters(self, loss: Tensor) -> None:
        """Check, in the first window, that the gradients are averaged over the ranks, and will be divided."""
        if self._bigbatch_checked or self.distributed_type == DistributedType.FSDP:
            return  # the graph of FSDP2 ends in other tensors than the parameters
        models: Iterable[nn.Module] = self._models if self.num_processes == 1 else self._bigbatch_wrapped
        own = {id(parameter) for model in models for parameter in model.parameters()}
        if self.num_processes == 1:
            own.update(map(id, self._bigbatch_parameters()))
        for parameter in reached_parameters(loss):
            if id(parameter) not in own:
                raise InputError(
                    f"the loss reaches a parameter of shape {tuple(parameter.shape)} that no prepared model has, and "
                    "its gradient would neither be averaged over ranks nor divided: pass its module to "
                    "accelerator.prepare(), or call requires_grad_(False) on it."
                )


def _mixed(before: str, now: str) -> InputError:
    return InputError(
        f"this window has micro-batches {before} items, and this one is {now} items: a mean cannot be added to sums. "
        "Pass items= for every micro-batch of a window, or for none."
    )


__all__ = ["AccumulationReport", "ExactAccelerator"]
