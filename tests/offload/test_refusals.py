"""What offload refuses, each with a sentence, and which optimizers of other classes it accepts."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigbatch
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.training.lion import Lion
from bigbatch.lm.training.muon import MuonWithAdamW
from offload.models import make_batch, make_engine, make_model, values

REST = ': use another optimizer, or offload="none".'
START = "offload= steps an optimizer one part of its parameters after the other, and "


class Custom(torch.optim.Optimizer):
    """An optimizer like those of users: ``rule(optimizer, group, parameter)`` writes to the parameter."""

    def __init__(self, parameters: Any, rule: Callable[..., None]) -> None:
        super().__init__(parameters, {"lr": 0.01, "count": 0})
        self.rule, self.total = rule, 0

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            self.total += 1
            for group in self.param_groups:
                group["count"] += 1
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.rule(self, group, parameter)


def momentum(optimizer: Custom, group: dict[str, Any], parameter: Tensor) -> None:
    state = optimizer.state[parameter]
    state["mean"] = state.get("mean", torch.zeros_like(parameter)) * 0.9 + parameter.grad  # another tensor each time
    parameter.sub_(state["mean"] * group["lr"] / (group["count"] + optimizer.total))


def by_norm_of_all(optimizer: Custom, group: dict[str, Any], parameter: Tensor) -> None:
    norm = torch.stack([p.grad.norm() for p in group["params"]]).norm()
    parameter.sub_(parameter.grad / norm, alpha=group["lr"])


def noisy(optimizer: Custom, group: dict[str, Any], parameter: Tensor) -> None:
    parameter.sub_(parameter.grad + torch.randn_like(parameter), alpha=group["lr"])


def with_list(optimizer: Custom, group: dict[str, Any], parameter: Tensor) -> None:
    optimizer.state[parameter]["factors"] = [parameter.grad]


def fails(optimizer: Custom, group: dict[str, Any], parameter: Tensor) -> None:
    raise ValueError("not on the CPU")


def refusal(make: Callable[[Any], Any], level: str = "optimizer", model: nn.Module | None = None) -> str:
    model = model or make_model()
    with pytest.raises(InputError) as caught:
        make_engine(model, make(list(model.parameters())), level)
    return str(caught.value)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (by_norm_of_all, "Custom then gives other results, as one that reads all of them or draws random numbers does"),
        (noisy, "Custom then gives other results, as one that reads all of them or draws random numbers does"),
        (
            with_list,
            "Custom has a state that cannot be streamed (the state of Custom has 'factors', a list, and offload= "
            "streams plain tensors only)",
        ),
        (fails, "Custom cannot be tried on small tensors (ValueError: not on the CPU)"),
    ],
)
def test_optimizer_that_cannot_be_stepped_in_parts_is_refused(rule: Callable[..., None], reason: str):
    assert refusal(lambda p: Custom(p, rule)) == START + reason + REST


@pytest.mark.parametrize(
    "make",
    [
        lambda p: Custom(p, momentum),
        lambda p: Lion(p, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1),
        lambda p: MuonWithAdamW(
            [{"params": [each for each in p if each.ndim == 2], "weight_decay": 0.1}],
            [{"params": [each for each in p if each.ndim == 1], "weight_decay": 0.0}],
            lr=0.01,
            momentum=0.9,
            betas=(0.9, 0.99),
            eps=1e-8,
        ),
        lambda p: torch.optim.AdamW([{"params": p[:3]}, {"params": p[3:], "lr": 0.1}], lr=0.01, fused=True),
        lambda p: torch.optim.Adafactor([{"params": p[:3]}, {"params": p[3:], "lr": 0.1}], lr=0.01),
        lambda p: torch.optim.RMSprop([{"params": p[:3]}, {"params": p[3:], "lr": 0.1}], lr=0.01, foreach=True),
    ],
    ids=["custom", "lion", "muon with adamw", "groups fused", "groups loop", "groups foreach"],
)
def test_other_optimizer_has_equal_bits(make: Callable[[Any], Any]):
    found = []
    for level in ("none", "optimizer"):
        model = make_model()
        optimizer = make(list(model.parameters()))
        engine = make_engine(model, optimizer, level)
        for number in range(6):
            engine.step(make_batch(number))
        settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        found.append((values(model).tolist(), settings, vars(optimizer).get("total")))
    assert found[0] == found[1]


def test_trial_draws_no_random_numbers():
    model = make_model()
    before = torch.get_rng_state()
    make_engine(model, Custom(model.parameters(), momentum))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda p: torch.optim.LBFGS(p, max_iter=1),
            "LBFGS computes with all parameters at once, or with sparse gradients",
        ),
        (
            lambda p: torch.optim.SparseAdam(p),
            "SparseAdam computes with all parameters at once, or with sparse gradients",
        ),
        (
            lambda p: torch.optim.SGD(p, lr=0.1, differentiable=True),
            "SGD has differentiable=True, which keeps the graph of its step",
        ),
    ],
)
def test_optimizer_of_torch_is_refused(make: Callable[[Any], Any], reason: str):
    assert refusal(make) == START + reason + REST


def test_wrapper_is_refused():
    class Wrapper(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=0.1)
            self.optimizer = torch.optim.SGD(parameters, lr=0.1)

    assert refusal(Wrapper) == START + "Wrapper wraps another optimizer; pass that one" + REST


def test_replaced_step_is_refused():
    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        optimizer.step = lambda: None  # type: ignore[method-assign]
        return optimizer

    assert refusal(make) == START + "SGD has a step() that was replaced on this object" + REST


def test_closure_is_refused():
    class Sharpness(torch.optim.SGD):
        def step(self, closure: Any) -> Any:  # type: ignore[override]
            with torch.enable_grad():
                closure()
            return super().step()

    found = refusal(lambda p: Sharpness(p, lr=0.1))
    assert found.startswith(START + "Sharpness cannot be tried on small tensors (TypeError: ")


def test_level_without_optimizer_is_refused():
    model = make_model()
    with pytest.raises(
        InputError,
        match=r"^offload='optimizer' moves the state of the optimizer, and there is none: pass the optimizer\.$",
    ):
        bigbatch.Accumulator(model, None, offload="optimizer")


def test_unknown_level_is_refused():
    message = "offload is 'weights': it must be one of 'none', 'optimizer', 'master', 'gradients', or 'auto'."
    assert refusal(lambda p: torch.optim.SGD(p, lr=0.1), "weights") == message


def test_parameters_on_other_devices_are_refused():
    model = make_model()
    lost = nn.Parameter(torch.empty(3, device="meta"))
    assert refusal(lambda p: torch.optim.SGD([*p, lost], lr=0.1), model=model) == (
        "offload= copies between host memory and one CUDA device, and the parameters are on cpu, meta: move them to "
        'one, or leave offload="none".'
    )


def test_parameters_of_other_classes_are_refused():
    class Sharded(nn.Parameter):
        pass

    odd = Sharded(torch.zeros(3))
    assert refusal(lambda p: torch.optim.SGD([*p, odd], lr=0.1)) == (
        "a parameter of shape (3,) is a Sharded, and offload= supports whole, plain parameters only: for a sharded "
        'model leave offload="none".'
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"parallel": "fsdp"},
            "offload optimizer is not supported with parallel fsdp and hsdp, which shard the optimizer state: use ddp, "
            "or offload none",
        ),
        (
            {"optimizer": "adamw-8bit"},
            "offload optimizer is not supported with optimizer adamw-8bit, whose state is quantized: use adamw",
        ),
    ],
)
def test_setting_that_excludes_offload_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(offload="optimizer", **settings)
