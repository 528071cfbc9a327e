"""Context manager that turns embedding outputs into leaves, to differentiate with respect to them only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def embedded_tokens(model: Any) -> Iterator[list[Tensor]]:
    """Replace the outputs of the input embedding by leaves that require grad, and collect them.

    Yields:
        The list of leaves, one ``[rows, length, width]`` for each call of the embedding.
    """
    leaves: list[Tensor] = []

    def replace(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = model.get_input_embeddings().register_forward_hook(replace)
    try:
        yield leaves
    finally:
        handle.remove()
