"""A loss whose backward is the finished gradient of a window, for training loops that own the update.

    run a window → its gradients, with ``.grad`` as before → 0-d loss → loss.backward() → .grad += factor · gradient

The gradients pass through autograd, which adds them as those of any loss, and `torch.autograd.grad` returns them. A
parameter with hooks of its own is the exception: they were called with the gradient of every micro-batch, and one that
scales it must not do so twice, so its gradient is added to ``.grad`` directly. So are those of an engine that captures
CUDA graphs: a capture fails while another graph holds nodes of the parameters, as the loss of the last window would.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bigbatch.accumulation.update_outcome import NO_ITEMS
from bigbatch.errors import WindowStateError
from bigbatch.execution.runner import MicrobatchRunner
from bigbatch.window_report import WindowReport


def exact_loss(
    parameters: Sequence[Tensor], backward: Callable[[], WindowReport], runner: MicrobatchRunner
) -> tuple[Tensor, WindowReport]:
    """Run a window, and return its loss, whose backward delivers its gradient, and its report.

    Every ``.grad`` is as before when this returns or raises.

    Args:
        parameters: Of the window.
        backward: Runs it and leaves its gradients in ``.grad``.
        runner: May own the tensors that the gradients are in.
    """
    found = [parameter.grad for parameter in parameters]
    try:
        report = backward()
        buffers = runner.static_buffers or {}  # the next window writes to them
        gradients = [
            parameter.grad.clone() if parameter.grad is not None and parameter in buffers else parameter.grad
            for parameter in parameters
        ]
    finally:
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
    if report.skipped == NO_ITEMS:
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
    by_autograd = [index for index, parameter in enumerate(parameters) if not parameter._backward_hooks]
    if runner.captures_graphs:
        by_autograd = []
    anchor = torch.zeros((), requires_grad=True)  # if no gradient passes through autograd
    delivery = _Delivery(parameters, gradients, by_autograd)
    loss: Tensor = _HandOver.apply(  # type: ignore[no-untyped-call]
        _value(report, parameters), delivery, anchor, *(parameters[index] for index in by_autograd)
    )
    return loss, report


def is_exact_loss(loss: object) -> bool:
    """Return whether a loss comes from `exact_loss`, and nothing was computed with it since."""
    return getattr(type(getattr(loss, "grad_fn", None)), "_forward_cls", None) is _HandOver


def _value(report: WindowReport, parameters: Sequence[Tensor]) -> Tensor:
    """Return the loss of a window, 0-d: NaN if it or its gradient is not finite, and 0 without items."""
    is_wide = any(parameter.dtype == torch.float64 for parameter in parameters)  # factors then have its precision
    value = 0.0 if report.skipped == NO_ITEMS else math.nan if report.skipped else report.loss
    return torch.tensor(value, dtype=torch.float64 if is_wide else torch.float32, device=parameters[0].device)


class _Delivery:
    """The gradients of a window until they are delivered, once.

    Args:
        parameters: Of the window.
        gradients: As many; not used by anything else.
        by_autograd: Indices of the parameters whose gradients are returned to autograd.
    """

    def __init__(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], by_autograd: Sequence[int]
    ) -> None:
        self._parameters = parameters
        self._gradients: Sequence[Tensor | None] | None = gradients
        self._by_autograd = by_autograd

    def deliver(self, factor: Tensor) -> list[Tensor | None]:
        """Return the gradients times a factor for autograd, after adding the others to ``.grad``.

        Raises:
            WindowStateError: They were delivered before, or the graph of the backward was requested.
        """
        if torch.is_grad_enabled():
            raise WindowStateError(
                "the backward of engine.loss(batch) was called with create_graph=True, and a finished gradient has no "
                "graph: compute the loss of gradients inside loss_fn, or leave create_graph out."
            )
        if self._gradients is None:
            raise WindowStateError(
                "backward() was called a second time on a loss of engine.loss(batch), whose gradient was delivered by "
                "the first call: call engine.loss(batch) again for another one."
            )
        gradients, self._gradients = self._gradients, None
        _multiply([gradient for gradient in gradients if gradient is not None], factor)
        through_autograd = set(self._by_autograd)
        for index, (parameter, gradient) in enumerate(zip(self._parameters, gradients, strict=True)):
            if index not in through_autograd and gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return [gradients[index] for index in self._by_autograd]


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, delivery: _Delivery, *_: Tensor) -> Tensor:
        vars(ctx).update(deliver=delivery.deliver)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *ctx.deliver(factor)


def _multiply(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply gradients in place, on their devices, without waiting for the factor."""
    if factor.is_cpu and factor.item() == 1:
        return
    by_device: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        values = gradient.coalesce()._values() if gradient.is_sparse else gradient
        by_device.setdefault(values.device, []).append(values)
    for device, values_there in by_device.items():
        torch._foreach_mul_(values_there, factor.to(device))
