"""One window's sums and counts, and how they become an update: what stands behind a `Window`."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigbatch.accumulation.optimizer_update import OptimizerUpdate, UpdateOutcome
from bigbatch.distributed.gradient_sync import GradientSync
from bigbatch.distributed.window_vote import Number, RankVote, VoteResult, from_numbers, name_ranks, to_numbers
from bigbatch.errors import RankFailedError, WindowAbandonedError
from bigbatch.gradients.gradient_sums import GradientSums
from bigbatch.gradients.loss_totals import LossTotals, as_terms, may_have_items
from bigbatch.memory.usage import peak_bytes
from bigbatch.scaling.noise_scale import NoiseScale, NoiseScaleEstimator
from bigbatch.types import Items
from bigbatch.window_report import RanksReport, WindowReport


@dataclass
class Wishes:
    """What a rank has to say when the window ends, besides its gradients.

    Attributes:
        abandoned: Whether it was told to drop the window.
        tokens: It ran over, without padding; None where nobody counts.
        samples: Of the batch; None where nobody counts.
        measures: Whether the noise of this window can be told.
        stopping: Asked at the end: whether to stop after this update.
    """

    abandoned: bool = False
    tokens: int | None = None
    samples: int | None = None
    measures: bool = True
    stopping: Callable[[], bool] = lambda: False


class PendingUpdate:
    """One window's sums and counts, and how they become an update.

    Args:
        update: What divides and steps.
        totals: Items of the whole window over all ranks, by term, for a loss of several.
        static_buffers: As for `GradientSums`.
        sync: How gradients cross ranks.
        noise: Takes in the noise of the window; None where nobody wants it, or it cannot be measured.
        squared_norm_sum: Where the squared norms of micro-gradients are summed, for ``noise``.

    Attributes:
        counts: Whether what is added next counts; False for what is run for the sake of the other ranks.
        is_complete: Whether this rank has run all that the other ranks of a sharded model could wait for.
    """

    def __init__(
        self,
        update: OptimizerUpdate,
        totals: Mapping[str, Items] | None,
        *,
        static_buffers: Mapping[Tensor, Tensor] | None = None,
        sync: GradientSync,
        noise: NoiseScaleEstimator | None = None,
        squared_norm_sum: Tensor | None = None,
    ) -> None:
        self._update = update
        self._noise = noise
        self._sync = sync
        self._started_s = time.perf_counter()
        self._num_microbatches = 0
        self._num_syncs = 0
        self._has_voted = sync.size == 1
        self.wishes = Wishes()
        self.counts = True
        self.is_complete = not sync.runs_in_lockstep
        self._loss_scale = update.loss_scale()
        parameters = update.parameters()
        float16 = self._loss_scale is not None or any(p.dtype == torch.float16 for p in parameters)
        self._squared_norm_sum = None if noise is None or float16 or totals is not None else squared_norm_sum
        if self._squared_norm_sum is not None:
            self._squared_norm_sum.zero_()
        self.loss_totals = LossTotals(totals, prescale=float16)
        self.sums = GradientSums(
            parameters,
            static_buffers=static_buffers,
            parameters_are_wrapped=sync.parameters_are_wrapped,
            squared_norm_sum=self._squared_norm_sum,
        ).__enter__()
        sync.start_window()

    def add(self, loss_sum: Any, items: Items | None, *, only: Sequence[Tensor] | None = None) -> None:
        """Add one micro-batch: its loss and items to the ledger, its gradient to the sums, or to ``only`` some."""
        terms = as_terms(loss_sum if items is None else (loss_sum, items))
        loss = self.loss_totals.record(terms) if self.counts else None
        if self._sync.runs_in_lockstep:
            self._sync.zero_gradient = loss is None
            loss = _keep_unused_terms_in_graph(loss, terms)
        if loss is not None and (only is None or only):
            with self._sync.backward():
                self.sums.backward(loss if self._loss_scale is None else loss * self._loss_scale, only=only)
        self._num_microbatches += self.counts
        self._num_syncs += self._sync.syncs_in_backward

    @property
    def uses_plain_sums(self) -> bool:
        """Whether losses are differentiated as they come, with no factor of this window's own."""
        return self._loss_scale is None and self.loss_totals.uses_plain_sums

    def add_recorded(self, loss_sum: Tensor, items: Items) -> None:
        """Enter one micro-batch whose gradient is in the sums already."""
        self.loss_totals.record(as_terms((loss_sum, items)))
        self._num_microbatches += 1

    def apply(self) -> WindowReport:
        """Update once, clear, and tell. Collective.

        Raises:
            RankFailedError: Another rank failed in this window.
            WindowAbandonedError: A rank was told to drop it.
        """
        self.is_complete = True
        result = None if self._sync.size == 1 else self._vote()
        if result is not None:
            self._agree(result)
        squared_norm_sum, counts = self._noise_inputs(result)
        beside = [value for value in (squared_norm_sum, counts) if isinstance(value, Tensor)]
        outcome = self._update.apply(
            self.sums, self.loss_totals, loss_scale=self._loss_scale, sync=self._sync, extra_scalars=beside
        )
        self.discard()
        items = self.loss_totals.items()
        noise = self._observe(outcome, squared_norm_sum, counts, result, items=items)
        peak = peak_bytes(self._update.device)
        return WindowReport(
            step=self._update.num_steps,
            items=items,
            grad_norm=outcome.grad_norm,
            num_microbatches=self._num_microbatches,
            tokens=self.wishes.tokens if result is None else _sum_of_tokens(self.wishes.tokens, result),
            peak_bytes=peak if result is None or peak is None else max(peak, *(b.peak_bytes for b in result.votes)),
            elapsed_s=time.perf_counter() - self._started_s,
            syncs=self._num_syncs,
            skipped=outcome.skipped,
            ranks=None if result is None else _report(result),
            noise=noise,
            _read_terms=self.loss_totals.terms,
        )

    def _noise_inputs(self, result: VoteResult | None) -> tuple[Number, Number]:
        """Give Σ |S_i|² and Σ n_i² over the micro-batches of all ranks, where they are; NaN where nobody measured."""
        if self._squared_norm_sum is None or not self.wishes.measures or not self.sums.can_name_leaves:
            own: tuple[Number, Number] = math.nan, 0.0
        else:
            own = self._squared_norm_sum, self.loss_totals.items_squared()
        if result is None:
            return own
        return sum(float(b.squared_norm_sum) for b in result.votes), sum(
            float(b.squared_items_sum) for b in result.votes
        )

    def _observe(
        self,
        outcome: UpdateOutcome,
        squared_norm_sum: Number,
        counts: Number,
        result: VoteResult | None,
        *,
        items: float,
    ) -> NoiseScale | None:
        """Take the noise of this window in; give what is known by now."""
        if self._noise is None:
            return None
        if outcome.skipped is not None or self._squared_norm_sum is None:
            self._noise.skip_window(items)
        else:
            read = iter(outcome.extra_scalars)
            squared_norm_sum, counts = (
                next(read) if isinstance(value, Tensor) else value for value in (squared_norm_sum, counts)
            )
            samples = self.wishes.samples or 0 if result is None else sum(b.samples for b in result.votes)
            self._noise.update(outcome.grad_norm**2, squared_norm_sum, items, counts, samples=samples)
        return self._noise.estimate()

    def _vote(self, *, failed: bool = False) -> VoteResult:
        """Tell the other ranks, before anything could hang, and hear them. Collective; waits for the device."""
        device = self._update.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the gather would wait as long; this way the time is that of the window
        if any(p.grad is not None and p.grad.is_sparse for p in self.sums.parameters) and not failed:
            raise TypeError("a gradient is sparse, and those of ranks are summed dense: make embeddings sparse=False.")
        squared_norm_sum, items_squared = self._noise_inputs(None)
        vote = RankVote(
            failed=failed,
            abandoned=self.wishes.abandoned,
            stopping=not failed and self.wishes.stopping(),
            num_microbatches=self._num_microbatches,
            tokens=self.wishes.tokens or 0,
            peak_bytes=peak_bytes(device) or 0,
            elapsed_s=time.perf_counter() - self._started_s,
            samples=self.wishes.samples or 0,
            squared_norm_sum=squared_norm_sum,
            squared_items_sum=items_squared,
        )
        parameters = [] if self._sync.runs_in_lockstep else self.sums.parameters
        reached = self.sums.has_gradient() if parameters else []
        values = to_numbers(vote, {} if failed else self.loss_totals.local_totals(), reached)
        self._has_voted = True
        return from_numbers(self._sync.all_gather(values), len(parameters))

    def _agree(self, result: VoteResult) -> None:
        """Go on with what all ranks have, or not at all."""
        if failed := result.ranks_with("failed"):
            raise RankFailedError(
                f"{name_ranks(failed)} failed in the window after update {self._update.num_steps}, and it changed "
                "nothing on any rank: see what was said there. A window that ends without its step() has failed, too."
            )
        if result.ranks_with("gave_up"):
            raise WindowAbandonedError(f"the window was given up on {name_ranks(result.ranks_with('gave_up'))}.")
        self.loss_totals.set_global_totals(result.terms)
        self.loss_totals.undo_prescale(self.sums.tensors())
        self.sums.mark_unmodified()
        self._num_syncs += self._sync.reduce(self.sums, result.has_gradient)

    def discard(self) -> None:
        """Drop sums and gradients. Collective where the window ends without a vote: the other ranks wait for one."""
        if not self._has_voted:
            self._has_voted = True
            if self.is_complete:  # else they are in a layer of the sharded model, and wait for what never comes
                with suppress(Exception):  # they may be gone
                    self._vote(failed=True)
        self.sums.__exit__(None, None, None)
        self._sync.end_window()


def _keep_unused_terms_in_graph(loss: Tensor | None, terms: Mapping[str, tuple[Tensor, Items]]) -> Tensor:
    """Add, as zeros, the terms that count nothing here: other ranks may run backward through their layers."""
    for idle in (loss_sum for loss_sum, items in terms.values() if loss is None or not may_have_items(items)):
        loss = idle * 0.0 if loss is None else loss + idle * 0.0
    assert loss is not None, "there is at least one term"
    return loss


def _sum_of_tokens(own: int | None, result: VoteResult) -> int | None:
    return None if own is None else sum(vote.tokens for vote in result.votes)


def _report(result: VoteResult) -> RanksReport:
    times = [vote.elapsed_s for vote in result.votes]
    slowest = max(range(len(times)), key=times.__getitem__)
    return RanksReport(
        size=len(times),
        num_microbatches=tuple(vote.num_microbatches for vote in result.votes),
        slowest=slowest,
        slowest_share=1 - sum(times) / len(times) / times[slowest] if times[slowest] else 0.0,
        stopping=bool(result.ranks_with("stopping")),
    )
