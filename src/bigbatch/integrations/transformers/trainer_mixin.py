"""The methods of a Trainer that `exact` overrides.

    get_train_dataloader: samples are not collated → get_batch_samples: a window is one batch, the others are empty
    → training_step: empty ones are no-ops; for the window, compute_loss runs all micro-batches and returns one loss

Everything else is the Trainer's: backward, scaler, clipping, optimizer, schedule, logging, callbacks, checkpoints.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import Trainer

from bigbatch.errors import BigbatchError, InputError, first_line
from bigbatch.integrations.transformers.checks import uneven_updates
from bigbatch.integrations.transformers.own_batches import refuse_changed_batches
from bigbatch.integrations.transformers.own_code import (
    call_training_step,
    overrides_training_step,
    own_training_step,
)
from bigbatch.integrations.transformers.own_loss import ComputeLoss
from bigbatch.integrations.transformers.samples import EmptyBatch, SampleBatch, SampleCollator, WindowBatch, as_window
from bigbatch.integrations.transformers.unit_refusals import class_name
from bigbatch.integrations.transformers.window_engine import WindowEngine, batch_size_of
from bigbatch.memory.usage import is_out_of_memory
from bigbatch.window_report import WindowReport


class Windows(Protocol):
    """Computes the loss of windows of one trainer."""

    def loss(self, model: nn.Module, window: WindowBatch, compute_loss: ComputeLoss) -> tuple[Tensor, WindowReport]:
        """As `WindowEngine.loss`."""


@dataclass
class _Call:
    """The call of compute_loss for a window.

    Attributes:
        is_started: Whether it was called.
        report: Of the window; None before it has run.
    """

    is_started: bool = False
    report: WindowReport | None = None


class ExactMixin:
    """Overrides of `transformers.Trainer`; `exact` puts it before the class of a trainer.

    Attributes:
        bigbatch_report: Report of the last window; None before it.
    """

    bigbatch_report: WindowReport | None = None
    _bigbatch_package: ClassVar[str] = "transformers"  # of the `exact` that was called
    _bigbatch_settings: Any
    _bigbatch_windows: Windows | None = None
    _bigbatch_held: Sequence[Any] = ()
    _bigbatch_is_in_step = False  # before the loss of a window
    _bigbatch_step_is_checked = _bigbatch_batches_are_checked = False

    def get_train_dataloader(self) -> Any:
        """Return the loader of the trainer, whose batches are lists of samples."""
        trainer: Any = self
        collator, config = trainer.data_collator, trainer.accelerator.dataloader_config
        keeper, dispatch_batches = SampleCollator(collator), config.dispatch_batches
        self._bigbatch_check_ranks()
        self._bigbatch_held = ()
        trainer.data_collator, config.dispatch_batches = keeper, False
        try:
            return super().get_train_dataloader()  # type: ignore[misc]
        finally:
            config.dispatch_batches = dispatch_batches
            if trainer.data_collator is keeper:
                trainer.data_collator = collator

    def _bigbatch_check_ranks(self) -> None:
        """Say what happens to a dataset that does not fill the last batch of every rank."""
        trainer: Any = self
        ranks, dataset = trainer.accelerator.num_processes, trainer.train_dataset
        if ranks == 1 or not hasattr(dataset, "__len__"):
            return
        size, drop_last = batch_size_of(trainer), trainer.args.dataloader_drop_last
        missing = -len(dataset) % (size * ranks)
        if trainer.accelerator.even_batches:
            if missing and not drop_last and trainer.accelerator.is_main_process:
                warnings.warn(
                    f"{len(dataset)} samples do not fill the last batches of {size} samples on {ranks} ranks, so "
                    f"{missing} of them count twice in each epoch: set dataloader_drop_last=True, or "
                    'accelerator_config={"even_batches": False}.',
                    stacklevel=2,
                )
            return
        if trainer.accelerator.split_batches:
            return
        problem = uneven_updates(
            len(dataset),
            batch_size=size,
            ranks=ranks,
            steps=trainer.args.gradient_accumulation_steps,
            drop_last=drop_last,
        )
        if problem is not None:
            raise InputError(problem)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Return the batches of a window: all samples are in the last one."""
        batches, _ = Trainer.get_batch_samples(self, *args, **kwargs)  # an override would count items of collated ones
        if batches:
            if not self._bigbatch_batches_are_checked:
                refuse_changed_batches(self, type(self).__bases__[1], batches)
                self._bigbatch_batches_are_checked = True
            batches, self._bigbatch_held = as_window(batches, self._bigbatch_held), ()
        return batches, None

    def _get_num_items_in_batch(self, *_: Any, **__: Any) -> None:
        """Return None: items are counted by micro-batch."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run a whole window, or nothing for the batches whose samples are in it.

        A stream of unknown length may end within a window, and the Trainer makes no update then: its samples become
        part of the next window.
        """
        trainer: Any = self
        is_window = isinstance(inputs, WindowBatch)
        if isinstance(inputs, EmptyBatch) and trainer.accelerator.sync_gradients:
            raise InputError(
                f"gradient_accumulation_steps was changed to {trainer.args.gradient_accumulation_steps} within an "
                "epoch, so an update would come before the last batch of its window: change it between calls of "
                "train()."
            )
        if is_window and not trainer.accelerator.sync_gradients:
            self._bigbatch_held = inputs.samples
        if isinstance(inputs, EmptyBatch) or self._bigbatch_held:
            return torch.zeros((), device=trainer.args.device)
        step = super().training_step  # type: ignore[misc]
        if not is_window:
            return call_training_step(step, model, inputs, *args, **kwargs)
        with self._bigbatch_window_loss() as called:
            try:
                loss = call_training_step(step, model, inputs, *args, **kwargs)
            except Exception as error:
                is_own = overrides_training_step(self) and not isinstance(error, BigbatchError)
                if called.is_started or not is_own or is_out_of_memory(error):
                    raise
                raise _before_the_loss(trainer, f" and raised {type(error).__name__}: {first_line(error)}") from error
        if called.report is None:
            raise _before_the_loss(trainer, "")
        if not self._bigbatch_step_is_checked:
            self._bigbatch_step_is_checked = True
            self._bigbatch_check_returned(loss, called.report)
        return loss

    def _bigbatch_check_returned(self, loss: Any, report: WindowReport) -> None:
        """Check that an own training_step returns the loss of the window, which is logged, undivided."""
        trainer: Any = self
        steps = trainer.args.gradient_accumulation_steps
        is_one_value = isinstance(loss, Tensor) and loss.numel() == 1
        if steps == 1 or not is_one_value or report.skipped is not None or own_training_step(self) is None:
            return
        if math.isclose(float(loss) * steps, report.loss, rel_tol=1e-3):  # waits for the device, once
            raise InputError(
                f"training_step of {class_name(self)} returns the loss divided by gradient_accumulation_steps "
                f"({steps}), and the loss of a window is complete, so the logged loss would be too small: return it "
                "undivided."
            )

    @contextmanager
    def _bigbatch_window_loss(self) -> "Iterator[_Call]":
        """Make ``self.compute_loss`` run windows, and its result count as complete; yield whether it was called.

        The attribute of the instance precedes every class, those of subclasses included.
        """
        trainer: Any = self
        own: ComputeLoss = trainer.compute_loss
        attributes = vars(trainer)
        found = {name: attributes[name] for name in ("compute_loss",) if name in attributes}
        steps = trainer.current_gradient_accumulation_steps
        called = _Call()

        def compute_loss(model: nn.Module, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(inputs, WindowBatch):
                return own(model, inputs, return_outputs, *args, **kwargs)
            called.is_started, self._bigbatch_is_in_step = True, False
            if return_outputs:
                raise _no_outputs(trainer)
            if self._bigbatch_windows is None:
                self._bigbatch_windows = self._bigbatch_new_windows()
            loss, report = self._bigbatch_windows.loss(model, inputs, own)
            called.report = report
            self.bigbatch_report = replace(report, step=trainer.state.global_step + 1)
            return loss

        attributes.update(compute_loss=compute_loss, current_gradient_accumulation_steps=1)
        self._bigbatch_is_in_step = True
        try:
            yield called
        finally:
            self._bigbatch_is_in_step = False
            del attributes["compute_loss"]
            attributes.update(found, current_gradient_accumulation_steps=steps)

    def _bigbatch_new_windows(self) -> Windows:
        """Return what runs the windows of this trainer."""
        return WindowEngine(self, self._bigbatch_settings)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Leave windows as they are: their micro-batches are prepared one by one."""
        if isinstance(inputs, SampleBatch):
            return inputs
        if self._bigbatch_is_in_step and isinstance(inputs, Mapping) and not inputs:
            raise _copied_inputs(self)
        return super()._prepare_inputs(inputs)  # type: ignore[misc]

    def floating_point_ops(self, inputs: Any) -> float:
        """Return the sum over the micro-batches of a window."""
        if isinstance(inputs, SampleBatch):
            return inputs.pieces.floating_point_ops if isinstance(inputs, WindowBatch) else 0.0
        operations: float = super().floating_point_ops(inputs)  # type: ignore[misc]
        return operations

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Count the tokens of the micro-batches of a window."""
        trainer: Any = self
        if not isinstance(inputs, SampleBatch):
            super()._track_num_input_tokens(inputs)  # type: ignore[misc]
        elif isinstance(inputs, WindowBatch):
            tokens = inputs.pieces.input_tokens
            name = getattr(trainer.model, "main_input_name", "input_ids")
            shape_only = torch.empty(tokens, device="meta")
            super()._track_num_input_tokens({name: shape_only, "attention_mask": torch.tensor(tokens)})  # type: ignore[misc]

    def _bigbatch_input_tokens(self, inputs: Any) -> int:
        """Return the tokens of a micro-batch by the rule of the trainer's arguments."""
        trainer: Any = self
        rule = trainer.args.include_num_input_tokens_seen
        tokens = inputs.get(getattr(trainer.model, "main_input_name", "input_ids")) if hasattr(inputs, "get") else None
        if rule in ("no", False) or tokens is None:
            return 0
        if rule == "non_padding":
            padding = getattr(trainer.processing_class, "pad_token_id", None)
            if "attention_mask" in inputs:
                return int(inputs["attention_mask"].sum())
            if padding is not None:
                return int((tokens != padding).sum())
        return int(tokens.numel())


def _before_the_loss(trainer: Any, what: str) -> InputError:
    return InputError(
        f"training_step of {class_name(trainer)} did not pass its inputs to self.compute_loss{what}. They are a whole "
        "window of exact(), whose micro-batches are collated in self.compute_loss: compute the loss there, and call "
        "self.compute_loss(model, inputs)."
    )


def _copied_inputs(trainer: Any) -> InputError:
    return InputError(
        f"training_step of {class_name(trainer)} uses a copy of its inputs, which is empty: they "
        "are a whole window of exact(), whose micro-batches are collated in self.compute_loss. Pass them as they are, "
        "and change inputs in compute_loss or in the data collator."
    )


def _no_outputs(trainer: Any) -> InputError:
    return InputError(
        f"training_step of {class_name(trainer)} asks self.compute_loss for outputs, and a window of exact() has none "
        "in one piece: call it with return_outputs=False, and use the outputs of a micro-batch in compute_loss."
    )
