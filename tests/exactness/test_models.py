"""Frozen, tied, unused and checkpointed parameters, compiled models, and losses of several terms."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import bigbatch
from support import full_batch_reference as ref
from support.tiers import slow

EXACT = 1e-12
WRONG = 1e-3
# torch 2.11 trips over its own deprecation when it first compiles.
OLD_SCRIPT = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")


class Adapted(nn.Module):
    """A frozen linear layer with a trained low-rank adapter beside it."""

    def __init__(self, width=8, rank=2):
        super().__init__()
        self.embedding = nn.Embedding(ref.VOCABULARY, width).requires_grad_(False)
        self.base = nn.Linear(width, ref.VOCABULARY).requires_grad_(False)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, ref.VOCABULARY, bias=False)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        return self.base(hidden) + self.up(self.down(hidden))


class Tied(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.embedding = nn.Embedding(ref.VOCABULARY, width)
        self.head = nn.Linear(width, ref.VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.embedding(tokens)))


class Routed(nn.Module):
    """Runs one of two experts on each micro-batch's rows, and a third never."""

    def __init__(self, width=8):
        super().__init__()
        self.embedding = nn.Embedding(ref.VOCABULARY, width)
        self.experts = nn.ModuleList(nn.Linear(width, ref.VOCABULARY) for _ in range(3))

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        chosen = tokens[:, 0] % 2
        output = hidden.new_zeros(*hidden.shape[:2], ref.VOCABULARY)
        for index in (0, 1):
            if (rows := chosen == index).any():
                output[rows] = self.experts[index](hidden[rows])
        return output


class Checkpointed(ref.TokenModel):
    use_reentrant = False

    def forward(self, tokens):
        hidden = checkpoint(self._inner, self.embedding(tokens), use_reentrant=self.use_reentrant)
        return self.head(hidden)

    def _inner(self, hidden):
        return torch.tanh(self.hidden(self.norm(hidden)))


class ReentrantCheckpointed(Checkpointed):
    use_reentrant = True


class CheckpointedAdapter(Adapted):
    """A frozen embedding before the checkpoint and a frozen base inside it."""

    def forward(self, tokens):
        return checkpoint(self._inner, self.embedding(tokens).requires_grad_(), use_reentrant=True)

    def _inner(self, hidden):
        return self.base(hidden) + self.up(self.down(hidden))


MODELS = [Adapted, Tied, Routed, Checkpointed, ReentrantCheckpointed, CheckpointedAdapter]


@pytest.mark.parametrize("stepper", ref.STEPPERS.values(), ids=ref.STEPPERS.keys())
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("size", [1, 4])
def test_every_parameter_kind_gets_full_batch_update(kind, stepper, size):
    torch.manual_seed(0)
    model = kind().double()
    batch = ref.ragged_batch(10, seed=8)
    loss = ref.loss_mean(model, batch)
    loss.backward()  # torch.autograd.grad would not work under reentrant checkpointing
    full = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(list(full.values())).item()
    model.zero_grad()
    parts = [part for part in ref.cut(batch, size) if ref.count(part)]
    for part in parts:
        (ref.loss_mean(model, part) / len(parts)).backward()
    naive = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert ref.relative_error(naive, full) > WRONG

    before = ref.parameters_of(model)
    report = stepper(model, torch.optim.SGD(model.parameters(), lr=1.0), batch, size, max_grad_norm=norm * 2)
    moved = {name: before[name] - after for name, after in ref.parameters_of(model).items()}
    assert ref.relative_error({name: moved[name] for name in full}, full) <= EXACT
    assert all(not moved[name].any() for name in moved.keys() - full.keys())
    assert report.grad_norm == pytest.approx(norm, rel=EXACT)
    assert all(p.grad is None for p in model.parameters())


def test_unused_parameters_keep_state_and_values():
    """Weight decay must not touch what received no gradient, as in the full batch."""
    torch.manual_seed(0)
    model = Routed().double()
    start = copy.deepcopy(model)

    def make(module):
        return torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.5)

    optimizer = make(model)
    engine = bigbatch.Engine(model, optimizer, ref.loss_and_items, microbatch=1)
    for batch in ref.batches(5):
        engine.step(batch)
    full = ref.train_reference(start, make, ref.batches(5))
    assert ref.relative_error(ref.parameters_of(model), full.parameters) <= 1e-10
    assert all(not value.any() for value in optimizer.state[model.experts[2].weight].values())
    assert torch.equal(model.experts[2].weight, start.experts[2].weight)


