"""Validate the optimizers, schedulers and scaler of an update."""

import inspect
from collections.abc import Sequence
from itertools import chain
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from bigbatch.gradients.gradient_sums import HALF_PRECISION_DTYPES

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


def check_optimizers(optimizer: "Optimizer | Sequence[Optimizer] | None") -> "tuple[Optimizer, ...]":
    """Return the optimizers of an update, after checking them; none for None.

    Raises:
        TypeError: One is not a ``torch.optim.Optimizer``, or evaluates the loss several times in a step.
        ValueError: There is none, or a parameter occurs twice.
    """
    optimizers = as_optimizers(optimizer)
    if not optimizers and optimizer is not None:
        raise ValueError("optimizer is an empty list: pass at least one torch.optim.Optimizer.")
    for each in optimizers:
        if each is not optimizer and not isinstance(each, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer is a list that contains a {type(each).__name__}: pass a torch.optim.Optimizer, or a list "
                "of them."
            )
        _check_optimizer(each)
    owners: dict[Tensor, int] = {}
    for index, each in enumerate(optimizers):
        for parameter in chain.from_iterable(group["params"] for group in each.param_groups):
            if owners.get(parameter) == index:
                raise ValueError(
                    f"the optimizer ({type(each).__name__}) contains the same parameter of shape "
                    f"{tuple(parameter.shape)} twice: each update would change it twice. Pass each one once, for tied "
                    "weights list(dict.fromkeys(parameters))."
                )
            if owners.setdefault(parameter, index) != index:
                raise ValueError(
                    f"optimizers {owners[parameter]} and {index} ({type(optimizers[owners[parameter]]).__name__} and "
                    f"{type(each).__name__}) contain the same parameter of shape {tuple(parameter.shape)}: each update "
                    "would change it twice. Give every parameter to one optimizer."
                )
            if not is_lazy(parameter) and parameter.is_inference():
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} was created under torch.inference_mode(), and can "
                    "never be trained. Create the model outside of it."
                )
    return optimizers


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


def check_schedulers(
    scheduler: "LRScheduler | Sequence[LRScheduler] | None", optimizers: "Sequence[Optimizer]"
) -> "tuple[LRScheduler, ...]":
    """Return the schedulers of an update, after checking them.

    Raises:
        TypeError: One has no ``step()`` without arguments.
        ValueError: One belongs to another optimizer.
    """
    if scheduler is None:
        return ()
    if not optimizers:
        raise ValueError(
            "scheduler= was passed without an optimizer, whose updates it would follow: pass the optimizer instead of "
            "None, or leave scheduler= out and call scheduler.step() after your own update."
        )
    schedulers = tuple(scheduler) if isinstance(scheduler, list | tuple) else (scheduler,)
    for each in schedulers:
        _check_scheduler(each, optimizers)
    return schedulers


def _check_scheduler(scheduler: Any, optimizers: "Sequence[Optimizer]") -> None:
    owner = getattr(scheduler, "optimizer", None)
    groups = [id(optimizer.param_groups) for optimizer in optimizers]
    if isinstance(owner, torch.optim.Optimizer) and id(owner.param_groups) not in groups:
        raise ValueError(
            "the scheduler belongs to another optimizer: its steps would change learning rates that this one "
            "does not use. Make it for the optimizer that is passed here."
        )
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError(
            "ReduceLROnPlateau needs a validation loss at each step, which an update does not have. "
            "Leave scheduler= out and call scheduler.step(validation_loss) after each validation."
        )
    name, step = type(scheduler).__name__, getattr(scheduler, "step", None)
    if not callable(step):
        raise TypeError(
            f"scheduler is a {name}, which has no step() method: pass an object whose step() sets the learning rate of "
            "the next update, such as torch.optim.lr_scheduler.LambdaLR(optimizer, function)."
        )
    if required := _required_parameters(step):
        call = "step_update(report.step)" if hasattr(scheduler, "step_update") else f"step({required[0]})"
        raise TypeError(
            f"{name}.step() needs the argument {required[0]!r}, and a window calls step() without any, once after each "
            f"update. Leave scheduler= out and call scheduler.{call} after each window."
        )


def _required_parameters(function: Any) -> list[str]:
    """Return the names of the parameters that a call must pass; none if the signature is unknown."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in variadic]


def check_settings(max_grad_norm: object, gradient_hook: object, nonfinite: str, scaler: object) -> None:
    """Validate what is done to the gradient before the step; arguments as for `bigbatch.Accumulator`.

    Raises:
        TypeError: ``gradient_hook`` cannot be called, or another setting has another type.
        ValueError: A setting is out of range.
    """
    if not isinstance(max_grad_norm, Real | Tensor | None) or isinstance(max_grad_norm, bool):
        raise TypeError(f"max_grad_norm is {max_grad_norm!r}: pass a number above 0, or None to not clip.")
    if scaler is not None and not callable(getattr(scaler, "is_enabled", None)):
        raise TypeError(f"scaler is a {type(scaler).__name__}: pass a torch.amp.GradScaler, or None.")
    if max_grad_norm is not None and not float(max_grad_norm) > 0:
        raise ValueError(f"max_grad_norm is {max_grad_norm}: it must be above 0, or None to not clip.")
    if gradient_hook is not None and not callable(gradient_hook):
        raise TypeError(f"gradient_hook is a {type(gradient_hook).__name__}: pass a function of the parameters.")
    if nonfinite not in ("skip", "raise"):
        raise ValueError(f'nonfinite is {nonfinite!r}: it must be "skip" or "raise".')


def check_scalable(parameters: Sequence[Tensor]) -> None:
    """Raise unless a gradient scaler supports the dtypes of the parameters.

    Raises:
        TypeError: Some are in half precision.
    """
    narrow = {parameter.dtype for parameter in parameters if parameter.dtype in HALF_PRECISION_DTYPES}
    if narrow:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in narrow))
        raise TypeError(
            f"a GradScaler is for float16 autocast over float32 parameters, and these are {names}. "
            "Keep the parameters in float32, or leave scaler= out."
        )


def as_optimizers(optimizer: "Optimizer | Sequence[Optimizer] | None") -> "tuple[Optimizer, ...]":
    """Return one optimizer, several or none as a tuple."""
    if optimizer is None:
        return ()
    return tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)
