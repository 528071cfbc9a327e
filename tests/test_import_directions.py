"""Imports run one way: a file imports its own package and the packages below it, and no file is in a circle.

Type-only and function-local imports count. A row of ``LAYERS`` imports the rows above it; packages on one row do not
import each other.
"""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
CORE = [
    {
        "lazy_names",
        "errors",
        "types",
        "read_only",
        "rng",
        "scaling",
        "trials",
        "losses",
        "signal_deferral",
        "deterministic",
        "compiled_modules",
    },
    {"memory", "batching", "preserve", "window_report"},
    {"gradients"},
    {"distributed"},
    {"coupled"},
    {"batch_norm"},
    {"verification"},
    {"offload"},
    {"accumulation"},
    {"execution"},
    {"autotune"},
    {"engine"},
    {"integrations"},
]
PRODUCT = [
    {"lm.text", "lm.files"},
    {"lm.cpu_cores"},
    {"lm.data", "lm.device", "lm.runs"},
    {"lm.config"},
    {"lm.distributed", "lm.model"},
    {"lm.objectives"},
    {"lm.checkpoint", "lm.report"},
    {"lm.training"},
    {"lm.advice", "lm.bench", "lm.planning"},
    {"cli"},
    {"cli.commands"},
]
LAYERS = CORE + PRODUCT
ROW = {package: row for row, packages in enumerate(LAYERS) for package in packages}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for path in SOURCE.rglob("*.py")}


def imports_of(path: Path) -> set[str]:
    """Every module of the package that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else str(node.module) for name in names}
    return found & FILES.keys()


@cache
def import_graph() -> dict[str, set[str]]:
    """Return what each module imports; not at import of this file, which every test run collects."""
    return {name: imports_of(path) - {name} for name, path in FILES.items()}


def package_of(module: str) -> str | None:
    """The longest listed package that holds a module; None for the public surface, which anything may import."""
    parts = module.split(".")[1:]
    return next((".".join(parts[:end]) for end in (2, 1) if ".".join(parts[:end]) in ROW), None)


def test_every_module_belongs_to_a_layer():
    assert {name for name in FILES if package_of(name) is None} == {"bigbatch", "bigbatch.__main__", "bigbatch.lm"}


@pytest.mark.parametrize("module", sorted(FILES))
def test_module_imports_lower_layers_only(module: str):
    package = package_of(module)
    for imported in import_graph()[module]:
        below = package_of(imported)
        if package is not None and below is not None and below != package:
            assert ROW[below] < ROW[package], f"{module} imports {imported}"


def test_nothing_else_imports_integrations():
    inside = "bigbatch.integrations"
    graph = import_graph()
    assert not {name for name, imports in graph.items() for each in imports if inside in each and inside not in name}


def test_no_file_is_in_an_import_circle():
    graph = {
        name: imports - {"bigbatch"}
        for name, imports in import_graph().items()
        if name not in ("bigbatch", "bigbatch.__main__")
    }
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
