"""Every value of a captured state, deleted or replaced: it is refused and nothing changes, or it is still valid."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch
from bigbatch.lm.checkpoint.state_tree import copy_to_cpu, equal
from support.tiers import slow_except

DELETED = object()
optim, schedules = torch.optim, torch.optim.lr_scheduler


def loss_fn(model: nn.Module, microbatch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    return F.mse_loss(model(microbatch[0]), microbatch[1], reduction="sum"), microbatch[1].numel()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, generator=generator), torch.randn(6, 1, generator=generator)


class Lion(optim.Optimizer):
    """An optimizer that is not one of torch's."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                p.sub_(group["lr"] * average.lerp_(p.grad, 0.1).sign())


def chained(optimizer: optim.Optimizer) -> Any:
    parts = [schedules.LinearLR(optimizer, 0.1, 1, 3), schedules.MultiStepLR(optimizer, [4, 8])]
    return schedules.SequentialLR(optimizer, parts, [3])


KITS: dict[str, tuple[Callable[[Any], optim.Optimizer], Callable[[Any], Any] | None, bool]] = {
    "AdamW cosine scaler": (lambda p: optim.AdamW(p, amsgrad=True), lambda o: schedules.CosineAnnealingLR(o, 9), True),
    "SGD one cycle": (lambda p: optim.SGD(p, lr=0.1, momentum=0.9), lambda o: schedules.OneCycleLR(o, 0.1, 5), False),
    "RMSprop sequence": (lambda p: optim.RMSprop(p, lr=0.1, momentum=0.5), chained, False),
    "Adagrad lambda": (lambda p: optim.Adagrad(p, lr=0.1), lambda o: schedules.LambdaLR(o, lambda t: 0.5), False),
    "Adafactor cyclic": (
        lambda p: optim.Adafactor(p, lr=0.1),
        lambda o: schedules.CyclicLR(o, 0.1, 0.2, cycle_momentum=False),
        False,
    ),
    "Lion": (Lion, None, False),
}


def engine_of(kit: str, seed: int = 0) -> bigbatch.Engine:
    make_optimizer, make_scheduler, scaled = KITS[kit]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    parameters = [*model.parameters()]
    optimizer = make_optimizer([{"params": parameters[:3]}, {"params": parameters[3:]}])
    return bigbatch.Engine(
        model,
        optimizer,
        loss_fn,
        microbatch=2,
        scheduler=make_scheduler(optimizer) if make_scheduler else None,
        scaler=torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None,
        check=False,
    )


def paths(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value, except of those in long lists, which are random states."""
    if isinstance(tree, dict) or (isinstance(tree, list | tuple) and len(tree) < 100):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield (*place, key)
            yield from paths(value, (*place, key))


def edited(tree: Any, path: tuple[Any, ...], edit: Callable[[Any], Any]) -> Any:
    """Return a tree with one value edited; the tree itself is not changed."""
    key, *rest = path
    changed = list(tree) if isinstance(tree, tuple) else copy.copy(tree)
    value = edited(tree[key], tuple(rest), edit) if rest else edit(tree[key])
    if value is DELETED:
        del changed[key]
    else:
        changed[key] = value
    return tuple(changed) if isinstance(tree, tuple) else changed


def reshaped(value: Any) -> Any:
    return torch.zeros(*value.shape, 2, dtype=value.dtype) if isinstance(value, Tensor) else [value, value]


EDITS: dict[str, Callable[[Any], Any]] = {
    "deleted": lambda value: DELETED,
    "None": lambda value: None,
    "text": lambda value: "text",
    "-1": lambda value: -1,
    "nan": lambda value: math.nan,
    "True": lambda value: True,
    "empty": lambda value: torch.empty(0),
    "reshaped": reshaped,
    "complex": lambda value: value.to(torch.complex64) if isinstance(value, Tensor) else 1j,
    "meta": lambda value: value.to("meta") if isinstance(value, Tensor) else {"unknown": 1},
}
# How a step is computed; states of other versions lack some of these.
FLAGS = {"maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"}
# Settings for which -1, True or another text is a valid value, and states that hold it stay those of such a run.
SETTINGS = {"amsgrad", "nesterov", "dampening", "gamma", "beta2_decay", "d", "eps", "betas", "power", "factor"}
SETTINGS |= {"mode", "scale_mode", "cycle_momentum", "use_beta1", "centered", "start_factor", "end_factor"}
TRANSIENT = {"_is_initial", "_get_lr_called_within_step"}


def may_load(kit: str, path: tuple[Any, ...], edit: str) -> bool:
    """Whether a state is valid with an edit: it is one of other settings, or without what it need not have."""
    key = path[-1]
    if path[:2] == ("optimizer", "state"):  # a parameter may be without state, and other optimizers may have any
        return (len(path) == 3 and edit == "deleted") or kit == "Lion"
    if path[:2] == ("engine", "noise"):  # signal and noise may have any sign, and are not finite after an overflow
        return edit == "None" if len(path) == 2 else edit == "deleted" or bool({"signal", "noise"} & set(path))
    if path == ("format",) or key in TRANSIENT:
        return edit == "deleted"
    if key in FLAGS:
        return edit in ("deleted", "True") or (edit == "None" and key in ("foreach", "fused"))
    return bool(SETTINGS & set(path)) and edit in ("-1", "text", "True")


@pytest.mark.parametrize("part", ["model", "optimizer", "scheduler", "scaler", "engine", "random", "format"])
@pytest.mark.parametrize("kit", slow_except(KITS, "AdamW cosine scaler"))
def test_damaged_state_is_refused_unchanged_or_valid(kit: str, part: str) -> None:
    one, other = engine_of(kit), engine_of(kit, seed=1)
    for seed in range(3):
        one.step(batch(seed))
    other.step(batch(3))
    state = copy_to_cpu(one.state_dict())
    before = copy_to_cpu(other.state_dict())
    refused = 0
    for path in paths(state):
        first_or_last = path[2:3] in ((), (0,), (5,))  # parameter, or the first group
        if path[0] != part or (part == "optimizer" and not first_or_last):
            continue
        for name, edit in EDITS.items():
            try:
                other.load_state_dict(edited(state, path, edit))
            except ValueError:
                refused += 1
                assert equal(other.state_dict(), before), (path, name)
            else:
                assert may_load(kit, path, name) or equal(other.state_dict(), state), (path, name)
                assert math.isfinite(other.step(batch(4)).loss)
                other = engine_of(kit, seed=1)
                other.step(batch(3))
                before = copy_to_cpu(other.state_dict())
    assert refused >= len(EDITS) - 2
