"""The conductor: what it takes, what it reports, what it refuses. Exactness is in tests/exactness."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigbatch
from bigbatch.batching.token_groups import round_up_row
from bigbatch.engine.microbatch_size import WINDOWS_BEFORE_GROWTH
from support import full_batch_reference as ref

EXACT = 1e-12
WRONG = 1e-3


def make(loss_fn=ref.loss_and_items, model=None, **settings):
    model = ref.make_model() if model is None else model
    optimizer = ref.RecordingSGD(model)
    return bigbatch.Engine(model, optimizer, loss_fn, **{"microbatch": 3, **settings}), optimizer


def assert_full(optimizer, model, batch, size=3):
    assert ref.relative_error(optimizer.recorded[-1], ref.full_gradient(model, batch)) <= EXACT
    naive = ref.mean_of_means_gradient(model, ref.cut(batch, size))
    assert ref.relative_error(naive, ref.full_gradient(model, batch)) > WRONG


def test_any_pytree_is_a_batch():
    batch = ref.ragged_batch(10)
    shapes = {
        "tuple": (lambda b: (b["tokens"], b["labels"]), lambda b: b),
        "nested": (lambda b: {"x": [b["tokens"], None], "y": (b["labels"],)}, lambda b: (b["x"][0], b["y"][0])),
        "0-d": (lambda b: [b["tokens"], b["labels"], torch.tensor(1.0)], lambda b: b[:2]),
    }
    for wrap, take in shapes.values():

        def unwrap(part, take=take):
            return dict(zip(("tokens", "labels"), take(part), strict=True))

        engine, optimizer = make(lambda model, part, unwrap=unwrap: ref.loss_and_items(model, unwrap(part)))
        engine.step(wrap(batch))
        assert_full(optimizer, engine.model, batch)


def test_sample_lists_are_padded_per_microbatch():
    """Padding of another width in each micro-batch is masked, and changes nothing."""
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(ref.VOCABULARY, (length,), generator=generator) for length in (6, 1, 3, 2, 5, 1, 4)]

    def collate(some):
        tokens = nn.utils.rnn.pad_sequence(some, batch_first=True)
        labels = nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=ref.IGNORED)
        return {"tokens": tokens, "labels": labels}

    engine, optimizer = make(collate=collate, lengths=lambda batch: [len(sample) for sample in batch])
    report = engine.step(samples)
    assert_full(optimizer, engine.model, collate(samples))
    assert report.items == report.tokens == 22
    assert report.num_microbatches == 3


def test_lengths_become_report_tokens():
    batch = ref.ragged_batch(10)
    engine, _ = make(lengths=lambda part: (part["labels"] != ref.IGNORED).sum(1))
    tokens = engine.step(batch).tokens
    assert tokens == ref.count(batch)
    assert type(tokens) is int
    assert make()[0].step(batch).tokens is None


def test_failing_lengths_raise_before_update():
    engine, optimizer = make(lengths=lambda part: part["no such column"])
    with pytest.raises(KeyError):
        engine.step(ref.ragged_batch(10))
    assert not optimizer.recorded


def test_batch_smaller_than_microbatch_is_one_microbatch():
    batch = ref.ragged_batch(4)
    engine, optimizer = make(microbatch=100)
    report = engine.step(batch)
    assert report.num_microbatches == 1
    assert ref.relative_error(optimizer.recorded[0], ref.full_gradient(engine.model, batch)) <= EXACT


@pytest.mark.parametrize("batch", [{"tokens": torch.zeros(0, 6).long(), "labels": torch.zeros(0, 6).long()}])
def test_empty_batch_is_window_without_items(batch):
    engine, optimizer = make()
    report = engine.step(batch)
    assert (report.skipped, report.num_microbatches, report.items, report.step) == ("no items", 0, 0, 0)
    assert report.loss != report.loss
    assert not optimizer.recorded


@pytest.mark.parametrize("microbatch", [0, -1])
def test_zero_microbatch_is_rejected(microbatch):
    with pytest.raises(
        ValueError, match=f"microbatch is {microbatch}: it must be at least 1, the samples of one micro-batch"
    ):
        make(microbatch=microbatch)


@pytest.mark.parametrize("microbatch", [True, 2.5])
def test_non_integer_microbatch_is_rejected(microbatch):
    with pytest.raises(TypeError, match=f"microbatch is {microbatch!r}: it must be an int"):
        make(microbatch=microbatch)


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda m, b: ref.loss_mean(m, b), TypeError, r"is a tensor of shape \(\): return the pair \(loss_sum, items"),
        (lambda m, b: (m(b["tokens"]), 3), ValueError, r"has shape \(3, 6, 11\): it must be the 0-d sum"),
        (lambda m, b: (ref.loss_mean(m, b).item(), 3), TypeError, "is a float: it must be a 0-d tensor"),
        (lambda m, b: (ref.loss_mean(m, b), -1), ValueError, "are -1: they must be a finite count, 0 or more"),
        (lambda m, b: (ref.loss_mean(m, b), float("nan")), ValueError, "are nan: they must be a finite count"),
        (lambda m, b: (ref.loss_mean(m, b), "many"), TypeError, "are a str: they must be a number"),
        (lambda m, b: (ref.loss_mean(m, b), b["labels"] >= 0), ValueError, r"have shape \(3, 6\)"),
        (lambda m, b: (ref.loss_mean(m, b).detach(), 3), ValueError, "does not depend on any parameter.*detached"),
        (lambda m, b: (torch.tensor(1.0), 3), ValueError, "does not depend on any parameter"),
        (lambda m, b: None, TypeError, "is a NoneType: return the pair"),
    ],
)
def test_loss_function_with_wrong_result_is_rejected(loss_fn, error, message):
    engine, optimizer = make(loss_fn)
    before = ref.parameters_of(engine.model)
    with pytest.raises(error, match=message):
        engine.step(ref.ragged_batch(10))
    assert not optimizer.recorded
    assert all(p.grad is None for p in engine.model.parameters())
    assert all(torch.equal(before[name], p) for name, p in ref.parameters_of(engine.model).items())
    engine.loss_fn = ref.loss_and_items
    assert engine.step(ref.ragged_batch(10)).step == 1


def test_loss_function_error_leaves_next_step_exact():
    batch, calls = ref.ragged_batch(10), []

    def loss_fn(model, part):
        calls.append(part)
        if len(calls) == 3:
            raise ZeroDivisionError("mine")
        return ref.loss_and_items(model, part)

    engine, optimizer = make(loss_fn)
    with pytest.raises(ZeroDivisionError, match="mine"):
        engine.step(batch)
    assert all(p.grad is None for p in engine.model.parameters())
    engine.step(batch)
    assert_full(optimizer, engine.model, batch)


def test_mean_returned_as_sum_is_found_by_verify():
    batch = ref.ragged_batch(10)

    def mean_with_items(model, part):
        return ref.loss_mean(model, part), ref.count(part)

    batch["labels"][:, 0] = 1
    verification = bigbatch.verify(ref.make_model(), mean_with_items, batch, microbatch=3)
    assert not verification.exact
    assert "is not a sum" in verification.causes[0]


def test_engine_step_inside_open_window_is_rejected():
    engine, _ = make()
    window = engine.accumulator.window()
    window.backward(ref.loss_and_items(engine.model, ref.ragged_batch(3)))
    with pytest.raises(bigbatch.WindowStateError, match="still open and holds the gradients of 1 micro-batches"):
        engine.step(ref.ragged_batch(10))
    window.abort()


def test_report_describes_window():
    batch = ref.ragged_batch(10)
    engine, _ = make(lengths=lambda part: [ref.LENGTH] * len(part["tokens"]))
    engine.step(batch)
    report = engine.step(batch)
    assert [field.name for field in dataclasses.fields(report) if not field.name.startswith("_")] == [
        "step",
        "items",
        "grad_norm",
        "num_microbatches",
        "tokens",
        "peak_bytes",
        "elapsed_s",
        "syncs",
        "skipped",
        "retries",
        "ranks",
        "noise",
    ]
    full = ref.full_gradient(engine.model, batch)
    assert report.step == 2
    assert report.loss == pytest.approx(ref.loss_mean(engine.model, batch).item(), rel=EXACT)
    assert report.items == ref.count(batch)
    assert report.grad_norm == pytest.approx(torch.nn.utils.get_total_norm(list(full.values())).item(), rel=EXACT)
    assert report.num_microbatches == 4
    assert report.tokens == 10 * ref.LENGTH
    assert report.peak_bytes is None or report.peak_bytes > 10**6
    assert report.elapsed_s > 0
    assert report.syncs == 0
    assert report.skipped is None
    assert report.terms == {"loss": bigbatch.TermReport(loss=report.loss, items=report.items)}
    assert {type(getattr(report, name)) for name in ("loss", "grad_norm", "elapsed_s")} == {float}


def test_report_is_frozen_and_copies_and_pickles():
    engine, _ = make()
    report = engine.step(ref.ragged_batch(10))
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.step = 5
    for copied in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert copied == report
        assert copied.loss == report.loss
    assert "step=1" in repr(report)
    assert "_read" not in repr(report)


def test_earlier_reports_stay_unchanged():
    engine, _ = make(model=ref.make_model())
    engine.accumulator.optimizer.param_groups[0]["lr"] = 1.0
    losses = []
    reports = []
    for batch in ref.batches(4):
        losses.append(ref.loss_mean(engine.model, batch).item())
        reports.append(engine.step(batch))
    assert [report.loss for report in reports] == pytest.approx(losses, rel=EXACT)


def test_microbatches_are_split_lazily_and_batch_is_unchanged():
    batch = ref.ragged_batch(10)
    kept = copy.deepcopy(batch)
    engine, _ = make()
    engine.step(batch)
    assert all(torch.equal(batch[name], kept[name]) for name in kept)


def test_inplace_activation_gives_full_batch_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Linear(8, 1)).double()
    inputs = torch.randn(10, 3).double()
    full = ref.gradients_of(model, F.mse_loss(model(inputs), inputs[:, :1].square()))

    def loss_fn(module, rows):
        return F.mse_loss(module(rows), rows[:, :1].square(), reduction="sum"), len(rows)

    engine, optimizer = make(loss_fn, model=model)
    engine.step(inputs)
    assert ref.relative_error(optimizer.recorded[0], full) <= EXACT


def test_accumulators_and_engines_over_one_model_alternate():
    model, batch = ref.make_model(), ref.ragged_batch(10)
    first, one = make(model=model)
    second, other = make(model=model)
    first.step(batch)
    second.step(batch)
    first.step(batch)
    for recorded in (*one.recorded, *other.recorded):
        assert ref.relative_error(recorded, ref.full_gradient(model, batch)) <= EXACT


def test_copied_engine_trains_its_own_model():
    model = ref.make_model()
    engine = bigbatch.Engine(model, torch.optim.SGD(model.parameters(), lr=1.0), ref.loss_and_items, microbatch=3)
    other = copy.deepcopy(engine)
    batch = ref.ragged_batch(10)
    before = ref.parameters_of(engine.model)
    other.step(batch)
    assert all(torch.equal(before[name], p) for name, p in ref.parameters_of(engine.model).items())
    moved = {name: before[name] - after for name, after in ref.parameters_of(other.model).items()}
    assert ref.relative_error(moved, ref.full_gradient(engine.model, batch)) <= EXACT


def ragged(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    return [torch.randn(length, generator=generator, dtype=torch.float64) for length in lengths]


def pad(samples):
    return nn.utils.rnn.pad_sequence(samples, batch_first=True)


def budgeted(budget, seen, **settings):
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1).double()
    optimizer = ref.RecordingSGD(model)

    def loss_fn(model, padded):
        seen.append(tuple(padded.shape))
        mask = padded != 0
        return ((model(padded[..., None])[..., 0] - 1).square() * mask).sum(), mask.sum()

    engine = bigbatch.Engine(
        model,
        optimizer,
        loss_fn,
        microbatch=budget,
        **{"collate": pad, "lengths": lambda samples: [len(sample) for sample in samples], **settings},
    )
    return engine, optimizer


@pytest.mark.parametrize("tokens", [39, 64, 200, 5000])
def test_token_budget_is_respected_and_exact(tokens):
    samples, whole, seen = ragged(30), [], []
    engine, full = budgeted(len(samples), whole)
    engine.step(samples)
    engine, optimizer = budgeted(bigbatch.TokenBudget(tokens), seen)
    report = engine.step(samples)
    assert max(rows * longest for rows, longest in seen) <= tokens
    assert seen == sorted(seen, key=lambda shape: -shape[0] * shape[1])
    assert report.tokens == sum(map(len, samples))
    assert report.num_microbatches == len(seen)
    assert ref.relative_error(optimizer.recorded[0], full.recorded[0]) <= 1e-12


def test_sample_longer_than_budget_is_named():
    engine, _ = budgeted(bigbatch.TokenBudget(20), [])
    with pytest.raises(ValueError, match=r"^lengths\[10\] is 39, .* token_budget=20, .* Pass token_budget=39"):
        engine.step(ragged(30))


def test_token_budget_requires_lengths():
    with pytest.raises(ValueError, match="a TokenBudget needs the length of each sample: pass lengths="):
        budgeted(bigbatch.TokenBudget(20), [], lengths=None)


@pytest.mark.parametrize(("tokens", "kind"), [(0, ValueError), (-4, ValueError), (2.5, TypeError), (True, TypeError)])
def test_token_budget_is_positive_int(tokens, kind):
    with pytest.raises(kind, match="the token budget is"):
        bigbatch.TokenBudget(tokens)


def test_token_budget_shrinks_on_oom_to_longest_sample():
    samples, seen = ragged(30), []
    engine, _ = budgeted(bigbatch.TokenBudget(200), seen)
    loss_fn, limit = engine.loss_fn, [100]

    def limited(model, padded):
        if padded.numel() > limit[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss_fn(model, padded)

    engine.loss_fn = limited
    reports = [engine.step(samples) for _ in range(15)]
    assert reports[0].retries > 0
    assert reports[-1].retries == 0
    assert all(report.items == reports[0].items for report in reports)
    limit[0] = 45
    assert [engine.step(samples).retries for _ in range(20)][-1] == 0


# packed rows ---------------------------------------------------------------------------------------------------------


def pack(samples):
    """One row of a size that `round_up_row` gives; zeros fill it, and no sample has any."""
    row = torch.cat(samples)
    return torch.nn.functional.pad(row, (0, round_up_row(len(row)) - len(row)))[None]


def packing(budget, seen, **settings):
    return budgeted(budget, seen, **{"collate": pack, "layout": "packed", **settings})


def test_packed_rows_require_lengths_and_collate():
    for missing, said in (
        ("lengths", "lengths=, a function from the batch to the tokens of each sample"),
        ("collate", "collate="),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole sentence is compared
            make(**{"layout": "packed", "collate": pack, "lengths": len, missing: None})
        assert str(caught.value) == f'layout="packed" needs {said}: samples are packed into rows by their tokens.'


@pytest.mark.parametrize("layout", ["dense", "Packed", "", None, True])
def test_layout_is_padded_or_packed(layout):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole sentence is compared
        make(layout=layout)
    assert str(caught.value) == f'layout is {layout!r}: it must be "padded" or "packed".'


@pytest.mark.parametrize("tokens", [39, 64, 130, 256, 5000])
def test_packed_rows_respect_budget_and_are_exact(tokens):
    samples, whole, seen = ragged(30), [], []
    engine, full = budgeted(len(samples), whole)
    engine.step(samples)
    engine, optimizer = packing(bigbatch.TokenBudget(tokens), seen)
    report = engine.step(samples)
    assert ref.relative_error(optimizer.recorded[0], full.recorded[0]) <= EXACT
    taken = [sum(len(samples[i]) for i in group) for group in engine.groups([len(sample) for sample in samples])]
    assert max(taken) <= tokens
    assert seen == [(1, round_up_row(row)) for row in taken]
    assert taken == sorted(taken, reverse=True)
    assert report.items == report.tokens == sum(taken) == sum(map(len, samples))
    assert report.num_microbatches == len(seen)
    mean_of_means = sum(
        torch.autograd.grad(engine.loss_fn(engine.model, pack(part))[0] / sum(map(len, part)), engine.model.weight)[0]
        for part in ([samples[i] for i in group] for group in engine.groups([len(sample) for sample in samples]))
    ) / len(taken)
    wrong = (mean_of_means - full.recorded[0]["weight"]).norm() / full.recorded[0]["weight"].norm()
    assert (wrong > WRONG) == (len(taken) > 1)


def test_packed_rows_are_fewer_than_padded_ones():
    samples = ragged(30)
    padded, packed = (
        make_engine(bigbatch.TokenBudget(64), [])[0].step(samples).num_microbatches
        for make_engine in (budgeted, packing)
    )
    assert packed == -(-sum(map(len, samples)) // 64) or packed < padded


def test_packed_samples_can_be_counted_instead_of_tokens():
    samples, seen = ragged(30), []
    engine, optimizer = packing(7, seen)
    assert engine.token_budget is None
    report = engine.step(samples)
    assert report.num_microbatches == len(seen) == 5
    full_engine, full = budgeted(len(samples), [])
    full_engine.step(samples)
    assert ref.relative_error(optimizer.recorded[0], full.recorded[0]) <= EXACT


def test_packed_sample_longer_than_budget_is_named():
    engine, _ = packing(bigbatch.TokenBudget(20), [])
    with pytest.raises(ValueError, match=r"^lengths\[10\] is 39, .* token_budget=20, .* Pass token_budget=39"):
        engine.step(ragged(30))


def test_packed_rows_after_oom_use_few_sizes():
    samples, seen = ragged(60), []
    engine, optimizer = packing(bigbatch.TokenBudget(600), seen)
    full_engine, full = budgeted(len(samples), [])
    full_engine.step(samples)
    loss_fn, limit = engine.loss_fn, [1000]

    def limited(model, row):
        if row.numel() > limit[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss_fn(model, row)

    def step():
        report = engine.step(samples)
        assert report.items == sum(map(len, samples))
        assert ref.relative_error(optimizer.recorded[-1], full.recorded[0]) <= EXACT
        return report.retries

    engine.loss_fn = limited
    assert (step(), engine.token_budget) == (0, 600)
    limit[0] = 400
    budgets = []
    while step():
        budgets.append(engine.token_budget)
    assert budgets == [512, 448, 384], "93 % of each, and then the size below"
    limit[0] = 1000
    for _ in range(WINDOWS_BEFORE_GROWTH - 2):
        assert (step(), engine.token_budget) == (0, 384)
    grown = []
    for _ in range(4):
        step()
        grown.append(engine.token_budget)
        for _ in range(WINDOWS_BEFORE_GROWTH - 1):
            assert (step(), engine.token_budget) == (0, grown[-1])
    assert grown == [448, 512, 576, 600], "a size at a time, and no further than what was asked for"


def test_packed_rows_of_one_sample_have_minimum_size():
    """Below 64 tokens there are no sizes; a budget of 1 leaves every sample alone."""
    samples = ragged(4)
    engine, _ = packing(bigbatch.TokenBudget(70), [])
    loss_fn, failing = engine.loss_fn, [True]

    def limited(model, row):
        if failing[0]:
            failing[0] = False
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss_fn(model, row)

    engine.loss_fn = limited
    budgets = []
    for _ in range(60):
        failing[0] = True
        assert engine.step(samples).retries == 1
        budgets.append(engine.token_budget)
    assert budgets[:4] == [64, 59, 54, 50]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[-1] == 1
    assert engine.groups([len(sample) for sample in samples]) == tuple(
        (i,) for i in sorted(range(4), key=lambda i: (-len(samples[i]), i))
    )


def test_cuda_graphs_require_cuda_device():
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole sentence is compared
        make(cuda_graphs=True)
    said = "cuda_graphs=True needs a model on a CUDA device, and this one is on cpu: leave it out."
    assert str(caught.value) == said


def test_release_without_cuda_graphs_does_nothing():
    engine, optimizer = make()
    engine.release_cuda_graphs()
    batch = ref.ragged_batch(10)
    engine.step(batch)
    engine.release_cuda_graphs()
    assert engine.runner.static_buffers is None
    assert_full(optimizer, engine.model, batch)


def test_two_views_may_end_in_two_samples():
    samples = [((torch.full((3,), float(i)), torch.full((3,), -2.0 * i)), float(i)) for i in range(8)]
    torch.manual_seed(0)
    model, other = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    other.load_state_dict(model.state_dict())

    def two_views(model, batch):
        (first, second), labels = batch
        return (model(first) * model(second) * labels[:, None]).sum(), len(labels)

    engine = bigbatch.Engine(model, torch.optim.SGD(model.parameters(), lr=1e-4), two_views, microbatch=1)
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-4)
    for batch in torch.utils.data.DataLoader(samples, batch_size=3):
        engine.step(batch)
        optimizer.zero_grad()
        loss_sum, items = two_views(other, batch)
        (loss_sum / items).backward()
        optimizer.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("microbatch", [4, bigbatch.TokenBudget(64)])
@pytest.mark.parametrize("number", [7, 9])
def test_wrong_number_of_lengths_is_refused(microbatch, number: int):
    model = ref.make_model()
    before = [parameter.clone() for parameter in model.parameters()]
    engine = bigbatch.Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        ref.loss_and_items,
        microbatch=microbatch,
        lengths=lambda _: [1] * number,
    )
    with pytest.raises(ValueError, match="lengths= returned") as refused:
        engine.step(ref.ragged_batch(8))
    assert str(refused.value) == (
        f"lengths= returned {number} lengths for a batch of 8 samples: it must return one for each, in their order."
    )
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))
