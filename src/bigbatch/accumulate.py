"""Where gradient sums live and in which dtype.

Parameters in float32 or wider sum natively in ``.grad``. Parameters in bfloat16 or float16 get a float32 sum each:
adding many small bfloat16 gradients to a large one loses 1.1 % of the sum at 128 micro-batches and half of it at a
thousand that agree. A hook moves every micro-gradient into its sum as soon as autograd has made it, so that never more
than the one in flight exists in the narrow dtype.
"""

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bigbatch.errors import WindowStateError

NARROW_DTYPES = frozenset({torch.bfloat16, torch.float16})


class GradientSums:
    """Gradient sums of some parameters from its entering to its leaving as a context.

        with GradientSums(parameters) as sums:
            for loss in losses:
                sums.backward(loss)             # sums += ∂loss/∂parameters, and nothing else gets a gradient
            sums.tensors()                      # one a parameter that received a gradient, undivided

    Whatever ``.grad`` held on entering is cleared, so that nothing from before leaks in.

    Args:
        parameters: Leaf tensors of any floating dtype, on any devices. Those that do not require a gradient are left
            alone for as long as they do not.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = tuple(parameters)
        self._wide: dict[Tensor, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._name_leaves: bool | None = None
        self._witness: Tensor | None = None  # a parameter that holds part of the sums in its .grad

    def __enter__(self) -> Self:
        self.clear()
        narrow = (p for p in self.parameters if p.dtype in NARROW_DTYPES and p.requires_grad)
        self._handles = [_on_accumulated(p, self._widen) for p in narrow]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    def _widen(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None  # autograd calls this hook after it has written the gradient
        if (total := self._wide.get(parameter)) is None:
            self._wide[parameter] = gradient.to(torch.float32)
        else:
            total.add_(gradient)
        parameter.grad = None

    def backward(self, loss: Tensor) -> None:
        """Add ∂loss/∂parameters to the sums; no other leaf of the graph receives a gradient.

        Naming the leaves costs a few per cent on small models, so it is done where the first graph reaches others:
        a discriminator behind a generator, say. Reentrant checkpointing cannot be told which leaves to differentiate;
        where the graph holds some, all its leaves receive their gradients, as they do from ``loss.backward()``.

        Raises:
            ValueError: The loss does not depend on anything that requires a gradient.
            WindowStateError: Somebody cleared the gradients since the last backward.
        """
        self._check_witness()
        if not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on any parameter that requires a gradient: was it detached, or computed "
                "under torch.no_grad()?"
            )
        if self._name_leaves is None:
            self._name_leaves = _reaches_others(loss, set(self.parameters))
        leaves = [p for p in self.parameters if p.requires_grad] if self._name_leaves else None
        torch.autograd.backward(loss, inputs=leaves)
        if self._witness is None:
            self._witness = next((p for p in self.parameters if p.grad is not None), None)

    def _check_witness(self) -> None:
        if self._witness is not None and self._witness.grad is None:
            raise WindowStateError(
                "the gradients of this window were cleared between two of its micro-batches, by optimizer.zero_grad() "
                "or by another window over the same parameters. Remove the call: a window clears them when it opens "
                "and when it ends."
            )

    def tensors(self) -> list[Tensor]:
        """The sums of the parameters that received a gradient: ``.grad`` itself, or its float32 stand-in.

        Sparse gradients come as the values of their coalesced form. Operations in place reach the sums.
        """
        self._check_witness()
        tensors = []
        for parameter in self.parameters:
            total = self._wide.get(parameter, parameter.grad)
            if total is not None:
                tensors.append(self._sparse_values(parameter, total) if total.is_sparse else total)
        return tensors

    def _sparse_values(self, parameter: Tensor, total: Tensor) -> Tensor:
        if not total.is_coalesced():
            total = total.coalesce()
            if parameter in self._wide:
                self._wide[parameter] = total
            else:
                parameter.grad = total
        return total._values()

    def named_by(self, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """The sums by the names given for the parameters, zeros for those that received no gradient."""
        return {
            names[p]: torch.zeros_like(p) if total is None else total.to_dense() if total.is_sparse else total
            for p in self.parameters
            if p.requires_grad
            for total in [self._wide.get(p, p.grad)]
        }

    def hand_over(self) -> None:
        """Put the float32 sums into ``.grad`` in the parameters' own dtype, where optimizers expect them."""
        for parameter in list(self._wide):
            parameter.grad = self._wide.pop(parameter).to(parameter.dtype)

    def clear(self) -> None:
        """Drop the sums and the gradients."""
        self._wide.clear()
        self._witness = None
        for parameter in self.parameters:
            parameter.grad = None


def _on_accumulated(parameter: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return handle


def _reaches_others(loss: Tensor, own: set[Tensor]) -> bool:
    """Walk the graph once: tell whether it ends in leaves that are not ``own`` and can be left out."""
    others = False
    seen = {loss.grad_fn}
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None:
            continue
        if node.name() == "CheckpointFunctionBackward":  # what checkpoint(use_reentrant=True) leaves in the graph
            return False
        others = others or (hasattr(node, "variable") and node.variable not in own)
        for child, _ in node.next_functions:
            if child not in seen:
                seen.add(child)
                todo.append(child)
    return others
