"""Run the windows of a trainer on an engine: its collator, its loss, one exact gradient.

samples → unit of the loss → micro-batches (collator) → trainer's own loss, times items → sums → loss of the window
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import Trainer

from bigbatch.engine.checks import check_lengths
from bigbatch.engine.engine import Engine
from bigbatch.errors import InputError
from bigbatch.integrations.transformers import trainer_metrics
from bigbatch.integrations.transformers.checks import Settings
from bigbatch.integrations.transformers.loss_collectives import calls_collectives
from bigbatch.integrations.transformers.own_code import OwnCode, name_of
from bigbatch.integrations.transformers.own_loss import ComputeLoss, OwnLoss
from bigbatch.integrations.transformers.own_parameters import (
    clear_gradients,
    model_for_engine,
    model_of_engine,
    other_parameters,
)
from bigbatch.integrations.transformers.samples import Piece, WindowBatch, copy_samples, take_whole
from bigbatch.integrations.transformers.trainer_state import trainer_preserved
from bigbatch.integrations.transformers.unit_refusals import class_name, unequal_micro_batches
from bigbatch.integrations.transformers.window_hand_over import WindowHandOver, warn_of_batch_norms
from bigbatch.integrations.transformers.window_unit import WindowUnit
from bigbatch.rng import random_states, same_random_states, set_random_states
from bigbatch.trials.trial import is_trial
from bigbatch.types import Items
from bigbatch.verification.causes.modules import active_dropouts
from bigbatch.window_report import WindowReport


class WindowEngine:
    """Computes the loss of windows of one trainer.

    Args:
        trainer: Its arguments, collator and accelerator are read when they are used.
        settings: Of `exact`.
        audits_items: Whether ``items`` that were passed are checked against the loss.
    """

    def __init__(self, trainer: Any, settings: Settings, *, audits_items: bool = True) -> None:
        self._trainer = trainer
        self._settings = settings
        self._engine: Engine | None = None
        self._made_for: tuple[Any, ...] = ()
        self._own_code = OwnCode()
        self._own_loss = OwnLoss(trainer, self._own_code)
        collate = self._collate_samples
        self._unit = WindowUnit(trainer, settings.items, collate, self._own_loss, audits_items=audits_items)
        self._window = WindowBatch()
        self._hand_over = WindowHandOver(trainer)
        self._collator_draws = False  # random numbers
        self._lockstep: bool | None = None

    def loss(self, model: nn.Module, window: WindowBatch, compute_loss: ComputeLoss) -> tuple[Tensor, WindowReport]:
        """Return the loss of a window, 0-d, whose backward is the exact gradient, and the report. Collective.

        Args:
            model: As the trainer passes it to its loss, in its wrapper.
            window: With at least one sample.
            compute_loss: Of the trainer.

        Raises:
            InputError: The unit of the loss is not certain, the settings do not fit the loader, or a function of the
                user failed; from its error.
            NonFiniteError: The loss or its gradient is not finite, and ``nonfinite`` is ``"raise"``.
        """
        with self._own_code.named():
            return self._loss(model, window, compute_loss)

    def _loss(self, model: nn.Module, window: WindowBatch, compute_loss: ComputeLoss) -> tuple[Tensor, WindowReport]:
        self._own_loss.compute_loss, self._window = compute_loss, window
        if self._lockstep is None:
            self._lockstep = self._calls_collectives(window)
        engine = self._engine_for(model, is_collated=window.is_collated)
        engine.accumulator.update.set_num_steps(self._trainer.state.global_step)  # for messages
        batch = range(len(window.samples))
        with trainer_metrics.local_gathers(self._trainer.accelerator):
            self._unit.prepare(window, self._collate_ahead(engine, window))
            loss, report = self._hand_over.run(engine, batch)
            self._unit.audit_items(window)
        trainer_metrics.complete(self._trainer, window.pieces)
        self._window = WindowBatch()  # frees the samples
        return loss, report

    @property
    def unit(self) -> WindowUnit:
        """What the loss is averaged over."""
        return self._unit

    def _engine_for(self, model: nn.Module, *, is_collated: bool) -> Engine:
        """Return the engine for a model; another one if the model or the batch size changed since the last window."""
        settings, batch_size = self._settings, batch_size_of(self._trainer)
        others = other_parameters(self._trainer, model)
        clear_gradients(others)
        made_for = (model, batch_size, is_collated, tuple(map(id, others)))
        if self._engine is not None and made_for == self._made_for:
            return self._engine
        if is_collated and settings.needs_samples:
            raise InputError(
                f"the train dataloader of {class_name(self._trainer)} yields batches that are collated already, so "
                "micro-batches cannot be chosen: leave microbatch= and memory= out, and its batches are the "
                "micro-batches; or collate with self.data_collator in get_train_dataloader."
            )
        lengths = settings.lengths
        is_random = active_dropouts(model) or self._trainer.neftune_noise_alpha is not None
        evaluates = self._unit.is_given and is_collated and not is_random  # other units are audited
        if not evaluates:
            warn_of_batch_norms(model)
        together, sync = model_for_engine(self._trainer, model, others)
        try:
            self._engine = Engine(
                together,
                None,
                self._loss_and_items,
                microbatch=1 if is_collated else settings.microbatch_for(batch_size),
                memory=settings.memory,
                collate=self._collate,
                lengths=None if lengths is None or is_collated else self._lengths,
                layout="padded" if is_collated else settings.layout,
                scaler=self._trainer.accelerator.scaler,
                nonfinite=settings.nonfinite,
                lockstep=bool(self._lockstep),
                sync=sync,
                check=evaluates,
            )
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error
        self._made_for = made_for
        self._hand_over = WindowHandOver(self._trainer)
        return self._engine

    def _calls_collectives(self, window: WindowBatch) -> bool:
        """Return whether the loss calls collectives, and ranks must run equally many micro-batches. Collective."""
        if self._trainer.accelerator.num_processes == 1:
            return False
        collate = take_whole if window.is_collated else self._collate_samples
        is_called = calls_collectives(self._trainer, collate, window.samples, self._own_loss)
        if is_called and not isinstance(self._settings.microbatch_for(1), int):
            raise unequal_micro_batches(self._trainer)
        return is_called

    def _lengths(self, _batch: Any) -> Sequence[int]:
        assert self._settings.lengths is not None
        with self._own_code.call("lengths="):
            lengths = self._settings.lengths(self._window.samples)
        try:
            check_lengths(lengths, len(self._window.samples))
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error
        return lengths

    def _collate_samples(self, samples: Sequence[Any]) -> Any:
        collator = self._trainer.data_collator
        with self._own_code.call(f"the data collator of {class_name(self._trainer)} ({name_of(collator)})"):
            return collator(copy_samples(samples))

    def _collate_ahead(self, engine: Engine, window: WindowBatch) -> Sequence[Any] | None:
        """Collate the micro-batches of a window before they run, if they are counted in several units.

        Not if the collator draws random numbers: the model would draw others then. Collated twice in that case.
        """
        if self._collator_draws or window.is_collated or not self._unit.needs_counts:
            return None
        if not engine.microbatch_size.is_chosen:
            return None
        before = random_states()
        lengths = [1] * len(window.samples) if self._settings.lengths is None else self._lengths(None)
        window.collated = {
            tuple(rows): self._collate_samples([window.samples[row] for row in rows]) for rows in engine.groups(lengths)
        }
        self._collator_draws = not same_random_states(before, random_states())
        if self._collator_draws:
            set_random_states(before)
            window.collated = {}
            return None
        return list(window.collated.values())

    def _collate(self, rows: Sequence[int]) -> dict[str, Any]:
        """Make one micro-batch of samples of the window, and count it."""
        window, trainer = self._window, self._trainer
        samples = [window.samples[row] for row in rows]
        inputs = None if is_trial() else window.collated.pop(tuple(rows), None)
        if inputs is None:
            inputs = take_whole(samples) if window.is_collated else self._collate_samples(samples)
        piece = Piece(rows, self._count(inputs))
        if not is_trial():
            piece.floating_point_ops = float(trainer.floating_point_ops(inputs))
            piece.input_tokens = trainer._bigbatch_input_tokens(inputs)
            window.pieces.add(piece)
        return {"inputs": inputs, "piece": piece}

    def _count(self, inputs: Any) -> Items:
        with self._own_code.call("items="):
            return _as_number(self._unit.count(inputs))

    def _loss_and_items(self, model: nn.Module, microbatch: Mapping[str, Any]) -> tuple[Tensor, Items]:
        """Return the loss sum and the items of a micro-batch."""
        piece, trainer, model = microbatch["piece"], self._trainer, model_of_engine(model)
        with trainer_preserved(trainer) if is_trial() else trainer_metrics.recorded(trainer, piece):
            inputs = trainer._prepare_inputs(microbatch["inputs"])
            self._check_prepared(inputs, piece.items)
            if self._unit.takes_num_items:
                return self._own_loss.sum(model, inputs), piece.items
            needs_count = self._unit.is_given
            return self._own_loss.sum_of_mean(model, inputs, piece.items, may_need_count=needs_count), piece.items

    def _check_prepared(self, inputs: Any, items: Items) -> None:
        """Check that an own ``_prepare_inputs`` leaves the number of items as it was."""
        kind = type(self._trainer)
        owner = next(each for each in kind.__mro__[2:] if "_prepare_inputs" in vars(each))
        if owner is not Trainer and (number := self._count(inputs)) != items:
            raise InputError(
                f"_prepare_inputs of {owner.__name__} changes the number of items of a micro-batch from {items} to "
                f"{number}, and they are counted before it: change labels and masks in the data collator."
            )


def batch_size_of(trainer: Any) -> int:
    """Return the samples of one batch of the loader on each rank."""
    accelerator, size = trainer.accelerator, int(trainer._train_batch_size)
    return size // accelerator.num_processes if accelerator.split_batches else size


def _as_number(items: Any) -> Items:
    number: Any = items.item() if isinstance(items, Tensor | np.generic) else items
    if not isinstance(number, int | float) or not 0 <= number < math.inf:
        raise InputError(f"items= returned {number!r}: it must return the number of items of a micro-batch, 0 or more.")
    return number
