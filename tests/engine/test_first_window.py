"""The first window of an engine warns of what makes updates depend on the cut; it changes nothing by that."""

import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigbatch
from bigbatch.batching.split import split
from bigbatch.verification.first_window import FirstWindowCheck
from support import full_batch_reference as ref

HEAD = "the updates of this engine are not exactly those of the full batch:\n"
TAIL = "\nbigbatch.verify shows how much they differ. Engine(check=False) turns this check off."
DROPOUT = (
    "- dropout ({}): it draws from the global random generator, so each cut has other masks. Every cut is a valid "
    "sample of the same gradient, but the numbers differ."
)
BATCH_NORM = (
    "- BatchNorm in training mode ({}): it normalizes by the mean and variance of the micro-batch, so samples "
    'influence each other. Pass batch_norm="exact" to bigbatch.Engine, set it to eval mode, or use GroupNorm or '
    "LayerNorm."
)


def rows(samples=12, width=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, width, generator=generator, dtype=torch.float64).to(dtype)


def labelled(samples=12, dtype=torch.float64):
    return rows(samples, dtype=dtype), torch.arange(samples) * 7 % 5 % 3


def mlp(*middle, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *middle, nn.Linear(6, 3)).to(dtype)


def squares(model, part):
    return model(part).square().sum(), len(part)


def classify(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


def make(model, loss_fn, microbatch=3, **settings):
    return bigbatch.Engine(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, microbatch=microbatch, **settings
    )


def warning_of(engine, batch):
    """Return the text of the only warning of the first window, and check that there is none in the second."""
    with pytest.warns(UserWarning, match="the updates of this engine") as caught:
        engine.step(batch)
    engine.step(batch)  # warnings are errors
    (warning,) = caught
    assert warning.filename == __file__
    text = str(warning.message)
    assert text.startswith(HEAD)
    assert text.endswith(TAIL)
    return text.removeprefix(HEAD).removesuffix(TAIL)


def test_modules_are_named_in_one_warning():
    model = mlp(nn.BatchNorm1d(6), nn.Dropout(0.5))
    text = warning_of(make(model, squares), rows())
    assert text == f"{DROPOUT.format('3: Dropout')}\n{BATCH_NORM.format('2: BatchNorm1d')}"


def test_modules_in_eval_mode_are_silent():
    make(mlp(nn.BatchNorm1d(6), nn.Dropout(0.5)).eval(), squares).step(rows())
    make(mlp(nn.Dropout(0.0)), squares).step(rows())


def test_check_can_be_turned_off():
    model = mlp(nn.BatchNorm1d(6), nn.Dropout(0.5))
    make(model, lambda m, part: (m(part).square().mean(), len(part)), check=False).step(rows())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_mean_is_named(dtype):
    def mean(model, batch):
        return F.cross_entropy(model(batch[0]).float(), batch[1]), len(batch[1])

    text = warning_of(make(mlp(dtype=dtype), mean, microbatch=4), labelled(dtype=dtype))
    assert text.startswith("- the loss of the term 'loss' is not a sum: ")
    assert " for 4 samples lies between those of its 2 micro-batches (" in text
    assert text.endswith("like a mean. Use reduction='sum' and return the number of items.")


def test_mean_in_uncut_window_is_named():
    def mean(model, part):
        return model(part).square().mean(), len(part)

    assert "is not a sum" in warning_of(make(mlp(), mean, microbatch=12), rows())


def test_items_that_do_not_scale_are_named():
    text = warning_of(make(mlp(), lambda m, part: (m(part).square().mean(), 1), microbatch=4), rows())
    assert text == (
        "- the items of the term 'loss' do not add up: 1 in 4 samples, but 2 over its micro-batches of 2. Count "
        "exactly the items that the loss sums."
    )


def test_mean_of_one_term_is_named():
    def loss_fn(model, batch):
        sizes = model(batch[0]).square().sum(1)
        return {"class": classify(model, batch), "size": (sizes.mean(), len(sizes))}

    def count_items(batch):
        return dict.fromkeys(("class", "size"), len(batch[1]))

    text = warning_of(make(mlp(), loss_fn, count_items=count_items), labelled())
    assert text.count("\n") == 0
    assert text.startswith("- the loss of the term 'size' is not a sum")


def contrastive(model, part):
    embedded = F.normalize(model(part), dim=1)
    return F.cross_entropy(4 * embedded @ embedded.T, torch.arange(len(part)), reduction="sum"), len(part)


def test_coupled_loss_is_named_when_it_is_cut():
    engine = make(mlp(), contrastive, microbatch=12)
    engine.step(rows())  # one micro-batch: exact
    assert warning_of(engine, rows(24)).startswith("- the loss couples samples")


def test_random_numbers_are_named():
    def noisy(model, part):
        return model(part + torch.randn_like(part)).square().sum(), len(part)

    def twice(model, part):
        return noisy(model, part)[0] + noisy(model, part)[0], len(part)

    assert warning_of(make(mlp(), twice), rows()).startswith("- random numbers in the forward or in the loss")


def test_penalty_of_a_criterion_is_named():
    head = mlp()[0]

    def loss_fn(model, part):
        return model(part).square().sum() + head.weight.square().sum(), len(part)

    text = warning_of(make(mlp(), loss_fn, microbatch=4), rows())
    assert "(it reaches head.weight)" in text


def test_pairs_in_halves_are_refused():
    def loss_fn(model, part):
        first, second = model(part).square().sum(1).chunk(2)
        return F.softplus(second - 2 * first).sum(), len(first)

    model = mlp(dtype=torch.float32)
    before = ref.parameters_of(model)
    engine = make(model, loss_fn, microbatch=4)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole sentence is compared
        engine.step(rows(dtype=torch.float32))
    assert str(raised.value) == (
        "the loss combines samples of different halves of a micro-batch, i and i + n / 2 of n samples, and a cut "
        "separates them. Pass each half as a tensor of its own, such as {'chosen': ..., 'rejected': ...}, so that one "
        "sample is one pair. To run this batch as it is, pass check=False."
    )
    assert all(torch.equal(before[name], p) for name, p in ref.parameters_of(model).items())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="the loss combines samples"):
        engine.step(rows(dtype=torch.float32))
    make(model, loss_fn, microbatch=4, check=False).step(rows(dtype=torch.float32))
    make(model, loss_fn, microbatch=12).step(rows(dtype=torch.float32))  # not cut


