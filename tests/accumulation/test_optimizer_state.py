"""Optimizer state made ahead: what the first step would have begun with, and nothing else moves."""

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigbatch
from bigbatch.accumulation.optimizer_state import init_optimizer_state
from bigbatch.accumulation.optimizer_update import OptimizerUpdate

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    f"{kind.__name__} {' '.join(f'{name}={value}' for name, value in settings.items())}".strip(): (kind, settings)
    for kind, choices in {
        torch.optim.Adam: [
            {},
            {"amsgrad": True},
            {"weight_decay": 0.1, "maximize": True},
            {"foreach": True},
            {"foreach": False, "amsgrad": True},
            {"fused": True},
            {"fused": True, "amsgrad": True},
            {"lr": torch.tensor(0.03)},
        ],
        torch.optim.AdamW: [{}, {"amsgrad": True}, {"foreach": True}, {"fused": True}, {"weight_decay": 0.5}],
        torch.optim.NAdam: [{}, {"weight_decay": 0.1, "decoupled_weight_decay": True}, {"foreach": True}],
        torch.optim.RAdam: [{}, {"weight_decay": 0.1}, {"foreach": True}],
        torch.optim.Adamax: [{}, {"weight_decay": 0.1}, {"foreach": True}],
        torch.optim.Adadelta: [{}, {"weight_decay": 0.1}, {"foreach": True}],
        torch.optim.RMSprop: [
            {},
            {"momentum": 0.9},
            {"centered": True},
            {"momentum": 0.9, "centered": True, "weight_decay": 0.1, "foreach": True},
        ],
        torch.optim.Adafactor: [{}, {"weight_decay": 0.1}, {"foreach": True}],
        torch.optim.Muon: [{}, {"nesterov": False}],
    }.items()
    for settings in choices
}

LEFT_ALONE: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {}),
    "SGD with momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "Rprop": (torch.optim.Rprop, {}),
    "ASGD": (torch.optim.ASGD, {}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "LBFGS": (torch.optim.LBFGS, {"max_iter": 1}),
    "SparseAdam": (torch.optim.SparseAdam, {}),
}


