"""The optimizer's state, made before the first window: memory then runs out at the beginning, not within an update.

parameters without state → stand-ins that share their memory → the optimizer's own beginning → its state
"""

import inspect
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from bigbatch.errors import MemoryLimitError
from bigbatch.memory.limit import describe_bytes
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory

if TYPE_CHECKING:
    from torch.optim import Optimizer

_State: TypeAlias = dict[Tensor, dict[str, Any]]

# Their ``_init_group`` makes the whole state, of constants. Rprop and ASGD begin with the learning rate that the first
# step finds, SGD with the first gradient. Subclasses may do anything in their step.
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


def init_optimizer_state(optimizer: "Optimizer") -> bool:
    """Make the state that an optimizer would make in its first step, and count no step.

        state[p] = what step() would begin with     for each trainable parameter p that has no state yet

    Neither parameters nor gradients are touched. A parameter that never receives a gradient gets state that it would
    not have had: constants that no step reads or changes, because a step passes over parameters without ``.grad``.

    Args:
        optimizer: Its state is made if it is exactly one of torch's Adam, AdamW, NAdam, RAdam, Adamax, Adadelta,
            RMSprop, Adafactor and Muon. Others are left alone.

    Returns:
        Whether the optimizer is one of these.

    Raises:
        MemoryLimitError: The state does not fit in memory. None of it is kept.
    """
    if type(optimizer) not in _INIT_IS_CONSTANT:
        return False
    try:
        optimizer.state.update(_first_state(optimizer, Tensor.detach))
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        message = str(error).partition("\n")[0]
    # Outside the except block: in there, the traceback holds what was made.
    free_cached_memory()
    # Not as fused: that refuses tensors without data.
    needed = describe_bytes(_bytes(_first_state(optimizer, _without_data, fused=False)))
    raise MemoryLimitError(
        f"the state of {type(optimizer).__name__}, {needed}, does not fit in memory beside the model ({message}). "
        "Train fewer or narrower parameters, or take an optimizer that keeps less for each."
    )


def _first_state(optimizer: "Optimizer", proxy: Callable[[Tensor], Tensor], **settings: Any) -> _State:
    """Let the optimizer begin with stand-ins for its parameters and for their gradients; of these it reads no value."""
    twin = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer), state=defaultdict(dict))
    num_lists = len(inspect.signature(twin._init_group).parameters) - 1  # type: ignore[attr-defined]
    state: _State = {}
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if _wants_state(optimizer, p)]
        stand_ins = [proxy(p) for p in parameters]
        for tensor in stand_ins:
            tensor.grad = tensor.detach()
        lists: list[list[Any]] = [[] for _ in range(num_lists)]
        twin._init_group({**group, **settings, "params": stand_ins}, *lists)  # type: ignore[attr-defined]
        state.update((p, twin.state[tensor]) for p, tensor in zip(parameters, stand_ins, strict=True))
    return state


def _wants_state(optimizer: "Optimizer", parameter: Tensor) -> bool:
    trained = parameter.requires_grad and not is_lazy(parameter) and parameter.layout == torch.strided
    return trained and not optimizer.state.get(parameter)


def _without_data(parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, device="meta", requires_grad=False)


def _bytes(state: _State) -> int:
    return sum(value.nbytes for values in state.values() for value in values.values() if isinstance(value, Tensor))
