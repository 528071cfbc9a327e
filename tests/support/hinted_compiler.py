"""A compiler whose results depend on the sizes for which it compiles, as those of Inductor's kernels do on a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

REAL_COMPILE = torch.compile
STEP = 2.0**-20  # of the factor of all results


class HintedCompiler:
    """A backend of `torch.compile`.

    Attributes:
        sizes: For each compiled graph, the sizes of its inputs that may change, sorted.
    """

    def __init__(self) -> None:
        self.sizes: list[list[int]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Return code whose floating-point results are scaled by a number that depends on the sizes of the inputs."""
        dims = [dim for each in inputs for dim in (each.shape if isinstance(each, Tensor) else [each])]
        sizes = sorted({int(dim.node.hint) for dim in dims if isinstance(dim, torch.SymInt)})
        self.sizes.append(sizes)
        factor = 1 + STEP * (1 + sum(sizes) % 97)

        def run(*arguments: Any) -> Any:
            results = graph.forward(*arguments)
            return [
                each * factor if isinstance(each, Tensor) and each.is_floating_point() else each for each in results
            ]

        return run

    def compile(self, model: Any, **options: Any) -> Any:
        """Do what ``torch.compile`` does, with this backend."""
        return REAL_COMPILE(model, **options | {"backend": self, "options": None})


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def install(_rank: int = 0) -> HintedCompiler:
    """Replace the compiler of this process."""
    compiler = HintedCompiler()
    torch.compile = compiler.compile  # type: ignore[assignment]
    return compiler
