"""Run a window on an engine and pass its loss to a trainer, with what a trainer does with windows that are skipped."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.accumulation.update_outcome import NO_ITEMS
from bigbatch.engine.engine import Engine
from bigbatch.engine.hand_over import exact_loss
from bigbatch.errors import InputError
from bigbatch.integrations.transformers.unit_refusals import class_name
from bigbatch.verification.causes.modules import training_batch_norms
from bigbatch.window_report import WindowReport


class WindowHandOver:
    """Passes the losses of the windows of one engine to a trainer.

    Args:
        trainer: Calls backward on them.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._num_windows = 0

    def run(self, engine: Engine, batch: Sequence[int]) -> tuple[Tensor, WindowReport]:
        """Return the loss of a window, 0-d, whose backward is the exact gradient, and the report. Collective.

        Args:
            engine: Without an optimizer.
            batch: Its samples.

        Raises:
            NonFiniteError: The loss or its gradient is not finite, and ``nonfinite`` of the engine is ``"raise"``.
        """
        loss, report = exact_loss(engine.accumulator.update.parameters(), lambda: engine.backward(batch), engine.runner)
        if report.skipped is not None and self._trainer.accelerator.scaler is None:
            return self._without_gradient(report), report
        if report.skipped == NO_ITEMS:  # a GradScaler cannot step without a gradient
            self._warn_of_window("no items: its gradient is 0, and momentum and weight decay act as in any update")
        if not self._num_windows:
            loss.register_hook(self._check_factor)  # type: ignore[no-untyped-call]
        self._num_windows += 1
        return loss, report

    def _without_gradient(self, report: WindowReport) -> Tensor:
        """Return the loss of a window that changes nothing: its backward leaves every ``.grad`` as it is."""
        has_items = report.skipped != NO_ITEMS
        self._warn_of_window(
            f"{f'a {report.skipped}' if has_items else NO_ITEMS}: it changes no weight and no optimizer state; the "
            "learning rate schedule goes on"
        )
        value = float("nan") if has_items else 0.0
        return torch.full((), value, device=self._trainer.args.device, requires_grad=True)

    def _warn_of_window(self, what: str) -> None:
        warnings.warn(f"the window of update {self._trainer.state.global_step + 1} has {what}.", stacklevel=4)

    def _check_factor(self, factor: Tensor) -> None:
        """Check that the trainer differentiates the loss as it is, once: the gradient is multiplied by any factor."""
        scaler = self._trainer.accelerator.scaler
        expected = 1.0 if scaler is None else scaler.get_scale()
        if factor.item() != expected:
            raise InputError(
                f"training_step of {class_name(self._trainer)} multiplies the loss by {factor.item() / expected:g}, "
                "and the loss of a window is complete: remove the division by the number of accumulation steps."
            )


def warn_of_batch_norms(model: nn.Module) -> None:
    """Warn if a model normalizes by the statistics of micro-batches."""
    norms = training_batch_norms(model)
    if norms:
        warnings.warn(batch_norm_sentence(norms), stacklevel=3)


def batch_norm_sentence(norms: Iterable[str]) -> str:
    """Return what batch norms of these names do to updates."""
    return (
        f"BatchNorm in training mode ({', '.join(norms)}) normalizes by the mean and variance of a micro-batch, so the "
        "updates are not exactly those of the whole batch: set it to eval mode, or use GroupNorm or LayerNorm."
    )