class Stepping(torch.optim.AdamW):
    """Does something of its own in its step."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Net(nn.Module):
    """A scalar, vectors, matrices, four dimensions in channels_last, and a matrix that is stored transposed."""

    def __init__(self, *, matrices_only: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator))

        self.matrix = parameter(4, 3)
        self.transposed = nn.Parameter(parameter(5, 4).detach().t())
        self.frozen = parameter(3, 3).requires_grad_(False)
        self.unused = parameter(3, 2)
        self.late = parameter(2, 3)
        if not matrices_only:
            self.scalar, self.vector = parameter(), parameter(7)
            self.image = nn.Parameter(parameter(2, 3, 4, 4).detach().to(memory_format=torch.channels_last))

    def groups(self) -> list[dict[str, Any]]:
        parameters = list(self.parameters())
        return [{"params": parameters[:2]}, {"params": []}, {"params": parameters[2:], "lr": 0.007}]

    def set_gradients(self, step: int) -> None:
        """Of all but the frozen and the unused one; ``late`` has its first in the third step."""
        generator = torch.Generator().manual_seed(step)
        for name, p in self.named_parameters():
            gradient = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            without = name in ("frozen", "unused") or (name == "late" and step < 2)
            p.grad = None if without else torch.empty_like(p).copy_(gradient)


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[Net, torch.optim.Optimizer]:
    kind, settings = {**OPTIMIZERS, **LEFT_ALONE}[name]
    model = Net(matrices_only=kind is torch.optim.Muon).to(dtype)
    return model, kind(model.groups(), **settings)


def take_steps(model: Net, optimizer: torch.optim.Optimizer, num_steps: int = 4) -> None:
    for step in range(num_steps):
        model.set_gradients(step)
        # A schedule: what is made ahead must not hold the rate of the moment.
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.7
        optimizer.step()
        optimizer.zero_grad()


def named_state(model: Net, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if optimizer.state.get(p)}


def same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return type(one) is type(other) and one == other
    kinds = [(t.shape, t.dtype, t.device, t.stride(), t.requires_grad) for t in (one, other)]
    return kinds[0] == kinds[1] and torch.equal(one, other)


def assert_same_state(found: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert list(found[name]) == list(values), name
        assert all(same(found[name][key], values[key]) for key in values), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_after_preallocation_is_bit_identical(name: str, dtype: torch.dtype) -> None:
    lazy_model, lazy = make(name, dtype)
    model, optimizer = make(name, dtype)
    assert init_optimizer_state(optimizer)
    made = {id(value) for values in named_state(model, optimizer).values() for value in values.values()}
    take_steps(lazy_model, lazy)
    take_steps(model, optimizer)
    for (parameter, p), (_, expected) in zip(model.named_parameters(), lazy_model.named_parameters(), strict=True):
        assert torch.equal(p, expected), parameter
    state, expected_state = named_state(model, optimizer), named_state(lazy_model, lazy)
    assert all(not value.any() or value.numel() == 1 for value in state.pop("unused").values())
    assert_same_state(state, expected_state)
    assert {id(v) for values in state.values() for v in values.values() if isinstance(v, Tensor)} <= made


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_preallocation_leaves_parameters_gradients_and_groups_unchanged(name: str) -> None:
    model, optimizer = make(name)
    model.set_gradients(0)
    gradients = {parameter: p.grad for parameter, p in model.named_parameters()}
    values = {parameter: (p.detach().clone(), p._version) for parameter, p in model.named_parameters()}
    groups = copy.deepcopy([{**group, "params": None} for group in optimizer.param_groups])
    held = [list(group["params"]) for group in optimizer.param_groups]
    init_optimizer_state(optimizer)
    for parameter, p in model.named_parameters():
        assert p.grad is gradients[parameter]
        assert torch.equal(p, values[parameter][0])
        assert p._version == values[parameter][1]
    assert [{**group, "params": None} for group in optimizer.param_groups] == groups
    assert all(
        p is q
        for group, before in zip(optimizer.param_groups, held, strict=True)
        for p, q in zip(group["params"], before, strict=True)
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_preallocation_counts_no_step_and_skips_frozen_parameters(name: str) -> None:
    model, optimizer = make(name)
    init_optimizer_state(optimizer)
    state = named_state(model, optimizer)
    assert state.keys() == {parameter for parameter, p in model.named_parameters() if p.requires_grad}
    assert model.frozen not in optimizer.state
    assert all(values.get("step", 0) == 0 for values in state.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_existing_state_is_kept(name: str) -> None:
    """As after a resume: of the trained parameters only ``unused`` and ``late`` have none yet."""
    model, optimizer = make(name)
    take_steps(model, optimizer, 2)
    before = named_state(model, optimizer)
    assert init_optimizer_state(optimizer)
    after = named_state(model, optimizer)
    assert after.keys() - before.keys() == {"unused", "late"}
    assert all(after[parameter][key] is value for parameter in before for key, value in before[parameter].items())
    assert init_optimizer_state(optimizer)
    again = named_state(model, optimizer)
    assert all(again[parameter][key] is value for parameter in after for key, value in after[parameter].items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_state_loads_over_preallocated_state(name: str) -> None:
    trained_model, trained = make(name)
    take_steps(trained_model, trained)
    model, optimizer = make(name)
    model.load_state_dict(trained_model.state_dict())
    init_optimizer_state(optimizer)
    optimizer.load_state_dict(copy.deepcopy(trained.state_dict()))
    assert_same_state(named_state(model, optimizer), named_state(trained_model, trained))
    init_optimizer_state(optimizer)
    take_steps(trained_model, trained)
    take_steps(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), trained_model.parameters(), strict=True))


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_optimizers_with_other_initialization_are_skipped(name: str) -> None:
    kind, settings = LEFT_ALONE[name]
    model = nn.Linear(2, 3)
    optimizer = kind(model.parameters(), **settings)
    before = {id(p): dict(values) for p, values in optimizer.state.items()}
    assert init_optimizer_state(optimizer) is False
    assert {id(p): dict(values) for p, values in optimizer.state.items()} == before


def test_optimizer_subclass_is_skipped() -> None:
    model = nn.Linear(2, 3)
    optimizer = Stepping(model.parameters())
    assert init_optimizer_state(optimizer) is False
    assert not optimizer.state


def test_complex_parameters_have_complex_state() -> None:
    found = []
    for ahead in (False, True):
        p = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
        optimizer = torch.optim.Adam([p], lr=0.1)
        if ahead:
            init_optimizer_state(optimizer)
        for _ in range(3):
            p.grad = p.detach() * 1j
            optimizer.step()
        found.append((p.detach(), optimizer.state[p]["exp_avg"]))
    assert all(same(one, other) for one, other in zip(*found, strict=True))
    assert found[0][1].is_complex()


def test_parameters_without_data_or_shape_are_accepted() -> None:
    model = nn.Sequential(nn.Linear(2, 3, device="meta"), nn.LazyLinear(4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    init_optimizer_state(optimizer)
    assert optimizer.state[model[0].weight]["exp_avg"].is_meta
    assert model[1].weight not in optimizer.state
    model[1](torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert optimizer.state[model[1].weight]["step"] == 1
    assert optimizer.state[model[2].weight]["step"] == 0


def test_optimizer_error_passes_through_and_leaves_no_state() -> None:
    model = nn.Linear(2, 3, device="meta")
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(2))]}, {"params": model.parameters()}])
    optimizer.param_groups[1]["fused"] = True
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params"):
        init_optimizer_state(optimizer)
    assert not optimizer.state


def too_large(num_elements: int = 1 << 50) -> nn.Parameter:
    """Takes no memory itself; anything like it takes more than a process can address."""
    return nn.Parameter(torch.zeros(()).expand(num_elements))


@pytest.mark.parametrize(
    ("kind", "settings", "needed"),
    [
        (torch.optim.AdamW, {}, 2),
        (torch.optim.AdamW, {"amsgrad": True}, 3),
        (torch.optim.Adam, {"fused": True}, 2),
        (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}, 3),
        (torch.optim.Adafactor, {}, 1),
    ],
)
def test_oversized_state_raises_one_sentence_and_is_freed(kind: Any, settings: Any, needed: int) -> None:
    small = nn.Parameter(torch.ones(3))
    optimizer = kind([{"params": [small]}, {"params": [too_large()]}], **settings)
    gibibytes = f"{needed * 4 * 2**20}.0 GiB"
    expected = rf"^the state of {kind.__name__}, {gibibytes}, does not fit in memory with the model \(.*can't allocate"
    with pytest.raises(bigbatch.MemoryLimitError, match=expected) as raised:
        init_optimizer_state(optimizer)
    assert "\n" not in str(raised.value)
    assert raised.value.__context__ is None, "it would hold the tensors that were made"
    assert not optimizer.state
    assert small.grad is None


def test_update_prepares_once_and_again_after_failure() -> None:
    small, large = nn.Parameter(torch.ones(3)), too_large()
    optimizer = torch.optim.AdamW([small, large])
    update = OptimizerUpdate(optimizer)
    assert not optimizer.state, "nothing is made before it is asked for"
    for _ in range(2):
        with pytest.raises(bigbatch.MemoryLimitError):
            update.prepare()
    large.requires_grad_(False)
    update.prepare()
    assert optimizer.state.keys() == {small}
    optimizer.state.clear()
    update.prepare()
    assert not optimizer.state, "it does nothing from the second time on"


def test_windows_after_prepare_are_bit_identical() -> None:
    found = []
    for ahead in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        if ahead:
            init_optimizer_state(optimizer)
        engine = bigbatch.Engine(model, optimizer, lambda m, x: (m(x).square().sum(), len(x)), microbatch=2)
        for _ in range(3):
            engine.step(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)))
        found.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"fused": True, "amsgrad": True}),
        (torch.optim.AdamW, {"capturable": True, "foreach": True}),
        (torch.optim.NAdam, {"capturable": True}),
        (torch.optim.RMSprop, {"capturable": True, "momentum": 0.9}),
    ],
)
def test_training_on_gpu_is_bit_identical(kind: Any, settings: Any) -> None:
    found = []
    for ahead in (False, True):
        model = Net().cuda()
        optimizer = kind(model.groups(), **settings)
        if ahead:
            init_optimizer_state(optimizer)
        take_steps(model, optimizer)
        state = named_state(model, optimizer)
        state.pop("unused", None)
        found.append(([p.detach() for p in model.parameters()], state))
    assert all(torch.equal(one, other) for one, other in zip(found[0][0], found[1][0], strict=True))
    assert_same_state(found[1][1], found[0][1])


@pytest.mark.gpu
def test_oversized_state_on_gpu_leaves_memory_unchanged() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    small = nn.Parameter(torch.ones(1 << 20, device="cuda"))
    large = nn.Parameter(torch.zeros((), device="cuda").expand(free // 4 * 2 // 3))  # one moment fits, two do not
    optimizer = torch.optim.AdamW([small, large])
    before, reserved_before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    with pytest.raises(bigbatch.MemoryLimitError, match=r"^the state of AdamW, [\d.]+ GiB, does not fit"):
        init_optimizer_state(optimizer)
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.memory_reserved() - reserved_before < free // 4
    assert not optimizer.state