def test_parameters_outside_optimizer_get_no_gradient():
    model, batch = ref.make_model(), ref.ragged_batch(9)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=1.0)
    before, full = ref.parameters_of(model), ref.full_gradient(model, batch)
    model.embedding.weight.grad = kept = torch.ones_like(model.embedding.weight)
    ref.step_by_engine(model, optimizer, batch, 2)
    assert model.embedding.weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert model.hidden.weight.grad is None
    after = ref.parameters_of(model)
    head = {name: before[name] - after[name] for name in before if name.startswith("head")}
    assert ref.relative_error(head, {name: full[name] for name in head}) <= EXACT
    assert torch.equal(after["hidden.weight"], before["hidden.weight"])


def test_parameters_changed_between_windows_are_handled():
    batch = ref.ragged_batch(9)
    model = ref.make_model()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=1.0)
    accumulator = bigbatch.Accumulator(model, optimizer)
    ref.run_windows(accumulator, ref.cut(batch, 2), num_microbatches=9)
    optimizer.add_param_group({"params": list(model.hidden.parameters()), "lr": 0.5})
    model.head.bias.requires_grad_(False)
    before, full = ref.parameters_of(model), ref.full_gradient(model, batch)
    ref.run_windows(accumulator, ref.cut(batch, 2), num_microbatches=9)
    after = ref.parameters_of(model)
    moved = {name: before[name] - after[name] for name in before}
    expected = {"head.weight": full["head.weight"]}
    expected |= {name: 0.5 * full[name] for name in ("hidden.weight", "hidden.bias")}
    assert ref.relative_error({name: moved[name] for name in expected}, expected) <= EXACT
    assert not moved["head.bias"].any()


def test_parameters_unfrozen_inside_window_are_trained_or_rejected():
    """A GAN's loop freezes and unfreezes one model while windows over it are open."""
    model, batch = ref.make_model(), ref.ragged_batch(9)
    optimizer = ref.RecordingSGD(model)
    model.hidden.requires_grad_(False)
    window = bigbatch.Accumulator(model, optimizer).window()
    model.hidden.requires_grad_(True)
    full = ref.full_gradient(model, batch)
    try:
        for part in ref.cut(batch, 2):
            window.backward(ref.loss_and_items(model, part))
        window.step()
    except (ValueError, bigbatch.WindowStateError):
        return
    assert ref.relative_error(optimizer.recorded[0], full) <= EXACT


@OLD_SCRIPT
@pytest.mark.parametrize("dynamic", [False, slow(True)])
def test_compiled_model_gets_full_batch_update(dynamic):
    model, batch = ref.make_model(), ref.ragged_batch(8, seed=3)
    before, full = ref.parameters_of(model), ref.full_gradient(model, batch)
    compiled = torch.compile(model, backend="aot_eager", dynamic=dynamic)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=1.0)
    ref.step_by_engine(compiled, optimizer, batch, 3)
    moved = {name: before[name] - after for name, after in ref.parameters_of(model).items()}
    assert ref.relative_error(moved, full) <= EXACT
    assert ref.relative_error(ref.mean_of_means_gradient(model, ref.cut(batch, 3)), full) > WRONG
    torch.compiler.reset()


@OLD_SCRIPT
def test_compiled_bf16_model_sums_in_float32():
    model, batch = ref.make_model(dtype=torch.bfloat16), ref.ragged_batch(8, seed=3)

    def loss_fn(module, part):
        logits = module(part["tokens"]).flatten(0, 1).float()
        loss = F.cross_entropy(logits, part["labels"].flatten(), ignore_index=ref.IGNORED, reduction="sum")
        return loss, ref.count(part)

    eager, compiled = ref.RecordingSGD(model), ref.RecordingSGD(model)
    bigbatch.Engine(model, eager, loss_fn, microbatch=2).step(batch)
    bigbatch.Engine(torch.compile(model, backend="aot_eager"), compiled, loss_fn, microbatch=2).step(batch)
    assert ref.relative_error(compiled.recorded[0], eager.recorded[0]) <= 1e-2
    torch.compiler.reset()


def token_count(batch):
    return int((batch["labels"] != ref.IGNORED).sum())


def pair_count(batch):
    return int((batch["labels"][:, 0] == 3).sum())


class TwoHeaded(ref.TokenModel):
    def __init__(self):
        super().__init__()
        self.value = nn.Linear(8, 1)

    def forward(self, tokens):
        hidden = self.norm(self.embedding(tokens))
        return self.head(torch.tanh(self.hidden(hidden))), self.value(hidden.mean(1))[:, 0]


def two_terms(model, batch, *, leave_out_empty=False):
    """Tokens and samples, counted each by itself; some micro-batches have none of one, or of both."""
    logits, values = model(batch["tokens"])
    tokens = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=ref.IGNORED, reduction="sum")
    chosen = batch["labels"][:, 0] == 3
    terms = {
        "tokens": (tokens, token_count(batch)),
        "values": (values[chosen].square().sum() * 5, int(chosen.sum())),
    }
    return {name: term for name, term in terms.items() if term[1] or not leave_out_empty}


