"""The gradient of a coupled loss is that of the whole batch, whatever the cut, in float64."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigbatch
from bigbatch import losses
from coupled.models import (
    CASES,
    NUM_SAMPLES,
    TOLERANCE,
    batch,
    engine_of,
    gradient_error,
    relative_error,
    rows_of,
    towers,
    two_towers,
    whole_batch,
)
from support.tiers import slow_except


@pytest.mark.parametrize(
    "name", slow_except(CASES, "info_nce", "clip", "sup_con", "barlow twins, head with batch norm")
)
def test_every_cut_gives_whole_gradient(name: str) -> None:
    case, data = CASES[name], batch()
    reference, loss = whole_batch(towers(), case, data)
    for cut in range(1, NUM_SAMPLES + 1):
        model = towers()
        report = engine_of(model, case, cut).backward(data)
        assert gradient_error(model, reference) <= TOLERANCE
        assert report.loss == pytest.approx(loss, rel=1e-12)
        assert (report.items, report.num_microbatches) == (NUM_SAMPLES, -(-NUM_SAMPLES // cut))


@pytest.mark.parametrize("name", CASES)
def test_weighted_microbatches_are_wrong(name: str) -> None:
    case, data, model = CASES[name], batch(), towers()

    def loss_fn(model: Any, part: dict[str, Tensor]) -> tuple[Tensor, int]:
        samples = len(part["left"])
        return case.loss(model, case.encode(model, part)) * samples, samples

    bigbatch.Engine(model, None, loss_fn, microbatch=4, check=False).backward(data)
    assert gradient_error(model, whole_batch(towers(), case, data)[0]) > 0.1


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_updates_equal_those_of_plain_loop(kind: Any) -> None:
    case = CASES["clip"]
    model, reference = towers(), towers()
    optimizer, plain = kind(model.parameters(), lr=0.05), kind(reference.parameters(), lr=0.05)
    engine = engine_of(model, case, 4, optimizer, max_grad_norm=0.3)
    for seed, num_samples in enumerate([22, 22, 9]):  # the last window is partial
        data = batch(num_samples, seed)
        report = engine.step(data)
        plain.zero_grad()
        case.loss(reference, case.encode(reference, data)).backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.3)
        plain.step()
        assert report.grad_norm == pytest.approx(norm.item(), rel=1e-12)
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in pairs)


def test_loss_of_engine_hands_over_gradient() -> None:
    case, data, model = CASES["clip"], batch(), towers()
    reference, value = whole_batch(towers(), case, data)
    loss = engine_of(model, case, 5).loss(data)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    (2 * loss).backward()
    for p in reference.parameters():
        p.grad = None if p.grad is None else 2 * p.grad
    assert gradient_error(model, reference) <= TOLERANCE


def test_token_groups_keep_order_of_samples() -> None:
    lengths = [3, 9, 1, 7, 5, 2, 8, 4, 6, 10, 2, 9]
    samples = [{name: column[0] for name, column in batch(1, seed).items()} for seed in range(len(lengths))]

    def collate(chosen: Any) -> dict[str, Tensor]:
        return {name: torch.stack([sample[name] for sample in chosen]) for name in chosen[0]}

    seen = []

    def loss(model: Any, features: Any) -> Tensor:  # depends on the order
        seen.append(features[0].detach())
        weights = torch.arange(1.0, len(features[0]) + 1, dtype=torch.float64)[:, None]
        return (features[0] * weights).roll(1, 0).mul(features[1]).sum().tanh()

    model = towers()
    engine = bigbatch.Engine(
        model,
        None,
        bigbatch.Coupled(two_towers, loss),
        microbatch=bigbatch.TokenBudget(12),
        collate=collate,
        lengths=lambda chosen: lengths,
    )
    report = engine.backward(samples)
    assert report.num_microbatches > 3
    assert torch.allclose(seen[0], towers().left(collate(samples)["left"]))
    reference = towers()
    loss(reference, two_towers(reference, collate(samples))).backward()
    assert gradient_error(model, reference) <= TOLERANCE


def masked_whole_batch(case: Any, data: dict[str, Tensor], cut: int) -> nn.Module:
    """Return the gradient of the whole batch in one graph, with the masks that micro-batches of a cut draw."""
    reference = towers(dropout=0.3)
    torch.manual_seed(7)
    parts = [case.encode(reference, rows_of(data, slice(i, i + cut))) for i in range(0, NUM_SAMPLES, cut)]
    case.loss(reference, tuple(torch.cat(column) for column in zip(*parts, strict=True))).backward()
    return reference


@pytest.mark.parametrize("cut", [1, 4, 11, 22])
def test_dropout_masks_are_replayed(cut: int) -> None:
    case, data = CASES["clip"], batch()
    reference = masked_whole_batch(case, data, cut)
    after = torch.get_rng_state()
    model = towers(dropout=0.3)
    engine = engine_of(model, case, cut, check=False)
    torch.manual_seed(7)
    engine.backward(data)
    assert gradient_error(model, reference) <= TOLERANCE
    assert torch.equal(torch.get_rng_state(), after), "the generator ends as after one pass"


def test_random_collate_is_replayed() -> None:
    samples = [{name: column[0] for name, column in batch(1, seed).items()} for seed in range(10)]

    def collate(chosen: Any) -> dict[str, Tensor]:
        part = {name: torch.stack([sample[name] for sample in chosen]) for name in chosen[0]}
        return {**part, "left": part["left"] + torch.randn_like(part["left"])}

    case, model, reference = CASES["clip"], towers(), towers()
    torch.manual_seed(5)
    parts = [case.encode(reference, collate(samples[i : i + 4])) for i in range(0, 10, 4)]
    case.loss(reference, tuple(torch.cat(column) for column in zip(*parts, strict=True))).backward()
    torch.manual_seed(5)
    engine_of(model, case, 4, collate=collate, check=False).backward(samples)
    assert gradient_error(model, reference) <= TOLERANCE


def test_python_and_numpy_numbers_are_replayed() -> None:
    import random

    import numpy as np

    def encode(model: Any, part: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        left, right = two_towers(model, part)
        return left * random.random(), right * np.random.rand()

    case, data, model, reference = CASES["clip"], batch(), towers(), towers()
    random.seed(3)
    np.random.seed(3)
    parts = [encode(reference, rows_of(data, slice(i, i + 4))) for i in range(0, NUM_SAMPLES, 4)]
    case.loss(reference, tuple(torch.cat(column) for column in zip(*parts, strict=True))).backward()
    random.seed(3)
    np.random.seed(3)
    bigbatch.Engine(model, None, bigbatch.Coupled(encode, case.loss), microbatch=4, check=False).backward(data)
    assert gradient_error(model, reference) <= TOLERANCE


def test_buffers_learn_once() -> None:
    case, data = CASES["barlow twins, head with batch norm"], batch()
    model = towers()
    model.left.append(nn.BatchNorm1d(4).double())  # in an encoder: statistics of micro-batches
    model.right.append(nn.BatchNorm1d(4).double())
    reference = copy.deepcopy(model)
    engine = engine_of(model, case, 11, check=False)
    engine.backward(data)
    parts = [case.encode(reference, rows_of(data, rows)) for rows in (slice(0, 11), slice(11, 22))]
    case.loss(reference, tuple(torch.cat(column) for column in zip(*parts, strict=True))).backward()
    assert gradient_error(model, reference) <= TOLERANCE
    for found, expected in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-12)
    engine.backward(data)
    assert model.left[-1].num_batches_tracked == 4
    assert model.head[1].num_batches_tracked == 4


class Moving(nn.Module):
    """Scales by a buffer that each forward changes, as an exponential average does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.scale.mul_(0.9).add_(0.1 * inputs.detach().abs().mean())
        return self.linear(inputs) * self.scale.clone()


