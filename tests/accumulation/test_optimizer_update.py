"""The update: once, on the total; refusals of what cannot work."""

import pytest
import torch
from torch import nn

import bigbatch
from support import full_batch_reference as ref


def test_scheduler_that_needs_validation_loss_is_rejected():
    model = ref.make_model()
    optimizer = torch.optim.SGD(model.parameters())
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(
        TypeError, match=r"ReduceLROnPlateau needs a validation loss.*scheduler.step\(validation_loss\)"
    ):
        bigbatch.Accumulator(model, optimizer, scheduler=scheduler)


@pytest.mark.parametrize("limit", [0, -1.0, float("nan")])
def test_invalid_clipping_norm_is_rejected(limit):
    model = ref.make_model()
    with pytest.raises(ValueError, match=f"max_grad_norm is {limit}: it must be above 0, or None"):
        bigbatch.Accumulator(model, torch.optim.SGD(model.parameters()), max_grad_norm=limit)


@pytest.mark.parametrize("limit", ["1.0", True, [1.0]])
def test_clipping_norm_that_is_no_number_is_rejected(limit):
    model = ref.make_model()
    with pytest.raises(TypeError) as caught:
        bigbatch.Accumulator(model, torch.optim.SGD(model.parameters()), max_grad_norm=limit)
    assert str(caught.value) == f"max_grad_norm is {limit!r}: pass a number above 0, or None to not clip."


def test_scaler_of_another_type_is_rejected():
    model = ref.make_model()
    with pytest.raises(TypeError) as caught:
        bigbatch.Accumulator(model, torch.optim.SGD(model.parameters()), scaler=3)
    assert str(caught.value) == "scaler is a int: pass a torch.amp.GradScaler, or None."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"collate": 3}, "collate is a int: pass a function."),
        ({"lengths": [3]}, "lengths is a list: pass a function."),
        ({"count_items": {}}, "count_items is a dict: pass a function."),
        ({"check": "off"}, "check is 'off': pass True or False."),
        ({"cuda_graphs": "no"}, "cuda_graphs is 'no': pass True or False."),
        ({"reproducible": "no"}, "reproducible is 'no': pass True or False."),
    ],
)
def test_arguments_of_another_type_are_rejected(settings, message):
    model = ref.make_model()
    with pytest.raises(TypeError) as caught:
        bigbatch.Engine(model, torch.optim.SGD(model.parameters()), ref.loss_and_items, microbatch=2, **settings)
    assert str(caught.value) == message


def test_loss_that_is_no_function_is_rejected():
    model = ref.make_model()
    with pytest.raises(TypeError) as caught:
        bigbatch.Engine(model, torch.optim.SGD(model.parameters()), 3, microbatch=2)
    assert str(caught.value) == "loss_fn is a int: pass a function."


def test_verify_with_exchanged_arguments_is_rejected():
    with pytest.raises(TypeError) as caught:
        bigbatch.verify(ref.loss_and_items, ref.make_model(), ref.ragged_batch(8))
    assert str(caught.value) == "model is a function: pass verify(model, loss_fn, batch), in this order."


def test_infinite_clipping_norm_does_not_clip():
    model, batch = ref.make_model(), ref.ragged_batch(8)
    optimizer = ref.RecordingSGD(model)
    ref.step_by_engine(model, optimizer, batch, 3, max_grad_norm=float("inf"))
    full = ref.full_gradient(model, batch)
    assert ref.relative_error(optimizer.recorded[0], full) <= 1e-12
    assert ref.relative_error(ref.mean_of_means_gradient(model, ref.cut(batch, 3)), full) > 1e-3


def test_non_optimizer_is_rejected():
    model = ref.make_model()
    with pytest.raises(
        TypeError,
        match=r"optimizer is a list that contains a Parameter: pass a torch.optim.Optimizer, or a list of them\.",
    ):
        bigbatch.Accumulator(model, list(model.parameters()))


def test_non_module_is_rejected():
    model = ref.make_model()
    with pytest.raises(TypeError, match=r"model is a function: pass the torch.nn.Module"):
        bigbatch.Accumulator(lambda x: x, torch.optim.SGD(model.parameters()))


def test_optimizer_over_other_parameters_is_rejected():
    with pytest.raises(ValueError, match="none of the optimizer's parameters belongs to the model"):
        bigbatch.Accumulator(ref.make_model(), torch.optim.SGD(ref.make_model().parameters()))


def test_scheduler_of_another_optimizer_is_rejected():
    model, other = ref.make_model(), ref.make_model()
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(other.parameters()), 1)
    with pytest.raises(ValueError, match="scheduler"):
        bigbatch.Accumulator(model, torch.optim.SGD(model.parameters()), scheduler=scheduler)


