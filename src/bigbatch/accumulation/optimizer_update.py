"""The optimizer update of a window: unscale, divide, check, clip, step, schedule. Once, on the total.

Long because every part of an update is here, in its order.
"""

import math
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from operator import is_
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bigbatch.accumulation.deferred_offload import DeferredOffload
from bigbatch.accumulation.loss_scaling import unscaled
from bigbatch.accumulation.optimizer_checks import check_optimizers, check_scalable, check_schedulers, check_settings
from bigbatch.accumulation.optimizer_state import init_optimizer_state
from bigbatch.accumulation.optimizer_step import OptimizerStep
from bigbatch.accumulation.parameter_places import ParameterPlaces
from bigbatch.accumulation.update_outcome import NO_ITEMS, GradientHook, NonFinite, UpdateOutcome, skip_or_raise
from bigbatch.errors import NonFiniteError, WindowStateError
from bigbatch.gradients.foreign_writes import check_same_parameters
from bigbatch.gradients.gradient_sums import GradientSums
from bigbatch.offload.levels import Offload, check_master
from bigbatch.offload.optimizer_offload import offload_optimizers

if TYPE_CHECKING:
    from torch.amp import GradScaler
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from bigbatch.distributed.gradient_sync import GradientSync
    from bigbatch.gradients.loss_totals import LossTotals

# Added to the norm in the clip coefficient, as torch.nn.utils.clip_grad_norm_ does, so that both give the same result.
CLIP_EPSILON = 1e-6


