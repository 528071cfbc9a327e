"""One cause each, named with the module, hook or count behind it; correct losses are never accused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigbatch
from bigbatch.batching.split import split
from bigbatch.verification.causes.case import Case, Kind
from bigbatch.verification.cut_gradients import CutGradients
from bigbatch.verification.diagnose import find_causes
from bigbatch.verification.module_state import ModuleState
from support import full_batch_reference as ref


def rows(samples=12, width=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, width, generator=generator, dtype=torch.float64).to(dtype)


def classes(samples=12):
    return torch.randint(3, (samples,), generator=torch.Generator().manual_seed(1))


def mlp(*middle, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *middle, nn.Linear(6, 3)).to(dtype)


def classify(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="sum"), len(labels)


def squares(model, part):
    return model(part).square().sum(), len(part)


def only_cause(model, loss_fn, batch, microbatch=3, **settings):
    found = bigbatch.verify(model, loss_fn, batch, microbatch=microbatch, **settings)
    assert not found.exact, str(found)
    (cause,) = found.causes
    return cause


HOOK = (
    "a gradient hook ({}): it changes the undivided sum of each micro-batch, not the gradient of the batch. Clip with "
    "max_grad_norm=, or change the gradient of the batch with gradient_hook=."
)


def normalize(gradient):
    return gradient / gradient.norm()


def halve(parameter):
    parameter.grad.mul_(0.5)


def test_parameter_hook_is_named():
    model = mlp(dtype=torch.float32)
    model[2].bias.register_hook(normalize)
    cause = only_cause(model, classify, (rows(dtype=torch.float32), classes()))
    assert cause == HOOK.format("normalize on the parameter '2.bias'")


def test_same_hook_on_many_parameters_is_one_cause():
    model = mlp()
    for p in model.parameters():
        p.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    cause = only_cause(model, classify, (rows(), classes()))
    places = "the parameter '0.weight', the parameter '0.bias', the parameter '2.weight' and 1 more"
    assert cause == HOOK.format(f"a lambda on {places}")


def test_module_backward_hook_is_named():
    model = mlp()

    def normalize_inputs(_module, grad_inputs, _grad_outputs):
        return tuple(map(normalize, grad_inputs))

    model[2].register_full_backward_hook(normalize_inputs)
    cause = only_cause(model, classify, (rows(), classes()))
    assert cause == HOOK.format("normalize_inputs on the module '2' (Linear)")


def test_post_accumulate_hook_that_writes_is_refused():
    model = mlp()
    model[0].weight.register_post_accumulate_grad_hook(halve)
    with pytest.raises(bigbatch.WindowStateError, match="a hook on parameter 1 of 4"):
        bigbatch.verify(model, classify, (rows(), classes()), microbatch=3)


class Normalized(nn.Module):
    def forward(self, hidden):
        middle = 2 * hidden
        if hidden.requires_grad:
            middle.register_hook(normalize)
        return middle.tanh()


def test_hook_on_activation_is_named_with_its_module():
    cause = only_cause(mlp(Normalized()), classify, (rows(), classes()))
    assert cause == HOOK.format("normalize on a tensor in the module '2' (Normalized)")


def test_hook_on_output_in_loss_is_named():
    def loss_fn(model, batch):
        logits = model(batch[0])
        logits.register_hook(lambda gradient: gradient.sign())  # also without gradients, where torch would refuse
        return F.cross_entropy(logits, batch[1], reduction="sum") + logits.square().sum(), len(batch[1])

    model = mlp()
    model[0].weight.register_hook(normalize)
    cause = only_cause(model, loss_fn, (rows(), classes()))
    assert cause.startswith("a gradient hook (normalize on the parameter '0.weight'")


class NormalizedBackward(torch.autograd.Function):
    @staticmethod
    def forward(_context, values):
        return values.clone()

    @staticmethod
    def backward(_context, gradient):
        return gradient / gradient.norm()


class WithFunction(nn.Module):
    def forward(self, hidden):
        return NormalizedBackward.apply(hidden)


def test_custom_function_is_named():
    cause = only_cause(mlp(WithFunction()), classify, (rows(), classes()))
    assert cause == (
        "a backward that is not linear (NormalizedBackward): it changes the undivided sum of each micro-batch, not the "
        "gradient of the batch. Clip with max_grad_norm=, or remove it."
    )


def test_linear_hooks_are_not_named():
    def contrastive(model, part):
        similar = model(part) @ model(part).T
        return F.cross_entropy(similar, torch.arange(len(part)), reduction="sum"), len(part)

    model, seen = mlp(), []
    model[0].weight.register_hook(lambda gradient: 0.5 * gradient)
    model[2].register_full_backward_hook(lambda *_: seen.append(1))
    assert bigbatch.verify(model, squares, rows(), microbatch=3).exact
    assert only_cause(model, contrastive, rows()).startswith("the loss couples samples")
    assert seen


def test_hooks_remain_registered():
    model, calls = mlp(), []
    first = model[0].weight.register_hook(lambda gradient: calls.append("first"))
    model[0].weight.register_hook(normalize)
    before = list(model[0].weight._backward_hooks.values())
    only_cause(model, squares, rows())
    assert list(model[0].weight._backward_hooks.values()) == before
    first.remove()
    assert list(model[0].weight._backward_hooks.values()) == [normalize]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_penalty_is_named_with_its_parameters(dtype):
    model = mlp(dtype=dtype)

    def lasso(model, batch):
        loss_sum, items = classify(model, batch)
        return loss_sum + model[2].weight.abs().sum(), items

    cause = only_cause(model, lasso, (rows(dtype=dtype), classes()), microbatch=[2])
    amount = float(cause.partition("'loss': ")[2].partition(" ")[0])
    assert amount == pytest.approx(float(model[2].weight.detach().abs().sum()), rel=1e-4)
    assert cause == (
        f"a penalty that does not depend on the batch is added to the sum of the term 'loss': {amount:.6g} in every "
        "micro-batch (it reaches 2.weight), so its weight grows with their number. Multiply it by the items, or "
        "return it as its own term."
    )


def test_penalty_of_one_term_is_named():
    def loss_fn(model, batch):
        loss_sum, items = classify(model, batch)
        orthogonal = (model[0].weight.T @ model[0].weight - torch.eye(4)).square().sum()
        return {"class": (loss_sum, items), "size": (model(batch[0]).square().sum() + 3 * orthogonal, items)}

    def count_items(batch):
        return dict.fromkeys(("class", "size"), len(batch[1]))

    cause = only_cause(mlp(), loss_fn, (rows(), classes()), count_items=count_items)
    assert "added to the sum of the term 'size'" in cause


def test_penalty_times_items_is_exact():
    def loss_fn(model, batch):
        loss_sum, items = classify(model, batch)
        return loss_sum + items * model[2].weight.abs().sum(), items

    assert bigbatch.verify(mlp(), loss_fn, (rows(), classes()), microbatch=[2, 5]).exact


def masked_batch(samples=10, length=7):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, ref.VOCABULARY, (samples, length), generator=generator)
    lengths = torch.randint(3, length + 1, (samples, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return {"tokens": tokens * mask, "mask": mask}


def token_mean(model, part, mask):
    losses = F.cross_entropy(model(part["tokens"]).transpose(1, 2), part["tokens"], reduction="none")
    return (losses * mask).sum() / mask.sum()


def test_mean_over_mask_times_samples_is_named():
    def loss_fn(model, part):
        return token_mean(model, part, part["mask"]) * len(part["mask"]), len(part["mask"])

    batch = masked_batch()
    cause = only_cause(ref.make_model(), loss_fn, batch)
    assert cause == (
        "the loss of the term 'loss' is a mean times its 10 items, but the mean runs over "
        f"{int(batch['mask'].sum())}: (microbatch['tokens'] != 0).sum(). Count these instead."
    )


def test_unshifted_count_of_shifted_mean_is_named():
    def loss_fn(model, part):
        shifted = {"tokens": part["tokens"][:, 1:]}
        mask = part["mask"][:, 1:] * (part["tokens"][:, 1:] != 3)
        return token_mean(model, shifted, mask) * part["tokens"].ne(3).sum(), part["tokens"].ne(3).sum()

    batch = masked_batch()
    batch["labels"] = torch.where(batch["mask"].bool() & (batch["tokens"] != 3), batch["tokens"], -100)
    cause = only_cause(ref.make_model(), loss_fn, batch, microbatch=2)
    items = int((batch["labels"][:, 1:] != -100).sum())
    assert f"but the mean runs over {items}: (microbatch['labels'][:, 1:] != -100).sum(). Count these" in cause


def test_mean_over_class_weights_is_recognized():
    def loss_fn(model, batch):
        weight = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
        return F.cross_entropy(model(batch[0]), batch[1], weight=weight) * len(batch[1]), len(batch[1])

    assert only_cause(mlp(), loss_fn, (rows(), classes())) == (
        "the loss of the term 'loss' is a mean times its 12 items, but the mean runs over something else. Return the "
        "sum itself (reduction='sum'), or count what the mean divides by."
    )


class Queue(nn.Module):
    """Scores against the outputs of earlier forwards, as momentum contrast does."""

    def __init__(self, where):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.where = where
        if where == "buffer":
            self.register_buffer("queue", torch.ones(5, 3))
        else:
            self.queue = torch.ones(5, 3, dtype=torch.float64)

    def forward(self, inputs):
        hidden = self.linear(inputs)
        scores = hidden @ self.queue.T
        self.queue = torch.cat([hidden.detach()[-2:], self.queue[:-2]])
        return scores


@pytest.mark.parametrize("where", ["buffer", "attribute"])
def test_changing_state_is_named(where):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Queue(where)).double()
    assert only_cause(model, squares, rows()) == (
        f"state that changes in the forward ({where} 'queue' of 1: Queue): each micro-batch reads what those before "
        "it wrote. Set the module to eval mode, or update its state once per batch, after the step."
    )


def test_changing_number_is_named():
    class Annealed(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, hidden):
            self.calls += 1
            return hidden / (1 + 0.1 * self.calls)

    cause = only_cause(mlp(Annealed()), squares, rows())
    assert cause.startswith("state that changes in the forward (attribute 'calls' of 2: Annealed): ")


def test_changing_list_is_reported():
    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = [1.0]

        def forward(self, hidden):
            self.seen.append(0.5 * self.seen[-1])
            return hidden * self.seen[-1]

    cause = only_cause(mlp(Remembering()), squares, rows())
    assert cause.startswith("state that changes in the forward (an object that hangs on a module): ")


def test_spectral_norm_is_named():
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6))
    model = nn.Sequential(normed, nn.Tanh(), nn.Linear(6, 2)).double()
    cause = only_cause(model, squares, rows())
    assert "buffers '_u', '_v' of 0.parametrizations.weight.0: _SpectralNorm" in cause


def test_statistics_that_are_only_written_are_not_named():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, hidden):
            self.mean.lerp_(hidden.detach().mean(0), 0.1)
            return hidden - hidden.mean(0)

    cause = only_cause(mlp(Counted()), squares, rows())
    assert cause.startswith("the module '2' (Counted) mixes samples")


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, inputs):
        output = self.layer(inputs)
        return output[0] if isinstance(output, tuple) else output


TIME_FIRST = (
    "the module {} {}: it reads dimension 0, along which the batch is cut, as time. Pass batch_dim=1 if the batch is "
    "[time, samples, ...], or inputs [samples, time, ...] with batch_first=True."
)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.GRU(4, 4, num_layers=2), "'layer' (GRU)"),
        (nn.RNN(4, 4), "'layer' (RNN)"),
        (nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), "'layer.self_attn' (MultiheadAttention)"),
    ],
)
def test_time_first_layer_is_named(layer, named):
    model = Recurrent(layer).double()
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p)
    cause = only_cause(model, squares, torch.randn(10, 3, 4, dtype=torch.float64), microbatch=4)
    assert cause == TIME_FIRST.format(named, "has batch_first=False")


def test_sequence_without_batch_dimension_is_named():
    torch.manual_seed(0)
    cause = only_cause(Recurrent(nn.LSTM(4, 4, batch_first=True)).double(), squares, rows(), microbatch=4)
    assert cause == TIME_FIRST.format("'layer' (LSTM)", "receives inputs without a batch dimension")


def test_transposed_time_first_layer_is_exact():
    torch.manual_seed(0)
    layer = nn.LSTM(4, 4).double()
    model = Recurrent(layer)

    def loss_fn(model, part):
        return model(part.transpose(0, 1)).square().sum(), len(part)

    assert bigbatch.verify(model, loss_fn, torch.randn(6, 5, 4, dtype=torch.float64), microbatch=[2, 5]).exact


def ranked(scores, parts, *, adjacent):
    split_scores = scores.unflatten(0, (-1, parts)).unbind(1) if adjacent else scores.chunk(parts)
    first, *others = split_scores
    return -sum(F.logsigmoid(first - other).sum() for other in others), len(first)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (
            2,
            "the loss combines samples of different halves of a micro-batch, i and i + n / 2 of n samples, and a cut "
            "separates them. Pass each half as a tensor of its own, such as {'chosen': ..., 'rejected': ...}, so that "
            "one sample is one pair.",
        ),
        (
            3,
            "the loss combines samples of different thirds of a micro-batch, i and i + n / 3 of n samples, and a cut "
            "separates them. Pass each third as a tensor of its own, such as {'chosen': ..., 'rejected': ...}, so "
            "that one sample is one triple.",
        ),
    ],
)
def test_concatenated_pairs_are_named(parts, expected):
    def loss_fn(model, part):
        return ranked(model(part).square().sum(1), parts, adjacent=False)

    assert only_cause(mlp(), loss_fn, rows(), microbatch=6) == expected


def test_adjacent_pairs_are_named():
    def loss_fn(model, part):
        scores = model(part).square().sum(1)
        winners, losers = scores[0 : len(scores) // 2 * 2 : 2], scores[1::2]
        return -F.logsigmoid(winners - losers).sum(), len(winners)

    assert bigbatch.verify(mlp(), loss_fn, rows(), microbatch=4).exact
    assert only_cause(mlp(), loss_fn, rows(), microbatch=3) == (
        "the loss combines 2 neighbouring samples, and this cut separates some of them. Use a micro-batch that is a "
        "multiple of 2, or pass tensors [samples / 2, 2, ...]."
    )


def weighted(model, batch):
    weight = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    return F.cross_entropy(model(batch[0]), batch[1], weight=weight, reduction="sum"), weight[batch[1]].sum()


def regression(model, batch):
    return F.mse_loss(model(batch[0]), batch[0][:, :3], reduction="sum"), 3 * len(batch[0])


def with_both_signs(model, batch):
    return (model(batch[0])[:, 0] * (batch[1] - 1.0)).sum(), len(batch[1])


def mean_times_items(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1]) * len(batch[1]), len(batch[1])


def focal(model, batch):
    labels = (batch[1] == 2).double()
    logits = model(batch[0])[:, 0]
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (losses * (torch.sigmoid(logits) - labels).square()).sum(), labels.sum()


CORRECT = [classify, weighted, regression, with_both_signs, mean_times_items, focal]


@pytest.mark.parametrize("cut", [1, 2, 5])
@pytest.mark.parametrize("loss_fn", CORRECT)
def test_correct_loss_is_not_accused(loss_fn, cut):
    """All hypotheses are tested, although nothing is wrong."""
    model = mlp()
    labels = classes()
    labels[3] = 2
    samples = split((rows(), labels), 1, device=torch.device("cpu"))
    (cause,) = find_causes(
        Case(CutGradients(model, loss_fn, samples), 12, cut, 1e-12, ModuleState(model.named_modules()))
    )
    assert cause.kind is Kind.UNKNOWN


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_masked_and_multi_term_losses_are_not_accused(cut):
    def two_terms(model, part):
        tokens, count = ref.loss_and_items(model, part)
        return {"tokens": (tokens, count), "size": (model(part["tokens"]).square().sum(), len(part["tokens"]))}

    model, batch = ref.make_model(), ref.ragged_batch(12)
    samples = split(batch, 1, device=torch.device("cpu"))
    for loss_fn, totals in (
        (ref.loss_and_items, None),
        (ref.mean_times_items, None),
        (two_terms, {"tokens": ref.count(batch), "size": 12}),
    ):
        cut_gradients = CutGradients(model, loss_fn, samples, totals)
        (cause,) = find_causes(Case(cut_gradients, 12, cut, 1e-12, ModuleState(model.named_modules())))
        assert cause.kind is Kind.UNKNOWN, cause