@pytest.mark.parametrize("kind", ["FullyShardedDataParallel", "DataParallel"])
def test_unsupported_wrapper_is_rejected(kind):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    Wrapper.__name__ = kind
    model = Wrapper(ref.make_model())
    with pytest.raises(TypeError, match=f"wrapped in {kind}"):
        bigbatch.Accumulator(model, torch.optim.SGD(model.parameters()))


def test_fused_optimizer_works_with_and_without_scaler():
    inputs = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))

    def train(size, **settings):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        engine = bigbatch.Engine(
            model, optimizer, lambda m, x: (m(x).square().sum(), len(x)), microbatch=size, max_grad_norm=0.5, **settings
        )
        for _ in range(5):
            engine.step(inputs)
        return ref.parameters_of(model)

    full = train(9)
    assert ref.relative_error(train(2), full) <= 1e-5
    assert ref.relative_error(train(2, scaler=torch.amp.GradScaler("cpu", init_scale=64.0)), full) <= 1e-5


def test_model_without_parameters_trains_optimizer_parameters():
    """Prompt tuning of a function: the module holds nothing."""

    class Function(nn.Module):
        def forward(self, rows, prompt):
            return rows * prompt

    prompt, rows = torch.ones(3, dtype=torch.float64, requires_grad=True), torch.randn(9, 3).double()
    engine = bigbatch.Engine(
        Function(),
        torch.optim.SGD([prompt], lr=1.0),
        lambda module, part: (module(part, prompt).square().sum(), len(part)),
        microbatch=2,
    )
    engine.step(rows)
    assert torch.allclose(1 - prompt.detach(), 2 * rows.square().mean(0), rtol=1e-12)


def test_empty_first_parameter_group_is_accepted():
    model = nn.Linear(2, 1).double()
    optimizer = torch.optim.SGD([{"params": []}, {"params": list(model.parameters())}], lr=1.0)
    before = model.bias.detach().clone()
    window = bigbatch.Accumulator(model, optimizer).window()
    window.backward(model(torch.ones(3, 2).double()).sum(), items=3)
    assert window.step().step == 1
    assert torch.equal(before - 1, model.bias)


def test_loss_without_optimizer_parameters_raises_or_skips_step():
    """AdamW with no gradient at all does nothing: a step that changed nothing must not be reported as an update."""
    model = nn.ModuleDict({"trained": nn.Linear(1, 1), "other": nn.Linear(1, 1)})
    optimizer = torch.optim.AdamW(model["trained"].parameters())
    for settings in ({}, {"scaler": torch.amp.GradScaler("cpu")}):
        engine = bigbatch.Engine(model, optimizer, lambda m, x: (m["other"](x).sum(), len(x)), microbatch=2, **settings)
        with pytest.raises(ValueError, match="none of the optimizer's parameters received a gradient"):
            engine.step(torch.ones(3, 1))


def test_optimizer_step_hooks_see_divided_gradient_once():
    model, batch = ref.make_model(), ref.ragged_batch(8)
    full = ref.full_gradient(model, batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append({name: p.grad.clone() for name, p in model.named_parameters()})
    )
    ref.step_by_engine(model, optimizer, batch, 3)
    assert len(seen) == 1
    assert ref.relative_error(seen[0], full) <= 1e-12


class RunningOut(torch.optim.AdamW):
    """Has no memory left when the first parameter has moved."""

    @torch.no_grad()
    def step(self, closure=None):
        self.param_groups[0]["params"][0].add_(1.0)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has …")


@pytest.mark.parametrize("scaled", [False, True])
def test_out_of_memory_in_step_reports_lost_parameters(scaled):
    model = nn.Linear(2, 1)
    optimizer = RunningOut(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    engine = bigbatch.Engine(
        model, optimizer, lambda m, x: (m(x).sum(), len(x)), microbatch=2, scheduler=scheduler, scaler=scaler
    )
    with pytest.raises(
        bigbatch.MemoryLimitError,
        match=r"^memory ran out within the step of RunningOut \(CUDA out of memory. Tried to allocate 20.00 MiB\): "
        "some parameters may be updated and others not. Return to a checkpoint, and leave more memory",
    ) as raised:
        engine.step(torch.ones(3, 2))
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    assert "\n" not in str(raised.value)
    assert engine.accumulator.num_steps == 0
    assert scheduler.last_epoch == 0
    assert all(p.grad is None for p in model.parameters())


def test_other_errors_in_step_pass_through():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("shapes do not match")

    model = nn.Linear(2, 1)
    engine = bigbatch.Engine(model, Broken(model.parameters()), lambda m, x: (m(x).sum(), len(x)), microbatch=2)
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        engine.step(torch.ones(3, 2))