def test_time_first_layer_is_refused():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.GRU(4, 5), nn.Linear(5, 2)

        def forward(self, inputs):
            return self.head(self.layer(inputs)[0])

    def every_step(model, part):
        return model(part).square().sum(), part.shape[0] * part.shape[1]

    torch.manual_seed(0)
    batch = torch.randn(10, 3, 4)
    with pytest.raises(ValueError, match="the GRU 'layer' reads dimension 0 as time"):
        make(Tagger(), every_step, microbatch=4).step(batch)  # by the check of the micro-batch
    make(Tagger(), every_step, microbatch=2, batch_dim=1).step(batch)


def weighted(model, batch):
    weight = torch.tensor([0.2, 1.0, 3.0], dtype=batch[0].dtype)
    loss_sum = F.cross_entropy(model(batch[0]), batch[1], weight=weight, reduction="sum")
    return loss_sum, weight[batch[1]].float().sum()


def regression(model, batch):
    return F.mse_loss(model(batch[0]), batch[0][:, :3], reduction="sum"), 3 * len(batch[0])


def signed(model, batch):
    return (model(batch[0])[:, 0] * (batch[1] - 1)).sum(), len(batch[1])


def mean_times_items(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1]) * len(batch[1]), len(batch[1])


def rare_positives(model, batch):
    """Most micro-batches have none, and a loss all the same."""
    positive = batch[1] == 1
    logits = model(batch[0])[:, 0]
    losses = F.binary_cross_entropy_with_logits(logits, positive.to(logits), reduction="none")
    return (losses * (torch.sigmoid(logits) - positive.to(logits)).square()).sum(), positive.sum() + 1e-3 * len(logits)


def neighbours(model, batch):
    scores = model(batch[0]).square().sum(1)
    return F.softplus(scores[1::2] - scores[::2]).sum(), len(scores) // 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("microbatch", [1, 2, 5, 12])
@pytest.mark.parametrize("loss_fn", [classify, weighted, regression, signed, mean_times_items, rare_positives])
def test_correct_loss_is_silent(loss_fn, microbatch, dtype):
    make(mlp(dtype=dtype), loss_fn, microbatch=microbatch).step(labelled(dtype=dtype))


@pytest.mark.parametrize("microbatch", [2, 6, 10])
def test_pairs_that_stay_together_are_silent(microbatch):
    make(mlp(), neighbours, microbatch=microbatch).step(labelled(20))


