"""Windows with batch norm over the whole batch, against the whole batch in one piece."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bigbatch
from batch_norm.models import (
    NUM_SAMPLES,
    TOLERANCE,
    WIDTH,
    Batch,
    Small,
    buffer_error,
    classify,
    engine_of,
    gradient_error,
    images,
    norms,
    plain,
    resnet,
    rows,
    squares,
    whole,
)
from support.tiers import slow_except

BUFFER_TOLERANCE = 1e-14


@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving", "cumulative"])
@pytest.mark.parametrize("cut", slow_except(range(1, NUM_SAMPLES + 1), 1, 4, NUM_SAMPLES))
def test_resnet_is_exact_for_every_cut(cut: int, momentum: float | None) -> None:
    model, batches = resnet(momentum), [images(seed=1), images(7, seed=2), images(seed=3)]
    expected = whole(model, classify, batches)
    engine = engine_of(model, classify, cut)
    for batch in batches:
        report = engine.backward(batch)
    assert gradient_error(model, expected) <= TOLERANCE
    assert buffer_error(model, expected) <= BUFFER_TOLERANCE
    assert [int(norm.num_batches_tracked) for norm in norms(model)] == [3] * len(norms(model))
    assert report.loss == pytest.approx(classify(expected, batch)[0].item() / NUM_SAMPLES, rel=TOLERANCE)
    assert report.items == NUM_SAMPLES


def test_plain_accumulation_is_not_exact() -> None:
    model = resnet()
    expected = whole(model, classify, [images()])
    engine_of(model, classify, 4, batch_norm=None).backward(images())
    assert gradient_error(model, expected) > 0.1
    assert buffer_error(model, expected) > 0.01


def test_updates_follow_those_of_whole_batch() -> None:
    models = [resnet(), resnet()]
    engines = [
        bigbatch.Engine(
            model, torch.optim.SGD(model.parameters(), lr=0.1), classify, microbatch=cut, batch_norm="exact"
        )
        for model, cut in zip(models, (3, NUM_SAMPLES), strict=True)
    ]
    for seed in range(4):
        for engine in engines:
            engine.step(images(seed=seed))
    for found, wanted in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def shared(model: Any, x: Tensor) -> Tensor:
    return model.last(model.norm(model.second(model.norm(model.first(x)).relu())).tanh())


def parallel(model: Any, x: Tensor) -> Tensor:
    hidden = model.first(x)
    return model.last(model.norm(hidden).tanh() * model.other(model.second(x)).sigmoid() + hidden)


def functional(_model: Any, x: Tensor) -> Tensor:
    return _model.last(F.batch_norm(_model.first(x), None, None, training=True).tanh())


def operator(model: Any, x: Tensor) -> Tensor:
    hidden = torch.batch_norm(model.first(x), None, None, None, None, True, 0.1, 1e-5, False)
    return model.last(hidden.tanh())


def three_dimensional(model: Any, x: Tensor) -> Tensor:
    return model.last(model.norm(model.first(x).view(-1, 2, 1, WIDTH // 2, 1)).flatten(1).tanh())


def instance(model: Any, x: Tensor) -> Tensor:
    return model.last(model.norm(model.first(x).view(-1, 2, WIDTH // 2)).flatten(1).tanh())


class ActivatedNorm(nn.BatchNorm1d):
    """A norm with an activation in its forward, as in other libraries."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.2, self.eps)
        return F.relu(y)


CASES: dict[str, Small] = {
    "norm called twice": Small(shared),
    "norm called twice, cumulative": Small(shared, norm=nn.BatchNorm1d(WIDTH, momentum=None)),
    "parallel branches": Small(parallel, other=nn.BatchNorm1d(WIDTH)),
    "without affine": Small(plain, norm=nn.BatchNorm1d(WIDTH, affine=False)),
    "without running statistics": Small(plain, norm=nn.BatchNorm1d(WIDTH, track_running_stats=False)),
    "without running statistics, eval": Small(plain, norm=nn.BatchNorm1d(WIDTH, track_running_stats=False)).eval(),
    "one norm in eval mode": Small(parallel, other=nn.BatchNorm1d(WIDTH).eval()),
    "function": Small(functional),
    "operator": Small(operator),
    "three dimensions": Small(three_dimensional, norm=nn.BatchNorm3d(2)),
    "instance norm": Small(instance, norm=nn.InstanceNorm1d(2, affine=True, track_running_stats=False)),
    "sync": nn.SyncBatchNorm.convert_sync_batchnorm(Small(plain)),
    "own class": Small(plain, norm=ActivatedNorm(WIDTH)),
}


@pytest.mark.parametrize("cut", [1, 4, 10])
@pytest.mark.parametrize("name", CASES)
def test_kinds_of_norms_are_exact(name: str, cut: int) -> None:
    model = copy.deepcopy(CASES[name])
    expected = whole(model, squares, [rows(), rows(seed=5)])
    engine = engine_of(model, squares, cut)
    for seed in (2, 5):
        engine.backward(rows(seed=seed))
    assert gradient_error(model, expected) <= TOLERANCE
    assert buffer_error(model, expected) <= BUFFER_TOLERANCE


