"""Parameters that a loss reaches outside of the model, such as the weights of a criterion, and their names.

loss_fn → objects that it refers to (closure, globals, __self__, functools.partial) → modules and tensors
loss.grad_fn → leaves of the graph that are no parameters of the model
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.gradients.loss_totals import as_terms
from bigbatch.verification.cut_gradients import CutGradients, largest_that_fits
from bigbatch.verification.tolerances import coarser_dtype

MAX_PARTS = 100  # of one list or dict
MAX_OBJECTS = 2000  # objects that are looked at, from the loss function outwards


def referenced_modules(loss_fn: Any, model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that a loss function refers to and that share nothing with the model, by name."""
    own = set(model.modules())
    found: dict[str, nn.Module] = {}
    for name, value in _referenced(loss_fn):
        if isinstance(value, nn.Module):
            found |= _separate(name, value, own)
    return found


def modules_by_name(loss_fn: Any, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the submodules of the model, and those of the modules outside of it that a loss function refers to."""
    yield from model.named_modules()
    for name, module in referenced_modules(loss_fn, model).items():
        yield from ((f"{name}.{path}".rstrip("."), part) for path, part in module.named_modules())


def _separate(name: str, module: nn.Module, own: set[nn.Module]) -> dict[str, nn.Module]:
    """Return a module if it shares nothing with the model, else those of its children that do not."""
    if module in own:
        return {}
    if not own.intersection(module.modules()):
        return {name: module}
    parts = (_separate(f"{name}.{path}", child, own) for path, child in module.named_children())
    return {path: part for found in parts for path, part in found.items()}


def outside_parameters(
    loss_fn: Any, model: nn.Module, losses: Iterable[Tensor], known: Mapping[Tensor, str]
) -> dict[Tensor, str]:
    """Return the leaves of graphs that are no parameters of the model, with a name for each, after the known ones.

    Leaves that nothing refers to and that are no `torch.nn.Parameter` are left out: inputs that require a gradient.

    Args:
        loss_fn: The function that computed the losses.
        model: The model that it received.
        losses: 0-d, of one micro-batch.
        known: Leaves of other micro-batches.
    """
    own = {*model.parameters(), *known}
    leaves = [leaf for loss in losses for leaf in _graph_leaves(loss) if leaf not in own]
    if not leaves:
        return dict(known)
    names: dict[Tensor, str] = {}
    for name, value in _referenced(loss_fn):
        if isinstance(value, nn.Module):
            for path, parameter in value.named_parameters():
                owner = type(value).__name__ if name == "loss_fn" else name
                names.setdefault(parameter, f"{owner}.{path}")
        elif isinstance(value, Tensor):
            names.setdefault(value, name)
    taken = {*known.values(), *(name for name, _ in model.named_parameters())}
    found = dict(known)
    for leaf in leaves:
        if leaf in found or (leaf not in names and not isinstance(leaf, nn.Parameter)):
            continue
        name = names.get(leaf, f"criterion parameter {list(leaf.shape)}")
        found[leaf] = _distinct(name, taken)
        taken.add(found[leaf])
    return found


def survey_losses(cut_gradients: CutGradients) -> tuple[dict[Tensor, str], torch.dtype]:
    """Run one forward; return the parameters that the loss reaches outside of the model, and its coarsest dtype."""

    def losses(size: int) -> tuple[dict[Tensor, str], torch.dtype]:
        loss_fn, model = cut_gradients.loss_fn, cut_gradients.model
        found: dict[Tensor, str] = {}
        dtypes = []
        for part in cut_gradients.split(size):
            losses = [loss for loss, _ in as_terms(loss_fn(model, part)).values()]
            found = outside_parameters(loss_fn, model, losses, known=found)
            dtypes += [loss.dtype for loss in losses if loss.is_floating_point()]
        return found, coarser_dtype(*dtypes, torch.float64)

    return largest_that_fits(cut_gradients, losses)[1]


def _distinct(name: str, taken: set[str]) -> str:
    number = 2
    distinct = name
    while distinct in taken:
        distinct = f"{name} ({number})"
        number += 1
    return distinct


def _graph_leaves(loss: Tensor) -> list[Tensor]:
    leaves: list[Tensor] = []
    seen = {loss.grad_fn, None}
    todo = [loss.grad_fn] if loss.grad_fn is not None else []
    if loss.grad_fn is None and loss.requires_grad:
        leaves.append(loss)
    while todo:
        node = todo.pop()
        if type(node).__name__ == "AccumulateGrad":
            leaves.append(node.variable)  # type: ignore[attr-defined]
        for child, _ in node.next_functions:
            if child not in seen:
                seen.add(child)
                todo.append(child)  # type: ignore[arg-type]
    return leaves


@contextmanager
def preserved_tensors(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the values and gradients of tensors on exit; inside, every ``grad`` starts as None."""
    saved = [(tensor, tensor.detach().clone(), tensor.grad) for tensor in tensors]
    for tensor, _, _ in saved:
        tensor.grad = None
    try:
        yield
    finally:
        for tensor, copy, gradient in saved:
            with torch.no_grad():
                if not torch.equal(tensor, copy):
                    tensor.copy_(copy)
            tensor.grad = gradient


def _referenced(loss_fn: Any) -> Iterator[tuple[str, Any]]:
    """Yield the modules and tensors that a function refers to, breadth first, with the names that it uses for them."""
    seen: set[int] = set()
    todo = deque([("loss_fn", loss_fn)])
    while todo and len(seen) < MAX_OBJECTS:
        name, value = todo.popleft()
        if id(value) in seen or value is None:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module | Tensor):
            yield name, value
            if not isinstance(value, nn.Module) or name != "loss_fn":
                continue
        todo.extend(_references(name, value))


def _references(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    prefix = "" if name == "loss_fn" else f"{name}."
    if isinstance(value, partial):
        yield name, value.func
        yield from ((f"argument {index}", argument) for index, argument in enumerate(value.args))
        yield from value.keywords.items()
    elif isinstance(value, MethodType):
        yield "loss_fn", value.__self__  # its attributes by their own names
        yield "loss_fn", value.__func__
    elif isinstance(value, FunctionType):
        yield from _of_function(value)
    elif isinstance(value, Mapping):
        yield from ((f"{name}[{key!r}]", part) for key, part in islice(value.items(), MAX_PARTS))
    elif isinstance(value, list | tuple):
        yield from ((f"{name}[{index}]", part) for index, part in enumerate(value[:MAX_PARTS]))
    elif not isinstance(value, type | ModuleType) and hasattr(value, "__dict__"):
        yield from ((prefix + key, part) for key, part in vars(value).items() if _leads_on(part))


def _of_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function refers to: variables of its closure, globals that its code names, and defaults."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    names = dict.fromkeys(_global_names(function.__code__))
    yield from ((name, function.__globals__[name]) for name in names if name in function.__globals__)
    yield from (("default", value) for value in function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).items()
    if (wrapped := getattr(function, "__wrapped__", None)) is not None:
        yield "loss_fn", wrapped


def _global_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)


def _leads_on(value: Any) -> bool:
    return isinstance(value, nn.Module | Tensor | FunctionType | MethodType | partial | Mapping | list | tuple) or (
        hasattr(value, "__dict__") and not isinstance(value, type | ModuleType)
    )
