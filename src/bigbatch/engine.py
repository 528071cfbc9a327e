"""The conductor: a batch goes in, one update comes out.

split → window (forward, backward, accumulate) → update → report
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from bigbatch.errors import WindowStateError
from bigbatch.objective import Items, Terms
from bigbatch.plan import TokenBudget, plan
from bigbatch.recover import Recovery
from bigbatch.report import WindowReport
from bigbatch.split import Collate, Split, check_count, split, split_into
from bigbatch.transaction import Transaction
from bigbatch.update import Update
from bigbatch.window import Window

if TYPE_CHECKING:
    from torch.amp import GradScaler
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

LossFunction: TypeAlias = Callable[[Any, Any], "tuple[Tensor, Items] | Terms"]
CountItems: TypeAlias = Callable[[Any], Mapping[str, Items]]


SHRINK = 0.93  # of the micro-batch, after a window that ran out of memory
GROW_AFTER = 20  # windows without running out, before the micro-batch grows back by a step


class Accumulator:
    """Exact accumulation windows in a loop of your own.

        accumulator = Accumulator(model, optimizer, max_grad_norm=1.0)
        for window in accumulator.windows(loader, num_microbatches=4):
            for inputs, labels in window:
                loss_sum = F.mse_loss(model(inputs), labels, reduction="sum")
                window.backward(loss_sum, items=labels.numel())
            report = window.step()

    Each window updates the optimizer's parameters with Σ_i ∇loss_sum_i / Σ_i items_i. Only these parameters receive a
    gradient, so accumulators over different parameters may share a graph and be open at the same time. Their ``.grad``
    is cleared when a window opens and when it ends.

    Args:
        model: The module being trained, in one process.
        optimizer: A ``torch.optim.Optimizer`` over its parameters, of any dtypes; bfloat16 parameters sum in float32.
        max_grad_norm: Largest 2-norm of the divided gradient over all parameters; None to not clip.
        scheduler: A learning-rate scheduler, stepped once after each update.
        scaler: A ``torch.amp.GradScaler`` for float16 autocast. Call neither its ``scale`` nor its ``step``.

    Raises:
        TypeError: A wrapper, optimizer or scheduler of a kind that cannot work this way.
        ValueError: None of the optimizer's parameters belongs to the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: "Optimizer",
        *,
        max_grad_norm: float | None = None,
        scheduler: "LRScheduler | None" = None,
        scaler: "GradScaler | None" = None,
    ) -> None:
        self._update = Update(optimizer, scheduler=scheduler, scaler=scaler, max_grad_norm=max_grad_norm)
        _check_model(model, optimizer)
        self.model = model
        self.optimizer = optimizer
        self._open: Window | None = None

    @property
    def num_steps(self) -> int:
        """Updates applied so far."""
        return self._update.num_steps

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return self._update.device

    def windows(
        self, loader: Iterable[Any], *, num_microbatches: int, count_items: CountItems | None = None
    ) -> Iterator[Window]:
        """Group a loader's micro-batches into windows; the last one holds what is left.

        Args:
            loader: Gives micro-batches, of any sizes. Drawn lazily, one at a time.
            num_microbatches: How many make a window, at least 1.
            count_items: For a loss of several terms, ``count_items(microbatch) → {term: items}``. The window's
                micro-batches are then drawn before its first backward.

        Raises:
            TypeError: ``num_microbatches`` is no int.
            ValueError: ``num_microbatches`` is below 1.
            WindowStateError: The previous window holds gradients and was neither stepped nor aborted.
        """
        check_count("num_microbatches", num_microbatches, "the micro-batches of one window")
        return self._windows(iter(loader), num_microbatches, count_items)

    def _windows(
        self, microbatches: Iterator[Any], num_microbatches: int, count_items: CountItems | None
    ) -> Iterator[Window]:
        window = None
        try:
            for first in microbatches:
                taken: Iterable[Any] = chain([first], islice(microbatches, num_microbatches - 1))
                totals = None
                if count_items is not None:
                    taken = list(taken)
                    totals = _total_items(map(count_items, taken))
                window = self.window(taken, totals=totals)
                yield window
            self._finish_previous()
        finally:
            if window is not None:
                window.abort()

    def window(self, microbatches: Iterable[Any] = (), *, totals: Mapping[str, Items] | None = None) -> Window:
        """Open one window.

        Args:
            microbatches: What iterating over the window gives. May be left empty: ``window.backward`` takes any loss.
            totals: Items of the whole window by term, for a loss of several terms.

        Raises:
            WindowStateError: The previous window holds gradients and was neither stepped nor aborted.
        """
        return self.open(microbatches, totals)[0]

    def open(self, microbatches: Iterable[Any], totals: Mapping[str, Items] | None) -> "tuple[Window, Transaction]":
        """Open one window and give its transaction with it. For `Engine`, not for loops."""
        self._finish_previous()
        transaction = Transaction(self._update, totals)
        self._open = Window(iter(microbatches), transaction)
        return self._open, transaction

    def _finish_previous(self) -> None:
        if self._open is None or not self._open.is_open:
            return
        if self._open.num_microbatches:
            raise WindowStateError(
                f"a window is still open and holds the gradients of {self._open.num_microbatches} micro-batches. "
                "Call its step(), or its abort() to drop them, before going on."
            )
        self._open.abort()