def test_triples_of_large_microbatches_are_silent():
    def triples(model, batch):
        scores = model(batch[0]).square().sum(1)[: len(batch[0]) // 3 * 3].unflatten(0, (-1, 3))
        return F.softplus(scores[:, 1:] - scores[:, :1]).sum(), len(scores)

    make(mlp(), triples, microbatch=6).step(labelled(24))
    make(mlp(), triples, microbatch=12).step(labelled(24))


@pytest.mark.parametrize("loss_fn", [ref.loss_and_items, ref.mean_times_items])
def test_masked_and_empty_microbatches_are_silent(loss_fn):
    batch = ref.ragged_batch(12)
    batch["labels"][:4] = ref.IGNORED
    make(ref.make_model(), loss_fn, microbatch=2).step(batch)


def test_token_budget_is_never_exceeded():
    seen = []

    def pad(samples):
        return nn.utils.rnn.pad_sequence(samples, batch_first=True)

    def loss_fn(model, padded):
        seen.append(padded.numel())
        mask = padded != 0
        return (model(padded[..., None])[..., 0].square() * mask).sum(), mask.sum()

    torch.manual_seed(0)
    samples = [torch.ones(length) for length in (9, 9, 8, 8, 7, 5, 4, 3, 2, 2)]
    lengths = {"collate": pad, "lengths": lambda samples: list(map(len, samples))}
    for budget in (18, 40):
        make(nn.Linear(1, 1), loss_fn, microbatch=bigbatch.TokenBudget(budget), **lengths).step(samples)
        assert max(seen) <= budget
        seen.clear()


class Everything(nn.Module):
    """Draws random numbers and changes buffers and modes in every forward."""

    def __init__(self):
        super().__init__()
        self.layers = mlp(nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs):
        self.calls += 1
        return self.layers(inputs) + 0.1 * torch.rand(()) + 0.1 * random.random()


@pytest.mark.filterwarnings("ignore:the updates of this engine")
@pytest.mark.parametrize(
    "loss_fn", [squares, lambda model, part: (model(part).square().mean(), len(part)), contrastive]
)
@pytest.mark.parametrize("make_model", [lambda: Everything().double(), mlp, lambda: mlp(nn.BatchNorm1d(6))])
def test_check_changes_no_bit_of_the_update(loss_fn, make_model):
    results = []
    for check in (True, False):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch=3, check=check)
        torch.manual_seed(3)
        random.seed(3)
        reports = [engine.step(rows(seed=seed)) for seed in range(3)]
        results.append(
            [
                *model.state_dict().values(),
                *(torch.tensor([report.loss, report.grad_norm]) for report in reports),
                torch.get_rng_state(),
                torch.tensor(random.random()),
            ]
        )
    assert all(map(torch.equal, *results))


def test_check_changes_no_bit_of_the_criterion():
    results = []
    for check in (True, False):
        model, criterion = mlp(), nn.BatchNorm1d(3).double()
        own = [*model.parameters(), *criterion.parameters()]

        def loss_fn(model, part, criterion=criterion):
            return criterion(model(part)).square().mean(1).sum(), len(part)

        engine = bigbatch.Engine(model, torch.optim.SGD(own, lr=0.1), loss_fn, microbatch=4, check=check)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.step(rows())
        results.append([*model.state_dict().values(), *criterion.state_dict().values()])
    assert all(map(torch.equal, *results))


def mean(model, part):
    return model(part).square().mean(), len(part)


def test_empty_window_postpones_the_check():
    engine = make(mlp(), mean)
    engine.step(rows(0))
    assert "is not a sum" in warning_of(engine, rows())


def test_window_without_items_postpones_the_check():
    counts = [0, 0, 0, 0]

    def loss_fn(model, part):
        return model(part).square().mean(), (len(part) if part.any() else 0)

    engine = make(mlp(), loss_fn)
    assert engine.step(torch.zeros(len(counts), 4, dtype=torch.float64)).skipped == "no items"
    assert "is not a sum" in warning_of(engine, rows())


def test_nonfinite_window_postpones_the_check():
    engine = make(mlp(), mean)
    assert engine.step(rows() * float("nan")).skipped is not None
    assert "is not a sum" in warning_of(engine, rows())


def test_modules_are_checked_in_the_first_cut_window():
    engine = make(mlp(nn.Dropout(0.5)), squares, microbatch=12)
    engine.step(rows())  # not cut: exact
    assert warning_of(engine, rows(24)) == DROPOUT.format("2: Dropout")


@pytest.mark.parametrize("error", [AssertionError, ValueError, torch.OutOfMemoryError])
def test_loss_that_fails_on_fewer_samples_is_not_checked(error):
    def loss_fn(model, part):
        if len(part) != 4:
            raise error("only 4 samples")
        return model(part).square().mean(), len(part)

    report = make(mlp(), loss_fn, microbatch=4).step(rows())
    assert (report.num_microbatches, report.retries) == (3, 0)


def test_loss_is_not_evaluated_over_ranks_or_compiled():
    calls = []

    def loss_fn(model, part):
        calls.append(len(part))
        return mean(model, part)

    parts = split(rows(), 3, device=torch.device("cpu"))
    compiled = mlp()
    compiled.compile(backend="eager")
    for model, evaluates in ((mlp(), False), (compiled, True)):
        check = FirstWindowCheck(model, enabled=True, evaluates=evaluates)
        check.run(loss_fn, parts, may_join=True)
        assert check.is_done
    assert not calls


