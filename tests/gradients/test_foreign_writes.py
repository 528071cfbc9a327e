"""Writes of other code to gradients and parameters of an open window are refused, on every parameter."""

import re
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import bigbatch
from bigbatch import WindowStateError
from bigbatch.gradients.gradient_sums import GradientSums
from support import full_batch_reference as ref


def three_layers(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def rows(dtype=torch.float64):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def own_backward(model):
    model(rows(model[0].weight.dtype)).float().sum().backward()


WRITES = {
    "head.zero_grad": lambda model: model[4].zero_grad(),
    "zero in place": lambda model: model[4].zero_grad(set_to_none=False),
    "scaled bias": lambda model: model[2].bias.grad.mul_(1.5),
    "clipped part": lambda model: nn.utils.clip_grad_norm_(model[2].parameters(), 1e-3),
    "clipped values": lambda model: nn.utils.clip_grad_value_(model[4].parameters(), 1e-3),
    "none": lambda model: setattr(model[4].bias, "grad", None),
    "new tensor": lambda model: setattr(model[4].bias, "grad", model[4].bias.grad.clone()),
    "own backward": own_backward,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("num_backwards", [1, 2])
def test_write_between_backwards_is_refused(write, num_backwards):
    model = three_layers()
    window = bigbatch.Accumulator(model, torch.optim.AdamW(model.parameters())).window()
    for _ in range(num_backwards):
        window.backward(model(rows()).square().sum(), items=4)
    write(model)
    with pytest.raises(WindowStateError, match="the gradients of this window were changed since its last backward"):
        window.backward(model(rows()).square().sum(), items=4)
    assert window.state is bigbatch.WindowState.ABORTED
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_write_before_step_is_refused(write):
    model = three_layers()
    before = ref.parameters_of(model)
    window = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)).window()
    window.backward(model(rows()).square().sum(), items=4)
    write(model)
    with pytest.raises(WindowStateError, match="changed since its last backward"):
        window.step()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_refusal_names_first_changed_parameter():
    model = three_layers()
    with GradientSums(model.parameters()) as sums:
        sums.backward(model(rows()).sum())
        model[2].bias.grad.mul_(2)
        with pytest.raises(WindowStateError) as refused:
            sums.tensors()
    assert str(refused.value) == (
        "the gradients of this window were changed since its last backward, by optimizer.zero_grad(), by clipping, "
        "by a hook, by a backward of your own or by another window over the same parameters. The first that differs is "
        "that of parameter 4 of 6, of shape (4,). Remove the code that does this: a window clears the gradients when "
        "it opens and when it ends, and nothing else may write to them in between."
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", ["before", "between", "last"])
def test_own_backward_is_refused_in_every_dtype(dtype, position):
    """Half-precision parameters have no ``.grad`` between backwards, so only a hook sees the other backward."""
    model = three_layers(dtype)
    window = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1)).window()
    if position == "before":
        own_backward(model)
    else:
        window.backward(model(rows(dtype)).float().sum(), items=4)
        own_backward(model)
    end = window.step if position == "last" else lambda: window.backward(model(rows(dtype)).float().sum(), items=4)
    expected = "before its first backward" if position == "before" else "since its last backward"
    with pytest.raises(WindowStateError, match=f"changed {expected}, by"):
        end()


def test_backward_on_part_is_refused():
    """An auxiliary loss of the first layer, in front of the window's own backward."""
    model = three_layers()
    window = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1)).window()
    window.backward(model(rows()).sum(), items=4)
    window.backward(model[:3](rows()).sum(), items=4)  # does not reach the last layer
    model[0](rows()).abs().sum().backward()
    with pytest.raises(WindowStateError, match="parameter 1 of 6"):
        window.backward(model(rows()).sum(), items=4)


def test_write_to_frozen_and_sparse_model_is_refused():
    model = nn.ModuleDict(
        {"table": nn.Embedding(5, 3, sparse=True), "frozen": nn.Linear(3, 3), "head": nn.Linear(3, 1)}
    )
    model["frozen"].requires_grad_(False)
    with GradientSums(model.parameters()) as sums:
        for _ in range(2):
            sums.backward(model["head"](model["frozen"](model["table"](torch.tensor([0, 3])))).sum())
        model["head"].bias.grad = model["head"].bias.grad.clone()
        with pytest.raises(WindowStateError, match="parameter 5 of 5"):
            sums.tensors()