class Engine:
    """One exact update from one batch of any size.

        engine = Engine(model, optimizer, loss_fn, microbatch=8)
        for batch in loader:                        # on the CPU, as large as you like
            report = engine.step(batch)

    The gradient is Σ_i ∇loss_sum_i / Σ_i items_i over the micro-batches i of the batch: ``microbatch`` decides about
    memory and time, never about the result. No state outlives a step.

    Args:
        model: The module being trained; micro-batches are moved to the device of its first parameter.
        optimizer: As for `Accumulator`.
        loss_fn: ``loss_fn(model, microbatch) → (loss_sum, items)``: the 0-d **sum** of the item losses and how many
            items it runs over; or ``{term: (loss_sum, items)}``, whose total is Σ_term sum / items.
        microbatch: Samples of one forward and backward; or a `TokenBudget`, under which samples of like length come
            together so that little is padded, the largest micro-batch first.
        collate: For batches that are lists of samples: makes one micro-batch of a list. Padding is then that of the
            micro-batch.
        lengths: ``lengths(batch) → one length per sample``, in tokens, for a `TokenBudget` and ``report.tokens``.
        count_items: ``count_items(batch) → {term: items}``, needed for a loss of several terms.
        max_grad_norm: As for `Accumulator`.
        scheduler: As for `Accumulator`.
        scaler: As for `Accumulator`.

    Raises:
        TypeError: A wrapper, optimizer or scheduler of a kind that cannot work this way.
        ValueError: A setting out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: "Optimizer",
        loss_fn: LossFunction,
        *,
        microbatch: int | TokenBudget,
        collate: Collate | None = None,
        lengths: Callable[[Any], Sequence[int]] | None = None,
        count_items: CountItems | None = None,
        max_grad_norm: float | None = None,
        scheduler: "LRScheduler | None" = None,
        scaler: "GradScaler | None" = None,
    ) -> None:
        if not isinstance(microbatch, TokenBudget):
            check_count("microbatch", microbatch, "the samples of one micro-batch")
        elif lengths is None:
            raise ValueError(
                "a TokenBudget needs the length of each sample: pass lengths=, a function from the batch to them."
            )
        self.accumulator = Accumulator(
            model, optimizer, max_grad_norm=max_grad_norm, scheduler=scheduler, scaler=scaler
        )
        self.model = model
        self.loss_fn = loss_fn
        self.microbatch = microbatch
        self._size = self._size_in_use = microbatch.tokens if isinstance(microbatch, TokenBudget) else microbatch
        self._good_windows = 0
        self._recovery = Recovery(model, self.accumulator.device)
        self.collate = collate
        self.lengths = lengths
        self.count_items = count_items

    def step(self, batch: Any) -> WindowReport:
        """Apply the gradient of the whole batch, once.

        Args:
            batch: A pytree of tensors ``[samples, ...]`` on any device, or with ``collate`` a list of samples.

        Where memory runs out in mid-window, the micro-batch that failed is run again, then in halves, and every sample
        still counts once; the next windows use micro-batches smaller by 7 %, which grow back after 20 good windows.
        Whatever else ``loss_fn`` raises passes through, with the window aborted and the gradients cleared. An empty
        batch is a window without items.

        Raises:
            MemoryLimitError: A single sample does not fit in memory.
            TypeError: The batch cannot be cut, or ``loss_fn`` returned something else than sums and items.
            ValueError: A loss or a count is not what it must be; the message says which.
        """
        lengths = None if self.lengths is None else [int(length) for length in self.lengths(batch)]
        parts = self._split(batch, lengths)
        totals = None if self.count_items is None else self.count_items(batch)
        window, transaction = self.accumulator.open((), totals)
        recovery = self._recovery
        recovery.begin(transaction)

        def forward(rows: Sequence[int]) -> Any:
            return self.loss_fn(self.model, parts.take(rows))

        try:
            for rows in parts.groups:
                window.run(recovery.add, forward, rows)
            report = window.step()
        finally:
            window.abort()
        self._adapt(recovery.num_failures)
        return replace(report, tokens=None if lengths is None else sum(lengths), retries=recovery.num_failures)

    def _split(self, batch: Any, lengths: list[int] | None) -> Split:
        device = self.accumulator.device
        if lengths is None or isinstance(self.microbatch, int):
            return split(batch, self._size_in_use, device=device, collate=self.collate)
        # A budget that shrank still takes the longest sample, as long as the budget that was asked for does.
        budget = max(self._size_in_use, min(self.microbatch.tokens, max(lengths, default=1)))
        groups = plan(lengths, token_budget=budget).microbatches[0]
        return split_into(batch, groups, device=device, collate=self.collate)

    def _adapt(self, num_failures: int) -> None:
        """Take smaller micro-batches after a window that ran out of memory, and larger ones again after many good."""
        self._good_windows = 0 if num_failures else self._good_windows + 1
        if num_failures:
            self._size_in_use = max(1, min(self._size_in_use - 1, int(self._size_in_use * SHRINK)))
        elif self._good_windows % GROW_AFTER == 0 and self._size_in_use < self._size:
            self._size_in_use = min(self._size, math.ceil(self._size_in_use / SHRINK))


def _total_items(counts: Iterable[Mapping[str, Items]]) -> dict[str, Items]:
    totals: dict[str, Items] = {}
    for count in counts:
        for name, items in count.items():
            totals[name] = totals.get(name, 0) + items
    return totals


def _check_model(model: nn.Module, optimizer: "Optimizer") -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass the torch.nn.Module that is being trained.")
    wrapper = next((kind.__name__ for kind in type(model).__mro__ if kind.__name__ in _RANK_WRAPPERS), None)
    if wrapper is not None:
        raise TypeError(
            f"the model is wrapped in {wrapper}, which averages gradients over ranks at every backward, and so gives "
            "ranks with few items too much weight. This version trains in one process: pass the module itself."
        )
    own = set(model.parameters())
    if own and not any(p in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "none of the optimizer's parameters belongs to the model: it would never change. Make the optimizer from "
            "model.parameters(), after the model has its final form and device."
        )


_RANK_WRAPPERS = frozenset({"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"})
