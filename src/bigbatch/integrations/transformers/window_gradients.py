"""Compute the gradient of one window by a Trainer's own loop, by `exact`, and in one piece, and their errors."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bigbatch.errors import InputError
from bigbatch.integrations.transformers.checks import Settings
from bigbatch.integrations.transformers.own_code import OwnCode, name_of
from bigbatch.integrations.transformers.own_loss import loss_name
from bigbatch.integrations.transformers.samples import WindowBatch
from bigbatch.integrations.transformers.traceless import attribute, class_of, collective, without_autocast
from bigbatch.integrations.transformers.trainer_mixin import ExactMixin
from bigbatch.integrations.transformers.unit_probe import LossProbe
from bigbatch.integrations.transformers.unit_refusals import class_name
from bigbatch.integrations.transformers.weights import WeightsMixin
from bigbatch.integrations.transformers.window_data import FixedCollator, WindowData
from bigbatch.integrations.transformers.window_engine import WindowEngine
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory

Gradient: TypeAlias = list[Tensor]
WHOLE = "the whole batch in one piece"
ONE_BY_ONE = "one sample at a time, weighted by its items"
OWN_BATCHES = "the loader's batches, weighted by their items"


@dataclass(frozen=True)
class WindowErrors:
    """Errors of one window's gradient, ‖gradient − reference‖ / ‖reference‖, over all ranks.

    Attributes:
        name: ``"first"`` or ``"last"`` of an epoch.
        num_samples: Samples of this rank.
        num_microbatches: Micro-batches of this rank in the Trainer's loop.
        stock_error: Of the Trainer's own accumulation.
        relative_error: Of bigbatch.
    """

    name: str
    num_samples: int
    num_microbatches: int
    stock_error: float
    relative_error: float


class WindowGradients:
    """Gradients of one window of a trainer. Call inside `traceless`.

    Args:
        trainer: With the class ``stock``.
        model: Its bare model.
        kind: Its class: that of `exact` or `weights`, or ``stock``.
        stock: The class without bigbatch.
        settings: Of `exact`.
        window: The data.
    """

    def __init__(
        self, trainer: Any, model: nn.Module, kind: type, stock: type, settings: Settings, window: WindowData
    ) -> None:
        self._trainer, self._model, self._kind, self._stock = trainer, model, kind, stock
        self._settings, self._window = settings, window
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._is_sharded = any(hasattr(parameter, "device_mesh") for parameter in self._parameters)
        self._num_ranks: int = trainer.accelerator.num_processes
        if window.is_collated:
            self._collate: Callable[[Any], Any] = lambda batches: batches[0]
            self._samples = window.samples
        else:
            own_code, collator = OwnCode(), trainer.data_collator
            with own_code.named(), own_code.call(f"the data collator of {stock.__name__} ({name_of(collator)})"):
                fixed = FixedCollator(collator, window.samples)
            self._collate, self._samples = fixed, fixed.samples

    def errors(self) -> tuple[WindowErrors, str, str, float]:
        """Return the errors, the unit, how the reference was computed, and the tolerance."""
        own_code = OwnCode()
        with own_code.named(), _as_probed(self._trainer, self._model, self._batches(), own_code) as tolerance:
            stock = self._by_training_steps(self._stock)
            if issubclass(self._kind, WeightsMixin):
                ours = self._by_training_steps(self._kind)
                unit, count, takes_num_items = "items= that was passed", self._trainer._bigbatch_weights_items, False
            else:
                ours, unit, count, takes_num_items = self._by_engine()
            reference, how = self._reference(count, takes_num_items)
            size = len(self._window.samples)
            if self._window.is_collated:
                size = sum(len(next(iter(batch.values()))) for batch in self._window.batches)
            errors = WindowErrors(
                self._window.name,
                size,
                len(self._window.batches),
                self._error(stock, reference),
                self._error(ours, reference),
            )
        return errors, unit, how, tolerance

    def _batches(self) -> list[Any]:
        """Return the micro-batches of the Trainer's loop, collated."""
        if self._window.is_collated:
            return list(self._window.batches)
        bounds = itertools.accumulate(map(len, self._window.batches), initial=0)
        return [self._collate(self._samples[start:stop]) for start, stop in itertools.pairwise(bounds)]

    def _by_training_steps(self, kind: type) -> Gradient:
        """Return the gradient of the Trainer's loop: its batches, counts, losses and divisions."""
        trainer, device = self._trainer, self._trainer.args.device
        batches = self._batches()
        with class_of(trainer, kind), collective(trainer.accelerator), attribute(self._model, "train", self._stay):
            batches, num_items = trainer.get_batch_samples(iter(batches), len(batches), device)
            trainer.current_gradient_accumulation_steps = len(batches)
            for inputs in batches:
                trainer.training_step(self._model, inputs, num_items)
        gradient = self._take()
        if self._num_ranks > 1 and not self._is_sharded:  # what DistributedDataParallel does
            for each in gradient:
                torch.distributed.all_reduce(each)
                each /= self._num_ranks
        return gradient

    def _stay(self, mode: bool = True) -> nn.Module:
        """Leave the mode of the model as it is, in place of ``model.train()``."""
        return self._model

    def _by_engine(self) -> tuple[Gradient, str, Callable[[Any], Any], bool]:
        """Return the gradient of `exact`, and the unit, its count, and whether the loss takes a number of items."""
        trainer = self._trainer
        own = trainer.compute_loss
        window = WindowBatch(self._samples, is_collated=self._window.is_collated)
        with ExitStack() as stack:
            stack.enter_context(class_of(trainer, _exact_kind(self._kind)))
            stack.enter_context(attribute(trainer, "data_collator", self._collate))
            stack.enter_context(attribute(trainer, "_bigbatch_settings", self._settings))
            engine = WindowEngine(trainer, self._settings_of_samples(), audits_items=False)
            loss, _ = engine.loss(self._wrapped(), window, own)
            loss.backward()  # type: ignore[no-untyped-call]
        unit = engine.unit
        return self._take(), unit.name, unit.count, unit.takes_num_items

    def _settings_of_samples(self) -> Settings:
        """Return the settings, with lengths of what is passed to the collator: samples, or their rows."""
        lengths, samples = self._settings.lengths, self._window.samples
        if lengths is None or self._samples is samples:
            return self._settings
        return replace(self._settings, lengths=lambda rows: lengths([samples[row] for row in rows]))

    def _wrapped(self) -> nn.Module:
        """Return the model as the engine needs it to sum over ranks."""
        if self._num_ranks == 1 or self._is_sharded:
            return self._model
        return nn.parallel.DistributedDataParallel(self._model)

    def _reference(self, count: Callable[[Any], Any], takes_num_items: bool) -> tuple[Gradient, str]:
        """Return Σ items · ∇mean / Σ items over parts, and which parts: all samples, or one at a time."""
        if self._window.is_collated:
            return self._weighted([[batch] for batch in self._samples], count, takes_num_items), OWN_BATCHES
        try:
            return self._weighted([self._samples], count, takes_num_items), WHOLE
        except RuntimeError as error:
            if not is_out_of_memory(error) or self._num_ranks > 1:
                raise
        self._take()
        free_cached_memory()
        return self._weighted([[sample] for sample in self._samples], count, takes_num_items), ONE_BY_ONE

    def _weighted(self, parts: Sequence[Sequence[Any]], count: Callable[[Any], Any], takes_num_items: bool) -> Gradient:
        total = 0.0
        for part in parts:
            inputs = self._trainer._prepare_inputs(self._collate(part))
            items = float(count(inputs))
            total += items
            if items or self._is_sharded:
                num_items = torch.ones((), device=self._trainer.args.device) if takes_num_items else None
                loss = self._trainer.compute_loss(self._model, inputs, num_items_in_batch=num_items)
                factor = 1 / self._loss_factor() if takes_num_items else items
                (loss * factor if items else loss.nan_to_num() * 0).backward()
        gradient = self._take()
        totals = torch.tensor(total, dtype=torch.float64, device=self._trainer.args.device)
        if self._num_ranks > 1:
            torch.distributed.all_reduce(totals)
            for each in gradient if not self._is_sharded else ():
                torch.distributed.all_reduce(each)
        if not float(totals):
            raise InputError(
                f"the {self._window.name} window of {class_name(self._trainer)} has no items, so that it has no "
                "gradient to compare: verify a trainer whose window has some."
            )
        scale = float(totals) / (self._num_ranks if self._is_sharded else 1)  # the backward of a sharded model averages
        return [each / scale for each in gradient]

    def _loss_factor(self) -> int:
        """Return by what the Trainer multiplies a loss that is divided by a number of items."""
        return self._num_ranks if self._trainer.args.average_tokens_across_devices else 1

    def _take(self) -> Gradient:
        """Return the gradients and clear them."""
        found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters]
        for parameter in self._model.parameters():
            parameter.grad = None
        return found

    def _error(self, gradient: Gradient, reference: Gradient) -> float:
        squares = torch.zeros(2, dtype=torch.float64, device=self._trainer.args.device)
        for own, right in zip(map(_local, gradient), map(_local, reference), strict=True):
            squares[0] += (own.double() - right.double()).square().sum()
            squares[1] += right.double().square().sum()
        if self._is_sharded:
            torch.distributed.all_reduce(squares)
        difference, norm = squares.sqrt().tolist()
        return difference / norm if norm else (math.inf if difference else 0.0)


@contextmanager
def _as_probed(trainer: Any, model: nn.Module, batches: Sequence[Any], own_code: OwnCode) -> Iterator[float]:
    """Run in training mode without dropout, or in eval mode, without autocast and scaler; yield the tolerance."""

    def compute_loss(model: nn.Module, inputs: Any, num_items: Any) -> Tensor:
        with own_code.call(loss_name(trainer)):
            loss: Tensor = trainer.compute_loss(model, inputs, num_items_in_batch=num_items)
        return loss

    with ExitStack() as stack:
        stack.enter_context(without_autocast(model))
        stack.enter_context(attribute(trainer.accelerator, "scaler", None))
        stack.enter_context(warnings.catch_warnings(action="ignore", category=UserWarning))  # of the engine: dropout
        probe = LossProbe(trainer, model, compute_loss)
        probe.choose_mode(batches[0])
        yield probe.tolerance


def _exact_kind(kind: type) -> type:
    """Return the class that `exact` gives to trainers of a class."""
    return kind if issubclass(kind, ExactMixin) else type(f"Exact{kind.__name__}", (ExactMixin, kind), {})


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.to_dense() if local.is_sparse else local