def test_buffers_that_forwards_read_are_replayed() -> None:
    torch.manual_seed(0)
    model = Moving().double()
    reference, data = copy.deepcopy(model), batch()["left"]
    coupled = bigbatch.Coupled(lambda model, part: model(part), lambda _, f: (f @ f.T).tanh().square().mean())
    engine = bigbatch.Engine(model, None, coupled, microbatch=6, check=False)
    for _ in range(2):
        reference.zero_grad()
        features = torch.cat([reference(part) for part in data.split(6)])
        (features @ features.T).tanh().square().mean().backward()
        engine.backward(data)
        assert gradient_error(model, reference) <= TOLERANCE
        assert torch.equal(model.scale, reference.scale)


@pytest.mark.parametrize("cut", [5, 22])
def test_bfloat16_autocast_reaches_weights(cut: int) -> None:
    case = CASES["clip"]
    data = {name: c.float() if c.is_floating_point() else c for name, c in batch().items()}
    model, reference = towers().float(), towers().float()
    with torch.autocast("cpu", torch.bfloat16):
        engine_of(model, case, cut, check=False).backward(data)
        case.loss(reference, case.encode(reference, data)).backward()
    assert gradient_error(model, reference) < 0.05


class Sam(torch.optim.SGD):
    """Foret et al., arXiv:2010.01412: the gradient is that at the weights plus a step along the gradient."""

    def step(self, closure: Any) -> Any:
        with torch.enable_grad():
            loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        moves = [0.1 * p.grad.clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_add_(parameters, moves)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            torch._foreach_sub_(parameters, moves)
        super().step()
        return loss


def test_optimizer_with_closure_runs_both_passes_again() -> None:
    case, data, model, reference = CASES["clip"], batch(), towers(), towers()
    plain = Sam(reference.parameters(), lr=0.1)

    def closure() -> Tensor:
        plain.zero_grad()
        loss = case.loss(reference, case.encode(reference, data))
        loss.backward()
        return loss

    engine_of(model, case, 5, Sam(model.parameters(), lr=0.1)).step(data)
    plain.step(closure)
    found, expected = ([p.detach() for p in each.parameters()] for each in (model, reference))
    assert relative_error(found, expected) <= TOLERANCE


def test_parameters_outside_of_model_are_trained() -> None:
    data = batch()
    model, reference = towers(), towers()
    scale, plain_scale = (nn.Parameter(torch.tensor(2.0, dtype=torch.float64)) for _ in range(2))
    optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.1)
    coupled = bigbatch.Coupled(two_towers, losses.clip(logit_scale=scale))
    bigbatch.Engine(model, optimizer, coupled, microbatch=4).step(data)
    losses.clip(*two_towers(reference, data), logit_scale=plain_scale).backward()
    assert scale.item() == pytest.approx(2.0 - 0.1 * plain_scale.grad.item(), rel=1e-12)