@pytest.mark.parametrize("frozen", ["first", "norm", "last"])
def test_frozen_layers_are_exact(frozen: str) -> None:
    model = Small(plain)
    model.get_submodule(frozen).requires_grad_(False)
    expected = whole(model, squares, [rows()])
    engine_of(model, squares, 4).backward(rows())
    assert gradient_error(model, expected) <= TOLERANCE


def test_norm_of_loss_is_exact() -> None:
    criterion = nn.BatchNorm1d(WIDTH).double()

    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, int]:
        return F.mse_loss(criterion(model(batch[0])), batch[1], reduction="sum"), len(batch[0])

    model = nn.Linear(WIDTH, WIDTH).double()
    expected = whole(model, loss_fn, [rows()])
    criterion.reset_running_stats()
    engine_of(model, loss_fn, 4).backward(rows())
    assert gradient_error(model, expected) <= TOLERANCE
    assert criterion.num_batches_tracked == 1


class Hidden:
    """Keeps a norm where modules are not searched for."""

    __slots__ = ("norm",)

    def __init__(self) -> None:
        self.norm = nn.BatchNorm1d(WIDTH, momentum=None).double()

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        return F.mse_loss(self.norm(model(batch[0])), batch[1], reduction="sum"), len(batch[0])


def test_norm_that_no_search_finds_is_exact() -> None:
    found, wanted, model = Hidden(), Hidden(), nn.Linear(WIDTH, WIDTH).double()
    expected = whole(model, wanted, [rows(), rows(seed=5)])
    engine = engine_of(model, found, 4)
    for seed in (2, 5):
        engine.backward(rows(seed=seed))
    assert gradient_error(model, expected) <= TOLERANCE
    assert buffer_error(found.norm, wanted.norm) <= BUFFER_TOLERANCE
    before = copy.deepcopy(found.norm)
    with pytest.raises(RuntimeError, match="must match the size"), warnings.catch_warnings(action="ignore"):
        engine.backward((rows()[0], rows()[1][:, :2]))
    assert buffer_error(found.norm, before) == 0


def test_lazy_norm_is_exact() -> None:
    lazy = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LazyBatchNorm1d()).double()
    usual = nn.Sequential(copy.deepcopy(lazy[0]), nn.BatchNorm1d(WIDTH)).double()
    expected = whole(usual, squares, [rows()])
    with pytest.warns(UserWarning, match="was written to after the first backward|Lazy"):
        engine_of(lazy, squares, 4).backward(rows())
    assert gradient_error(lazy, expected) <= TOLERANCE
    assert buffer_error(lazy, expected) <= BUFFER_TOLERANCE


def items_above(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """Count some samples only; of a few micro-batches none."""
    outputs, counts = model(batch[0]), batch[1][:, 0] > -0.2
    return F.mse_loss(outputs[counts], batch[1][counts], reduction="sum"), int(counts.sum())


@pytest.mark.parametrize("cut", [1, 4])
def test_micro_batches_without_items_are_exact(cut: int) -> None:
    model = Small(plain)
    expected = whole(model, items_above, [rows()])
    engine_of(model, items_above, cut).backward(rows())
    assert gradient_error(model, expected) <= TOLERANCE


def test_several_terms_are_exact() -> None:
    def terms(model: Any, batch: Batch) -> Any:
        outputs = model(batch[0])
        return {
            "fit": (F.mse_loss(outputs, batch[1], reduction="sum"), len(outputs)),
            "size": (outputs.square().sum(), 3 * len(outputs)),
        }

    def total(model: Any, batch: Batch) -> tuple[Tensor, int]:
        return sum(loss_sum / items for loss_sum, items in terms(model, batch).values()), 1  # type: ignore[return-value]

    def count(batch: Batch) -> dict[str, int]:
        return {"fit": len(batch[0]), "size": 3 * len(batch[0])}

    model = Small(plain)
    expected = whole(model, total, [rows()])
    engine_of(model, terms, 4, count_items=count).backward(rows())
    assert gradient_error(model, expected) <= TOLERANCE


def test_gradients_inside_loss_are_exact() -> None:
    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, int]:
        inputs = batch[0].clone().requires_grad_()
        outputs = model(inputs)
        (gradient,) = torch.autograd.grad(outputs.sum(), inputs, retain_graph=True)
        return F.mse_loss(outputs * gradient.sign(), batch[1], reduction="sum"), len(inputs)

    model = Small(plain)
    expected = whole(model, loss_fn, [rows()])
    engine_of(model, loss_fn, 4).backward(rows())
    assert gradient_error(model, expected) <= TOLERANCE


def checkpointed(model: Any, x: Tensor) -> Tensor:
    def body(hidden: Tensor) -> Tensor:
        return model.drop(model.second(model.norm(model.drop(model.first(hidden))).tanh()))

    if model.how == "whole":
        return model.last(body(x))
    hidden = x if model.how == "later" else x * model.scale
    return model.last(checkpoint(body, hidden, use_reentrant=model.how == "reentrant"))


