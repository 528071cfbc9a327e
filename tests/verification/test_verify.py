"""Proof on a user's own model: exact where it is, and the cause named where it is not."""

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigbatch
from support import full_batch_reference as ref
from support.tiers import slow

SAMPLES = 12


def batch_with_items(samples=SAMPLES):
    batch = ref.ragged_batch(samples)
    batch["labels"][:, 0] = batch["tokens"][:, 0] % 3  # no sample without an item: means are finite
    return batch


def squares(model, rows):
    return model(rows).square().sum(), len(rows)


def rows(samples=SAMPLES, width=4, dtype=torch.float64):
    return torch.randn(samples, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def mlp(*middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Linear(6, 1)).double()


@pytest.mark.parametrize("microbatch", [None, 1, 5, 12, 100, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
def test_clean_model_is_exact_in_every_cut(microbatch):
    model, batch = ref.make_model(), batch_with_items()
    found = bigbatch.verify(model, ref.loss_and_items, batch, microbatch=microbatch)
    assert found.exact
    assert found.relative_error <= 1e-12
    assert (found.tolerance, found.dtype) == (1e-12, torch.float64)
    assert (found.num_samples, found.reference_microbatch) == (SAMPLES, SAMPLES)
    assert found.worst == ()
    assert found.causes == ()
    full = ref.full_gradient(model, batch)
    for cut in found.cuts:
        assert cut.num_microbatches == -(-SAMPLES // cut.microbatch)
        naive = ref.relative_error(ref.mean_of_means_gradient(model, ref.cut(batch, cut.microbatch)), full)
        assert cut.mean_of_means_error == pytest.approx(naive, rel=1e-6, abs=1e-14)
        assert naive > 1e-3 or cut.num_microbatches == 1


def test_default_cuts_are_sixteen_five_and_two_microbatches():
    found = bigbatch.verify(mlp(), squares, rows(64), microbatch=None)
    assert [(cut.microbatch, cut.num_microbatches) for cut in found.cuts] == [(4, 16), (13, 5), (32, 2)]


def test_empty_microbatches_are_exact_unlike_mean_of_means():
    batch = batch_with_items()
    batch["labels"][:4] = ref.IGNORED
    found = bigbatch.verify(ref.make_model(), ref.mean_times_items, batch, microbatch=2)
    assert found.exact
    assert math.isnan(found.cuts[0].mean_of_means_error)


def test_constant_loss_of_empty_microbatch_is_exact():
    """``return torch.zeros(()), 0`` is what careful users write for nothing."""

    def loss_fn(model, part):
        return ref.loss_and_items(model, part) if ref.count(part) else (torch.zeros(()), 0)

    batch = batch_with_items()
    batch["labels"][:4] = ref.IGNORED
    found = bigbatch.verify(ref.make_model(), loss_fn, batch, microbatch=2)
    assert found.exact, str(found)


def test_several_terms_are_verified_with_their_totals():
    def loss_fn(model, part):
        logits = model(part["tokens"])
        tokens = F.cross_entropy(
            logits.flatten(0, 1), part["labels"].flatten(), ignore_index=ref.IGNORED, reduction="sum"
        )
        return {"tokens": (tokens, ref.count(part)), "size": (logits.square().mean((1, 2)).sum(), len(logits))}

    def count_items(part):
        return {"tokens": ref.count(part), "size": len(part["tokens"])}

    batch = batch_with_items()
    found = bigbatch.verify(ref.make_model(), loss_fn, batch, microbatch=[1, 5], count_items=count_items)
    assert found.exact, str(found)
    with pytest.raises(ValueError, match="several terms need their totals"):
        bigbatch.verify(ref.make_model(), loss_fn, batch)


def test_lists_with_collate_are_verified():
    def collate(samples):
        return nn.utils.rnn.pad_sequence(samples, batch_first=True)

    def loss_fn(model, padded):
        mask = padded.ne(0).all(-1)
        return (model(padded)[..., 0].square() * mask).sum(), mask.sum()

    samples = [row.repeat(1 + index % 4, 1) for index, row in enumerate(rows())]
    found = bigbatch.verify(mlp(nn.Tanh()), loss_fn, samples, microbatch=[1, 5], collate=collate)
    assert found.exact, str(found)
    assert found.cuts[0].mean_of_means_error > 1e-3


def cause_of(model, loss_fn=squares, batch=None, microbatch=3, **settings):
    found = bigbatch.verify(model, loss_fn, rows() if batch is None else batch, microbatch=microbatch, **settings)
    assert not found.exact, str(found)
    assert found.relative_error > 1e-3 or math.isnan(found.relative_error)
    assert found.worst
    return found.causes


def test_batch_norm_in_training_mode_is_named():
    (cause,) = cause_of(mlp(nn.BatchNorm1d(6)))
    assert "BatchNorm in training mode (1: BatchNorm1d)" in cause


def test_batch_norm_in_eval_mode_is_exact():
    model = mlp(nn.BatchNorm1d(6), nn.Tanh())
    model[1].eval()
    assert bigbatch.verify(model, squares, rows(), microbatch=3).exact


def test_batch_norm_failing_on_one_sample_is_reported():
    found = bigbatch.verify(mlp(nn.BatchNorm1d(6)), squares, rows(), microbatch=1)
    assert not found.exact
    assert "micro-batches of 1 cannot run, although larger ones can" in found.causes[0]


def test_dropout_is_named():
    """Two of them: one alone draws its numbers on the CPU in the order of the samples, whatever the cut."""
    (cause,) = cause_of(mlp(nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.25)))
    assert cause.startswith("dropout (1: Dropout, 3: Dropout)")


def test_dropout_in_eval_mode_is_exact():
    found = bigbatch.verify(mlp(nn.Dropout(0.5)).eval(), squares, rows(), microbatch=3)
    assert found.exact
    assert not found.notes


def test_single_dropout_is_exact_here_and_said_to_differ_elsewhere():
    found = bigbatch.verify(mlp(nn.Dropout(0.5)), squares, rows(), microbatch=3)
    assert found.exact
    assert str(found).endswith(
        "\n  note: dropout (1: Dropout) is active, and its masks were the same in every cut, because it draws its "
        "numbers in the order of the samples here. That holds for a single layer of dropout on the CPU; with several, "
        "or on a GPU, each cut has other masks."
    )


class FunctionalDropout(nn.Module):
    def forward(self, hidden):
        return F.dropout(hidden, 0.5, training=self.training)


def test_functional_dropout_is_reported_as_random_numbers():
    (cause,) = cause_of(mlp(FunctionalDropout(), nn.Tanh(), FunctionalDropout()))
    assert "random numbers in the forward or in the loss" in cause


def test_mode_independent_noise_is_reported_as_random_numbers():
    def loss_fn(model, part):
        noisy = part + torch.randn_like(part)
        return (model(noisy) + torch.randn_like(part[:, :1])).square().sum(), len(part)

    assert "random numbers in the forward or in the loss" in cause_of(mlp(nn.Tanh()), loss_fn)[0]


def test_mean_is_distinguished_from_sum():
    def loss_fn(model, part):
        return ref.loss_mean(model, part), ref.count(part)

    (cause,) = cause_of(ref.make_model(), loss_fn, batch_with_items())
    assert "the loss of the term 'loss' is not a sum" in cause
    assert "reduction='sum'" in cause


def test_mean_of_single_items_is_detected_by_items():
    def loss_fn(model, part):
        return ref.loss_mean(model, part), 1

    (cause,) = cause_of(ref.make_model(), loss_fn, batch_with_items())
    assert "the items of the term 'loss' do not add up: 1 in the full batch, but 4 over its micro-batches of 3" in cause


def test_inconsistent_items_are_named_with_their_term():
    def loss_fn(model, part):
        return {"value": (model(part).square().sum(), len(part) ** 2)}

    (cause,) = cause_of(mlp(nn.Tanh()), loss_fn)
    assert "the items of the term 'value' do not add up: 144 in the full batch, but 36" in cause


def contrastive(model, part):
    embedded = F.normalize(model(part), dim=1)
    return F.cross_entropy(embedded @ embedded.T, torch.arange(len(part)), reduction="sum"), len(part)


def test_contrastive_loss_is_named():
    torch.manual_seed(0)
    (cause,) = cause_of(nn.Linear(4, 3).double(), contrastive)
    assert cause.startswith("the loss couples samples")


class Centred(nn.Module):
    def forward(self, hidden):
        return hidden - hidden.mean(0)


def test_sample_mixing_module_is_named():
    (cause,) = cause_of(mlp(nn.Tanh(), Centred()))
    assert "the module '2' (Centred) mixes samples" in cause


def test_nested_sample_mixing_module_is_named_by_path():
    (cause,) = cause_of(mlp(nn.Sequential(nn.Tanh(), Centred(), nn.Tanh())))
    assert "'1.1' (Centred)" in cause


class Balanced(nn.Module):
    """A router whose balance loss is quadratic in the share of each expert."""

    def __init__(self, keep):
        super().__init__()
        self.linear, self.router = nn.Linear(4, 3), nn.Linear(4, 3)
        self.keep = keep

    def forward(self, inputs):
        share = self.router(inputs).softmax(-1).mean(0)
        balance = share.square().sum()
        output = self.linear(inputs)
        if self.keep == "attribute":
            self.aux_loss = balance
            return output
        return (output, balance) if self.keep == "tuple" else {"output": output, "balance": balance}


@pytest.mark.parametrize(
    ("keep", "named"), [("attribute", "aux_loss"), ("tuple", "output 1"), ("dict", "output 'balance'")]
)
def test_auxiliary_loss_inside_model_is_named(keep, named):
    def loss_fn(model, part):
        result = model(part)
        if keep == "attribute":
            output, balance = result, model.aux_loss
        else:
            output, balance = result if keep == "tuple" else result.values()
        return output.square().sum() + 30 * balance * len(part), len(part)

    torch.manual_seed(0)
    (cause,) = cause_of(Balanced(keep).double(), loss_fn)
    assert cause.startswith("an auxiliary loss inside the model")
    assert named in cause


def test_two_causes_are_both_named():
    causes = cause_of(mlp(nn.BatchNorm1d(6), nn.Dropout(0.5)))
    assert [cause.partition(" ")[0] for cause in causes] == ["dropout", "BatchNorm"]


def test_clamping_gradient_hook_is_inexact_and_reported():
    model = mlp(nn.Tanh())
    model[0].weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    found = bigbatch.verify(model, squares, rows(), microbatch=3)
    assert not found.exact
    assert found.worst[0].name == "0.weight"
    assert found.causes


def test_most_different_parameters_come_first():
    found = bigbatch.verify(mlp(nn.BatchNorm1d(6)), squares, rows(), microbatch=3)
    errors = [parameter.relative_error for parameter in found.worst]
    assert errors == sorted(errors, reverse=True)
    assert len(errors) == 5
    assert {parameter.name for parameter in found.worst} <= {
        name for name, _ in mlp(nn.BatchNorm1d(6)).named_parameters()
    }


class Everything(nn.Module):
    """Changes whatever it can while it runs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, 1)

    def forward(self, inputs):
        return self.head(self.dropout(self.norm(self.linear(inputs))))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mutates", [False, True])
def test_all_state_is_restored(fails, mutates):
    numpy = pytest.importorskip("numpy")
    torch.manual_seed(0)
    model = Everything().double()
    model.norm.eval()
    model.head.bias.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    calls = []

    def loss_fn(module, part):
        calls.append(part)
        random.random()
        numpy.random.rand()
        module.norm.train()
        module.dropout.eval()
        if mutates:
            with torch.no_grad():
                for p in module.parameters():
                    p.mul_(1.01)
                module.norm.running_var.add_(1)
        if fails and len(calls) == 4:
            raise KeyError("mine")
        return module(part).square().sum(), len(part)

    state = copy.deepcopy(model.state_dict())
    gradients = [(p, p.grad) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    if fails:
        with pytest.raises(KeyError, match="mine"):
            bigbatch.verify(model, loss_fn, rows(), microbatch=3)
    else:
        bigbatch.verify(model, loss_fn, rows(), microbatch=3)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for p, gradient in gradients:
        assert p.grad is gradient
        assert gradient is None or bool((gradient == 1).all())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(numpy.array_equal(a, b) for a, b in zip(numpy.random.get_state(), states[2], strict=True))
    assert ref.hooks_of(model) == 0
    assert not any(module._forward_hooks for module in model.modules())


def out_of_memory_above(limit, calls):
    def loss_fn(model, part):
        calls.append(len(part))
        if len(part) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return squares(model, part)

    return loss_fn


@pytest.mark.parametrize(("limit", "reference"), [(11, 6), (5, 3), (2, 2), (1, 1)])
def test_oversized_batch_is_compared_with_largest_that_fits(limit, reference):
    calls = []
    found = bigbatch.verify(mlp(nn.Tanh()), out_of_memory_above(limit, calls), rows())
    assert found.exact, str(found)
    assert found.reference_microbatch == reference
    assert max(cut.microbatch for cut in found.cuts) <= reference
    assert f"micro-batches of {reference}, the largest that fit" in str(found)


def test_oversized_single_sample_raises_out_of_memory_error():
    with pytest.raises(torch.OutOfMemoryError):
        bigbatch.verify(mlp(), out_of_memory_above(0, []), rows())


def test_oversized_cut_is_not_reported_as_full_batch():
    found = bigbatch.verify(mlp(nn.Tanh()), out_of_memory_above(4, []), rows(), microbatch=[8, 2])
    assert not any("though the full batch can" in cause for cause in found.causes), str(found)


class Transformer(nn.Module):
    """Four layers of pre-norm attention with a causal mask."""

    def __init__(self, width=32):
        super().__init__()
        self.embedding = nn.Embedding(ref.VOCABULARY, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True, norm_first=True) for _ in range(4)
        )
        self.head = nn.Linear(width, ref.VOCABULARY)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        return self.head(hidden)


def wide_loss(model, part):
    logits = model(part["tokens"]).flatten(0, 1)
    logits = logits if logits.dtype is torch.float64 else logits.float()
    return F.cross_entropy(logits, part["labels"].flatten(), ignore_index=ref.IGNORED, reduction="sum"), ref.count(part)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [0, slow(1)])
def test_dtype_tolerance_separates_exact_from_mean_of_means(dtype, seed):
    torch.manual_seed(seed)
    model, batch = Transformer().to(dtype), batch_with_items(32)
    found = bigbatch.verify(model, wide_loss, batch, microbatch=[1, 3, 16])
    print(f"\n{dtype}: {found.relative_error:.1e} of {found.tolerance:.0e}")
    assert found.dtype is dtype
    assert found.exact, str(found)
    assert found.relative_error < found.tolerance / 2
    assert all(cut.mean_of_means_error > 2 * found.tolerance for cut in found.cuts)


def test_autocast_is_detected_and_sets_dtype_tolerance():
    torch.manual_seed(0)
    model, batch = Transformer(), batch_with_items(16)

    def loss_fn(module, part):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return wide_loss(module, part)

    found = bigbatch.verify(model, loss_fn, batch, microbatch=[1, 3])
    assert found.dtype is torch.bfloat16
    assert found.exact, str(found)


def test_explicit_tolerance_decides():
    found = bigbatch.verify(mlp(nn.BatchNorm1d(6)), squares, rows(), microbatch=3, tolerance=1e9)
    assert found.exact
    assert found.tolerance == 1e9


@pytest.mark.parametrize("samples", [0, 1])
def test_unsplittable_batch_is_rejected(samples):
    with pytest.raises(ValueError, match=rf"the batch has {samples} sample\(s\): pass at least 2"):
        bigbatch.verify(mlp(), squares, rows(samples))


def test_model_without_trained_parameters_is_rejected():
    for model in (mlp().requires_grad_(False), nn.Identity()):
        with pytest.raises(
            ValueError, match="no parameter of the model requires a gradient: there is nothing to verify"
        ):
            bigbatch.verify(model, squares, rows())


def test_batch_without_items_is_rejected():
    with pytest.raises(ValueError, match="the batch has no items, so the gradient of the mean loss is undefined"):
        bigbatch.verify(mlp(), lambda model, part: (model(part).sum(), 0), rows())


@pytest.mark.parametrize("microbatch", [0, -1, [2, 0]])
def test_cut_of_no_sample_is_rejected(microbatch):
    with pytest.raises(ValueError, match="it must be at least 1, the samples of one micro-batch"):
        bigbatch.verify(mlp(), squares, rows(), microbatch=microbatch)


def test_empty_list_of_cuts_is_rejected():
    with pytest.raises(ValueError, match="microbatch is an empty list"):
        bigbatch.verify(mlp(), squares, rows(), microbatch=[])


@pytest.mark.parametrize("microbatch", [True, 2.5, "2", [2.5]])
def test_non_integer_cut_is_rejected(microbatch):
    with pytest.raises(TypeError, match="it must be an int"):
        bigbatch.verify(mlp(), squares, rows(), microbatch=microbatch)


def test_loss_function_without_pair_is_rejected():
    with pytest.raises(TypeError, match=r"return the pair \(loss_sum, items\)"):
        bigbatch.verify(mlp(), lambda model, part: model(part).sum(), rows())


def test_quantised_and_other_frozen_parameters_are_ignored():
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)
            self.adapter = nn.Linear(4, 1).double()

        def forward(self, inputs):
            return self.adapter(inputs * self.codes)

    assert bigbatch.verify(Quantised(), squares, rows(), microbatch=3).exact


def test_complex_parameters_are_verified():
    class Phases(nn.Module):
        def __init__(self):
            super().__init__()
            self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex128))

        def forward(self, inputs):
            return (inputs * self.phase).abs()

    assert bigbatch.verify(Phases(), squares, rows(), microbatch=3).exact


def test_frozen_and_sparse_parameters_are_verified():
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(ref.VOCABULARY, 4, sparse=True), "frozen": nn.Linear(4, 2)}).double()
    model["frozen"].requires_grad_(False)

    def loss_fn(module, part):
        return module["frozen"](module["table"](part["tokens"])).square().sum(), part["tokens"].numel()

    assert bigbatch.verify(model, loss_fn, ref.ragged_batch(SAMPLES), microbatch=[1, 5]).exact


def test_loss_with_both_signs_is_not_called_mean():
    """Sums of +5 and −4 make 1, which lies between them as a mean's would; the cause is what the model does."""
    signs = torch.tensor([1.0, -1.0]).double().repeat(6)

    def loss_fn(model, part):
        values, sign = part
        return (model(values)[:, 0] * sign * values[:, 0].abs()).sum(), len(values)

    causes = cause_of(mlp(nn.Tanh(), Centred(), nn.Tanh()), loss_fn, (rows(), signs), microbatch=3)
    assert any("Centred" in cause for cause in causes), causes


def test_printed_table_shows_passing_cuts():
    text = str(bigbatch.verify(ref.make_model(), ref.loss_and_items, batch_with_items(), microbatch=[3, 5]))
    lines = text.splitlines()
    assert lines[0] == ("gradient of 12 samples, relative error against the full batch (float64, tolerance 1e-12)")
    assert lines[1].split() == ["micro-batch", "micro-batches", "bigbatch", "mean", "of", "means"]
    assert [line.split()[:2] for line in lines[2:4]] == [["3", "4"], ["5", "3"]]
    assert lines[4:] == ["exact: every cut gives the full-batch gradient"]


def test_printed_table_explains_failures():
    text = str(bigbatch.verify(mlp(nn.BatchNorm1d(6)), squares, rows(), microbatch=[3, 5]))
    assert text.count("  not exact") == 2
    assert "\nNOT exact\n  largest error: " in text
    assert "\n  cause: BatchNorm in training mode (1: BatchNorm1d)" in text
