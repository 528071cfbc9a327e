"""Callbacks of the user: what they may define, and how an exception of one ends the run.

event of the trainer → UserCallbacks → the methods that exist; an exception → stop after the update → raised at the end
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.messages import listing
from bigbatch.lm.training.callbacks import MetricsRow, TrainResult


class StopTraining(Exception):  # noqa: N818  it is a request, not an error
    """Raised by a method of a callback to stop the run, with the reason as its message.

    The run ends after the current update as it does after a signal: with a checkpoint and the model saved, to be
    resumed later or not. On several ranks it ends one update later, because the ranks agree during an update.
    `bigbatch.lm.train` returns, with ``finished=False``; if all updates were done, with ``finished=True``.
    """


@dataclass(frozen=True)
class RunStart:
    """A run that begins or resumes, as `Callback.on_start` receives it.

    Attributes:
        path: The run directory.
        config: With every default resolved.
        model: In training mode, on its device; its parameters must not be changed.
        tokenizer: Of the model.
        step: Updates done before: 0, or those of the checkpoint that the run resumes from.
        total_steps: Updates of the whole run.
        notes: Sentences about the data and the model, such as how many records were left out.
    """

    path: Path
    config: TrainConfig
    model: Any
    tokenizer: Any
    step: int
    total_steps: int
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RunResult(TrainResult):
    """The result of `bigbatch.lm.train`.

    Attributes:
        step: Updates done, the skipped ones included.
        skipped: Updates that changed nothing: without items, or with gradients that are not finite.
        finished: Whether the run has ended, early or after all updates; False if a callback stopped it.
        validation_loss: The last one, in the unit of the objective (nats per token for sft), or None; with a
            ``loss_fn``, the mean of that loss.
        elapsed_s: Seconds of the training loop of this call; 0 if the run was finished before.
        stopped_early: Whether ``early_stopping`` has ended it.
        saved_step: Number of updates behind the saved model.
        best_step: Number of updates done at the best validation; 0 without one.
        best_loss: The lowest validation loss, in the same unit, or None.
        path: The run directory.
        model_path: The folder of the model and its tokenizer, or of the LoRA adapters of a run that saves those.
        metrics: The rows of metrics.jsonl, one for each update, those before a resume included.
        notes: As in `RunStart`.
    """

    path: Path
    model_path: Path
    metrics: tuple[MetricsRow, ...]
    notes: tuple[str, ...]


class Callback:
    """Base class of callbacks, all of whose methods do nothing. Any object with some of these methods is a callback.

        on_start
        for each update: on_update; if it validates, on_evaluation or on_validation_metrics, and on_validation; if it
                         samples, on_sample
        on_end

    Methods are called on the first rank only, in the thread of the training loop, between two updates; the values are
    over all ranks. Of several callbacks, each method is called in the order of the list. The time that they take is
    not part of the measured speed. They must not change the parameters of the model.

    An exception that a method raises ends the run after the current update, with a checkpoint and the model saved; the
    other callbacks still receive the event, and `bigbatch.lm.train` then raises the exception. `StopTraining` ends the
    run in the same way without an error. Exceptions that are no `Exception`, such as ``KeyboardInterrupt``, end the run
    at once; it can be resumed from its last checkpoint.
    """

    def on_start(self, run: RunStart) -> None:
        """Called before the first update of this process, when everything is set up."""

    def on_update(self, row: MetricsRow) -> None:
        """Called after every update with a copy of its row of metrics.jsonl, without the validation loss.

        Among others: ``step``, ``loss``, ``items``, ``lr``, ``grad_norm``, ``tokens``, ``tokens_per_s``, ``skipped``.
        """

    def on_validation(self, step: int, loss: float) -> None:
        """Called after a validation with its loss in the unit of the objective; of several sets, ``best_metric``'s."""

    def on_evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Called before `on_validation` with the losses of named validation sets, in the unit of the objective."""

    def on_validation_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called before `on_validation` with the metrics of dpo, reward or embedding, such as ``accuracy``."""

    def on_sample(self, step: int, text: str) -> None:
        """Called with a text that the model generated from the setting ``sample_prompt``."""

    def on_note(self, sentence: str) -> None:
        """Called with a sentence for the user, such as that an invalid checkpoint was skipped."""

    def on_end(self, result: RunResult) -> None:
        """Called when the run has ended, also if a callback stopped it, but not after an error."""


METHODS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class UserCallbacks:
    """Calls the methods that callbacks define, and keeps the first exception.

    Args:
        callbacks: Objects with some of the methods of `Callback`.

    Attributes:
        error: The first exception, to be raised at the end of the run; None without one.
        stopped_by: Who stopped the run, for messages; None if nobody did.

    Raises:
        InputError: An object has none of the methods, or another method whose name begins with ``on_``.
    """

    def __init__(self, callbacks: Iterable[Any]) -> None:
        self._callbacks = tuple(callbacks)
        self.error: Exception | None = None
        self.stopped_by: str | None = None
        for callback in self._callbacks:
            _check_methods(callback)

    @property
    def is_stopping(self) -> bool:
        """Whether a callback raised an exception."""
        return self.stopped_by is not None

    def call(self, method: str, *arguments: Any) -> None:
        """Call a method of every callback that has it."""
        for callback in self._callbacks:
            if not hasattr(callback, method):
                continue
            try:
                getattr(callback, method)(*arguments)
            except Exception as error:  # noqa: BLE001  raised by `raise_error` when the run has been saved
                self._receive(error, f"{type(callback).__name__}.{method}")

    def _receive(self, error: Exception, where: str) -> None:
        reason = str(error) if isinstance(error, StopTraining) else f"{type(error).__name__}"
        self.stopped_by = self.stopped_by or (f"{where}: {reason}" if reason else where)
        if isinstance(error, StopTraining):
            return
        error.add_note(f"raised by {where}; the run was saved, and can be resumed")
        if self.error is None:
            self.error = error
        else:
            self.error.add_note(f"{where} raised {type(error).__name__}, too: {error}")

    def raise_error(self) -> None:
        """Raise the first exception, if there was one."""
        if self.error is not None:
            raise self.error

    def on_update(self, row: MetricsRow) -> None:
        """Forward an update."""
        self.call("on_update", dict(row))

    def on_validation(self, step: int, loss: float) -> None:
        """Forward a validation."""
        self.call("on_validation", step, loss)

    def on_evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Forward the losses of named validation sets."""
        self.call("on_evaluation", step, dict(losses))

    def on_validation_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Forward the metrics of a validation of pairs."""
        self.call("on_validation_metrics", step, dict(metrics))

    def on_sample(self, step: int, text: str) -> None:
        """Forward a generated text."""
        self.call("on_sample", step, text)


def _check_methods(callback: Any) -> None:
    named = [name for name in dir(callback) if name.startswith("on_") and callable(getattr(callback, name))]
    unknown = [name for name in named if name not in METHODS]
    kind = callback.__name__ if isinstance(callback, type) else type(callback).__name__
    if isinstance(callback, type):
        raise InputError(f"the callback {kind} is a class: pass an object of it, {kind}(...).")
    if unknown:
        raise InputError(
            f"the callback {kind} has {listing(unknown)}, which is never called. The methods are {', '.join(METHODS)}."
        )
    if not named:
        raise InputError(f"the callback {kind} has none of the methods {', '.join(METHODS)}.")
