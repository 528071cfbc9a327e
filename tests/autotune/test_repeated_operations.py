"""Repeated operations against those of `FakeTensorMode` alone: the same tensors, aliases and predictions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bigbatch.autotune import peak_prediction, repeated_operations
from bigbatch.autotune.peak_prediction import PeakPredictor, Prediction, PredictionError
from bigbatch.autotune.repeated_operations import RepeatedOperations
from bigbatch.memory.allocation_tracker import AllocationTracker
from support.tiers import slow


def repeating(mode: FakeTensorMode) -> AllocationTracker:
    return AllocationTracker(torch.device("cpu"), run=RepeatedOperations(mode))


class Reached(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that are passed on; entered below the tracker."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def make_inputs(mode: FakeTensorMode) -> dict[str, Any]:
    with mode:
        return {
            "x": torch.empty(4, 6),
            "y": torch.empty(6, 4).t(),
            "indices": torch.empty(4, dtype=torch.int64),
            "image": torch.empty(2, 3, 8, 8).to(memory_format=torch.channels_last),
            "complex": torch.empty(3, dtype=torch.complex64),
        }


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "new": lambda x, y, **_: x + y,
    "scalar": lambda x, **_: (x * 2, x * 2.0, x > True),
    "strides": lambda x, y, **_: (torch.empty_like(y), x.t().contiguous(), y.exp()),
    "channels last": lambda image, **_: F.conv2d(image, torch.empty(5, 3, 3, 3)),
    "cast": lambda x, **_: (x.to(torch.bfloat16), x.to(torch.float32), x.to(torch.int64)),
    "views": lambda x, **_: (x.t(), x[1:3], x.view(2, 12), x.expand(3, 4, 6), x.detach(), x.T[2:].unsqueeze(1)),
    "views of parts": lambda x, **_: (*x.split(2), *x.unbind(1), *x[1:].chunk(2)),
    "view of another dtype": lambda x, **_: x.view(torch.int32),
    "list": lambda x, y, **_: torch.cat([x, y, x]),
    "several outputs": lambda x, **_: torch.max(x, 1),
    "layer norm": lambda x, **_: torch.native_layer_norm(x, [6], None, None, 1e-5),
    "dropout": lambda x, **_: torch.native_dropout(x, 0.5, True),
    "in place": lambda x, **_: (x.add_(1) is x, x.mul_(x) is x, x[1].zero_().shape),
    "in place view": lambda x, **_: x.clone().t_(),
    "resized": lambda x, **_: x.clone().resize_(2, 3),
    "out": lambda x, y, **_: torch.mul(x, y, out=torch.empty(4, 6)),
    "index": lambda x, indices, **_: (x[indices], F.embedding(indices, x)),
    "complex": lambda **inputs: (inputs["complex"] * 2, inputs["complex"].real, inputs["complex"].imag),
    "constant": lambda x, **_: x + torch.tensor(3.0),
    "attention": lambda x, **_: attend(x.view(1, 2, 4, 3)),
}


def described(value: Any, inputs: dict[str, Any]) -> Any:
    """Return everything that a step can see of a result, with the input whose memory it shares."""
    if isinstance(value, tuple | list):
        return [described(each, inputs) for each in value]
    if not isinstance(value, Tensor):
        return value
    assert type(value) is FakeTensor
    storage = value.untyped_storage()
    shared = [name for name, tensor in inputs.items() if tensor.untyped_storage()._cdata == storage._cdata]
    metadata = value.shape, value.stride(), value.storage_offset(), value.dtype, value.device, value.requires_grad
    return metadata, storage.nbytes(), value.is_conj(), value.is_neg(), shared


@pytest.mark.parametrize("name", OPERATIONS)
def test_second_result_is_that_of_fake_tensors_alone(name: str) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        inputs = make_inputs(mode)
        expected = described(OPERATIONS[name](**inputs), inputs)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, repeating(mode):
        for _ in range(3):
            inputs = make_inputs(mode)
            assert described(OPERATIONS[name](**inputs), inputs) == expected


@pytest.fixture
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RepeatedOperations, "_known", {})


@pytest.mark.usefixtures("_nothing_known")
def test_equal_layers_run_once() -> None:
    mode, reached = FakeTensorMode(allow_non_fake_inputs=True), Reached()
    with mode, reached, repeating(mode):
        layer, inputs = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)), torch.empty(4, 8)
        layer(inputs).sum().backward()
        layer(inputs).sum().backward()  # adds to the gradients
        first = len(reached.names)
        for _ in range(3):
            layer(inputs).sum().backward()
    assert first > 10
    assert not [name for name in reached.names[first:] if "addmm" in name or "gelu" in name or "layer_norm" in name]


@pytest.mark.usefixtures("_nothing_known")
def test_other_shape_dtype_or_value_runs_again() -> None:
    mode, reached = FakeTensorMode(), Reached()
    with mode, reached, repeating(mode):
        x = torch.empty(4, 6)
        for operand in (x, x, x[:2], x[1:3], x.double(), x.t()):
            torch.exp(operand)
        x.sum(0), x.sum(1), x.sum(1), x.sum((0, 1))
    assert reached.names.count("aten.exp.default") == 5
    assert reached.names.count("aten.sum.dim_IntList") == 3


@pytest.mark.usefixtures("_nothing_known")
def test_number_of_known_operations_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated_operations, "MAX_KNOWN", 2)
    mode = FakeTensorMode()
    with mode, repeating(mode):
        for rows in (1, 2, 3):
            torch.exp(torch.empty(rows))
    assert len(RepeatedOperations._known) == 1


def test_tensors_of_another_mode_are_passed_on() -> None:
    mode, other = FakeTensorMode(), FakeTensorMode()
    with other:
        foreign = torch.empty(3)
    with mode, repeating(mode), pytest.raises(AssertionError, match="Mixing fake modes"):
        torch.exp(foreign)


# predictions -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers of several kinds: convolution, batch norm, attention, dropout; checkpointed on request."""

    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.convolution, self.norm = nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))
        self.head = nn.Linear(16, 50)
        self.head.weight = self.embedding.weight
        self.checkpointed = checkpointed

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden = hidden + self.norm(self.convolution(hidden.transpose(1, 2))).transpose(1, 2)
        for layer in self.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=False) if self.checkpointed else layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits


def loss_fn(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
    loss_sum = F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten(), reduction="sum")
    return loss_sum, tokens.numel()


def autocast_loss_fn(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return loss_fn(model, tokens)


@pytest.mark.parametrize(
    ("loss", "checkpointed", "optimizer", "device"),
    [
        slow(loss_fn, False, torch.optim.AdamW, None),
        (autocast_loss_fn, True, torch.optim.AdamW, None),
        slow(loss_fn, True, torch.optim.Adafactor, "cuda"),
        (autocast_loss_fn, False, torch.optim.SGD, "cuda"),
    ],
)
def test_predictions_are_those_without_repetition(
    loss: Any, checkpointed: bool, optimizer: Any, device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predictions() -> list[Prediction]:
        model = Net(checkpointed=checkpointed)
        predictor = PeakPredictor.from_training(
            model, optimizer(model.parameters()), loss, device=None if device is None else torch.device(device)
        )
        return [predictor.predict(torch.ones(rows, 12, dtype=torch.int64)) for rows in (1, 6)]

    found = predictions()
    monkeypatch.setattr(peak_prediction, "RepeatedOperations", lambda _: None)
    assert found == predictions()


def test_step_that_needs_data_is_refused_each_time() -> None:
    def selecting(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
        return model(tokens[tokens[:, 0] > 0]).sum(), tokens.numel()

    model = Net(checkpointed=False)
    predictor = PeakPredictor.from_training(model, torch.optim.SGD(model.parameters()), selecting)
    for _ in range(2):
        with pytest.raises(PredictionError, match="nonzero"):
            predictor.predict(torch.ones(2, 12, dtype=torch.int64))
