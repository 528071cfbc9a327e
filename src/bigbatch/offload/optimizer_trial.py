"""Whether an optimizer may be stepped one part of its parameters after the other: known for torch's, tried for others.

a miniature of the optimizer → three steps over all its parameters → the same steps one parameter at a time → equal bits
"""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bigbatch.errors import InputError, first_line
from bigbatch.offload.host_values import whole_value
from bigbatch.offload.streamed_optimizer import StreamedOptimizer
from bigbatch.offload.transfers import Transfers

if TYPE_CHECKING:
    from torch.optim import Optimizer

_OF_TORCH = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adafactor,
    torch.optim.ASGD,
    torch.optim.Muon,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)
_NUM_STEPS = 3
_LARGEST_DIM = 128  # of a miniature: two have 16,384 elements, for which optimizers in 8 bits quantize
_PER_GROUP = 4


def check_streamable(optimizer: "Optimizer") -> None:
    """Check that an optimizer updates each parameter from its own gradient and its own state alone.

    Raises:
        InputError: It does not, or that cannot be found out.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS | torch.optim.SparseAdam):
        raise _refusal(name, "computes with all parameters at once, or with sparse gradients")
    if any(isinstance(value, torch.optim.Optimizer) for value in vars(optimizer).values()):
        raise _refusal(name, "wraps another optimizer; pass that one")
    own_step = vars(optimizer).get("step")
    if own_step is not None and not getattr(own_step, "_wrapped_by_lr_sched", False):
        raise _refusal(name, "has a step() that was replaced on this object")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise _refusal(name, "has differentiable=True, which keeps the graph of its step")
    if type(optimizer) not in _OF_TORCH and (reason := _difference(optimizer)) is not None:
        raise _refusal(name, reason)


def _refusal(name: str, reason: str) -> InputError:
    return InputError(
        f"offload= steps an optimizer one part of its parameters after the other, and {name} {reason}: use another "
        'optimizer, or offload="none".'
    )


def _difference(optimizer: "Optimizer") -> str | None:
    """Return why a miniature gives other results in parts, in a few words; None if it gives the same."""
    has_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if has_cuda else ()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            jointly, in_parts = _miniature(optimizer), _miniature(optimizer)
            streamed = StreamedOptimizer(in_parts, Transfers(torch.device("cpu")), chunk_bytes=1)
            for seed in range(_NUM_STEPS):
                _set_gradients(jointly, seed)
                _set_gradients(in_parts, seed)
                jointly.step()
                streamed.step()
    except InputError as error:
        return f"has a state that cannot be streamed ({first_line(error).partition(':')[0]})"
    except Exception as error:  # noqa: BLE001 - code of the user
        return f"cannot be tried on small tensors ({type(error).__name__}: {first_line(error)})"
    same = _values(jointly) == _values(in_parts)
    return None if same else "then gives other results, as one that reads all of them or draws random numbers does"


def _miniature(optimizer: "Optimizer") -> "Optimizer":
    """Copy an optimizer, without state and hooks, over some small parameters of the same numbers of dimensions."""
    small: Any = object.__new__(type(optimizer))
    left_out = {"state", "param_groups", "step"}
    attributes = {name: value for name, value in vars(optimizer).items() if name not in left_out}
    for name in attributes:
        if name.startswith("_optimizer_") and name.endswith("_hooks"):
            attributes[name] = OrderedDict()
    small.state = defaultdict(dict)
    copies: dict[int, Any] = {id(optimizer.state): small.state, id(optimizer): small}
    for group in optimizer.param_groups:
        parameters = _small_parameters(group["params"])
        copies[id(group["params"])] = parameters
        copies.update((id(parameter), parameters[0]) for parameter in group["params"])  # held elsewhere: not copied
    small.param_groups = copy.deepcopy(optimizer.param_groups, copies)
    vars(small).update(copy.deepcopy(attributes, copies))
    return small  # type: ignore[no-any-return]


def _small_parameters(parameters: Sequence[Tensor]) -> list[Tensor]:
    chosen = [*parameters[: _PER_GROUP // 2], *parameters[_PER_GROUP // 2 :][-(_PER_GROUP // 2) :]]
    generator = torch.Generator().manual_seed(len(parameters))
    return [
        nn.Parameter(torch.randn([min(size, _LARGEST_DIM) for size in p.shape], generator=generator).to(p.dtype))
        for p in map(whole_value, chosen)
    ]


def _set_gradients(optimizer: "Optimizer", seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def _values(optimizer: "Optimizer") -> list[Any]:
    """Return parameters, state and settings as plain values."""
    found: list[Any] = []
    for group in optimizer.param_groups:
        found.append({name: value for name, value in group.items() if isinstance(value, bool | int | float | str)})
        for parameter in group["params"]:
            entry = optimizer.state.get(parameter, {})
            found += [parameter.tolist(), {k: v.tolist() if isinstance(v, Tensor) else v for k, v in entry.items()}]
    return found
