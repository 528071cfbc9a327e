"""Gradient hooks that a forward registers on tensors: found, and left out where they are not wanted."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

_REGISTER = (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook)


def describe_function(function: Any) -> str:
    """Return the name of a function, as in a sentence."""
    name = getattr(function, "__qualname__", type(function).__qualname__).rpartition("<locals>.")[2]
    return "a lambda" if name == "<lambda>" else name


class ActivationHooks(TorchFunctionMode):
    """Inside this context hooks are registered on tensors only if they are wanted; all of them are recorded.

    Args:
        is_wanted: Receives the place and the function of a hook; by default none is registered.

    Attributes:
        found: Place and function of each hook, in the order of registration, without repetition.
    """

    def __init__(self, is_wanted: Callable[[str, Any], bool] = lambda _place, _function: False) -> None:
        super().__init__()
        self.found: list[tuple[str, Any]] = []
        self._is_wanted = is_wanted
        self._running: dict[int, list[str]] = {}  # by thread: with batch_norm="exact" forwards take turns

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record a registration; call any other function."""
        if function in _REGISTER:
            hook = args[1] if len(args) > 1 else (kwargs or {})["hook"]
            running = self._running.get(threading.get_ident())
            place = f"a tensor in {running[-1]}" if running else "a tensor in loss_fn"
            if (place, hook) not in self.found:
                self.found.append((place, hook))
            if not self._is_wanted(place, hook):
                return RemovableHandle(OrderedDict())
        return function(*args, **(kwargs or {}))

    @contextmanager
    def naming(self, model: nn.Module) -> Iterator[None]:
        """Follow which module of a model runs, to name the places of hooks."""

        thread, running = threading.get_ident(), list[str]()

        def enter(label: str, *_: object) -> None:
            if threading.get_ident() == thread:
                running.append(label)

        def leave(*_: object) -> None:
            if threading.get_ident() == thread:
                running.pop()

        self._running[thread] = running
        handles = []
        for name, module in model.named_modules():
            label = f"the module {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
            handles += [module.register_forward_pre_hook(partial(enter, label)), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            del self._running[thread]
