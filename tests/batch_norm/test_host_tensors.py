"""Saved tensors in host memory: what is moved, once, and unchanged. Without CUDA, from the host to the host."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batch_norm.models import NUM_SAMPLES, TOLERANCE, buffer_error, classify, gradient_error, images, resnet, whole
from bigbatch.batch_norm import host_tensors
from bigbatch.batch_norm.host_tensors import HostTensors
from bigbatch.batch_norm.joint_window import JointWindow
from bigbatch.batch_norm.moments import Moments
from bigbatch.batch_norm.normalize import normalize
from bigbatch.gradients.gradient_sums import GradientSums
from bigbatch.gradients.leaf_backward import backward_inside

CPU = torch.device("cpu")
ROWS, WIDTH = 96, 256  # 98,304 bytes in float32: above the limit


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)).to(dtype)


def moved(run: Callable[[HostTensors], Tensor], *resident: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return the copies on the host that a forward makes, after its backward."""
    copies = []

    def copied(tensor: Tensor) -> Tensor:
        copies.append(original(tensor))
        return copies[-1]

    original = host_tensors._to_host
    monkeypatch.setattr(host_tensors, "_to_host", copied)
    host = HostTensors(CPU, resident)
    with host.moving():
        loss = run(host)
    loss.backward()
    return copies


def test_tensor_that_two_operations_save_moves_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = layers(), torch.randn(ROWS, WIDTH)
    copies = moved(lambda _host: model(rows).sum(), *model.parameters(), monkeypatch=monkeypatch)
    assert [tuple(copy.shape) for copy in copies] == [(ROWS, WIDTH)] * 2  # the input, and the output of ReLU


def test_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, rows = layers(), layers(), torch.randn(ROWS, WIDTH)
    moved(lambda _host: one(rows).square().sum(), *one.parameters(), monkeypatch=monkeypatch)
    other(rows).square().sum().backward()
    assert gradient_error(one, other) == 0.0


def test_value_before_change_in_place_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(ROWS, WIDTH, requires_grad=True)

    def run(_host: HostTensors) -> Tensor:
        hidden = values * 1.0
        total = hidden.square().sum()
        hidden.mul_(3.0)
        return total + hidden.square().sum()

    copies = moved(run, monkeypatch=monkeypatch)
    assert len(copies) == 2
    torch.testing.assert_close(values.grad, 2 * values.detach() + 18 * values.detach())


def test_small_tensors_and_parameters_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    small = torch.randn(4, WIDTH)

    def run(_host: HostTensors) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(F.linear(small, weight).float(), weight).sum()

    assert not moved(run, weight, monkeypatch=monkeypatch)


def test_strides_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(2, 32, 32, 32, requires_grad=True)
    copies = moved(
        lambda _host: (images.contiguous(memory_format=torch.channels_last) * 1.0).square().sum(),
        monkeypatch=monkeypatch,
    )
    assert copies[-1].is_contiguous(memory_format=torch.channels_last)


def test_input_of_norm_is_read_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(ROWS, WIDTH, requires_grad=True)
    expected = inputs.detach().clone().requires_grad_()
    F.batch_norm(expected, None, None, training=True).pow(3).sum().backward()

    def run(host: HostTensors) -> Tensor:
        assert host.is_moving
        moments = Moments.of(inputs.detach())
        outputs = normalize(
            inputs, None, None, eps=1e-5, moments=moments, add_up=lambda sums: sums, releases_input=host.is_moving
        )
        return outputs.pow(3).sum()

    moved(run, monkeypatch=monkeypatch)
    torch.testing.assert_close(inputs.grad, expected.grad, rtol=1e-3, atol=1e-5)


def test_nothing_moves_outside() -> None:
    host = HostTensors(CPU, ())
    assert not host.is_moving
    with host.moving(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert not host.is_moving


@pytest.mark.parametrize("cut", [1, 4, 10])
def test_windows_with_host_tensors_are_exact(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_tensors, "SMALLEST_BYTES", 1)
    model, (pixels, labels) = resnet(), images()
    expected = whole(model, classify, [(pixels, labels)])
    window, sums = JointWindow([model], CPU, keeps_on_host=True), GradientSums(model.parameters())
    copies = []
    original = host_tensors._to_host
    monkeypatch.setattr(host_tensors, "_to_host", lambda tensor: copies.append(tensor.shape) or original(tensor))

    def differentiate(start: int) -> None:
        loss_sum, _ = classify(model, (pixels[start : start + cut], labels[start : start + cut]))
        backward_inside(loss_sum / NUM_SAMPLES, sums, trained)

    with sums, sums.adding() as trained, window.open():
        assert window.run(partial(differentiate, start) for start in range(0, NUM_SAMPLES, cut)) is None
        gradients = [p.grad for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    assert len(copies) > 20
    assert gradient_error(model, expected) <= TOLERANCE
    assert buffer_error(model, expected) <= 1e-14
