"""Batches [time, batch, ...]: exact with batch_dim=1, and refused where layers would read samples as time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigbatch

EXACT = 1e-12
WRONG = 1e-3


class Recurrent(nn.Module):
    def __init__(self, kind=nn.GRU, **options):
        super().__init__()
        self.encoder = kind(3, 4, **options)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.encoder(x)[0])


class Attention(nn.Module):
    """Reads [samples, time, features], and transposes for its layer if that expects time first."""

    def __init__(self, transposes=True, batch_first=False):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=batch_first)
        self.transposes = transposes

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1) if self.transposes else self.layer(x)


def make(build):
    torch.manual_seed(1)
    return build().double()


def masked_sum(model, batch):
    errors = F.mse_loss(model(batch["x"]), batch["y"], reduction="none").mean(-1)
    return (errors * batch["mask"]).sum() * batch["scale"], batch["mask"].sum()


def time_first(steps=7, samples=5, features=3, outputs=2):
    torch.manual_seed(0)
    lengths = torch.arange(samples) % steps + 1
    mask = (torch.arange(steps)[:, None] < lengths).double()
    x, y = torch.randn(steps, samples, features).double(), torch.randn(steps, samples, outputs).double()
    return {"x": x, "y": y, "mask": mask, "scale": torch.tensor(3.0).double()}


def transposed(batch):
    return {name: tensor.transpose(0, 1) if tensor.ndim else tensor for name, tensor in batch.items()}


def gradient(model, loss_fn, batch):
    loss, items = loss_fn(model, batch)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss / items, list(model.parameters()))])


def engine_for(model, loss_fn=masked_sum, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return bigbatch.Engine(model, optimizer, loss_fn, **{"microbatch": 2, "noise": False, **settings})


def moved_by(engine, batch):
    before = nn.utils.parameters_to_vector(engine.model.parameters()).detach().clone()
    report = engine.step(batch)
    return before - nn.utils.parameters_to_vector(engine.model.parameters()).detach(), report


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("microbatch", [1, 2, 4, 5, 99])
def test_time_first_batch_is_exact(kind, microbatch):
    def build():
        return Recurrent(kind)

    batch = time_first()
    expected = gradient(make(build), masked_sum, batch)
    found, report = moved_by(engine_for(make(build), microbatch=microbatch, batch_dim=1), batch)
    assert relative_error(found, expected) <= EXACT
    assert report.num_microbatches == -(-5 // microbatch)
    along_time, _ = moved_by(engine_for(make(build), batch_dim=0, check=False), batch)
    assert relative_error(along_time, expected) > WRONG


def test_time_first_tuple_by_token_budget_is_exact():
    whole = time_first()
    batch = (whole["x"], [whole["y"], whole["mask"]], None)

    def loss_fn(model, part):
        return masked_sum(model, {"x": part[0], "y": part[1][0], "mask": part[1][1], "scale": torch.tensor(1.0)})

    def lengths(part):
        return part[1][1].sum(0).int().tolist()

    expected = gradient(make(Recurrent), loss_fn, batch)
    engine = engine_for(make(Recurrent), loss_fn, microbatch=bigbatch.TokenBudget(8), lengths=lengths, batch_dim=1)
    found, report = moved_by(engine, batch)
    assert relative_error(found, expected) <= EXACT
    assert report.tokens == 15
    assert report.num_microbatches > 1


def test_time_first_batch_after_out_of_memory_is_exact():
    batch, sizes = time_first(), []

    def loss_fn(model, part):
        sizes.append(part["x"].shape[1])
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return masked_sum(model, part)

    expected = gradient(make(Recurrent), masked_sum, batch)
    found, report = moved_by(engine_for(make(Recurrent), loss_fn, microbatch=4, batch_dim=1), batch)
    assert relative_error(found, expected) <= EXACT
    assert report.retries
    assert max(sizes) == 4


def test_auto_microbatch_counts_along_batch_dim():
    batch = time_first(samples=6)
    expected = gradient(make(Recurrent), masked_sum, batch)
    engine = engine_for(make(Recurrent), microbatch="auto", batch_dim=1)
    choice = engine.tune(batch)
    found, report = moved_by(engine, batch)
    assert 1 <= choice.microbatch <= 6
    assert report.num_microbatches == -(-6 // choice.microbatch)
    assert relative_error(found, expected) <= EXACT


def test_verify_cuts_along_batch_dim():
    batch = time_first(samples=6)
    right = bigbatch.verify(make(Recurrent), masked_sum, batch, microbatch=[1, 4], batch_dim=1)
    assert right.exact
    assert right.num_samples == 6
    assert [cut.num_microbatches for cut in right.cuts] == [6, 2]
    assert not bigbatch.verify(make(Recurrent), masked_sum, batch, microbatch=[4]).exact


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_model_that_transposes_is_accepted(batch_dim):
    batch = transposed(time_first(steps=7, samples=5, features=4, outputs=4))
    expected = gradient(make(Attention), masked_sum, batch)
    found, _ = moved_by(engine_for(make(Attention), batch_dim=batch_dim), batch)
    assert relative_error(found, expected) <= EXACT


def test_batch_first_layers_are_accepted():
    batch = transposed(time_first())
    for sizes in (1, 2, 5):
        engine_for(make(lambda: Recurrent(batch_first=True)), microbatch=sizes).step(batch)
    wide = transposed(time_first(features=4, outputs=4))
    engine_for(make(lambda: Attention(transposes=False, batch_first=True))).step(wide)


def test_time_first_batch_is_refused_with_argument():
    model = make(lambda: nn.Sequential(Recurrent(nn.LSTM)))
    engine = engine_for(model, microbatch=3)
    before = [parameter.clone() for parameter in model.parameters()]
    for _ in range(2):  # also if the first error was caught
        with pytest.raises(ValueError, match=r"\.$") as caught:
            engine.step(time_first(samples=4))
        assert str(caught.value) == (
            "the LSTM '0.encoder' reads dimension 0 as time (with batch_first=False), and its input of shape [3, 4, 3] "
            "has the 3 sample(s) of the micro-batch there. Pass batch_dim=1 for a batch [time, batch, ...], or "
            "batch_dim=0 if dimension 0 of the batch is the sample and the model is right."
        )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model[0].encoder._forward_pre_hooks


def test_samples_without_batch_dimension_are_refused():
    """A 2-D input is one sequence, for layers with batch_first=True as well."""
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()

    def loss_fn(model, batch):
        return F.mse_loss(model(batch[0]), batch[1], reduction="sum"), batch[1].numel()

    with pytest.raises(ValueError, match=r"the GRU 'encoder' reads dimension 0 as time \(without a batch dimension\)"):
        engine_for(make(lambda: Recurrent(batch_first=True)), loss_fn).step((x, y))


def test_attention_over_samples_is_refused():
    batch = transposed(time_first(features=4, outputs=4))
    engine = engine_for(make(lambda: Attention(transposes=False)))
    with pytest.raises(ValueError, match=r"the MultiheadAttention 'layer\.self_attn' reads dimension 0 as time"):
        engine.step(batch)


def test_inputs_by_name_are_checked():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x):
            return self.attention(query=x, key=x, value=x)[0]

    with pytest.raises(ValueError, match="the MultiheadAttention 'attention' reads dimension 0 as time"):
        engine_for(make(Named)).step(time_first(features=4, outputs=4))


def test_layers_are_hooked_in_first_window_only():
    model, hooked = make(Attention), []
    engine = engine_for(
        model, lambda m, b: (hooked.append(len(m.layer.self_attn._forward_pre_hooks)), masked_sum(m, b))[1], check=False
    )
    batch = transposed(time_first(features=4, outputs=4))
    engine.step(batch)
    engine.step(batch)
    assert hooked == [1, 1, 1, 0, 0, 0]


def test_collated_samples_may_be_time_first():
    whole = time_first()
    samples = [{name: t[:, i] for name, t in whole.items() if t.ndim} for i in range(5)]

    def collate(some):
        return {name: torch.stack([s[name] for s in some], dim=1) for name in some[0]} | {"scale": whole["scale"]}

    expected = gradient(make(Recurrent), masked_sum, whole)
    found, _ = moved_by(engine_for(make(Recurrent), collate=collate), samples)
    assert relative_error(found, expected) <= EXACT


@pytest.mark.parametrize("settings", [{"batch_dim": -2}, {"batch_dim": 0, "collate": torch.stack}])
def test_wrong_batch_dim_is_refused_when_constructed(settings):
    with pytest.raises(ValueError, match=f"batch_dim(=| is ){settings['batch_dim']}"):
        engine_for(make(Recurrent), **settings)