def test_own_backward_between_windows_is_legal():
    model = three_layers()
    optimizer = ref.RecordingSGD(model)
    accumulator = bigbatch.Accumulator(model, optimizer)
    for _ in range(2):
        own_backward(model)
        window = accumulator.window()
        full = ref.gradients_of(model, model(rows()).square().sum() / 4)
        model.zero_grad()
        for part in rows().split(2):
            window.backward(model(part).square().sum(), items=2)
        window.step()
        assert ref.relative_error(optimizer.recorded[-1], full) <= 1e-12


def test_autograd_grad_inside_window_is_legal():
    """It returns gradients, and writes none."""
    model = three_layers()
    window = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1)).window()
    for part in rows().split(2):
        loss = model(part).square().sum()
        assert torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)[0].any()
        window.backward(loss, items=2)
    assert window.step().skipped is None


def fuse(model, make, *, zeroes=True):
    optimizers = {p: make([p]) for p in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        if zeroes:
            optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zeroes", [True, False])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, partial(torch.optim.Adam, fused=True)])
def test_fused_optimizer_is_refused_with_weights_kept(dtype, zeroes, make):
    model = three_layers(dtype)
    fuse(model, lambda parameters: make(parameters, lr=0.1), zeroes=zeroes)
    before = ref.parameters_of(model)
    engine = bigbatch.Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda m, x: (m(x).float().square().sum(), len(x)),
        microbatch=2,
    )
    with pytest.raises(WindowStateError, match="It has been restored"):
        engine.step(rows(dtype))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_fused_optimizer_message_names_parameter():
    model = nn.Linear(3, 2, bias=False)
    fuse(model, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    with GradientSums(model.parameters()) as sums, pytest.raises(WindowStateError) as refused:
        sums.backward(model(rows(torch.float32)).sum())
    assert str(refused.value) == (
        "a hook on parameter 1 of 1, of shape (2, 3), changed it within backward, as an optimizer that is fused into "
        "backward does, when the gradient of the window was not complete. It has been restored; remove the hook, and "
        "let the window's step() call the optimizer."
    )


def test_optimizer_fused_every_second_backward_is_refused():
    model = three_layers()
    calls = []
    optimizer = torch.optim.SGD([model[4].weight], lr=0.1)

    def step(_parameter):
        calls.append(None)
        if len(calls) % 2 == 0:
            optimizer.step()

    model[4].weight.register_post_accumulate_grad_hook(step)
    with GradientSums(model.parameters()) as sums:
        sums.backward(model(rows()).sum())
        with pytest.raises(WindowStateError, match="It has moved: start again from a checkpoint; remove the hook"):
            sums.backward(model(rows()).sum())


def test_optimizer_in_backward_is_refused_before_weights_move():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit.script
        from torch.distributed.optim import _apply_optimizer_in_backward
    model = three_layers()
    _apply_optimizer_in_backward(torch.optim.SGD, model[2].parameters(), {"lr": 0.1})
    before = ref.parameters_of(model)
    with GradientSums(model.parameters()) as sums, pytest.raises(WindowStateError) as refused:
        sums.backward(model(rows()).sum())
    assert str(refused.value) == (
        "_apply_optimizer_in_backward was called for parameter 3 of 6, of shape (4, 4): its optimizer would step "
        "before the gradient of the window is complete. Make a model without it, and let the window's step() call the "
        "optimizer."
    )
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_optimizer_fused_at_graph_node_is_refused():
    """No list of hooks shows it."""
    model = three_layers()
    bias = model[2].bias
    optimizer = torch.optim.SGD([bias], lr=0.1)
    node = bias.view_as(bias).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: optimizer.step())
    with GradientSums(model.parameters()) as sums, pytest.raises(WindowStateError) as refused:
        sums.backward(model(rows()).sum())
    assert str(refused.value) == (
        "the backward of a window changed parameter 4 of 6, of shape (4,), as an optimizer that is fused into backward "
        "does. The weights have moved: remove its hooks, and start again from a checkpoint."
    )


