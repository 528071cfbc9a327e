"""Initialize the optimizer state before the first window, so that memory does not run out inside an update.

parameters without state → proxies that share their memory → the optimizer's own initialization → its state
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from bigbatch.errors import MemoryLimitError, first_line
from bigbatch.memory.limit import describe_bytes
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory

if TYPE_CHECKING:
    from torch.optim import Optimizer

_State: TypeAlias = dict[Tensor, dict[str, Any]]

# Their ``_init_group`` creates the whole state, from constants. Rprop and ASGD start from the learning rate of the
# first step, SGD from the first gradient. Subclasses may do anything in their step.
_INIT_IS_CONSTANT = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    torch.optim.Adafactor,
    torch.optim.Muon,
)
# Their ``_init_group`` creates a state with the names and shapes of every later one, but with other values.
_INIT_HAS_ALL_NAMES = (torch.optim.Rprop, torch.optim.ASGD, torch.optim.Adagrad)


def init_optimizer_state(optimizer: "Optimizer", only: Sequence[Tensor] | None = None) -> bool:
    """Create the state that an optimizer would create in its first step, without counting a step.

        state[p] = initial state of step()     for each trainable parameter p without state

    Parameters and gradients do not change. A parameter that never receives a gradient gets state that it would not
    have had: constants that no step reads or changes, because a step skips parameters without ``.grad``.

    Args:
        optimizer: Its state is created if it is exactly one of torch's Adam, AdamW, NAdam, RAdam, Adamax, Adadelta,
            RMSprop, Adafactor and Muon; no-op for others.
        only: The parameters whose state is created; None for all.

    Returns:
        Whether the optimizer is one of these.

    Raises:
        MemoryLimitError: The state does not fit in memory. None of it is kept.
    """
    if type(optimizer) not in _INIT_IS_CONSTANT:
        return False
    try:
        optimizer.state.update(_first_state(optimizer, Tensor.detach, only))
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        message = first_line(error)
    # Outside the except block: inside it, the traceback holds the new tensors.
    free_cached_memory()
    # Not fused, which does not support tensors without data.
    needed = describe_bytes(_bytes(_first_state(optimizer, _without_data, only, fused=False)))
    raise MemoryLimitError(
        f"the state of {type(optimizer).__name__}, {needed}, does not fit in memory with the model ({message}). "
        "Train fewer parameters or in lower precision, or use an optimizer with less state for each."
    )


def _first_state(
    optimizer: "Optimizer", proxy: Callable[[Tensor], Tensor], only: Sequence[Tensor] | None, **settings: Any
) -> _State:
    """Run the optimizer state initialization on proxy tensors; no value is read."""
    wanted = None if only is None else set(only)
    optimizer_copy = object.__new__(type(optimizer))
    vars(optimizer_copy).update(vars(optimizer), state=defaultdict(dict))
    num_lists = len(inspect.signature(optimizer_copy._init_group).parameters) - 1  # type: ignore[attr-defined]
    state: _State = {}
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if (wanted is None or p in wanted) and _wants_state(optimizer, p)]
        proxies = [proxy(p) for p in parameters]
        for tensor in proxies:
            tensor.grad = tensor.detach()
        lists: list[list[Any]] = [[] for _ in range(num_lists)]
        optimizer_copy._init_group({**group, **settings, "params": proxies}, *lists)  # type: ignore[attr-defined]
        state.update((p, optimizer_copy.state[tensor]) for p, tensor in zip(parameters, proxies, strict=True))
    return state


def expected_state(optimizer: "Optimizer", groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | None]:
    """Return the state that an optimizer keeps for each of its parameters, with meta tensors of the global shapes.

    Args:
        optimizer: Nothing of it is changed.
        groups: Settings of its groups to use in place of its own.

    Returns:
        For each parameter of all groups, in order, its state by name; None if the optimizer is neither SGD nor one
        whose state is created in advance (see `init_optimizer_state`), Adagrad, Rprop or ASGD.
    """
    base = next((kind for kind in (*_INIT_IS_CONSTANT, *_INIT_HAS_ALL_NAMES) if _initializes_as(optimizer, kind)), None)
    is_sgd = _initializes_as(optimizer, torch.optim.SGD)
    expected: list[dict[str, Any] | None] = []
    for own, settings in zip(optimizer.param_groups, groups, strict=True):
        for parameter in own["params"]:
            if is_lazy(parameter) or parameter.layout != torch.strided or not (base or is_sgd):
                expected.append(None)
                continue
            proxy = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            if is_sgd:
                expected.append({"momentum_buffer": proxy} if settings["momentum"] else {})
            else:
                expected.append(_state_of_proxy(optimizer, {**own, **settings}, parameter, proxy))
    return expected


def _initializes_as(optimizer: "Optimizer", kind: type["Optimizer"]) -> bool:
    """Whether an optimizer has the state of one of torch's: it is one, or a subclass with the same step."""
    of = type(optimizer)
    same = (getattr(of, name, None) is getattr(kind, name) for name in ("step", "_init_group"))
    return issubclass(of, kind) and (of is kind or all(same))


def _state_of_proxy(
    optimizer: "Optimizer", group: Mapping[str, Any], parameter: Tensor, proxy: Tensor
) -> dict[str, Any]:
    optimizer_copy = object.__new__(type(optimizer))
    vars(optimizer_copy).update(vars(optimizer), state=defaultdict(dict))
    proxy.grad = proxy.detach()
    num_lists = len(inspect.signature(optimizer_copy._init_group).parameters) - 1  # type: ignore[attr-defined]
    settings = {**group, **dict.fromkeys(("fused", "foreach", "capturable", "differentiable"), False)}
    try:
        optimizer_copy._init_group({**settings, "params": [proxy]}, *([] for _ in range(num_lists)))  # type: ignore[attr-defined]
    except KeyError:  # the constructor creates the state, as that of Adagrad does before torch 2.12
        own = optimizer.state[parameter]
        return {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in own.items()}
    state: dict[str, Any] = optimizer_copy.state[proxy]
    return state


def _wants_state(optimizer: "Optimizer", parameter: Tensor) -> bool:
    trained = parameter.requires_grad and not is_lazy(parameter) and parameter.layout == torch.strided
    return trained and not optimizer.state.get(parameter)


def _without_data(parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, device="meta", requires_grad=False)


def _bytes(state: _State) -> int:
    return sum(value.nbytes for values in state.values() for value in values.values() if isinstance(value, Tensor))
