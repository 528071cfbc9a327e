"""Which leaves the graph of a loss reaches, and the backward that adds to some of them only.

Passing ``inputs=`` to autograd leaves every other leaf without a gradient, whatever a graph reaches. It is not
supported by reentrant checkpoints, and it leaves out hooks that run a backward of their own: `hides_leaves` finds both.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward

from bigbatch.errors import WindowStateError
from bigbatch.gradients.foreign_writes import WindowHook

HIDDEN_LATER = (
    "a micro-batch runs a reentrant checkpoint, or a hook with a backward of its own, and earlier ones did not: only "
    "the first of a window shows that such parameters exist. Pass use_reentrant=False to "
    "torch.utils.checkpoint.checkpoint, or run such a micro-batch first; if it is switched on between two windows, run "
    "this window again."
)

NO_GRADIENT = (
    "the loss does not depend on any parameter that requires a gradient: was it detached, or computed under "
    "torch.no_grad()? The loss of a micro-batch without anything to learn is model_output.sum() * 0."
)


def hides_leaves(loss: Tensor, own: set[Tensor]) -> bool:
    """Return whether parameters may receive gradients that the graph of a loss does not show.

    So they do in reentrant checkpoints, and in hooks of another leaf, such as the surrogate loss of a gradient cache.
    Walks the graph: about 1 µs for each node.

    Args:
        loss: 0-d, requires a gradient.
        own: The parameters.
    """
    if loss.grad_fn is None:
        return loss not in own
    seen: set[Any] = {loss.grad_fn}
    todo: list[Any] = [loss.grad_fn]
    while todo:
        node = todo.pop()
        kind = type(node).__name__
        if kind == "AccumulateGrad":
            leaf = node.variable
            if leaf not in own and _has_hooks(leaf):
                return True
        elif "Checkpoint" in kind:  # CheckpointFunctionBackward, left by checkpoint(use_reentrant=True), and its copies
            return True
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                todo.append(child)
    return False


def _has_hooks(leaf: Tensor) -> bool:
    """Return whether other code has hooked a leaf that is no parameter of a module."""
    hooks: Any = leaf._backward_hooks
    return bool(hooks) and not isinstance(leaf, nn.Parameter) and not _are_ours(hooks.values())


def _are_ours(hooks: Any) -> bool:
    return all(isinstance(hook, WindowHook) for hook in hooks)


def run_backward(
    loss: Tensor, inputs: Sequence[Tensor], *, retain_graph: bool, parameters: Sequence[Tensor] = ()
) -> None:
    """Add ∂loss/∂leaf to the ``.grad`` of leaves, as `torch.autograd.backward` does.

    Args:
        loss: 0-d, requires a gradient.
        inputs: The leaves; all that the graph reaches if there are none.
        retain_graph: Whether the graph can be differentiated again.
        parameters: Leaves whose gradients will be changed in place: new ones share their memory with no other tensor.

    Raises:
        WindowStateError: The graph contains reentrant checkpoints, which do not support ``inputs``.
    """
    without = [parameter for parameter in parameters if parameter.grad is None]
    _run_backward(loss, inputs, retain_graph=retain_graph)
    _copy_shared(without)


def _run_backward(loss: Tensor, inputs: Sequence[Tensor], *, retain_graph: bool) -> None:
    try:
        if type(loss) is not Tensor or loss.is_complex():
            torch.autograd.backward(loss, retain_graph=retain_graph, inputs=inputs or None)
            return
        # What torch.autograd.backward calls after checks in Python that a 0-d loss does not need. They cost 30 µs, and
        # with inputs 45 µs, of a backward of 300 µs (1 layer of benchmarks/overhead.py, torch 2.13).
        _engine_run_backward(
            (loss,),
            (torch.ones_like(loss),),
            retain_graph,
            False,
            tuple(inputs),
            allow_unreachable=True,
            accumulate_grad=True,
        )
    except RuntimeError as error:
        if not inputs or "use_reentrant" not in str(error):
            raise
        raise WindowStateError(HIDDEN_LATER) from error


def shares_memory(tensor: Tensor) -> bool:
    """Return whether anything else refers to the memory of a dense tensor; False for tensors of other types."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided:
        return False
    return _count_references(tensor) > _references_of_one()


def _copy_shared(parameters: Iterable[Tensor]) -> None:
    """Copy gradients that share memory with another tensor, whose value would change with them.

    Autograd stores a gradient without a copy if nothing else refers to the tensor; views of its memory do not count.
    With ``x + (p[None] + q[None])`` the gradients of p and q are views of the same memory, and each division of one
    divides both.
    """
    for parameter in parameters:
        if (gradient := parameter.grad) is not None and shares_memory(gradient):
            parameter.grad = None  # first: if there is no memory for a copy, the gradient is computed again
            parameter.grad = gradient.clone()


def _count_references(tensor: Tensor) -> int:
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # as torch does for its CUDA graphs
    return count


@cache
def _references_of_one() -> int:
    return _count_references(torch.empty(0))
