"""The methods of a Trainer that `exact` overrides.

    get_train_dataloader: samples are not collated → get_batch_samples: a window is one batch, the others are empty
    → training_step: empty ones are no-ops; for the window, compute_loss runs all micro-batches and returns one loss

Everything else is the Trainer's: backward, scaler, clipping, optimizer, schedule, logging, callbacks, checkpoints.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import Trainer

from bigbatch.errors import InputError
from bigbatch.integrations.transformers.checks import uneven_updates
from bigbatch.integrations.transformers.samples import EmptyBatch, SampleBatch, SampleCollator, WindowBatch, as_window
from bigbatch.integrations.transformers.window_engine import ComputeLoss, WindowEngine, batch_size_of
from bigbatch.window_report import WindowReport


class Windows(Protocol):
    """Computes the loss of windows of one trainer."""

    def loss(self, model: nn.Module, window: WindowBatch, compute_loss: ComputeLoss) -> tuple[Tensor, WindowReport]:
        """As `WindowEngine.loss`."""


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
        with self._bigbatch_window_loss() if is_window else nullcontext():
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        return loss

    @contextmanager
    def _bigbatch_window_loss(self) -> Iterator[None]:
        """Make ``self.compute_loss`` run windows, and its result count as complete.

        The attribute of the instance precedes every class, those of subclasses included.
        """
        trainer: Any = self
        own: ComputeLoss = trainer.compute_loss
        attributes = vars(trainer)
        found = {name: attributes[name] for name in ("compute_loss",) if name in attributes}
        steps = trainer.current_gradient_accumulation_steps

        def compute_loss(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(inputs, WindowBatch):
                return own(model, inputs, *args, **kwargs)
            if self._bigbatch_windows is None:
                self._bigbatch_windows = self._bigbatch_new_windows()
            loss, report = self._bigbatch_windows.loss(model, inputs, own)
            self.bigbatch_report = replace(report, step=trainer.state.global_step + 1)
            return loss

        attributes.update(compute_loss=compute_loss, current_gradient_accumulation_steps=1)
        try:
            yield
        finally:
            del attributes["compute_loss"]
            attributes.update(found, current_gradient_accumulation_steps=steps)

    def _bigbatch_new_windows(self) -> Windows:
        """Return what runs the windows of this trainer."""
        return WindowEngine(self, self._bigbatch_settings)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Leave windows as they are: their micro-batches are prepared one by one."""
        return inputs if isinstance(inputs, SampleBatch) else super()._prepare_inputs(inputs)  # type: ignore[misc]

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
