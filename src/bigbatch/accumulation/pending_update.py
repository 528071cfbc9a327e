"""The pending update of one window: its gradient sums and counts, and how they become one optimizer update.

EMPTY ──add──▶ ACCUMULATING ──apply / finish──▶ CLOSED, or TORN if the update failed after it had begun
  └───apply / finish / discard──┴──discard───▶ ABORTED

Long because the whole life of a window is here, with all that ranks exchange.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bigbatch.accumulation.noise_observer import NO_HOOKS, NoiseObserver
from bigbatch.accumulation.optimizer_update import OptimizerUpdate
from bigbatch.accumulation.update_outcome import NO_ITEMS, UpdateOutcome
from bigbatch.accumulation.window_content import WindowContent, WindowState
from bigbatch.distributed import window_vote
from bigbatch.distributed.collective import Number
from bigbatch.distributed.gradient_sync import GradientSync, Microbatch, never
from bigbatch.errors import WindowStateError
from bigbatch.gradients.discarded_backward import backward_and_discard
from bigbatch.gradients.gradient_sums import GradientSums
from bigbatch.gradients.loss_totals import LossTotals, as_terms
from bigbatch.memory.usage import peak_bytes
from bigbatch.types import Items, LossResult
from bigbatch.window_report import WindowReport


class PendingUpdate:
    """The gradient sums and counts of one window, until they are applied or discarded.

        with PendingUpdate(update, sync, content) as pending:      # leaving it without apply() discards it
            for microbatch in pending.microbatches():
                pending.add(loss_fn(model, microbatch.content), counts=microbatch.counts)
            report = pending.apply()

    Args:
        update: Divides, clips and steps.
        sync: Synchronizes gradients over ranks.
        content: What the window will run.
        static_buffers: As for `GradientSums`.
        observer: Measures the gradient noise scale; None to not measure it.
        should_stop: Called when the window ends: whether to stop after this update.

    Attributes:
        state: EMPTY, ACCUMULATING, CLOSED, ABORTED or TORN.
        num_microbatches: Micro-batches of this rank that count, so far.
        sums: The gradient sums.
        loss_totals: Loss sums and items.
    """

    def __init__(
        self,
        update: OptimizerUpdate,
        sync: GradientSync,
        content: WindowContent,
        *,
        static_buffers: Mapping[Tensor, Tensor] | None = None,
        observer: NoiseObserver | None = None,
        should_stop: Callable[[], bool] = never,
    ) -> None:
        self._update, self._num_steps_before = update, update.num_steps
        self._sync, self._content, self._should_stop = sync, content, should_stop
        self._started_s = time.perf_counter()
        self._num_syncs, self._is_abandoned, self._has_voted = 0, False, sync.size == 1
        self._all_count = self._all_have_run = not sync.runs_in_lockstep  # else there may be padding
        self.state, self.num_microbatches, self._overlap = WindowState.EMPTY, 0, window_vote.Overlap.NO
        self._loss_scale = update.loss_scale()
        parameters = update.parameters()
        self._device = parameters[0].device if parameters else update.device
        is_float16 = self._loss_scale is not None or torch.float16 in {p.dtype for p in parameters}
        self._prescales, self._may_add_constants = is_float16, False
        self.loss_totals = LossTotals(content.totals, prescale=is_float16)
        self.sums = GradientSums(
            parameters,
            static_buffers=static_buffers,
            parameters_are_wrapped=sync.parameters_are_wrapped,
            store=None if update.offload is None else update.offload.sums,
        )
        self.sums.open()
        update.steps.guard(self.holds_gradients)
        self._observer = observer
        if observer is not None and (is_float16 or content.totals is not None):
            observer.skip_window()
        elif observer is not None:
            observer.attach(self.sums, content.microbatches, samples=content.samples)
        self._is_alone = sync.size == 1 and not sync.runs_in_lockstep
        self._is_plain = self._is_alone and (observer is None or not observer.is_measuring)
        sync.start_window()

    def __enter__(self) -> "PendingUpdate":
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    @property
    def is_open(self) -> bool:
        """Whether micro-batches can be added."""
        return self.state in (WindowState.EMPTY, WindowState.ACCUMULATING)

    def holds_gradients(self) -> bool:
        """Return whether ``.grad`` contains undivided sums."""
        return self.state is WindowState.ACCUMULATING

    @property
    def uses_plain_sums(self) -> bool:
        """Whether losses are differentiated as they are, without a factor of this window."""
        return self._loss_scale is None and self.loss_totals.uses_plain_sums

    def microbatches(
        self, should_abandon: Callable[[], bool] = never, again: Sequence[Any] = ()
    ) -> Iterator[Microbatch]:
        """Yield this rank's micro-batches; for a sharded model also padding, as many as any rank runs.

        Args:
            should_abandon: Called before each micro-batch: whether to drop the window, on all ranks.
            again: Yielded in place of those of the window, for a second pass.

        Raises:
            WindowAbandonedError: It is dropped, in a single process; over several ranks `apply` raises it.
        """
        microbatches = again or self._content.microbatches
        if (self._is_alone and should_abandon is never) or not isinstance(microbatches, Sequence):
            return map(Microbatch, microbatches)  # drawn lazily: their number may be unknown
        turns = self._sync.turns(microbatches, self._content.max_num_microbatches, should_abandon)
        return turns if self._sync.size == 1 else self._noting_end(turns)

    def _noting_end(self, turns: Generator[Microbatch, None, bool]) -> Iterator[Microbatch]:
        self._all_have_run = self._all_count
        self._is_abandoned = (yield from turns) or self._is_abandoned
        self._all_have_run = True

    def add(
        self,
        result: LossResult,
        *,
        counts: bool = True,
        only: Sequence[Tensor] | None = None,
        retain_graph: bool = False,
    ) -> None:
        """Add one micro-batch: its loss and items to the totals, its gradient to the sums.

        Args:
            result: As returned by a loss function.
            counts: False for padding: the backward runs, with a zero gradient.
            only: Parameters that receive the gradient; all by default.
            retain_graph: Whether the graph can be differentiated again.

        Raises:
            WindowStateError: The window is closed or aborted, or its gradients were changed by other code.
        """
        if self.state is not WindowState.ACCUMULATING:
            self._require_open()
            self.state = WindowState.ACCUMULATING
        loss = self.loss_totals.record_pair(result) if self._all_count else None
        has_items = loss is not None
        if not has_items:
            terms = as_terms(result)
            loss = self.loss_totals.record(terms) if counts else None
            has_items = loss is not None
            loss = self._sync.loss_to_differentiate(loss, terms)
        if loss is not None and not (has_items or self._sync.is_sharded):
            backward_and_discard(loss, self.sums)
        elif loss is not None and (only is None or only) and (loss.requires_grad or not self._may_add_constants):
            loss = loss if self._loss_scale is None else loss * self._loss_scale
            if self._is_plain:  # the contexts would do nothing
                self.sums.backward(loss, only=only, retain_graph=retain_graph)
            else:
                self._backward_in_contexts(loss, only, has_items=has_items, retain_graph=retain_graph)
        self.num_microbatches += counts
        self._num_syncs += self._sync.syncs_in_backward

    def _backward_in_contexts(
        self, loss: Tensor, only: Sequence[Tensor] | None, *, has_items: bool, retain_graph: bool
    ) -> None:
        hooks = NO_HOOKS if self._observer is None else self._observer.microbatch(self.loss_totals.num_recorded)
        with self._sync.backward(counts=has_items), hooks:
            self.sums.backward(loss, only=only, retain_graph=retain_graph)

    def factor_of_leaves(self, items: Items) -> float | Tensor:
        """Return the factor for the backward of a loss outside of `add`; micro-batches may then add constants."""
        self.state, self._may_add_constants = WindowState.ACCUMULATING, True
        factor = self.loss_totals.prescale_factor(items)
        return factor if self._loss_scale is None else self._loss_scale * factor

    def restart(self) -> None:
        """Drop the micro-batches so far, to run them again."""
        self.loss_totals = LossTotals(self._content.totals, prescale=self._prescales)
        self.sums.clear()
        self.num_microbatches = 0

    def record(self, result: LossResult) -> Tensor | None:
        """Count one micro-batch that is differentiated elsewhere; return its loss for that, None without items."""
        self._require_open()
        self.state, self.num_microbatches = WindowState.ACCUMULATING, self.num_microbatches + 1
        loss = self.loss_totals.record(as_terms(result))
        return loss if loss is None or self._loss_scale is None else loss * self._loss_scale

    def apply(self, *, retries: int = 0, run_again: "Callable[[PendingUpdate], None] | None" = None) -> WindowReport:
        """Update once, clear the gradients, and report. Collective.

        Args:
            retries: Attempts of this rank that ran out of memory and were repeated.
            run_again: Adds the micro-batches of the window again, for optimizers that need a closure; None if they are
                no longer available.

        Raises:
            RankFailedError: Another rank failed in this window.
            TornUpdateError: The update failed after it had begun.
            WindowAbandonedError: A rank abandoned it.
            WindowStateError: The window is closed or aborted, there is no optimizer, or gradients or parameters were
                changed by other code.
        """
        self._update.require_optimizer()
        extra, result, to_read = self._settle(retries)
        outcome = self._update.apply(
            self.sums,
            self.loss_totals,
            loss_scale=self._loss_scale,
            sync=self._sync,
            extra_scalars=to_read,
            evaluate_again=None if run_again is None else partial(self._evaluate_again, run_again),
        )
        if outcome.skipped is None:
            torch.clear_autocast_cache()  # under one autocast around the whole loop it holds casts of the old weights
        self._release(WindowState.CLOSED)
        return self._report(outcome, extra, result, retries=retries)

    def finish(self, *, retries: int = 0) -> WindowReport:
        """Leave the finished gradient in ``.grad`` without an update, and report. Collective.

        Arguments and errors are those of `apply`. The gradient is NaN if that of the window, or its loss, is not
        finite, and None for a window without items.
        """
        extra, result, to_read = self._settle(retries)
        outcome = self._update.finish(
            self.sums, self.loss_totals, loss_scale=self._loss_scale, sync=self._sync, extra_scalars=to_read
        )
        if outcome.skipped == NO_ITEMS:
            self.sums.clear()
        elif outcome.skipped is not None:
            self.sums.write_nan_to_grad()
        torch.clear_autocast_cache()  # other code updates the weights before the next window
        self._release(WindowState.CLOSED, keeps_gradients=True)
        return self._report(outcome, extra, result, retries=retries)

    def _settle(self, retries: int) -> tuple[Sequence[Number], window_vote.VoteResult | None, list[Tensor]]:
        """End the micro-batches and reduce the sums; return the observer's scalars, the votes, and scalars to read."""
        self._require_open()
        self._update.check_parameters(self.sums)
        self._all_have_run = True
        extra: Sequence[Number] = window_vote.NO_EXTRA
        if self._observer is not None:
            extra = self._observer.scalars(self.sums, self.loss_totals, retries=retries)
        result = None if self._sync.size == 1 else self._vote(extra)
        if result is not None:
            self._reduce(result)
        return extra, result, [value for value in extra if isinstance(value, Tensor)] if result is None else []

    def _report(
        self, outcome: UpdateOutcome, extra: Sequence[Number], result: window_vote.VoteResult | None, *, retries: int
    ) -> WindowReport:
        items, read = self.loss_totals.items(), iter(outcome.extra_scalars)
        local = [next(read, 0.0) if isinstance(value, Tensor) else value for value in extra]
        noise = None
        if self._observer is not None:
            extras, was_skipped = [local] if result is None else result.extra, outcome.skipped is not None
            noise = self._observer.finish(extras, grad_norm=outcome.grad_norm, items=items, skipped=was_skipped)
        tokens, peak = self._content.tokens, peak_bytes(self._device)
        return WindowReport(
            step=self._update.num_steps,
            items=items,
            grad_norm=outcome.grad_norm,
            num_microbatches=self.num_microbatches,
            tokens=tokens if tokens is None or result is None else result.tokens,
            peak_bytes=peak if peak is None or result is None else max(peak, result.peak_bytes),
            elapsed_s=time.perf_counter() - self._started_s,
            syncs=self._num_syncs,
            skipped=outcome.skipped,
            retries=retries,
            ranks=None if result is None else result.report(),
            noise=noise,
            _read_terms=self.loss_totals.terms,
        )

    def _evaluate_again(self, run_again: "Callable[[PendingUpdate], None]") -> LossTotals:
        """Compute the sums again, with the parameters as they are now; the report keeps the first totals."""
        first, num_microbatches = self.loss_totals, self.num_microbatches
        self.restart()
        try:
            run_again(self)
            return self.loss_totals
        finally:
            self.loss_totals, self.num_microbatches = first, num_microbatches

    def discard(self) -> None:
        """Drop sums and gradients; no-op for a finished window. Collective if the other ranks wait for a vote."""
        if not self.is_open:
            return
        if not self._has_voted:
            self._has_voted = True
            if self._all_have_run:  # else they are inside a layer or loss, where no vote reaches them
                window_vote.announce_failed_window(self._sync, len(self.sums.parameters), self._update.known_num_steps)
        if self._update.steps.torn is not None:
            self._release(WindowState.TORN)
        else:  # the update may have ended although what came after it failed
            applied = self._update.num_steps != self._num_steps_before
            self._release(WindowState.CLOSED if applied else WindowState.ABORTED)

    def _release(self, state: WindowState, *, keeps_gradients: bool = False) -> None:
        self.sums.close(keeps_gradients=keeps_gradients)
        self._sync.end_window()
        self.state = state  # last: if this is interrupted, `discard` repeats it

    def _require_open(self) -> None:
        if not self.is_open:
            raise WindowStateError(f"the window is {self.state.value}: it takes no micro-batch and no step.")

    def _vote(self, extra: Sequence[Number]) -> window_vote.VoteResult:
        """Exchange the status of all ranks. Collective; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # as the all-gather would; now elapsed_s is of this rank
        window_vote.check_dense(self.sums.parameters)
        vote = window_vote.RankVote(
            abandoned=self._is_abandoned,
            stopping=self._should_stop(),
            num_microbatches=self.num_microbatches,
            tokens=self._content.tokens or 0,
            peak_bytes=peak_bytes(self._device) or 0,
            elapsed_s=time.perf_counter() - self._started_s,
            num_steps=window_vote.number_or_unknown(self._update.known_num_steps),
            overlap=self._overlap,
        )
        flags = [] if self._sync.is_sharded else self.sums.has_gradient()
        numbers = window_vote.to_numbers(vote, self.loss_totals.local_totals(), flags, extra)
        self._has_voted = True
        return window_vote.from_numbers(self._sync.all_gather(numbers), len(flags))

    def _reduce(self, result: window_vote.VoteResult) -> None:
        """Reduce the sums over ranks if every rank succeeded. Collective."""
        result.check_succeeded(num_steps=self._update.known_num_steps)
        self.loss_totals.set_global_totals(result.terms)
        self.loss_totals.undo_prescale(self.sums.tensors())
        self.sums.mark_unmodified()
        self._num_syncs += self._sync.reduce(self.sums, result.has_gradient, has_items=result.has_items)