@pytest.mark.parametrize("how", ["later", "reentrant"])
@pytest.mark.parametrize("cut", [3, NUM_SAMPLES])
def test_checkpoints_repeat_norm_and_dropout(how: str, cut: int) -> None:
    found = []
    for each in ("whole", how):
        model = Small(checkpointed, drop=nn.Dropout(0.4))
        model.how, model.scale = each, nn.Parameter(torch.ones((), dtype=torch.float64))
        model.scale.requires_grad_(each == "reentrant")
        torch.manual_seed(5)
        engine_of(model, squares, cut).backward(rows())
        found.append(model)
    models = [[p.grad for name, p in model.named_parameters() if name != "scale"] for model in found]
    for one, other in zip(*models, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)
    assert found[1].norm.num_batches_tracked == 1
    assert buffer_error(*found) == 0.0


def test_dropout_draws_other_masks_for_each_micro_batch() -> None:
    masks = []

    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, int]:
        model(batch[0])
        masks.append(F.dropout(torch.ones(50)))
        return squares(model, batch)

    model = Small(plain)
    engine_of(model, loss_fn, 4).backward(rows())
    assert len({tuple(mask.tolist()) for mask in masks}) == 3


def test_random_numbers_repeat_with_seed_and_move_on() -> None:
    def after(seed: int, num_windows: int) -> Tensor:
        torch.manual_seed(seed)
        engine = engine_of(Small(lambda m, x: F.dropout(plain(m, x))), squares, 4)
        for _ in range(num_windows):
            engine.backward(rows())
        return torch.cat([p.grad.flatten() for p in engine.model.parameters() if p.grad is not None])

    assert torch.equal(after(3, 1), after(3, 1))
    assert not torch.equal(after(3, 1), after(3, 2))


PRECISIONS = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.01}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_parameters_in_low_precision_are_near(dtype: torch.dtype) -> None:
    model, batch = Small(plain).to(dtype), tuple(values.to(dtype) for values in rows())
    expected = whole(model, squares, [batch])
    engine_of(model, squares, 4).backward(batch)
    assert gradient_error(model, expected) <= PRECISIONS[dtype]
    assert buffer_error(model, expected) <= PRECISIONS[dtype]


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_autocast_reaches_every_micro_batch(place: str) -> None:
    dtypes = set()

    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, int]:
        with torch.autocast("cpu", torch.bfloat16, enabled=place == "inside" or torch.is_autocast_enabled("cpu")):
            outputs = model(batch[0])
            dtypes.add(outputs.dtype)
            return F.mse_loss(outputs, batch[1], reduction="sum"), len(outputs)

    model, batch = Small(plain).float(), tuple(values.float() for values in rows())
    with torch.autocast("cpu", torch.bfloat16):
        expected = whole(model, loss_fn, [batch])
    with torch.autocast("cpu", torch.bfloat16, enabled=place == "outside"):
        engine_of(model, loss_fn, 4).backward(batch)
    assert dtypes == {torch.bfloat16}
    assert gradient_error(model, expected) <= PRECISIONS[torch.bfloat16]


def test_large_mean_keeps_precision() -> None:
    model = Small(lambda m, x: m.last(m.norm(m.first(x) + 1e6).tanh()))
    expected = whole(model, squares, [rows()])
    engine_of(model, squares, 3).backward(rows())
    assert gradient_error(model, expected) <= 1e-7  # of 1e-16, times the mean over the deviation


def test_closure_of_optimizer_runs_window_again() -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Any) -> Any:  # type: ignore[override]
            with torch.enable_grad():
                closure()
            super().step()
            with torch.enable_grad():
                closure()
            return super().step()

    models = [Small(plain), Small(plain)]
    for model, cut in zip(models, (4, NUM_SAMPLES), strict=True):
        engine = bigbatch.Engine(model, Twice(model.parameters(), 0.1), squares, microbatch=cut, batch_norm="exact")
        engine.step(rows())
    for one, other in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_empty_batch_changes_nothing() -> None:
    model = Small(plain)
    report = engine_of(model, squares, 4).backward(rows(0))
    assert report.skipped == "no items"
    assert model.norm.num_batches_tracked == 0


def test_loss_of_engine_has_exact_gradient() -> None:
    model = Small(plain)
    expected = whole(model, squares, [rows()])
    (engine_of(model, squares, 4).loss(rows()) * 3).backward()
    for parameter in expected.parameters():
        parameter.grad = None if parameter.grad is None else 3 * parameter.grad
    assert gradient_error(model, expected) <= TOLERANCE


def test_time_first_layer_is_checked_by_its_own_micro_batch() -> None:
    """Time has the length of the last micro-batch, which is drawn before the first one reaches the layer."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.layer = nn.BatchNorm1d(WIDTH), nn.GRU(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.norm(x).repeat(3, 1, 1))[0][-1]

    model = Recurrent().double()
    expected = whole(model, squares, [rows()])
    engine_of(model, squares, 4).backward(rows())  # 4, 4 and 3 samples
    assert gradient_error(model, expected) <= TOLERANCE
