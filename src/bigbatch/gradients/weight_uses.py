"""How often the graph of a loss uses each weight: a sum of several gradients is complete only after the last one."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from bigbatch.gradients.graph_edges import graph_edges


class WeightUses(NamedTuple):
    """Uses of a weight in a graph.

    Attributes:
        number: Its nodes that receive the weight, or a cast of it. Code that is compiled as a whole counts once.
        is_compiled: Whether one of them is compiled code, which may use it several times.
    """

    number: int
    is_compiled: bool


def count_uses(loss: Tensor, weights: Iterable[Tensor]) -> Mapping[Tensor, WeightUses]:
    """Return how the graph of a loss uses the weights that it reaches.

    Walks the graph: about 1 µs for each node. Reentrant checkpoints hide their weights.

    Args:
        loss: 0-d, requires a gradient.
        weights: Leaves.
    """
    wanted = set(weights)
    in_degree: Counter[Any] = Counter()
    users: dict[Tensor, list[Any]] = {}
    for node, child in graph_edges(loss):
        in_degree[child] += 1
        leaf = getattr(child, "variable", None)
        if leaf is not None and leaf in wanted:
            users.setdefault(leaf, []).append(node)
    return {leaf: _uses(nodes, in_degree) for leaf, nodes in users.items()}


def _uses(nodes: list[Any], in_degree: Mapping[Any, int]) -> WeightUses:
    """Count the nodes that receive a leaf; autocast casts a leaf once for all of them."""
    kinds = [type(node).__name__ for node in nodes]
    number = sum(in_degree[node] if kind.startswith("ToCopy") else 1 for node, kind in zip(nodes, kinds, strict=True))
    return WeightUses(number, any(kind.startswith("CompiledFunction") for kind in kinds))
