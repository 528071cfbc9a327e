"""The embedded tokens of a model as what is differentiated by: all that is behind them, and no weight's gradient."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def embedded_tokens(model: Any) -> Iterator[list[Tensor]]:
    """Collect what the embedding gives meanwhile, ``[rows, length, width]``, as leaves that require a gradient."""
    given: list[Tensor] = []

    def watch(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        given.append(output.detach().requires_grad_())
        return given[-1]

    handle = model.get_input_embeddings().register_forward_hook(watch)
    try:
        yield given
    finally:
        handle.remove()
