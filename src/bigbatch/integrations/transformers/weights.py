"""Weight the micro-batches of a Trainer by their items, where its windows cannot be run by an engine.

window → inputs of all micro-batches → items of each, of all ranks → loss of each · items · ranks / items of all
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from bigbatch.errors import InputError
from bigbatch.integrations.transformers.checks import check_kind
from bigbatch.integrations.transformers.own_code import OwnCode, call_training_step, own_training_step
from bigbatch.integrations.transformers.unit_refusals import class_name
from bigbatch.integrations.transformers.weighted_window import NUM_ITEMS, CheckedInputs, WeightedWindow
from bigbatch.types import Items

AnyTrainer = TypeVar("AnyTrainer")
CountInputs = Callable[[Any], Items]


def weights(trainer: AnyTrainer, *, items: CountInputs) -> AnyTrainer:
    """Weight the mean loss of each micro-batch by its share of the items of its window.

        trainer = weights(trainer, items=lambda inputs: (inputs["labels"] != -100).sum())
        trainer.train()

    The gradient of an update is Σ_i items_i · ∇mean_i / Σ_i items_i over the micro-batches i of all ranks, as by
    `exact`; everything else stays the Trainer's: its micro-batches, backward, reduction and memory. For trainers that
    `exact` refuses: DeepSpeed, Megatron, FSDP 1, loaders that collate by themselves, and online trainers such as GRPO,
    whose completions exist only when a micro-batch is prepared. The weights make a loss exact that is a mean over
    items; a loss whose samples influence one another, such as one with an auxiliary loss, is weighted all the same.

    The trainer's loss is called without ``num_items_in_batch``, and must then return the mean over the items of its
    micro-batch, not divided by ``args.gradient_accumulation_steps``. Inputs of all micro-batches of a window are
    prepared before the first of them runs; ``items`` is called with each. A micro-batch without items has no gradient.
    Over several ranks the items are summed once a window: one small all-gather and one wait for the device.

    Args:
        trainer: A `transformers.Trainer`. Its class becomes a subclass; it is changed in place. A second call replaces
            ``items``.
        items: ``items(inputs) → number`` of items that the mean loss of prepared inputs runs over; or a 0-d tensor.

    Returns:
        The trainer.

    Raises:
        InputError: It is no Trainer, or one that `exact` was called on, or ``items`` is not callable.
    """
    own = check_kind(trainer)
    if not callable(items):
        raise InputError(
            f"items is {items!r}: pass a function from the inputs of a micro-batch to the number of items that its "
            "loss is a mean over."
        )
    if hasattr(trainer, "_bigbatch_settings"):
        raise InputError(
            f"exact() was called on this {type(trainer).__name__}, whose updates are weighted already: leave weights() "
            "out, or make another trainer for it."
        )
    owner, engine = own_training_step(trainer), own.accelerator.distributed_type.value
    if owner is not None and engine in ("DEEPSPEED", "MEGATRON_LM"):
        raise InputError(
            f"training_step of {owner} calls the backward itself, and the factor of its loss cannot be seen with "
            f"{engine}: call super().training_step(), and compute the loss in compute_loss."
        )
    own._bigbatch_weights_items, own._bigbatch_weights_ratios = items, {}
    if not isinstance(trainer, WeightsMixin):
        kind = type(trainer)
        attributes = {"__module__": kind.__module__, "__doc__": kind.__doc__}
        trainer.__class__ = type(f"Weighted{kind.__name__}", (WeightsMixin, kind), attributes)
    return trainer


class WeightsMixin:
    """Overrides of `transformers.Trainer`; `weights` puts it before the class of a trainer."""

    _bigbatch_weights_items: CountInputs
    _bigbatch_weights_window: WeightedWindow | None = None
    _bigbatch_weights_ratios: dict[tuple[int, int], float]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; gradients of an earlier call are gone."""
        self._bigbatch_weights_window = None
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Return the micro-batches of a window, without a number of items.

        A stream of unknown length may end within a window, and the Trainer makes no update then: the gradient of its
        micro-batches stays, and becomes part of the next window's.
        """
        batches, _ = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if batches or self._bigbatch_weights_window is None:  # none at the end of an epoch
            self._bigbatch_weights_window = WeightedWindow.after(self._bigbatch_weights_window, batches)
        return batches, None

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run one micro-batch."""
        window = self._bigbatch_weights_window
        if window is None or not (window.batches or window.prepared):
            raise InputError(
                f"training_step of {type(self).__name__} ran for a batch that get_batch_samples did not return, so its "
                "window is unknown: return every batch from super().get_batch_samples()."
            )
        window.is_running = True
        left = len(window.prepared) or len(window.batches)
        try:
            loss = call_training_step(super().training_step, model, inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            window.is_running = False
        if window.weight is not None or len(window.prepared) != left - 1:
            raise InputError(
                f"training_step of {class_name(self)} did not call self._prepare_inputs(inputs) and then "
                "self.compute_loss(model, inputs), once each, so its loss was not weighted: compute the loss in "
                "compute_loss, and call both."
            )
        return window.logged(loss, is_complete=self.accelerator.sync_gradients)  # type: ignore[attr-defined]

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Return the inputs of the next micro-batch; prepare and count those of the whole window at its first one."""
        window = self._bigbatch_weights_window
        if window is None or not window.is_running:
            return super()._prepare_inputs(inputs)  # type: ignore[misc]
        if not window.prepared:
            window.prepared = self._bigbatch_weights_prepare(window.batches)
            window.batches = []
            if window.carried and not self._bigbatch_weights_has_gradient():
                window.carried = 0.0  # cleared since, such as by a callback
            window.weights, window.total = self._bigbatch_weights_of(window.prepared, window.carried)
            if window.carried:
                for gradient in self._bigbatch_weights_gradients():
                    gradient.mul_(window.carried / window.total)
        window.weight = window.weights.pop(0)
        return window.prepared.pop(0)

    def _bigbatch_weights_prepare(self, batches: Sequence[Any]) -> list[Any]:
        """Prepare the batches in their order; online trainers look at their number of the step."""
        trainer: Any = self
        step = getattr(trainer, "_step", None)
        prepared = []
        try:
            for index, batch in enumerate(batches):
                if isinstance(step, int):
                    trainer._step = step + index
                prepared.append(super()._prepare_inputs(batch))  # type: ignore[misc]
        finally:
            if isinstance(step, int):
                trainer._step = step
        return prepared

    def _bigbatch_weights_of(self, prepared: Sequence[Any], carried: float) -> tuple[list[float], float]:
        """Return items · ranks / items of the window, for each micro-batch, and the latter. Collective."""
        trainer: Any = self
        accelerator = trainer.accelerator
        counts = [_counted(self._bigbatch_weights_items, inputs) for inputs in prepared]
        own = torch.stack([torch.as_tensor(count).detach().to(accelerator.device, torch.float64) for count in counts])
        invalid = not bool((own.isfinite() & (own >= 0)).all())
        local = own.sum()[None] * (math.nan if invalid else 1)  # raises on all ranks
        total = float(accelerator.gather(local).sum())  # waits for the device, once a window
        if math.isnan(total):
            raise InputError(
                f"items= returned {own.tolist()} for the micro-batches of this rank, or a number below 0 on another: "
                "it must return the number of items of a micro-batch, 0 or more."
            )
        total += carried
        if not total:
            return [0.0] * len(counts), 0.0
        return [count * accelerator.num_processes / total for count in own.tolist()], total

    def _bigbatch_weights_gradients(self) -> list[Tensor]:
        trainer: Any = self
        return [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]

    def _bigbatch_weights_has_gradient(self) -> bool:
        """Return whether any rank still has a gradient of micro-batches that no update followed. Collective.

        Raises:
            InputError: It is not in ``.grad``.
        """
        trainer: Any = self
        accelerator = trainer.accelerator
        engine = accelerator.distributed_type.value
        if engine in ("DEEPSPEED", "MEGATRON_LM"):
            raise InputError(
                f"the data of {class_name(self)} ended within a window, and {engine} keeps the gradient of its last "
                "micro-batches, which cannot be weighted there: use a data set with a length, or as many batches as "
                "gradient_accumulation_steps divides."
            )
        found = any(bool(gradient.any()) for gradient in self._bigbatch_weights_gradients())
        return bool(accelerator.gather(torch.tensor([found], device=accelerator.device)).any())

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the weighted loss in a training step, and the trainer's own elsewhere."""
        trainer: Any = self
        window = self._bigbatch_weights_window
        if window is None or not window.is_running:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if window.weight is None:
            raise InputError(
                f"training_step of {class_name(self)} calls self.compute_loss twice, or before "
                "self._prepare_inputs(inputs), and there is one weight for each micro-batch: call both once, and add "
                "up losses in compute_loss."
            )
        weight, window.weight = window.weight, None
        steps = trainer.current_gradient_accumulation_steps
        trainer.current_gradient_accumulation_steps = 1  # some losses divide by it
        try:
            if type(inputs) is dict and NUM_ITEMS in inputs:
                inputs = CheckedInputs(inputs, self)
            result = super().compute_loss(model, inputs, *args, **{**kwargs, NUM_ITEMS: None})  # type: ignore[misc]
        except TypeError as error:
            if "NoneType" not in str(error):
                raise
            raise InputError(
                f"compute_loss of {class_name(self)} failed without num_items_in_batch ({error}), and weights() calls "
                "it so: return the mean over the micro-batch if num_items_in_batch is None."
            ) from error
        finally:
            trainer.current_gradient_accumulation_steps = steps
        loss, *outputs = result if isinstance(result, tuple) else (result,)
        if not weight:  # the mean over nothing is NaN
            loss = torch.stack([p.sum() * 0 for p in model.parameters() if p.requires_grad]).sum()
        else:
            loss = loss * (weight * (steps if _is_divided(trainer) else 1))
            if own_training_step(self) is not None and loss.requires_grad:
                loss.register_hook(partial(self._bigbatch_weights_undo, steps))
        return (loss, *outputs) if outputs else loss

    def _bigbatch_weights_undo(self, steps: int, factor: Tensor) -> Tensor:
        """Replace what an own training_step multiplies the loss of a micro-batch by, before backward.

        Raises:
            InputError: It is neither undivided nor divided by the number of accumulation steps.
        """
        trainer: Any = self
        asked = trainer.args.gradient_accumulation_steps
        if (steps, asked) not in self._bigbatch_weights_ratios:
            scaler = trainer.accelerator.scaler
            found = factor.item() / (1.0 if scaler is None else scaler.get_scale())  # waits, once for each length
            if not any(math.isclose(found, 1 / number, rel_tol=1e-4) for number in (1, steps, asked)):
                raise InputError(
                    f"training_step of {class_name(self)} multiplies the loss of a micro-batch by {found:g}, and it is "
                    f"weighted already: leave it as it is, or divide it by the number of accumulation steps ({steps})."
                )
            expected = 1 / steps if _is_divided(trainer) else 1.0
            self._bigbatch_weights_ratios[steps, asked] = expected / found
        return factor * self._bigbatch_weights_ratios[steps, asked]


def _counted(items: CountInputs, inputs: Any) -> Items:
    """Return the items of a micro-batch; of which type is checked, and the value later, on all ranks."""
    own_code = OwnCode()
    with own_code.named(), own_code.call("items="):
        count: Any = items(inputs)
    if isinstance(count, np.generic):
        count = count.item()
    if not isinstance(count, int | float) and not (isinstance(count, Tensor) and count.numel() == 1):
        raise InputError(
            f"items= returned a {type(count).__name__}: it must return the number of items of a micro-batch, a number "
            "or a 0-d tensor."
        )
    return count.reshape(()) if isinstance(count, Tensor) else count


def _is_divided(trainer: Any) -> bool:
    """Return whether the Trainer divides a loss that was computed without a number of items by its steps."""
    is_scaled = trainer.loss_is_scaled_for_ga if hasattr(Trainer, "loss_is_scaled_for_ga") else None  # since 5.19
    if is_scaled is None:
        is_scaled = trainer.compute_loss_func is not None
    return not is_scaled
