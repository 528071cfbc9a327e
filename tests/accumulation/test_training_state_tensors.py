"""The tensors of a captured state: everything that was ever trained, wherever it is, and no frozen base weight."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch
from bigbatch.accumulation.state_tensors import StateTensors
from bigbatch.lm.checkpoint.state_tree import copy_to_cpu, equal

Batch = tuple[Tensor, Tensor]


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(10, 5, generator=generator), torch.randint(3, (10,), generator=generator)


class CenterLoss(nn.Module):
    """Cross-entropy and the distance to class centres, with a running count of classes."""

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(3, 3))
        self.register_buffer("counts", torch.zeros(3))

    def forward(self, model: nn.Module, microbatch: Batch) -> tuple[Tensor, int]:
        inputs, labels = microbatch
        outputs = model(inputs)
        self.counts += torch.bincount(labels, minlength=3)
        distance = (outputs - self.centers[labels]).square().sum()
        return F.cross_entropy(outputs, labels, reduction="sum") + distance, len(labels)


def engine_of(form: str, seed: int) -> tuple[bigbatch.Engine, nn.Linear, CenterLoss]:
    torch.manual_seed(seed)
    model, criterion = nn.Linear(5, 3), CenterLoss()
    groups = [{"params": [*model.parameters()]}, {"params": [*criterion.parameters()], "lr": 0.5}]
    forms: dict[str, Any] = {
        "module": criterion,
        "method": criterion.forward,
        "partial": functools.partial(criterion.forward),
        "closure": lambda model, microbatch: criterion(model, microbatch),
    }
    optimizer = torch.optim.RMSprop(groups, lr=0.01, momentum=0.5)
    return bigbatch.Engine(model, optimizer, forms[form], microbatch=4), model, criterion


# parameters outside of the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["module", "method", "partial", "closure"])
def test_criterion_resumes_bit_identically(form: str) -> None:
    one, _, criterion = engine_of(form, 0)
    for seed in range(3):
        one.step(batch(seed))
    state = copy_to_cpu(one.state_dict())
    other, _, other_criterion = engine_of(form, 1)
    other.load_state_dict(state)
    assert torch.equal(other_criterion.centers, criterion.centers)
    assert torch.equal(other_criterion.counts, criterion.counts) == (form != "closure")
    assert [one.step(batch(s)).loss for s in (3, 4)] == [other.step(batch(s)).loss for s in (3, 4)]
    assert torch.equal(other_criterion.centers, criterion.centers)


def test_names_tell_where_a_tensor_is() -> None:
    known, _, _ = engine_of("method", 0)
    assert list(known.state_dict()["model"]) == ["weight", "bias", "loss_fn.centers", "loss_fn.counts"]
    unknown, _, _ = engine_of("closure", 0)
    state = unknown.state_dict()
    assert list(state["model"]) == ["weight", "bias", "optimizer.group1.param0"]
    assert state["format"]["parameters"] == [["weight", "bias", "optimizer.group1.param0"]]


def test_positions_name_the_optimizer_of_several() -> None:
    model, first, second = nn.Linear(2, 2), nn.Linear(2, 1, bias=False), nn.Linear(2, 3, bias=False)
    optimizers = (
        torch.optim.SGD([*model.parameters(), first.weight], lr=0.1),
        torch.optim.AdamW(second.parameters()),
    )
    update: Any = SimpleNamespace(optimizers=optimizers)
    names = ["weight", "bias", "optimizer0.group0.param2", "optimizer1.group0.param0"]
    assert list(StateTensors(model, update, None).belonging()) == names


def test_loss_method_of_the_model_adds_no_name() -> None:
    class Classifier(nn.Linear):
        def loss(self, model: nn.Module, microbatch: Batch) -> tuple[Tensor, int]:
            return F.cross_entropy(model(microbatch[0]), microbatch[1], reduction="sum"), len(microbatch[1])

    model = Classifier(5, 3)
    engine = bigbatch.Engine(model, torch.optim.SGD(model.parameters()), model.loss, microbatch=2)
    assert list(engine.state_dict()["model"]) == ["weight", "bias"]


# frozen parameters -------------------------------------------------------------------------------------------------


def plain_loss(model: nn.Module, microbatch: Batch) -> tuple[Tensor, int]:
    return F.cross_entropy(model(microbatch[0]), microbatch[1], reduction="sum"), len(microbatch[1])


def layers_of(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).to(torch.bfloat16)


def bf16(seed: int) -> Batch:
    inputs, labels = batch(seed)
    return inputs.to(torch.bfloat16), labels


@pytest.mark.parametrize("frozen", [[0], [2, 4], [4]], ids=str)
def test_layers_frozen_after_training_are_stored(frozen: list[int]) -> None:
    model, other = layers_of(0), layers_of(1)
    engines = [bigbatch.Engine(m, torch.optim.AdamW(m.parameters()), plain_loss, microbatch=4) for m in (model, other)]
    engines[0].step(bf16(0))
    for each in (model, other):
        for index in frozen:
            each[index].requires_grad_(False)
    engines[0].step(bf16(1))
    state = copy_to_cpu(engines[0].state_dict())
    assert len(state["model"]) == 6
    engines[1].load_state_dict(state)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert engines[0].step(bf16(2)).loss == engines[1].step(bf16(2)).loss


def test_parameter_removed_from_optimizer_is_stored() -> None:
    model, other = layers_of(0), layers_of(1)
    groups = [{"params": [*model[0].parameters()]}, {"params": [*model[2:].parameters()]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    engine = bigbatch.Engine(model, optimizer, plain_loss, microbatch=4)
    engine.step(bf16(0))
    del optimizer.param_groups[0]
    model[0].requires_grad_(False)
    engine.step(bf16(1))
    state = copy_to_cpu(engine.state_dict())
    assert "0.weight" in state["model"]

    other[0].requires_grad_(False)
    head = bigbatch.Engine(other, torch.optim.SGD(other[2:].parameters(), lr=0.1), plain_loss, microbatch=4)
    head.load_state_dict(state)
    assert torch.equal(other[0].weight, model[0].weight)
    assert "0.weight" in head.state_dict()["model"], "it is not the weight that the model was made with"


def test_frozen_base_weights_stay_out() -> None:
    model = layers_of(0)
    model[:4].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    engine = bigbatch.Engine(model, optimizer, plain_loss, microbatch=4)
    engine.step(bf16(0))
    assert list(engine.state_dict()["model"]) == ["4.weight", "4.bias"]


def test_state_without_a_trained_tensor_is_refused() -> None:
    model, other = layers_of(0), layers_of(1)
    model[0].requires_grad_(False)
    heads = [
        bigbatch.Engine(m, torch.optim.SGD(m[2:].parameters(), lr=0.1), plain_loss, microbatch=4)
        for m in (model, other)
    ]
    before = copy_to_cpu(heads[1].state_dict())
    with pytest.raises(ValueError, match=r"^the state lacks 2 tensors of this model, such as 0\.bias\.$"):
        heads[1].load_state_dict(heads[0].state_dict())
    assert equal(heads[1].state_dict(), before)


# states of before -----------------------------------------------------------------------------------------------


def old(state: dict[str, Any]) -> dict[str, Any]:
    """The state as it was before classes and names were stored."""
    return {key: value for key, value in state.items() if key != "format"}


def test_old_state_without_frozen_parameters_loads() -> None:
    model, other = layers_of(0), layers_of(1)
    engines = []
    for each in (model, other):
        each[0].requires_grad_(False)
        engines.append(bigbatch.Engine(each, torch.optim.AdamW(each.parameters()), plain_loss, microbatch=4))
    engines[0].step(bf16(0))
    state = old(copy_to_cpu(engines[0].state_dict()))
    for name in ("0.weight", "0.bias"):
        del state["model"][name]
    engines[1].load_state_dict(state)
    assert torch.equal(other[2].weight, model[2].weight)
    assert engines[1].step(bf16(1)).step == 2


def test_old_state_without_criterion_is_refused() -> None:
    one, _, _ = engine_of("closure", 0)
    state = old(copy_to_cpu(one.state_dict()))
    del state["model"]["optimizer.group1.param0"]
    with pytest.raises(
        ValueError, match=r"^the state lacks 1 tensors of this model, such as optimizer\.group1\.param0"
    ):
        one.load_state_dict(state)