@pytest.mark.parametrize("write", [lambda p: p.grad.clamp_(-1e-3, 1e-3), lambda p: setattr(p, "grad", p.grad.sign())])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_hook_that_writes_gradient_is_refused(write, dtype):
    model = three_layers(dtype)
    model[2].weight.register_post_accumulate_grad_hook(write)
    with GradientSums(model.parameters()) as sums, pytest.raises(WindowStateError) as refused:
        sums.backward(model(rows(dtype)).sum())
    assert str(refused.value) == (
        "a hook on parameter 3 of 6, of shape (4, 4), changed its gradient within backward, when that of the window "
        "was not complete. Remove the hook: inside a window, hooks may only read gradients."
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_hooks_that_only_read_are_legal(dtype):
    model = three_layers(dtype)
    seen = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm()))
        parameter.register_hook(lambda gradient: seen.append(gradient.norm()))
    full = ref.gradients_of(model, model(rows(dtype)).square().sum() / 4)
    optimizer = ref.RecordingSGD(model)
    window = bigbatch.Accumulator(model, optimizer).window()
    seen.clear()
    for part in rows(dtype).split(1):
        window.backward(model(part).square().sum(), items=1)
    window.step()
    assert len(seen) == 4 * 6 * 2
    assert ref.relative_error(optimizer.recorded[0], full) <= (1e-12 if dtype is torch.float64 else 2e-2)


def test_dtype_changed_inside_window_is_refused():
    model = nn.Linear(3, 2)
    with GradientSums(model.parameters()) as sums:
        sums.backward(model(rows(torch.float32)).sum())
        model.to(torch.bfloat16)
        with pytest.raises(WindowStateError) as refused:
            sums.tensors()
    assert str(refused.value) == (
        "parameter 1 of 2, of shape (2, 3), was float32 at the first backward of the window and is bfloat16 now. "
        "Convert the model between two windows."
    )


def test_refusal_mentions_no_parameter_for_moved_gradient():
    """The gradients of half-precision parameters are moved away: none differs after another backward."""
    model = nn.Linear(3, 2).bfloat16()
    with GradientSums(model.parameters()) as sums:
        sums.backward(model(rows(torch.bfloat16)).sum())
        model(rows(torch.bfloat16)).sum().backward()
        with pytest.raises(WindowStateError, match=re.escape("same parameters. Remove the code")):
            sums.tensors()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_backwards", [1, 3])
def test_half_precision_gradient_set_between_backwards_is_refused(dtype, num_backwards):
    """The next backward would add to it, and move both into the sum."""
    model = three_layers(dtype)
    window = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1)).window()
    for _ in range(num_backwards):
        window.backward(model(rows(dtype)).float().sum(), items=4)
    model[2].weight.grad = torch.full_like(model[2].weight, 8.0)
    with pytest.raises(WindowStateError, match="that of parameter 3 of 6"):
        window.backward(model(rows(dtype)).float().sum(), items=4)


def test_conversion_inside_window_is_refused():
    model = three_layers(torch.float32)
    window = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1)).window()
    window.backward(model(rows(torch.float32)).sum(), items=4)
    model[4].double()
    window.backward(model[4](torch.ones(4, 4, dtype=torch.float64)).sum(), items=4)
    with pytest.raises(WindowStateError, match=r"parameter 5 of 6, of shape \(2, 4\), was float32 .* is float64 now"):
        window.step()


def write_by_other_optimizer(model: nn.Module) -> None:
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def write_by_state_dict(model: nn.Module) -> None:
    model.load_state_dict({name: tensor * 2 for name, tensor in model.state_dict().items()})


def write_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-0.1, 0.1)


@pytest.mark.parametrize("write", [write_by_other_optimizer, write_by_state_dict, write_in_place])
def test_parameters_written_inside_window_warn(write):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    accumulator = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    window = accumulator.window()
    window.backward(model(torch.ones(4, 3).double()).sum(), items=8)
    write(model)
    window.backward(model(torch.ones(2, 3).double()).sum(), items=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        window.step()
    assert [str(warning.message) for warning in caught] == [
        "parameter 1 of 2, of shape (2, 3), and 1 more, was written to after the first backward of a window and "
        "before its end, by another optimizer, by load_state_dict() or by an in-place operation: if its value changed, "
        "the micro-batches of the window used different weights. Write to parameters between two windows."
    ]


def test_parameters_written_between_windows_do_not_warn():
    model = nn.Linear(3, 2).double()
    accumulator = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        with accumulator.window() as window:
            window.backward(model(torch.ones(4, 3).double()).sum(), items=8)
            window.step()
        write_in_place(model)
