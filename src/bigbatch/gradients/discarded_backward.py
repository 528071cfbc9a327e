"""Run the backward of a loss whose gradient does not count, because the ranks run it together."""

from torch import Tensor

from bigbatch.gradients.gradient_sums import GradientSums
from bigbatch.gradients.graph_leaves import hides_leaves, run_backward


def backward_and_discard(loss: Tensor, sums: GradientSums) -> None:
    """Run the backward of a loss within a window, and leave sums and gradients as they are.

    Multiplying the loss by 0 instead would add NaN where the loss is a mean over nothing.

    Args:
        loss: 0-d.
        sums: Of the window.
    """
    trained = [parameter for parameter in sums.parameters if parameter.requires_grad]
    if not loss.requires_grad or not trained:
        return
    found = [parameter.grad for parameter in trained]
    with sums.paused():
        try:
            for parameter in trained:
                parameter.grad = None
            run_backward(loss, () if hides_leaves(loss, set(trained)) else trained, retain_graph=False)
        finally:
            for parameter, gradient in zip(trained, found, strict=True):
                parameter.grad = gradient
