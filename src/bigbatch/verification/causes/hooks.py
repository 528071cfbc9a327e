"""Gradient hooks and custom backwards whose effect on a sum is not the sum of their effects on its parts."""

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from bigbatch.gradients.foreign_writes import WindowHook
from bigbatch.verification.activation_hooks import ActivationHooks, describe_function
from bigbatch.verification.causes.case import Case, Cause, Kind, is_additive, listed
from bigbatch.verification.cut_gradients import CutGradients, relative_difference

MAX_FUNCTIONS = 16  # hook functions that are tested one by one

_MODULE_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


@dataclass
class _HookFunction:
    """One function, or one line of code, with all places where it is registered as a hook."""

    name: str
    places: list[str] = field(default_factory=list)
    registered: list[tuple[dict[int, Any], int]] = field(default_factory=list)  # in these dicts, under these keys
    is_on_parameter: bool = False


def gradient_hooks(case: Case) -> Iterator[Cause]:
    """Yield a cause for hooks that make the difference, or that are not linear in the sum; remove them."""
    functions = _find_hooks(case)
    if not functions:
        return
    every = set(functions)
    with _without(case, functions, every):
        is_linear, explained = not _is_nonlinear(case), case.is_explained()
    culprits = []
    for key in functions if len(functions) <= MAX_FUNCTIONS else ():
        with _without(case, functions, every - {key}):
            if explained:
                is_culprit = case.error() > case.tolerance
            else:  # hooks on activations see one sample's part at a time, and need not depend on the cut
                is_culprit = functions[key].is_on_parameter and is_linear and _is_nonlinear(case)
        if is_culprit:
            culprits.append(key)
    if explained and not culprits:
        culprits = list(functions)
    if culprits:
        case.eliminated.enter_context(_without(case, functions, every))
        named = listed([f"{functions[key].name} on {listed(functions[key].places)}" for key in culprits])
        yield Cause(
            Kind.HOOK,
            f"a gradient hook ({named}): it changes the undivided sum of each micro-batch, not the gradient of the "
            "batch. Clip with max_grad_norm=, or change the gradient of the batch with gradient_hook=.",
        )


def custom_backward(case: Case) -> Iterator[Cause]:
    """Yield a cause if the losses add up, and half a loss does not have half the gradient."""
    if not is_additive(case.terms(case.reference), case.terms(case.cut), case.tolerance) or not _is_nonlinear(case):
        return
    names = sorted(_custom_functions(case))
    yield Cause(
        Kind.HOOK,
        f"a backward that is not linear{f' ({listed(names)})' if names else ''}: it changes the undivided sum of each "
        "micro-batch, not the gradient of the batch. Clip with max_grad_norm=, or remove it.",
    )


def _is_nonlinear(case: Case) -> bool:
    """Return whether half the loss has another gradient than half of it, or adding a gradient twice is not twice it."""
    case.state.restore()
    same_state = replace(case.cut_gradients, reset=case.state.restore)
    whole, half = same_state.gradient(case.reference), same_state.gradient(case.reference, scale=0.5)
    if relative_difference({name: 2 * gradient for name, gradient in half.items()}, whole) > case.tolerance:
        return True
    first = range(min(case.cut, case.cut_gradients.samples.num_samples))
    try:
        return relative_difference(same_state.gradient([first, first]), same_state.gradient([first])) > case.tolerance
    except ValueError:  # no items in the first samples, or totals of several terms
        return False


def _find_hooks(case: Case) -> dict[Any, _HookFunction]:
    """Return the hooks on parameters and modules, and those that the forward registers on tensors."""
    found: dict[Any, _HookFunction] = {}

    def add(place: str, function: Any, registered: tuple[dict[int, Any], int] | None = None) -> None:
        entry = found.setdefault(_identity(function), _HookFunction(describe_function(function)))
        if place not in entry.places:
            entry.places.append(place)
        if registered is not None:
            entry.registered.append(registered)

    owners: list[tuple[str, Any, tuple[str, ...]]] = [
        (f"the parameter {name!r}", p, _PARAMETER_HOOKS) for p, name in case.cut_gradients.names().items()
    ]
    owners += [(_module(name, module), module, _MODULE_HOOKS) for name, module in case.model.named_modules()]
    for place, owner, attributes in owners:
        for attribute in attributes:
            hooks = getattr(owner, attribute, None) or {}
            for key, function in hooks.items():
                if isinstance(function, WindowHook):  # of an open window
                    continue
                add(place, function, (hooks, key))
                found[_identity(function)].is_on_parameter |= isinstance(owner, Tensor)
    mode = ActivationHooks(lambda _place, _function: True)
    with _forward_under(case, mode):
        case.gradient(case.cut)
    for place, function in mode.found:
        add(place, function)
    return found


def _module(name: str, module: nn.Module) -> str:
    return f"the module {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"


def _identity(function: Any) -> Any:
    """Return the code of a function: the same line may be registered many times, as a closure or a lambda."""
    return getattr(getattr(function, "__func__", function), "__code__", None) or id(function)


@contextmanager
def _without(case: Case, functions: dict[Any, _HookFunction], removed: Set[Any]) -> Iterator[None]:
    """Remove hook functions everywhere, and restore them on exit."""
    entries = [entry for key in removed for entry in functions[key].registered]
    originals = {id(hooks): (hooks, dict(hooks)) for hooks, _ in entries}
    for hooks, key in entries:
        hooks.pop(key, None)
    try:
        with _forward_under(case, ActivationHooks(lambda _place, function: _identity(function) not in removed)):
            yield
    finally:
        for hooks, content in originals.values():
            hooks.clear()
            hooks.update(content)


@contextmanager
def _forward_under(case: Case, mode: ActivationHooks) -> Iterator[None]:
    """Run every forward of a case inside a mode."""
    before: CutGradients = case.cut_gradients

    def loss_fn(model: Any, microbatch: Any) -> Any:
        with mode, mode.naming(case.model):
            return before.loss_fn(model, microbatch)

    case.cut_gradients = replace(before, loss_fn=loss_fn)
    try:
        yield
    finally:
        case.cut_gradients = replace(case.cut_gradients, loss_fn=before.loss_fn)


def _custom_functions(case: Case) -> set[str]:
    """Return the names of the `torch.autograd.Function` classes in the graph of the first micro-batch."""
    names: set[str] = set()

    def walk(result: Any) -> Any:
        for loss, _ in result.values() if isinstance(result, dict) else [result]:
            seen, todo = {None}, [loss.grad_fn]
            while todo:
                node = todo.pop()
                if node not in seen:
                    seen.add(node)
                    todo += [child for child, _ in node.next_functions]
                    if (function := getattr(type(node), "_forward_cls", None)) is not None:
                        names.add(function.__name__)
        return result

    loss_fn: Callable[..., Any] = case.cut_gradients.loss_fn
    watched = replace(case.cut_gradients, loss_fn=lambda model, microbatch: walk(loss_fn(model, microbatch)))
    case.state.restore()
    watched.gradient(case.reference)
    return names