def count_two(batch):
    return {"tokens": token_count(batch), "values": pair_count(batch)}


def two_term_setup():
    torch.manual_seed(0)
    model, batch = TwoHeaded().double(), ref.ragged_batch(12, seed=2)
    batch["labels"][[1, 6, 7], 0] = 3
    full = ref.gradients_of(model, sum(loss / items for loss, items in two_terms(model, batch).values()))
    return model, batch, full


@pytest.mark.parametrize("size", [1, 2, 5, 12])
@pytest.mark.parametrize("leave_out_empty", [False, True])
@pytest.mark.parametrize("use_engine", [True, False])
def test_each_term_divides_by_its_own_total(size, leave_out_empty, use_engine):
    model, batch, full = two_term_setup()
    batch = {name: column[[i for i in range(12) if ref.count(ref.cut(batch, 1)[i])]] for name, column in batch.items()}
    optimizer = ref.RecordingSGD(model)

    def loss_fn(module, part):
        return two_terms(module, part, leave_out_empty=leave_out_empty)

    if use_engine:
        engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch=size, count_items=count_two)
        report = engine.step(batch)
    else:
        (report,) = ref.run_windows(
            bigbatch.Accumulator(model, optimizer),
            ref.cut(batch, size),
            num_microbatches=12,
            loss_fn=loss_fn,
            count_items=count_two,
        )
    assert ref.relative_error(optimizer.recorded[0], full) <= EXACT
    losses = {name: (loss / items).item() for name, (loss, items) in two_terms(model, batch).items()}
    assert {name: term.loss for name, term in report.terms.items()} == pytest.approx(losses, rel=EXACT)
    assert {name: term.items for name, term in report.terms.items()} == count_two(batch)
    assert report.loss == pytest.approx(sum(losses.values()), rel=EXACT)
    assert report.items == count_two(batch)["tokens"]
    if size < len(batch["tokens"]):
        parts = [two_terms(model, part, leave_out_empty=True).values() for part in ref.cut(batch, size)]
        means = [sum(loss / items for loss, items in terms) for terms in parts if terms]
        assert ref.relative_error(ref.gradients_of(model, torch.stack(means).mean()), full) > WRONG


def test_microbatch_without_any_term_adds_nothing():
    model, batch, _ = two_term_setup()
    batch["labels"][4] = ref.IGNORED
    full = ref.gradients_of(model, sum(loss / items for loss, items in two_terms(model, batch).values()))
    optimizer = ref.RecordingSGD(model)
    engine = bigbatch.Engine(
        model,
        optimizer,
        lambda module, part: two_terms(module, part, leave_out_empty=True),
        microbatch=1,
        count_items=count_two,
    )
    engine.step(batch)
    assert ref.relative_error(optimizer.recorded[0], full) <= EXACT


def test_term_without_items_in_window_adds_nothing():
    model, batch, _ = two_term_setup()
    batch["labels"][:, 0] = 1
    assert count_two(batch)["values"] == 0
    tokens, items = two_terms(model, batch)["tokens"]
    full = ref.gradients_of(model, tokens / items)
    optimizer = ref.RecordingSGD(model)
    report = bigbatch.Engine(model, optimizer, two_terms, microbatch=5, count_items=count_two).step(batch)
    assert ref.relative_error(optimizer.recorded[0], full) <= EXACT
    assert report.loss == pytest.approx((tokens / items).item(), rel=EXACT)
    assert report.terms["values"].items == 0
    assert report.terms["values"].loss != report.terms["values"].loss


def test_window_without_items_in_any_term_changes_nothing():
    model, batch, _ = two_term_setup()
    batch["labels"].fill_(ref.IGNORED)
    before = ref.parameters_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.5)
    report = bigbatch.Engine(model, optimizer, two_terms, microbatch=5, count_items=count_two).step(batch)
    assert report.skipped == "no items"
    assert all(torch.equal(before[name], p) for name, p in ref.parameters_of(model).items())


def test_multi_term_windows_use_their_own_totals():
    model, batch, _ = two_term_setup()
    batch["labels"][[0, 5, 9], 0] = 3
    optimizer = ref.RecordingSGD(model)
    ref.run_windows(
        bigbatch.Accumulator(model, optimizer),
        ref.cut(batch, 2),
        num_microbatches=4,
        loss_fn=two_terms,
        count_items=count_two,
    )
    for gradient, rows in zip(optimizer.recorded, (slice(0, 8), slice(8, 12)), strict=True):
        part = {name: column[rows] for name, column in batch.items()}
        full = ref.gradients_of(model, sum(loss / items for loss, items in two_terms(model, part).values()))
        assert ref.relative_error(gradient, full) <= EXACT


