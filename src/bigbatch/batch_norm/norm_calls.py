"""The batch norms that one micro-batch runs: found where they are called, and normalized by the whole batch.

F.batch_norm(..., training=True) → own moments → suspended until all micro-batches are here → moments of the whole batch

Calls are found by a mode of torch, so that norms in other classes, and functions without a module, are found as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bigbatch.batch_norm.host_tensors import HostTensors
from bigbatch.batch_norm.made_tensors import MadeTensors, TensorsOfOne
from bigbatch.batch_norm.moments import Moments
from bigbatch.batch_norm.normalize import normalize
from bigbatch.errors import InputError


@dataclass(frozen=True)
class Meeting:
    """What a micro-batch waits for.

    Attributes:
        norm: Name of the norm, for messages and to compare.
        is_backward: Whether its backward waits, with sums of gradients, instead of its forward, with moments.
        own: Of this micro-batch; the reply is that of the whole batch.
        running: Running mean and variance to be updated; None for those that are not tracked.
        momentum: Their factor.
        num_batches: ``num_batches_tracked`` of the module, which has counted this micro-batch; None without one.
    """

    norm: str
    is_backward: bool
    own: Moments
    running: tuple[Tensor | None, Tensor | None] = (None, None)
    momentum: float = 0.0
    num_batches: Tensor | None = None

    def __str__(self) -> str:
        return f"the backward of {self.norm}" if self.is_backward else self.norm


class _Known(NamedTuple):
    moments: Moments
    num_batches: Tensor | None


@dataclass
class _Running:
    """A module that runs at the moment."""

    name: str
    module: nn.Module
    num_calls: int = 0


@dataclass
class NormCalls:
    """The calls of one micro-batch.

    Args:
        suspend: Returns the moments of the whole batch for a `Meeting`.
        host: Where saved tensors are kept; None on the device.
        tensors: That it makes and uses.
    """

    suspend: Callable[[Meeting], Moments]
    host: HostTensors | None = None
    tensors: TensorsOfOne = field(default_factory=lambda: MadeTensors().by(0))
    _running: list[_Running] = field(default_factory=list)
    _known: dict[str, list[_Known]] = field(default_factory=dict)

    def enter_module(self, name: str, module: nn.Module) -> None:
        """Note that a batch norm module begins its forward; its name is as in a sentence."""
        self._running.append(_Running(name, module))

    def leave_module(self) -> None:
        """Note that it ends.

        Raises:
            InputError: It normalized the micro-batch in a way that was not found.
        """
        running = self._running.pop()
        norm = running.module
        uses_batch = norm.training or getattr(norm, "running_mean", None) is None
        if uses_batch and not running.num_calls:
            raise InputError(
                f"{running.name} ({type(norm).__name__}) normalizes by other means than "
                'torch.nn.functional.batch_norm, or in another thread, so batch_norm="exact" cannot replace its '
                "statistics: use a norm of torch.nn, or leave batch_norm= out."
            )

    def mode(self) -> TorchFunctionMode:
        """Return the mode in which the micro-batch runs."""
        return _Mode(self)

    def call(
        self,
        inputs: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Normalize the micro-batch by the whole batch."""
        module = self._running[-1] if self._running else None
        name = f"an F.batch_norm of {inputs.shape[1]} channels" if module is None else module.name
        num_batches = None if module is None else getattr(module.module, "num_batches_tracked", None)
        if module is not None:
            module.num_calls += 1
        known = self._known.setdefault(name, [])
        if torch._C._current_graph_task_id() != -1:  # a checkpoint repeats a forward within the backward
            moments = self._repeated(name, known, num_batches)
        else:
            own = Moments.of(inputs.detach())
            running = (running_mean, running_var)
            moments = self.suspend(Meeting(name, False, own, running, momentum, num_batches))
            known.append(_Known(moments, None if num_batches is None else num_batches.clone()))

        def add_up(sums: Tensor) -> Tensor:
            return self.suspend(Meeting(name, True, Moments(moments.count, sums))).values

        releases_input = self.host is not None and self.host.is_moving
        return normalize(inputs, weight, bias, eps=eps, moments=moments, add_up=add_up, releases_input=releases_input)

    def _repeated(self, name: str, known: Sequence[_Known], num_batches: Tensor | None) -> Moments:
        if len(known) != 1:
            raise InputError(
                f"{name} runs inside an activation checkpoint, and {len(known)} times in the forward of a micro-batch: "
                'batch_norm="exact" cannot know which of them is repeated. Take it out of the checkpoint, or use one '
                "module for each call."
            )
        ((moments, counted),) = known
        if num_batches is not None and counted is not None:
            num_batches.copy_(counted)
        return moments


class _Mode(TorchFunctionMode):
    def __init__(self, calls: NormCalls) -> None:
        super().__init__()
        self._calls = calls

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch._C._current_graph_task_id() != -1:  # in the backward
            return self._run(function, args, kwargs)
        tensors = self._calls.tensors
        tensors.check(args, kwargs)
        result = self._run(function, args, kwargs)
        tensors.add(args, kwargs, result)
        return result

    def _run(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        names = _ARGUMENTS.get(function)
        if names is None:
            return function(*args, **kwargs)
        values = {**_DEFAULTS, **dict(zip(names, args, strict=False)), **kwargs}
        if not values["training"]:
            return function(*args, **kwargs)
        if values["momentum"] is None:
            values["momentum"] = 0.0
        return self._calls.call(values["input"], **{name: values[name] for name in _USED})


_FUNCTION = ["input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
_OPERATOR = ["input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled"]
_ARGUMENTS: dict[Any, list[str]] = {F.batch_norm: _FUNCTION, torch.batch_norm: _OPERATOR}
_DEFAULTS = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
_USED = ("running_mean", "running_var", "weight", "bias", "momentum", "eps")
