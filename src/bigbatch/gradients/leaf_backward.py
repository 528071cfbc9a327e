"""Run backwards that add to the sums of a window together with others, or to leaves such as features of a batch."""

from collections.abc import Sequence

from torch import Tensor

from bigbatch.gradients.gradient_sums import GradientSums
from bigbatch.gradients.graph_leaves import NO_GRADIENT, hides_leaves, run_backward


def backward_with_leaves(loss: Tensor, sums: GradientSums, leaves: Sequence[Tensor]) -> None:
    """Add ∂loss/∂parameters to the sums of a window, and ∂loss/∂leaf to the ``.grad`` of each leaf.

    The sums learn nothing about the graphs of micro-batches, whose first one they still walk.

    Args:
        loss: 0-d.
        sums: Of the window.
        leaves: Require a gradient, and are no parameters of the sums.

    Raises:
        ValueError: The loss depends on none of them.
    """
    if not loss.requires_grad:
        raise ValueError(NO_GRADIENT)
    hides = not sums.can_name_leaves or hides_leaves(loss, {*sums.parameters, *leaves})
    with sums.adding() as trained:
        run_backward(loss, () if hides else (*trained, *leaves), retain_graph=False, parameters=(*trained, *leaves))


def backward_inside(loss: Tensor, sums: GradientSums, trained: Sequence[Tensor]) -> None:
    """Add ∂loss/∂parameters to the sums of a window, inside `GradientSums.adding`, where others may do so meanwhile.

    Args:
        loss: 0-d.
        sums: Of the window.
        trained: What `GradientSums.adding` yields.

    Raises:
        ValueError: The loss depends on no parameter.
    """
    if not loss.requires_grad:
        raise ValueError(NO_GRADIENT)
    hides = not sums.can_name_leaves or hides_leaves(loss, set(sums.parameters))
    run_backward(loss, () if hides else trained, retain_graph=False, parameters=trained)
