"""Algorithm, in float64: parameters after many updates are those of full-batch training."""

import copy

import pytest
import torch

import bigbatch
from support import full_batch_reference as ref

EXACT = 1e-10
WRONG = 1e-3
STEPS = 10


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)


def adamw_in_groups(model):
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.2, "lr": 0.03}, {"params": others, "weight_decay": 0.0}], lr=0.1
    )


def warmup(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))


OPTIMIZERS = {"SGD": sgd, "AdamW": adamw, "AdamW in groups": adamw_in_groups}


def train(stepper_name, make_optimizer, size, *, max_grad_norm=None, make_scheduler=None, loss_fn=ref.loss_and_items):
    """Ten windows of one accumulator or engine."""
    model = ref.make_model()
    optimizer = make_optimizer(model)
    scheduler = None if make_scheduler is None else make_scheduler(optimizer)
    settings = {"max_grad_norm": max_grad_norm, "scheduler": scheduler}
    if stepper_name == "Engine":
        engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch=size, **settings)
        reports = [engine.step(batch) for batch in ref.batches(STEPS)]
    else:
        accumulator = bigbatch.Accumulator(model, optimizer, **settings)
        parts = [part for batch in ref.batches(STEPS) for part in ref.cut(batch, size)]
        reports = ref.run_windows(accumulator, parts, num_microbatches=len(parts) // STEPS, loss_fn=loss_fn)
    return ref.parameters_of(model), reports, optimizer


@pytest.mark.parametrize("stepper_name", ref.STEPPERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ten_updates_equal_full_batch_training(stepper_name, name, size):
    parameters, reports, _ = train(stepper_name, OPTIMIZERS[name], size)
    full = ref.train_reference(ref.make_model(), OPTIMIZERS[name], ref.batches(STEPS))
    assert ref.relative_error(parameters, full.parameters) <= EXACT
    assert [report.step for report in reports] == list(range(1, STEPS + 1))
    naive = ref.train_mean_of_means(ref.make_model(), OPTIMIZERS[name], ref.batches(STEPS), size)
    assert ref.relative_error(naive, full.parameters) > WRONG


@pytest.mark.parametrize("stepper_name", ref.STEPPERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_acts_once_on_full_batch_norm(stepper_name, name):
    limit = 0.25
    parameters, reports, _ = train(stepper_name, OPTIMIZERS[name], 2, max_grad_norm=limit)
    full = ref.train_reference(ref.make_model(), OPTIMIZERS[name], ref.batches(STEPS), max_grad_norm=limit)
    assert min(full.grad_norms) > limit, "the data must be clipped"
    assert reports[0].grad_norm == pytest.approx(full.grad_norms[0], rel=1e-12)
    assert [report.grad_norm for report in reports] == pytest.approx(full.grad_norms, rel=1e-10)
    assert ref.relative_error(parameters, full.parameters) <= EXACT
    unclipped = ref.train_reference(ref.make_model(), OPTIMIZERS[name], ref.batches(STEPS))
    assert ref.relative_error(unclipped.parameters, full.parameters) > WRONG


def test_norm_below_limit_is_unchanged():
    parameters, reports, _ = train("Engine", sgd, 2, max_grad_norm=1e6)
    full = ref.train_reference(ref.make_model(), sgd, ref.batches(STEPS), max_grad_norm=1e6)
    assert ref.relative_error(parameters, full.parameters) <= EXACT
    assert [report.grad_norm for report in reports] == pytest.approx(full.grad_norms, rel=1e-10)


def test_clipping_each_microbatch_would_be_wrong():
    batch = ref.ragged_batch(9, seed=100)
    model = ref.make_model()
    parts = [part for part in ref.cut(batch, 2) if ref.count(part)]
    total = sum(map(ref.count, parts))
    clipped = dict.fromkeys(ref.parameters_of(model), 0.0)
    for part in parts:
        gradient = ref.full_gradient(model, part)
        norm = torch.nn.utils.get_total_norm(list(gradient.values()))
        for name, tensor in gradient.items():
            clipped[name] += tensor * min(1.0, 0.25 / norm) * ref.count(part) / total
    optimizer = ref.RecordingSGD(model)
    ref.step_by_engine(model, optimizer, batch, 2, max_grad_norm=0.25)
    full = ref.full_gradient(model, batch)
    coefficient = 0.25 / (torch.nn.utils.get_total_norm(list(full.values())) + 1e-6)
    exact = {name: tensor * coefficient for name, tensor in full.items()}
    assert ref.relative_error(optimizer.recorded[0], exact) <= 1e-12
    assert ref.relative_error(clipped, exact) > WRONG


@pytest.mark.parametrize("stepper_name", ref.STEPPERS)
def test_schedule_advances_once_per_window(stepper_name):
    parameters, _, optimizer = train(stepper_name, sgd, 2, make_scheduler=warmup)
    full = ref.train_reference(ref.make_model(), sgd, ref.batches(STEPS), make_scheduler=warmup)
    assert ref.relative_error(parameters, full.parameters) <= EXACT
    assert optimizer.param_groups[0]["lr"] == 0.5
    unscheduled = ref.train_reference(ref.make_model(), sgd, ref.batches(STEPS))
    assert ref.relative_error(unscheduled.parameters, full.parameters) > WRONG


def test_cut_may_change_between_windows():
    model = ref.make_model()
    accumulator = bigbatch.Accumulator(model, adamw(model))
    for size, batch in zip([1, 9, 2, 4, 3, 5, 8, 1, 7, 6], ref.batches(STEPS), strict=True):
        parts = ref.cut(batch, size)
        ref.run_windows(accumulator, parts, num_microbatches=len(parts))
    full = ref.train_reference(ref.make_model(), adamw, ref.batches(STEPS))
    assert ref.relative_error(ref.parameters_of(model), full.parameters) <= EXACT


def all_optimizers():
    """Every optimizer of torch.optim, with the settings that it needs here."""
    special = {
        "LBFGS": {"max_iter": 1, "lr": 0.5},
        "Muon": {"lr": 0.02},
        "Adadelta": {"lr": 1.0},
        "Adafactor": {"lr": 0.05},
        "SGD": {"lr": 0.5, "momentum": 0.9, "nesterov": True},
    }
    kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type)]
    kinds = [kind for kind in kinds if issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer]
    assert len(kinds) >= 15
    return {kind.__name__: (kind, special.get(kind.__name__, {"lr": 0.05})) for kind in kinds}


class Matrices(torch.nn.Module):
    """Has two-dimensional parameters alone, and sparse gradients if asked."""

    def __init__(self, sparse=False):
        super().__init__()
        self.embedding = torch.nn.Embedding(ref.VOCABULARY, 5, sparse=sparse)
        self.head = torch.nn.Linear(5, ref.VOCABULARY, bias=False).requires_grad_(not sparse)

    def forward(self, tokens):
        return self.head(torch.tanh(self.embedding(tokens)))


@pytest.mark.parametrize("name", all_optimizers())
def test_every_torch_optimizer_gets_full_batch_update(name):
    kind, settings = all_optimizers()[name]
    torch.manual_seed(0)
    plain = name not in ("Muon", "SparseAdam")
    model = ref.make_model() if plain else Matrices(sparse=name == "SparseAdam").double()

    def make(module):
        return kind([p for p in module.parameters() if p.requires_grad], **settings)

    def full_batch_training(module):
        optimizer = make(module)
        for batch in ref.batches(4):
            optimizer.zero_grad()
            loss = ref.loss_mean(module, batch)
            loss.backward()
            optimizer.step((lambda loss=loss: loss) if name == "LBFGS" else None)
        return ref.parameters_of(module)

    full = full_batch_training(copy.deepcopy(model))
    naive = ref.train_mean_of_means(model, make, ref.batches(4), 2) if name != "LBFGS" else None
    assert ref.relative_error(ref.parameters_of(model), full) > WRONG
    engine = bigbatch.Engine(model, make(model), ref.loss_and_items, microbatch=2)
    reports = [engine.step(batch) for batch in ref.batches(4)]
    assert all(report.skipped is None for report in reports)
    assert ref.relative_error(ref.parameters_of(model), full) <= EXACT
    assert naive is None or ref.relative_error(naive, full) > WRONG


@pytest.mark.parametrize("limit", [0.05, None])
def test_sparse_gradients_are_summed_and_clipped_like_dense(limit):
    torch.manual_seed(0)
    sparse, dense = Matrices(sparse=True).double(), Matrices(sparse=False).double()
    dense.load_state_dict(sparse.state_dict())
    dense.head.requires_grad_(False)
    full = ref.train_reference(
        dense, lambda m: torch.optim.SGD([m.embedding.weight], lr=1.0), ref.batches(4), max_grad_norm=limit
    )
    engine = bigbatch.Engine(
        sparse,
        torch.optim.SGD([sparse.embedding.weight], lr=1.0),
        ref.loss_and_items,
        microbatch=2,
        max_grad_norm=limit,
    )
    reports = [engine.step(batch) for batch in ref.batches(4)]
    assert ref.relative_error(ref.parameters_of(sparse), full.parameters) <= EXACT
    assert [report.grad_norm for report in reports] == pytest.approx(full.grad_norms, rel=1e-12)


def test_lbfgs_that_reevaluates_loss_is_rejected():
    model = ref.make_model()
    for settings in ({}, {"max_iter": 1, "line_search_fn": "strong_wolfe"}):
        with pytest.raises(TypeError, match=r"evaluates the loss again within one update.*max_iter=1"):
            bigbatch.Accumulator(model, torch.optim.LBFGS(model.parameters(), **settings))