def test_noise_scale_is_not_measured() -> None:
    engine = engine_of(towers(), CASES["clip"], 4)
    assert engine.accumulator.noise is None
    assert engine.backward(batch()).noise is None


def test_empty_batch_changes_nothing() -> None:
    model = towers()
    report = engine_of(model, CASES["clip"], 4, torch.optim.SGD(model.parameters(), lr=0.1)).step(batch(0))
    assert (report.items, report.skipped) == (0, "no items")


class Prototypes(nn.Module):
    """A loss with parameters and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4))
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

    def forward(self, _model: Any, features: tuple[Tensor, Tensor]) -> Tensor:
        self.mean.lerp_(features[0].detach().mean(0), 0.5)
        logits = (features[0] - self.mean.clone()) @ self.points.T
        return (logits.softmax(0) * logits).mean()


@pytest.mark.parametrize("cut", [4, 22])
def test_loss_that_is_a_module_is_trained_and_saved(cut: int) -> None:
    model, reference, loss, plain = towers(), towers(), Prototypes(), Prototypes()
    engine = bigbatch.Engine(
        model,
        torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1),
        bigbatch.Coupled(two_towers, loss),
        microbatch=cut,
    )
    optimizer = torch.optim.SGD([*reference.parameters(), *plain.parameters()], lr=0.1)
    for seed in range(3):
        engine.step(batch(seed=seed))
        optimizer.zero_grad()
        plain(reference, two_towers(reference, batch(seed=seed))).backward()
        optimizer.step()
    assert torch.allclose(loss.points, plain.points, rtol=1e-12)
    assert torch.allclose(loss.mean, plain.mean, rtol=1e-12)
    assert {"loss_fn.points", "loss_fn.mean"} <= set(engine.state_dict()["model"])
