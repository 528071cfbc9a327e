"""Hooks on the gradients of parameters that are removed without a trace, for a single backward.

    hooks = GradientHooks(parameters, call)         # call(gradient) for each parameter, once its gradient is complete
    loss.backward()
    hooks.remove()

torch keeps an empty dict of hooks on a parameter whose last hook was removed, and every later backward calls Python to
look into it: 0.4 µs for each parameter and micro-batch, which is 1 % of an update of small models
(`benchmarks/overhead.py`). Such a dict is dropped here.
"""

from collections.abc import Callable, Iterable

from torch import Tensor


class GradientHooks:
    """Call a function with the gradient of each parameter, before it is added to ``.grad``, until `remove`.

    Args:
        parameters: Leaves; those that do not require a gradient are left alone.
        call: Receives the whole gradient of one parameter in one backward, and must not change it.
    """

    def __init__(self, parameters: Iterable[Tensor], call: Callable[[Tensor], None]) -> None:
        self._hooked = [
            (parameter, parameter.register_hook(call))  # type: ignore[no-untyped-call]
            for parameter in parameters
            if parameter.requires_grad
        ]

    def remove(self) -> None:
        """Remove the hooks; no-op from the second call on."""
        for parameter, handle in self._hooked:
            handle.remove()
            if not parameter._backward_hooks:  # of other owners remain
                parameter._backward_hooks = None
        self._hooked.clear()