def test_lazy_model_is_checked_once_initialized():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1)).double()
    check = FirstWindowCheck(model, enabled=True, evaluates=True)
    parts = split(rows(), 3, device=torch.device("cpu"))
    check.run(mean, parts, may_join=True)
    assert not check.is_done
    check.watch(mean, parts)(model, rows())
    with pytest.warns(UserWarning, match="is not a sum"):
        check.run(mean, parts, may_join=True)


def test_later_windows_call_the_loss_once_per_microbatch():
    calls, trials = [], []

    def loss_fn(model, part):
        calls.append(len(part))
        trials.append(bigbatch.is_trial())
        return squares(model, part)

    engine = make(mlp(), loss_fn)
    engine.step(rows())
    assert max(calls) <= 6
    assert trials.count(True) <= 5
    assert trials.count(False) == 4
    calls.clear()
    engine.step(rows())
    assert calls == [3, 3, 3, 3]


STATISTICS = {
    "centred": lambda outputs: (outputs - outputs.mean(0)).square().sum(),
    "variance": lambda outputs: outputs.var(dim=(0, 1)) * len(outputs),
    "deviation": lambda outputs: F.relu(1 - outputs.std(0)).sum() * len(outputs),
    "softmax": lambda outputs: outputs.softmax(0).square().sum(),
    "log-sum-exp": lambda outputs: outputs.logsumexp(0).sum() * len(outputs),
}


@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
@pytest.mark.parametrize("microbatch", [4, 6])
def test_statistics_over_samples_are_named(statistic, microbatch):
    engine = make(mlp(), lambda model, part: (statistic(model(part)), len(part)), microbatch)
    assert warning_of(engine, rows()).startswith("- the loss couples samples: ")


def test_warnings_of_torch_in_check_are_hidden():
    """Halves of two samples have no variance, of which torch warns."""
    engine = make(mlp(), lambda model, part: (model(part).var(0).sum() * len(part), len(part)), microbatch=2)
    assert "couples samples" in warning_of(engine, rows(8))


@pytest.mark.parametrize("statistic", [torch.softmax, torch.logsumexp, torch.mean, torch.var])
def test_statistics_over_features_are_silent(statistic):
    make(mlp(), lambda model, part: (statistic(model(part), -1).square().sum(), len(part))).step(rows())


def masked_mean_times_samples(model, batch):
    """The mean runs over fewer items than it is multiplied by."""
    return F.cross_entropy(model(batch[0]), batch[1], ignore_index=-100) * len(batch[1]), len(batch[1])


def masked(counts, size=8):
    """Return a batch whose micro-batches have so many labels, the first ones of each."""
    inputs, labels = rows(size * len(counts)), torch.arange(size * len(counts)) % 3
    for index, count in enumerate(counts):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(index))
        labels[index * size + order[count:]] = -100
    return inputs, labels


FEWER_ITEMS = (
    "- the loss of the term 'loss' is a mean times its 8 items, but the mean runs over {}: (microbatch[1] != "
    "-100).sum(). Count these instead."
)


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        ([5, 5, 6, 4], 5),  # two neighbours with equally many labels add up
        ([8, 5, 6, 4], 5),  # nothing is left out of the first
        ([2, 5, 6, 4], 5),  # too few in the first to tell
        ([5, 5, 7, 3], 5),
    ],
)
def test_mean_over_fewer_items_is_named_whatever_the_first_microbatch_has(counts, found):
    engine = make(mlp(), masked_mean_times_samples, microbatch=8)
    assert warning_of(engine, masked(counts)) == FEWER_ITEMS.format(found)


def test_mean_over_very_few_items_is_not_taken_for_coupling():
    text = warning_of(make(mlp(), masked_mean_times_samples, microbatch=8), masked([3, 2, 3, 2]))
    assert text == (
        "- the losses of parts of a micro-batch do not add up to its loss, and some samples by themselves have none: "
        "it may be a mean over fewer items than it is multiplied by. Return the sum and the items that it runs over."
    )


def test_microbatches_that_add_up_are_looked_at_again_in_later_windows():
    engine = make(mlp(), masked_mean_times_samples, microbatch=8)
    engine.step(masked([5, 5, 5, 5]))  # warnings are errors
    assert warning_of(engine, masked([7, 5, 4, 3])) == FEWER_ITEMS.format(7)


def test_mean_that_is_guarded_against_no_item_is_not_taken_for_coupling():
    def guarded(model, batch):
        count = (batch[1] != -100).sum().clamp(min=1)
        loss = F.cross_entropy(model(batch[0]), batch[1], ignore_index=-100, reduction="sum") / count
        return loss * len(batch[1]), len(batch[1])

    text = warning_of(make(mlp(), guarded, microbatch=8), masked([3, 2, 3, 2]))
    assert "couples samples" not in text
