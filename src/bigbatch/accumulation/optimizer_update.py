"""The optimizer update of a window: unscale, divide, check, clip, step, schedule. Once, on the total."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from bigbatch.accumulation.optimizer_state import init_optimizer_state
from bigbatch.errors import MemoryLimitError, NonFiniteError, first_line
from bigbatch.gradients.gradient_sums import HALF_PRECISION_DTYPES, GradientSums
from bigbatch.memory.usage import is_out_of_memory

if TYPE_CHECKING:
    from torch.amp import GradScaler
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from bigbatch.distributed.gradient_sync import GradientSync
    from bigbatch.gradients.loss_totals import LossTotals

NonFinite: TypeAlias = Literal["skip", "raise"]

# Added to the norm in the clip coefficient, as torch.nn.utils.clip_grad_norm_ does, so that both give the same result.
CLIP_EPSILON = 1e-6


@dataclass(frozen=True)
class UpdateOutcome:
    """The result of an update.

    Attributes:
        grad_norm: 2-norm of the divided gradient before clipping; NaN without items.
        skipped: Why nothing was updated; None if it was.
        extra_scalars: Values read from the device together with the norm.
    """

    grad_norm: float
    skipped: str | None = None
    extra_scalars: tuple[float, ...] = ()


class OptimizerUpdate:
    """Applies the gradient of a whole window.

    Args:
        optimizer: Any ``torch.optim.Optimizer`` that evaluates the loss at most once in a step.
        scheduler: Stepped once after each update that was applied.
        scaler: A gradient scaler for float16 autocast over float32 parameters.
        max_grad_norm: Largest 2-norm of the divided gradient, over all parameters of the optimizer; None to not clip.
        nonfinite: ``"skip"`` or ``"raise"``: what to do if the loss or gradient of a window is not finite.

    Attributes:
        num_steps: Updates applied so far.
    """

    def __init__(
        self,
        optimizer: "Optimizer",
        *,
        scheduler: "LRScheduler | None" = None,
        scaler: "GradScaler | None" = None,
        max_grad_norm: float | None = None,
        nonfinite: NonFinite = "skip",
    ) -> None:
        _check_optimizer(optimizer)
        _check_scheduler(scheduler, optimizer)
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}: it must be above 0, or None to not clip.")
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        if nonfinite not in ("skip", "raise"):
            raise ValueError(f'nonfinite is {nonfinite!r}: it must be "skip" or "raise".')
        self.max_grad_norm = max_grad_norm
        self.nonfinite = nonfinite
        self.num_steps = 0
        self._setup = False
        if self.scaler is not None:
            _check_scalable(optimizer)

    def prepare(self) -> None:
        """Initialize the optimizer state if the optimizer supports it; no-op from the second call on.

        Raises:
            MemoryLimitError: The state does not fit in memory.
        """
        if not self._setup:
            init_optimizer_state(self.optimizer)
            self._setup = True

    def set_num_steps(self, num_steps: int) -> None:
        """Continue to count updates after ``num_steps``."""
        self.num_steps = num_steps

    def parameters(self) -> list[Tensor]:
        """Return the parameters of all groups of the optimizer, as they are now."""
        return optimizer_parameters(self.optimizer)

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return self.parameters()[0].device

    def apply(
        self,
        sums: GradientSums,
        loss_totals: "LossTotals",
        *,
        loss_scale: Tensor | None = None,
        sync: "GradientSync | None" = None,
        extra_scalars: Sequence[Tensor] = (),
    ) -> UpdateOutcome:
        """Turn the sums of a window into one update, or skip it.

        Args:
            sums: Of the optimizer's parameters.
            loss_totals: Their divisor.
            loss_scale: The factor of the losses: the result of `loss_scale` when the window opened.
            sync: Synchronized the sums over ranks, which all apply the same; None in a single process.
            extra_scalars: Other 0-d tensors to read from the device at the same time, for the outcome.

        Waits for the device once, for the count and the norm that decide whether there is an update.

        Raises:
            MemoryLimitError: Memory ran out within the optimizer's step. Some parameters may be updated and others not.
        """
        gradients = sums.tensors()
        if loss_scale is None or not gradients:
            return self._apply(sums, gradients, loss_totals, sync, extra_scalars)
        assert self.scaler is not None, "the loss scale comes from it"
        # Relative to the scale at the start of this window: another window may have changed the scaler since.
        torch._foreach_mul_(gradients, self.scaler.scale(torch.ones_like(loss_scale)) / loss_scale)
        self.scaler.unscale_(self.optimizer)
        try:
            return self._apply(sums, gradients, loss_totals, sync, extra_scalars)
        finally:
            self.scaler.update()

    def loss_scale(self) -> Tensor | None:
        """Return the 0-d factor that every loss of one window is multiplied by; None without a scaler."""
        return None if self.scaler is None else self.scaler.scale(torch.ones((), device=self.device))

    def _apply(
        self,
        sums: GradientSums,
        gradients: list[Tensor],
        loss_totals: "LossTotals",
        sync: "GradientSync | None",
        extra_scalars: Sequence[Tensor],
    ) -> UpdateOutcome:
        norm_of = torch.nn.utils.get_total_norm if sync is None else sync.norm
        divide_factor = 1.0 if sync is None else sync.gradient_divide_factor
        norm_of_sums = norm_of(gradients)
        divisor = loss_totals.divisor() / divide_factor  # waits for the device if items are counted there
        if not divisor:
            return UpdateOutcome(math.nan, skipped="no items")
        if not gradients:
            raise ValueError(
                "none of the optimizer's parameters received a gradient: the loss does not depend on them."
            )
        together = [
            value.to(norm_of_sums) for value in (loss_totals.nan_if_loss_not_finite(norm_of_sums), *extra_scalars)
        ]
        norm, *read = torch.stack(together).tolist()  # waits for the device
        grad_norm = norm / divisor
        if not math.isfinite(grad_norm):  # the norm of the undivided sums may have overflowed
            _scale(gradients, 1 / divisor)
            grad_norm, divisor = norm_of(gradients).item(), 1.0
            if not math.isfinite(grad_norm):
                return self._skip_or_raise(grad_norm, "non-finite gradient")
            if not loss_totals.is_finite():
                return self._skip_or_raise(grad_norm, "non-finite loss")
        _scale(gradients, self._clip_coefficient(grad_norm) / divisor)
        gradients.clear()  # float32 sums are then freed one by one as they are written to .grad
        sums.write_to_grad()
        self._step(loss_totals)
        return UpdateOutcome(grad_norm, extra_scalars=tuple(read))

    def _skip_or_raise(self, grad_norm: float, why: str) -> UpdateOutcome:
        if self.nonfinite == "raise":
            raise NonFiniteError(
                f"the window after update {self.num_steps} has a {why}, and changed nothing: look at its samples, "
                'lower the learning rate, or pass nonfinite="skip" to continue without such windows.'
            )
        return UpdateOutcome(grad_norm, skipped=why)

    def _clip_coefficient(self, grad_norm: float) -> float:
        if self.max_grad_norm is None:
            return 1.0
        return min(1.0, self.max_grad_norm / (grad_norm + CLIP_EPSILON))

    def _step(self, loss_totals: "LossTotals") -> None:
        try:
            if isinstance(self.optimizer, torch.optim.LBFGS):
                loss = sum(term.loss for term in loss_totals.terms().values() if term.items)
                self.optimizer.step(lambda: torch.tensor(loss))  # type: ignore[no-untyped-call]
            else:
                self.optimizer.step()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = first_line(error)
            raise MemoryLimitError(
                f"memory ran out within the step of {type(self.optimizer).__name__} ({message}): some parameters may "
                "be updated and others not. Return to a checkpoint, and leave more memory for the step: train fewer "
                "parameters or in lower precision, or pass fused=True or foreach=False to the optimizer if it accepts "
                "them."
            ) from error
        self.num_steps += 1
        if self.scheduler is not None:
            self.scheduler.step()


def _scale(gradients: list[Tensor], factor: float) -> None:
    if gradients and factor != 1.0:
        torch._foreach_mul_(gradients, factor)


def _check_optimizer(optimizer: "Optimizer") -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}: pass a torch.optim.Optimizer.")
    if isinstance(optimizer, torch.optim.LBFGS):
        group = optimizer.param_groups[0]
        if group["max_iter"] != 1 or group["line_search_fn"] is not None:
            raise TypeError(
                f"LBFGS with max_iter={group['max_iter']} and line_search_fn={group['line_search_fn']!r} evaluates the "
                "loss again within one update, when the micro-batches of the window are no longer available. "
                "Use LBFGS(max_iter=1, line_search_fn=None), or another optimizer."
            )


def _check_scheduler(scheduler: "LRScheduler | None", optimizer: "Optimizer") -> None:
    owner = getattr(scheduler, "optimizer", optimizer)
    if isinstance(owner, torch.optim.Optimizer) and owner.param_groups is not optimizer.param_groups:
        raise ValueError(
            "the scheduler belongs to another optimizer: its steps would change learning rates that this one "
            "does not use. Make it for the optimizer that is passed here."
        )
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError(
            "ReduceLROnPlateau needs a validation loss at each step, which an update does not have. "
            "Leave scheduler= out and call scheduler.step(validation_loss) after each validation."
        )


def _check_scalable(optimizer: "Optimizer") -> None:
    narrow = {p.dtype for p in optimizer_parameters(optimizer) if p.dtype in HALF_PRECISION_DTYPES}
    if narrow:
        raise TypeError(
            f"a GradScaler is for float16 autocast over float32 parameters, and these are {_names(narrow)}. "
            "Keep the parameters in float32, or leave scaler= out."
        )


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def optimizer_parameters(optimizer: "Optimizer") -> list[Tensor]:
    """Return the parameters of all groups of an optimizer, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