class OptimizerUpdate:
    """Applies the gradient of a whole window.

    Args:
        optimizer: A ``torch.optim.Optimizer``, or several over different parameters of one graph; None if other code
            updates the weights: `finish` is then supported, and `apply` is not.
        model: Whose parameters that require a gradient are used if there is no optimizer.
        scheduler: Stepped once after each update that was applied; several if there are several optimizers.
        scaler: A gradient scaler for float16 autocast over float32 parameters. Its scale is only read if there is no
            optimizer.
        max_grad_norm: Largest 2-norm of the divided gradient, over the parameters of all optimizers; None to not clip.
        gradient_hook: Called once per update with the parameters, whose ``.grad`` is final; may change it in place.
        nonfinite: ``"skip"`` or ``"raise"``: what to do if the loss or gradient of a window is not finite.
        offload: As for `bigbatch.Accumulator`.

    Attributes:
        optimizers, schedulers: All of them.
        offload: Steps the optimizers with their state in host memory; None for ``offload="none"``.
        deferred: Keeps loaded state in host memory until a level of offload is chosen; None if one is.
        steps: Steps the optimizers and schedulers.
        knows_number: Whether ``num_steps`` is known: not if other code counts the updates.
    """

    def __init__(
        self,
        optimizer: "Optimizer | Sequence[Optimizer] | None",
        *,
        model: nn.Module | None = None,
        scheduler: "LRScheduler | Sequence[LRScheduler] | None" = None,
        scaler: "GradScaler | None" = None,
        max_grad_norm: float | None = None,
        gradient_hook: GradientHook | None = None,
        nonfinite: NonFinite = "skip",
        offload: Offload = "none",
    ) -> None:
        self.optimizers = check_optimizers(optimizer)
        self.schedulers = check_schedulers(scheduler, self.optimizers)
        self._model = model
        check_settings(max_grad_norm, gradient_hook, nonfinite, scaler)
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.max_grad_norm = max_grad_norm
        self.gradient_hook = gradient_hook
        self.nonfinite = nonfinite
        check_master(offload, {"gradient_hook=": gradient_hook is not None, "a GradScaler": self.scaler is not None})
        self.offload = offload_optimizers(self.optimizers, offload, model)
        self.deferred: DeferredOffload | None = None
        self.steps = OptimizerStep(self.optimizers, self.schedulers, self.offload)
        self._setup, self.knows_number = False, bool(self.optimizers)
        self._places = ParameterPlaces(model, self.parameters())
        if self.scaler is not None:
            check_scalable(self.parameters())

    @property
    def num_steps(self) -> int:
        """Updates applied so far."""
        return self.steps.num_steps

    def prepare(self) -> None:
        """Check that updates are possible here; the first time, create the optimizer state if that is supported.

        Raises:
            MemoryLimitError: The state does not fit in memory.
            TornUpdateError: The last update is torn.
            WindowStateError: ``torch.inference_mode`` is on, or a parameter of the model was replaced by another one.
        """
        self.steps.check_not_torn()
        self._check_places(self.parameters)
        if torch.is_inference_mode_enabled():
            raise WindowStateError(
                "torch.inference_mode() is on, and tensors that are created under it can never be trained. Run windows "
                "outside of it; use it, or torch.no_grad(), for evaluation only."
            )
        if self.offload is not None:
            self.offload.prepare(init_optimizer_state)
        elif not self._setup and self.deferred is None:
            for optimizer in self.optimizers:
                init_optimizer_state(optimizer)
            self._setup = True

    def defer_offload(self) -> None:
        """Create no optimizer state, and keep loaded state in host memory, until `set_offload`."""
        self.deferred = DeferredOffload(self.optimizers)

    def set_offload(self, level: Offload) -> None:
        """Use a level of offload, before the first window; errors are those of the class, and of `prepare`."""
        self.offload = offload_optimizers(self.optimizers, level, self._model)
        self.steps.set_offload(self.offload)
        if self.offload is None and self.deferred is not None:
            self.deferred.move_to_device()
        self.deferred = None

    @property
    def known_num_steps(self) -> int | None:
        """Updates applied so far; None if other code counts them."""
        return self.num_steps if self.knows_number else None

    def set_num_steps(self, num_steps: int) -> None:
        """Continue to count after ``num_steps`` updates, with a model and optimizers that were restored."""
        self.steps.reset(num_steps)
        self.knows_number = True

    def whole_weights(self) -> AbstractContextManager[None]:
        """Let narrow weights be their float32 values inside, in host memory."""
        return nullcontext() if self.offload is None else self.offload.wide_weights()

    def parameters(self) -> list[Tensor]:
        """Return the parameters of all groups of all optimizers, or those that the model trains, as they are now."""
        return trained_parameters(self._model, self.optimizers)

    def check_parameters(self, sums: GradientSums) -> None:
        """Raise a WindowStateError if the parameters of sums are not those of optimizers and model any more."""
        if self.optimizers:
            check_same_parameters(sums.parameters, self.parameters())
        self._check_places(lambda: sums.parameters)

    def _check_places(self, parameters: Callable[[], Sequence[Tensor]]) -> None:
        """Find parameters of the model that were replaced: about 0.05 µs for each parameter and module."""
        places = self._places
        if not all(map(is_, map(dict.get, places.tables, places.keys), places.values)):
            places.check(parameters())

    def require_optimizer(self) -> None:
        """Raise if there is no optimizer.

        Raises:
            WindowStateError: There is none.
        """
        if not self.optimizers:
            raise WindowStateError(
                "step() was called without an optimizer: pass an optimizer instead of None, or call finish() of the "
                "window, or backward() or loss() of the engine, and update the weights yourself."
            )

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        if self._model is not None and not self.optimizers:  # also while nothing requires a gradient
            return next(self._model.parameters()).device
        return self.parameters()[0].device

    def apply(
        self,
        sums: GradientSums,
        loss_totals: "LossTotals",
        *,
        loss_scale: Tensor | None = None,
        sync: "GradientSync | None" = None,
        extra_scalars: Sequence[Tensor] = (),
        evaluate_again: "Callable[[], LossTotals] | None" = None,
    ) -> UpdateOutcome:
        """Turn the sums of a window into one update, or skip it.

        Args:
            sums: Of the parameters of all optimizers.
            loss_totals: Their divisor.
            loss_scale: The factor of the losses: the result of `loss_scale` when the window opened.
            sync: Synchronized the sums over ranks, which all apply the same; None in a single process.
            extra_scalars: Other 0-d tensors to read from the device at the same time, for the outcome.
            evaluate_again: Computes the same sums again, for optimizers that need a closure; None if not possible.

        Waits for the device for the count and the norm that decide on the update, and again after a ``gradient_hook``.

        Raises:
            MemoryLimitError: Memory ran out within the step of an optimizer.
            TornUpdateError: The update failed after it had begun.
        """
        keep: Container[Tensor] | None = None
        if self.offload is not None:
            keep = self.offload.weights.narrowed if self.offload.sums is None else self.offload.sums.float32
        outcome = self.finish(
            sums, loss_totals, loss_scale=loss_scale, sync=sync, extra_scalars=extra_scalars, keep=keep
        )
        if outcome.skipped is None:
            if self.offload is not None:
                self.offload.weights.hand_over(sums.store.float32)

            def closure() -> Tensor:
                assert evaluate_again is not None, "not passed without it"
                totals = evaluate_again()
                again = self.finish(sums, totals, loss_scale=loss_scale, sync=sync)
                if again.skipped is not None:
                    raise NonFiniteError(f"the window has a {again.skipped} when its optimizer computes it again.")
                return torch.tensor(_loss(totals))

            self.steps.run(
                grad_norm=outcome.grad_norm,
                loss=partial(_loss, loss_totals),
                evaluate_again=None if evaluate_again is None else closure,
            )
        return outcome

    def finish(
        self,
        sums: GradientSums,
        loss_totals: "LossTotals",
        *,
        loss_scale: Tensor | None = None,
        sync: "GradientSync | None" = None,
        extra_scalars: Sequence[Tensor] = (),
        keep: Container[Tensor] | None = None,
    ) -> UpdateOutcome:
        """Divide, check and clip the sums of a window, and leave the result in ``.grad``; arguments as for `apply`.

        The sums of parameters to ``keep``, by default of none, stay in the store of ``sums``, not rounded to the dtype
        of ``.grad``.
        """
        if self.offload is not None and keep is None:
            self.offload.check_grad()
        gradients = sums.tensors()
        if loss_scale is None or not gradients:
            return self._finish(sums, gradients, loss_totals, sync, extra_scalars, keep=keep or ())
        divisor = loss_totals.divisor()  # waits for the device if items are counted there
        if not divisor:  # the scaler stays as it is
            return UpdateOutcome(math.nan, skipped=NO_ITEMS)
        assert self.scaler is not None, "the loss scale comes from it"
        if not self.optimizers:
            torch._foreach_div_(gradients, loss_scale)
            return self._finish(sums, gradients, loss_totals, sync, extra_scalars, divisor)
        with unscaled(self.scaler, self.optimizers, gradients, loss_scale):
            return self._finish(sums, gradients, loss_totals, sync, extra_scalars, divisor)

    def loss_scale(self) -> Tensor | None:
        """Return the 0-d factor that every loss of one window is multiplied by; None without a scaler."""
        return None if self.scaler is None else self.scaler.scale(torch.ones((), device=self.device))

    def _finish(
        self,
        sums: GradientSums,
        gradients: list[Tensor],
        loss_totals: "LossTotals",
        sync: "GradientSync | None",
        extra_scalars: Sequence[Tensor],
        divisor: float | None = None,
        keep: Container[Tensor] = (),
    ) -> UpdateOutcome:
        norm_of = torch.nn.utils.get_total_norm if sync is None else sync.norm
        divide_factor = 1.0 if sync is None else sync.gradient_divide_factor
        on_host = None if self.offload is None else self.offload.sums
        norm_of_sums = norm_of(gradients if on_host is None else on_host.norms(gradients))
        divisor = loss_totals.divisor() if divisor is None else divisor  # waits for the device if counts are there
        divisor /= divide_factor
        if not divisor:
            return UpdateOutcome(math.nan, skipped=NO_ITEMS)
        if not gradients:
            raise ValueError(
                f"none of the {'optimizer' if self.optimizers else 'model'}'s parameters received a gradient: the loss "
                "does not depend on them."
            )
        together = [v.to(norm_of_sums) for v in (loss_totals.nan_if_loss_not_finite(norm_of_sums), *extra_scalars)]
        norm, *read = [together[0].item()] if len(together) == 1 else torch.stack(together).tolist()  # waits
        grad_norm = norm / divisor
        if not math.isfinite(grad_norm):  # the norm of the undivided sums may have overflowed
            _scale(gradients, 1 / divisor)
            norm_of_sums = norm_of(gradients if on_host is None else on_host.norms(gradients))
            grad_norm, divisor = norm_of_sums.item(), 1.0
            if not math.isfinite(grad_norm):
                if sync is not None:
                    sync.check_reduced()
                return self._skip_or_raise(grad_norm, "non-finite gradient")
            if not loss_totals.is_finite():
                return self._skip_or_raise(grad_norm, "non-finite loss")
        factor = self._clip_coefficient(grad_norm) / divisor
        if on_host is None:
            _scale(gradients, factor)
        else:
            on_host.scale(factor)
        gradients.clear()  # float32 sums are then freed one by one as they are written to .grad
        sums.write_to_grad(keep)
        if self.gradient_hook is not None:
            changed = [parameter for parameter in sums.parameters if parameter.grad is not None]
            try:
                self.gradient_hook(changed)
            except BaseException:
                if sync is not None and sync.is_sharded:  # the other ranks wait for this norm, and skip if it is NaN
                    norm_of([p.grad.mul_(math.nan) for p in changed if p.grad is not None])
                raise
            after_hook = norm_of([p.grad for p in changed if p.grad is not None]).item()
            if not math.isfinite(after_hook):
                return self._skip_or_raise(after_hook, "non-finite gradient")
        return UpdateOutcome(grad_norm, extra_scalars=tuple(read))

    def _skip_or_raise(self, grad_norm: float, why: str) -> UpdateOutcome:
        return skip_or_raise(grad_norm, why, nonfinite=self.nonfinite, num_steps=self.known_num_steps)

    def _clip_coefficient(self, grad_norm: float) -> float:
        if self.max_grad_norm is None:
            return 1.0
        return min(1.0, self.max_grad_norm / (grad_norm + CLIP_EPSILON))


def _scale(gradients: list[Tensor], factor: float) -> None:
    if gradients and factor != 1.0:
        torch._foreach_mul_(gradients, factor)


def _loss(loss_totals: "LossTotals") -> float:
    """Return the sum over the terms with items of loss sum / items; waits for the device."""
    return float(sum(term.loss for term in loss_totals.terms().values() if term.items))


def optimizer_parameters(*optimizers: "Optimizer") -> list[Tensor]:
    """Return the parameters of all groups of some optimizers, in order."""
    return [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]


def trained_parameters(model: nn.Module | None, optimizers: "Sequence[Optimizer]") -> list[Tensor]:
    """Return the parameters of optimizers; without one, those of a model that require a gradient."""
    if optimizers or model is None:
        return optimizer_parameters(*optimizers)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
