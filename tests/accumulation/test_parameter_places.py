"""Parameters that are replaced in a model: no silent end of their training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import bigbatch
from bigbatch.errors import WindowStateError
from support import full_batch_reference as ref

EXACT = 1e-12
REPLACED = "was replaced by another one, which no optimizer has"


def assigned_state(model):
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()}, assign=True)


def new_parameter(model):
    model.hidden.weight = nn.Parameter(model.hidden.weight.detach().clone())


def new_layer(model):
    model.head = nn.Linear(8, ref.VOCABULARY, dtype=torch.float64)


REPLACE = {
    "load_state_dict": (assigned_state, "'embedding.weight' (and 6 more)"),
    "parameter": (new_parameter, "'hidden.weight' of"),
    "layer": (new_layer, "'head.weight' (and 1 more)"),
    "parametrization": (lambda model: parametrizations.weight_norm(model.head), "'head.weight' of"),
}


@pytest.mark.parametrize("kind", REPLACE)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_replacement_between_updates_is_refused(kind, optimizer):
    model, (replace, named) = ref.make_model(), REPLACE[kind]
    optimizer = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1)
    engine = bigbatch.Engine(model, optimizer, ref.loss_and_items, microbatch=2)
    engine.step(ref.ragged_batch(6))
    replace(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WindowStateError, match=REPLACED) as error:
        engine.step(ref.ragged_batch(6))
    assert named in str(error.value)
    assert str(error.value).endswith("or make optimizer and engine when the model has its final form.")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", REPLACE)
@pytest.mark.parametrize("has_optimizer", [True, False])
def test_replacement_within_a_window_is_refused(kind, has_optimizer):
    model, (replace, named) = ref.make_model(), REPLACE[kind]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if has_optimizer else None
    window = bigbatch.Accumulator(model, optimizer).window()
    for index, part in enumerate(ref.cut(ref.ragged_batch(6), 2)):
        loss_sum, items = ref.loss_and_items(model, part)
        window.backward(loss_sum, items=items)
        if not index:
            replace(model)
    with pytest.raises(WindowStateError, match=REPLACED) as error:
        window.step() if has_optimizer else window.finish()
    assert named in str(error.value)


def test_replacement_without_optimizer_is_trained_from_the_next_window_on():
    model = ref.make_model()
    engine = bigbatch.Engine(model, None, ref.loss_and_items, microbatch=2)
    batch = ref.ragged_batch(6)
    engine.backward(batch)
    new_parameter(model)
    engine.backward(batch)
    expected = ref.full_gradient(model, batch)
    assert ref.relative_error({n: p.grad for n, p in model.named_parameters()}, expected) <= EXACT


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def test_weights_tied_after_construction_are_exact():
    torch.manual_seed(0)
    model, tokens = Tied().double(), torch.tensor([0, 2, 4, 1])

    def loss_fn(model, tokens):
        return F.cross_entropy(model(tokens), tokens, reduction="sum"), len(tokens)

    engine = bigbatch.Engine(model, torch.optim.SGD(model.parameters(), lr=1.0), loss_fn, microbatch=2)
    model.head.weight = model.embedding.weight
    whole = copy.deepcopy(model)
    loss_sum, items = loss_fn(whole, tokens)
    (loss_sum / items).backward()
    engine.step(tokens)
    error = model.embedding.weight - (whole.embedding.weight - whole.embedding.weight.grad)
    assert error.abs().max().item() <= EXACT


@pytest.mark.parametrize("change", ["freeze", "parametrize", "prune", "new group", "same layer elsewhere"])
def test_other_changes_of_the_model_are_accepted(change):
    model = ref.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = bigbatch.Engine(model, optimizer, ref.loss_and_items, microbatch=2)
    engine.step(ref.ragged_batch(6))
    if change == "freeze":
        model.head.bias = nn.Parameter(model.head.bias.detach().clone(), requires_grad=False)
    elif change == "parametrize":
        parametrizations.weight_norm(model.head)
        optimizer.add_param_group({"params": list(model.head.parametrizations.parameters())})
    elif change == "prune":
        prune.random_unstructured(model.head, "weight", amount=0.5)
    elif change == "new group":
        new_layer(model)
        optimizer.add_param_group({"params": list(model.head.parameters())})
    else:
        model.head, model.hidden = nn.Sequential(model.head), nn.Sequential(model.hidden)
    before = copy.deepcopy(model.state_dict())
    assert engine.step(ref.ragged_batch(6)).skipped is None
    assert not torch.equal(model.state_dict()["embedding.weight"], before["embedding.weight"])


def test_copied_engine_watches_its_own_model():
    model = ref.make_model()
    engine = bigbatch.Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), ref.loss_and_items, microbatch=2)
    engine.step(ref.ragged_batch(6))
    copied = copy.deepcopy(engine)
    new_parameter(model)
    assert copied.step(ref.ragged_batch(6)).skipped is None
    new_parameter(copied.model)
    with pytest.raises(WindowStateError, match=REPLACED):
        copied.step(ref.ragged_batch(6))