def test_wrong_count_is_found_before_update():
    model, batch, _ = two_term_setup()
    before = ref.parameters_of(model)
    engine = bigbatch.Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        two_terms,
        microbatch=5,
        count_items=lambda part: {**count_two(part), "values": 7},
    )
    with pytest.raises(
        ValueError, match="count_items returned 7 items for the term 'values', and the micro-batches had 5"
    ):
        engine.step(batch)
    assert all(torch.equal(before[name], p) for name, p in ref.parameters_of(model).items())
    assert all(p.grad is None for p in model.parameters())


def test_several_terms_without_totals_are_rejected():
    model, batch, _ = two_term_setup()
    engine = bigbatch.Engine(model, torch.optim.SGD(model.parameters()), two_terms, microbatch=5)
    with pytest.raises(ValueError, match=r"the terms 'tokens', 'values': several terms need their totals"):
        engine.step(batch)


def test_term_missing_from_count_items_is_rejected():
    model, batch, _ = two_term_setup()
    engine = bigbatch.Engine(
        model,
        torch.optim.SGD(model.parameters()),
        two_terms,
        microbatch=5,
        count_items=lambda part: {"tokens": token_count(part)},
    )
    with pytest.raises(ValueError, match="'values', and count_items returned the totals of 'tokens'"):
        engine.step(batch)


def test_weight_totals_may_round_differently_from_parts():
    """Σ over the batch and Σ over the micro-batches of float32 weights differ in the last bit, and that is no lie."""
    torch.manual_seed(0)
    model, inputs, weights = nn.Linear(3, 1).double(), torch.randn(9, 3).double(), torch.rand(9)

    def loss_fn(module, batch):
        return {"weighted": ((module(batch[0])[:, 0] * batch[1]).sum(), batch[1].sum())}

    full = ref.gradients_of(model, loss_fn(model, (inputs, weights))["weighted"][0] / weights.sum().item())
    optimizer = ref.RecordingSGD(model)
    engine = bigbatch.Engine(
        model, optimizer, loss_fn, microbatch=1, count_items=lambda batch: {"weighted": batch[1].sum()}
    )
    engine.step((inputs, weights))
    assert ref.relative_error(optimizer.recorded[0], full) <= 1e-6


def test_single_named_term_needs_no_totals():
    model, batch = ref.make_model(), ref.ragged_batch(9)
    optimizer = ref.RecordingSGD(model)
    report = bigbatch.Engine(
        model, optimizer, lambda module, part: {"tokens": ref.loss_and_items(module, part)}, microbatch=2
    ).step(batch)
    assert ref.relative_error(optimizer.recorded[0], ref.full_gradient(model, batch)) <= EXACT
    assert list(report.terms) == ["tokens"]


def test_gradient_penalty_is_differentiated_twice():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), torch.randn(9, 3).double()

    def penalty(module, rows):
        rows = rows.clone().requires_grad_()
        (slope,) = torch.autograd.grad(module(rows).sum(), rows, create_graph=True)
        return (slope.norm(dim=1) - 1).square().sum(), len(rows)

    full = ref.gradients_of(model, penalty(model, inputs)[0] / 9)
    optimizer = ref.RecordingSGD(model)
    bigbatch.Engine(model, optimizer, penalty, microbatch=2).step(inputs)
    assert ref.relative_error(optimizer.recorded[0], full) <= EXACT


def test_complex_and_mixed_parameters_are_summed():
    torch.manual_seed(0)

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex128))
            self.wide = nn.Linear(3, 3).double()
            self.single = nn.Linear(3, 1)

        def forward(self, rows):
            return self.single((self.wide(rows) * self.phase).abs().float())[:, 0]

    model, inputs = Mixed(), torch.randn(9, 3).double()
    full = ref.gradients_of(model, model(inputs).square().mean())
    optimizer = ref.RecordingSGD(model)
    bigbatch.Engine(model, optimizer, lambda m, x: (m(x).square().sum(), len(x)), microbatch=2).step(inputs)
    real = {name: torch.view_as_real(g) if g.is_complex() else g for name, g in optimizer.recorded[0].items()}
    expected = {name: torch.view_as_real(g) if g.is_complex() else g for name, g in full.items()}
    assert ref.relative_error(real, expected) <= 1e-6


def test_parameters_sharing_storage_are_trained_as_two():
    storage = torch.randn(4, 3).double()
    model = nn.ParameterDict({"top": nn.Parameter(storage[:2]), "bottom": nn.Parameter(storage[2:])})
    inputs = torch.randn(9, 3).double()

    def loss_fn(module, rows):
        return ((rows @ module["top"].T) * (rows @ module["bottom"].T)).sum(), len(rows)

    full = ref.gradients_of(model, loss_fn(model, inputs)[0] / 9)
    optimizer = ref.RecordingSGD(model)
    bigbatch.Engine(model, optimizer, loss_fn, microbatch=2).step(inputs)
    assert ref.relative_error(optimizer.recorded[0], full) <= EXACT
