"""One window's sums and counts, and how they become an update: what stands behind a `Window`."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bigbatch.accumulate import GradientSums
from bigbatch.memory import peak_bytes
from bigbatch.objective import Items, Ledger, as_terms
from bigbatch.report import WindowReport
from bigbatch.update import Update


class Transaction:
    """One window's sums and counts, and how they become an update."""

    def __init__(
        self, update: Update, totals: Mapping[str, Items] | None, *, kept: Mapping[Tensor, Tensor] | None = None
    ) -> None:
        self._update = update
        self._started_s = time.perf_counter()
        self._num_microbatches = 0
        self._loss_scale = update.loss_scale()
        parameters = update.parameters()
        float16 = self._loss_scale is not None or any(p.dtype == torch.float16 for p in parameters)
        self.ledger = Ledger(totals, prescale=float16)
        self.sums = GradientSums(parameters, kept=kept).__enter__()

    def add(self, loss_sum: Any, items: Items | None, *, only: Sequence[Tensor] | None = None) -> None:
        """Add one micro-batch: its loss and items to the ledger, its gradient to the sums, or to ``only`` some."""
        loss = self.ledger.record(as_terms(loss_sum if items is None else (loss_sum, items)))
        if loss is not None and (only is None or only):
            self.sums.backward(loss if self._loss_scale is None else loss * self._loss_scale, only=only)
        self._num_microbatches += 1

    @property
    def differentiates_sums(self) -> bool:
        """Whether losses are differentiated as they come, with no factor of this window's own."""
        return self._loss_scale is None and self.ledger.differentiates_sums

    def note(self, loss_sum: Tensor, items: Items) -> None:
        """Enter one micro-batch whose gradient is in the sums already."""
        self.ledger.record(as_terms((loss_sum, items)))
        self._num_microbatches += 1

    def apply(self) -> WindowReport:
        """Update once, clear, and tell."""
        outcome = self._update.apply(self.sums, self.ledger, loss_scale=self._loss_scale)
        self.undo()
        return WindowReport(
            step=self._update.num_steps,
            items=self.ledger.items(),
            grad_norm=outcome.grad_norm,
            num_microbatches=self._num_microbatches,
            tokens=None,
            peak_bytes=peak_bytes(self._update.device),
            elapsed_s=time.perf_counter() - self._started_s,
            skipped=outcome.skipped,
            _read_terms=self.ledger.terms,
        )

    def undo(self) -> None:
        """Drop sums and gradients."""
        self.sums.__exit__(None, None, None)
