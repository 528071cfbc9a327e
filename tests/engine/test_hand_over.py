"""`Engine.backward` and `Engine.loss`: the gradient of the whole batch for loops that own the update."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigbatch
from bigbatch import WindowStateError
from bigbatch.engine.hand_over import is_exact_loss
from bigbatch.execution.oom_retry import OomRetry
from support import full_batch_reference as ref

EXACT = 1e-12
SPENT = (
    "backward() was called a second time on a loss of engine.loss(batch), whose gradient was delivered by the first "
    "call: call engine.loss(batch) again for another one."
)


def make(loss_fn=ref.loss_and_items, model=None, **settings):
    model = ref.make_model() if model is None else model
    return bigbatch.Engine(model, None, loss_fn, **{"microbatch": 3, "check": False, **settings})


def gradients_of(model):
    return {name: p.grad for name, p in model.named_parameters()}


def scaled(gradients, factor):
    return {name: gradient * factor for name, gradient in gradients.items()}


def assert_full(model, batch, factor=1.0):
    assert ref.relative_error(gradients_of(model), scaled(ref.full_gradient(model, batch), factor)) <= EXACT


@pytest.mark.parametrize("size", [1, 2, 4, 9, 100])
def test_loss_delivers_full_batch_gradient(size):
    engine, batch = make(microbatch=size), ref.ragged_batch(9)
    loss = engine.loss(batch)
    assert all(gradient is None for gradient in gradients_of(engine.model).values())
    assert loss.ndim == 0
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(ref.loss_mean(engine.model, batch).item(), rel=EXACT)
    loss.backward()
    assert_full(engine.model, batch)


@pytest.mark.parametrize("size", [1, 4, 9])
def test_backward_leaves_full_batch_gradient(size):
    engine, batch = make(microbatch=size), ref.ragged_batch(9)
    report = engine.backward(batch)
    assert_full(engine.model, batch)
    assert (report.step, report.items, report.skipped) == (0, ref.count(batch), None)
    engine.backward(ref.ragged_batch(5, seed=3))  # clears the first
    assert_full(engine.model, ref.ragged_batch(5, seed=3))


@pytest.mark.parametrize("of", [lambda loss: loss * 2, lambda loss: loss / 3, lambda loss: loss + loss, torch.neg])
def test_incoming_factor_multiplies_gradient(of):
    engine, batch = make(), ref.ragged_batch(8)
    loss = engine.loss(batch)
    result = of(loss)
    factor = result.item() / loss.item()
    result.backward()
    assert_full(engine.model, batch, factor)


def test_loss_within_larger_graph_adds_gradients():
    engine, batch = make(), ref.ragged_batch(8)
    weight = engine.model.head.weight
    (engine.loss(batch) + 0.5 * weight.square().sum()).backward()
    expected = ref.full_gradient(engine.model, batch)
    expected["head.weight"] = expected["head.weight"] + weight.detach()
    assert ref.relative_error(gradients_of(engine.model), expected) <= EXACT


def test_existing_gradient_is_kept_and_added_to():
    engine = make()
    batches = [ref.ragged_batch(7, seed=seed) for seed in range(3)]
    for batch in batches:
        before = gradients_of(engine.model)
        versions = {name: None if g is None else g._version for name, g in before.items()}
        loss = engine.loss(batch)
        after = gradients_of(engine.model)
        assert all(after[name] is before[name] for name in before)
        assert {name: None if g is None else g._version for name, g in after.items()} == versions
        (loss / len(batches)).backward()
    parts = [ref.full_gradient(engine.model, batch) for batch in batches]
    expected = {name: sum(part[name] for part in parts) / 3 for name in parts[0]}
    assert ref.relative_error(gradients_of(engine.model), expected) <= EXACT


def test_failing_loss_keeps_existing_gradient():
    engine, batch = make(), ref.ragged_batch(7)
    engine.loss(batch).backward()
    before = gradients_of(engine.model)
    with pytest.raises(KeyError):
        engine.loss({"tokens": batch["tokens"]})
    assert all(gradients_of(engine.model)[name] is before[name] for name in before)


def test_first_delivery_does_not_copy_gradients():
    model = nn.Linear(3, 2).double()
    pointers = []
    engine = make(
        lambda module, part: (module(part).square().sum(), 2 * len(part)),
        model,
        gradient_hook=lambda parameters: pointers.extend(p.grad.data_ptr() for p in parameters),
    )
    (engine.loss(torch.randn(7, 3).double()) * 2).backward()
    assert [p.grad.data_ptr() for p in model.parameters()] == pointers


def test_second_backward_is_refused():
    engine, batch = make(), ref.ragged_batch(7)
    loss = engine.loss(batch)
    loss.backward()
    with pytest.raises(WindowStateError, match=f"^{re.escape(SPENT)}$"):
        loss.backward()
    assert_full(engine.model, batch)


def test_create_graph_is_refused():
    engine, batch = make(), ref.ragged_batch(7)
    loss = engine.loss(batch)
    with pytest.raises(
        WindowStateError,
        match=re.escape(
            "the backward of engine.loss(batch) was called with create_graph=True, and a finished gradient has no "
            "graph: compute the loss of gradients inside loss_fn, or leave create_graph out."
        ),
    ):
        torch.autograd.grad(loss, list(engine.model.parameters()), create_graph=True)
    loss.backward()
    assert_full(engine.model, batch)


def test_autograd_grad_returns_gradient():
    engine, batch = make(), ref.ragged_batch(7)
    named = dict(engine.model.named_parameters())
    found = torch.autograd.grad(engine.loss(batch) * 2, list(named.values()))
    expected = scaled(ref.full_gradient(engine.model, batch), 2)
    assert ref.relative_error(dict(zip(named, found, strict=True)), expected) <= EXACT
    assert all(gradient is None for gradient in gradients_of(engine.model).values())


def test_hook_on_parameter_scales_once():
    engine, batch = make(), ref.ragged_batch(7)
    engine.model.head.weight.register_hook(lambda gradient: 3 * gradient)
    expected = ref.full_gradient(engine.model, batch)
    for number in (1, 2):
        engine.loss(batch).backward()
        full = scaled(expected, number)
        assert ref.relative_error(gradients_of(engine.model), full) <= EXACT


def test_unused_parameter_keeps_no_gradient():
    model = nn.ModuleDict({"used": nn.Linear(3, 1), "unused": nn.Linear(3, 1)})
    engine = make(lambda module, part: (module["used"](part).sum(), len(part)), model)
    engine.loss(torch.randn(5, 3)).backward()
    assert model["unused"].weight.grad is None
    assert model["used"].weight.grad is not None


def test_sparse_gradient_is_delivered_times_factor():
    model = nn.Embedding(20, 3, sparse=True).double()
    engine = make(lambda module, part: (module(part).square().sum(), len(part)), model)
    rows = torch.tensor([1, 5, 1, 7, 5, 2, 1])
    for number in (1, 2):
        (engine.loss(rows) * 4).backward()
        assert model.weight.grad.is_sparse
        expected = torch.zeros(20, 3).double()
        for row in rows:
            expected[row] += number * 4 * 2 * model.weight[row].detach() / len(rows)
        torch.testing.assert_close(model.weight.grad.to_dense(), expected, rtol=EXACT, atol=0.0)


def test_bfloat16_parameters_receive_bfloat16_gradients():
    torch.manual_seed(0)
    model = nn.Linear(6, 2, bias=False).to(torch.bfloat16)
    batch = torch.randn(300, 6).bfloat16()
    engine = make(lambda module, part: (module(part).float().square().sum(), 2 * len(part)), model)
    loss = engine.loss(batch)
    assert loss.dtype == torch.float32
    (loss * 2).backward()
    total = torch.zeros(2, 6)
    for part in batch.split(3):
        total += torch.autograd.grad(model(part).float().square().sum(), [model.weight])[0]
    assert torch.equal(model.weight.grad, (total / 600).bfloat16() * 2)


def test_nonfinite_window_makes_real_scaler_skip():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def loss_fn(module, part):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(part).float().square().sum(), len(part)

    engine = make(loss_fn, model)
    before = ref.parameters_of(model)
    batch = torch.randn(7, 4)
    batch[5, 2] = float("inf")
    loss = engine.loss(batch)
    assert loss.isnan()
    scaler.scale(loss).backward()
    assert all(p.grad.isnan().all() for p in model.parameters())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    optimizer.zero_grad()
    scaler.scale(engine.loss(torch.randn(7, 4))).backward()
    scaler.step(optimizer)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_scaled_loss_in_autocast_equals_full_batch():
    engine, batch = make(model=ref.make_model(dtype=torch.float32)), ref.ragged_batch(8)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = ref.RecordingSGD(engine.model, lr=0.5)
    exact = ref.make_model(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):  # under one autocast, whose cached casts must follow the weights
            exact.load_state_dict(engine.model.state_dict())
            optimizer.zero_grad()
            scaler.scale(engine.loss(batch)).backward()
            scaler.step(optimizer)
            scaler.update()
            with torch.autocast("cpu", enabled=False):
                full = ref.full_gradient(exact, batch)
            error = ref.relative_error(optimizer.recorded[-1], full)
            assert 1e-5 < error < 0.02  # bfloat16 inside


def test_scaler_without_optimizer_scales_microbatches_only():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    engine, batch = make(scaler=scaler), ref.ragged_batch(8)
    optimizer = ref.RecordingSGD(engine.model)
    scaler.scale(engine.loss(batch)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert ref.relative_error(optimizer.recorded[-1], ref.full_gradient(engine.model, batch)) <= EXACT
    assert scaler.get_scale() == 2.0**12


@pytest.mark.parametrize("num_samples", [0, 4])
def test_batch_without_items_is_loss_of_zero(num_samples):
    engine = make()
    batch = ref.ragged_batch(4)
    batch = {"tokens": batch["tokens"][:num_samples], "labels": torch.full((num_samples, ref.LENGTH), ref.IGNORED)}
    loss = engine.loss(batch)
    assert loss.item() == 0.0
    loss.backward()
    assert all(gradient.count_nonzero() == 0 for gradient in gradients_of(engine.model).values())
    report = engine.backward(batch)
    assert report.skipped == "no items"
    assert all(gradient is None for gradient in gradients_of(engine.model).values())


def test_clip_and_hook_come_before_factor():
    seen = []
    engine = make(max_grad_norm=0.01, gradient_hook=lambda parameters: seen.append(len(parameters)))
    batch = ref.ragged_batch(8)
    (engine.loss(batch) * 4).backward()
    full = ref.full_gradient(engine.model, batch)
    norm = float(torch.nn.utils.get_total_norm(list(full.values())))
    assert ref.relative_error(gradients_of(engine.model), scaled(full, 4 * 0.01 / (norm + 1e-6))) <= EXACT
    assert seen == [len(full)]


@pytest.mark.parametrize("call", ["loss", "backward"])
def test_memory_that_runs_out_changes_no_gradient(call):
    limit = [2]

    def limited(model, part):
        loss = ref.loss_and_items(model, part)
        if ref.num_samples(part) > limit[0]:
            raise torch.OutOfMemoryError("out of memory")
        return loss

    engine, batch = make(limited, microbatch=8), ref.ragged_batch(13)
    if call == "loss":
        engine.loss(batch).backward()
    else:
        assert engine.backward(batch).retries > 2
    assert_full(engine.model, batch)
    assert engine.microbatch_size.current < 8


def test_auto_chooses_microbatch_without_optimizer():
    engine = make(microbatch="auto", memory="4GiB")
    batch = ref.ragged_batch(12)
    engine.loss(batch).backward()
    assert engine.choice is not None
    assert_full(engine.model, batch)


def test_several_terms_are_divided_by_their_own_items():
    def two_terms(model, part):
        logits = model(part["tokens"])
        return {"class": ref.loss_and_items(model, part), "size": (logits.square().sum(), len(logits))}

    engine = make(
        two_terms, count_items=lambda batch: {"class": ref.count(batch), "size": ref.num_samples(batch)}, microbatch=2
    )
    batch = ref.ragged_batch(7)
    loss = engine.loss(batch)
    model = engine.model
    whole = ref.loss_mean(model, batch) + model(batch["tokens"]).square().sum() / 7
    assert loss.item() == pytest.approx(whole.item(), rel=EXACT)
    loss.backward()
    assert ref.relative_error(gradients_of(model), ref.gradients_of(model, whole)) <= EXACT


def test_step_without_optimizer_raises_before_first_forward():
    calls = []
    engine = make(lambda model, part: calls.append(part))
    with pytest.raises(WindowStateError, match="step\\(\\) was called without an optimizer"):
        engine.step(ref.ragged_batch(4))
    assert not calls


def test_state_without_optimizer_resumes_bit_identically():
    engine = make()
    engine.backward(ref.ragged_batch(6))
    state = engine.state_dict()
    assert state["optimizer"] is None
    later = make(model=ref.make_model(seed=5))
    later.load_state_dict(state)
    assert all(map(torch.equal, later.model.parameters(), engine.model.parameters()))


def test_step_and_loss_alternate_on_one_engine():
    model = ref.make_model()
    optimizer = ref.RecordingSGD(model, lr=0.1)
    engine = bigbatch.Engine(model, optimizer, ref.loss_and_items, microbatch=3, check=False)
    batch = ref.ragged_batch(8)
    engine.loss(batch).backward()
    assert_full(model, batch)
    full = ref.full_gradient(model, batch)
    assert engine.step(batch).step == 1  # clears what loss() delivered
    assert ref.relative_error(optimizer.recorded[-1], full) <= EXACT
    assert engine.backward(batch).step == 1


def test_training_by_loss_equals_full_batch_training():
    engine = make(microbatch=2)
    model = engine.model
    expected = ref.train_reference(
        model, lambda module: torch.optim.AdamW(module.parameters(), lr=0.01), ref.batches(4), max_grad_norm=0.5
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for batch in ref.batches(4):
        optimizer.zero_grad()
        engine.loss(batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    assert ref.relative_error(ref.parameters_of(model), expected.parameters) <= 1e-10


def test_lockstep_in_one_process_changes_nothing():
    engine, batch = make(lockstep=True, microbatch="auto"), ref.ragged_batch(7)
    engine.loss(batch).backward()
    assert not engine.sync.runs_in_lockstep
    assert_full(engine.model, batch)


def test_compiled_model_trains_without_optimizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    compiled = torch.compile(model, backend="eager")
    engine = make(lambda module, part: (module(part).square().sum(), len(part)), compiled)
    batch = torch.randn(7, 4).double()
    engine.loss(batch).backward()
    expected = torch.autograd.grad(F.mse_loss(model(batch), torch.zeros(7, 1).double()), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-15)


def test_first_window_check_warns_within_loss():
    def mean(model, part):
        loss_sum, items = ref.loss_and_items(model, part)
        return loss_sum / items, items

    engine = make(mean, check=True)
    with pytest.warns(UserWarning, match="the updates of this engine are not exactly those of the full batch"):
        engine.loss(ref.ragged_batch(8))
    assert all(gradient is None for gradient in gradients_of(engine.model).values())


def test_other_leaves_receive_no_gradient():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def times_scale(model, part):
        loss_sum, items = ref.loss_and_items(model, part)
        return loss_sum * scale, items

    engine, batch = make(times_scale), ref.ragged_batch(6)
    engine.loss(batch).backward()
    assert scale.grad is None
    assert_full(engine.model, batch)


class BufferOwner(OomRetry):
    """Owns the gradients of its windows, and sets them to zero, as captured graphs do."""

    def __init__(self, model):
        super().__init__(model, torch.device("cpu"))
        self.static_buffers = None

    def end(self, pending, should_abandon=None):
        self.static_buffers = pending.sums.grads_in_place()


def test_buffers_of_runner_are_not_delivered():
    engine = make()
    engine.runner = BufferOwner(engine.model)
    batches = [ref.ragged_batch(7, seed=seed) for seed in range(3)]
    losses = [engine.loss(batch) for batch in batches]
    for loss in losses:
        (loss / 3).backward()
    parts = [ref.full_gradient(engine.model, batch) for batch in batches]
    expected = {name: sum(part[name] for part in parts) / 3 for name in parts[0]}
    assert ref.relative_error(gradients_of(engine.model), expected) <= EXACT


@pytest.mark.gpu
def test_cuda_graph_buffers_are_not_delivered():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).double().cuda()

    def loss_fn(module, part):
        output = module(part)
        return output.square().sum(), torch.ones_like(output).sum()

    engine = make(loss_fn, model, microbatch=4, cuda_graphs=True)
    batches = [torch.randn(12, 8).double() for _ in range(4)]
    for loss in [engine.loss(batch) for batch in batches]:
        (loss / 2).backward()
    assert engine.runner.num_graphs == 1
    whole = sum(model(batch.cuda()).square().mean() for batch in batches) / 2
    assert ref.relative_error(gradients_of(model), ref.gradients_of(model, whole)) <= EXACT


def test_exact_loss_is_recognized():
    loss = make().loss(ref.ragged_batch(4))
    assert is_exact_loss(loss)
    assert not is_exact_loss(loss * 2)
    assert not is_exact_loss(torch.zeros(()))
