"""What other code does with weights and optimizers of an engine: the bits of a run without offload, or an error."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch
from bigbatch.errors import WindowStateError
from offload.models import OPTIMIZERS, Decoder, decoder_loss, make_batch, make_engine, make_model, make_tokens, values

Act = Callable[[bigbatch.Engine, torch.optim.Optimizer], None]
Run = list[list[float]]
WRITTEN = (
    r'^the weight first\.weight was written to by other code, and with offload="master" its value in float32 is in '
    r"host memory, which the next update would write back: change weights with engine\.load_state_dict\(\), or before "
    r"the engine is made\.$"
)


def make(level: str, **settings: Any) -> tuple[bigbatch.Engine, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = settings.pop("model", Decoder)()
    optimizer = settings.pop("optimizer", OPTIMIZERS["adamw"])(list(model.parameters()))
    return make_engine(model, optimizer, level, **({"loss_fn": decoder_loss} | settings)), optimizer


def train(engine: bigbatch.Engine, first: int, last: int) -> None:
    for number in range(first, last):
        engine.step(make_tokens(number))


def run(level: str, act: Act, **settings: Any) -> Run:
    engine, optimizer = make(level, **settings)
    train(engine, 0, 2)
    act(engine, optimizer)
    train(engine, 2, 5)
    return [tensor.double().flatten().tolist() for tensor in engine.state_dict()["model"].values()]


def assert_same(act: Act, **settings: Any) -> None:
    assert run("none", act, **settings) == run("master", act, **settings)


def nothing(_engine: bigbatch.Engine, _optimizer: torch.optim.Optimizer) -> None:
    pass


def state_of_first(engine: bigbatch.Engine) -> dict[str, Any]:
    return copy.deepcopy(engine.state_dict())


@pytest.mark.parametrize("act", [lambda model: model.float(), lambda model: model.half().float()])
def test_converted_model_is_refused(act: Callable[[nn.Module], object]):
    engine, _ = make("master")
    train(engine, 0, 2)
    act(engine.model)
    for call in (lambda: train(engine, 2, 3), engine.state_dict):
        with pytest.raises(WindowStateError, match=WRITTEN):
            call()


def test_replaced_memory_is_refused():
    engine, _ = make("master")
    train(engine, 0, 2)
    weight = engine.model.first.weight
    weight.data = weight.data * 0.5
    with pytest.raises(WindowStateError, match=WRITTEN):
        train(engine, 2, 3)


def test_write_through_data_is_refused_after_next_update():
    engine, _ = make("master")
    train(engine, 0, 2)
    saved = state_of_first(engine)
    engine.model.first.weight.data.clamp_(-0.01, 0.01)
    train(engine, 2, 3)
    for _ in range(2):
        with pytest.raises(
            WindowStateError,
            match=r'^the weight first\.weight was written to through \.data by other code, and with offload="master" '
            r"the last update has continued from its value in float32 in host memory: return to a checkpoint with "
            r"engine\.load_state_dict\(\), and change weights in no other way\.$",
        ):
            engine.state_dict()
    engine.load_state_dict(saved)
    train(engine, 2, 5)
    expected, _ = make("master")
    train(expected, 0, 5)
    assert values(engine.model).tolist() == values(expected.model).tolist()


def exchange(engine: bigbatch.Engine, _optimizer: torch.optim.Optimizer) -> None:
    own = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    engine.model.load_state_dict({name: tensor * 0 for name, tensor in own.items()})
    engine.model.load_state_dict(own)


def load_after_write(engine: bigbatch.Engine, _optimizer: torch.optim.Optimizer) -> None:
    saved = state_of_first(engine)
    with torch.no_grad():
        engine.model.first.weight.mul_(2)
    engine.load_state_dict(saved)


def load_with_whole_weights(engine: bigbatch.Engine, _optimizer: torch.optim.Optimizer) -> None:
    saved = state_of_first(engine)
    train(engine, 20, 21)
    with engine.whole_weights():
        engine.load_state_dict(saved)


def remove_first(engine: bigbatch.Engine, optimizer: torch.optim.Optimizer) -> None:
    weight, group = engine.model.first.weight, optimizer.param_groups[0]
    group["params"] = [each for each in group["params"] if each is not weight]
    del optimizer.state[weight]
    weight.requires_grad_(False)


def remove_and_add(engine: bigbatch.Engine, optimizer: torch.optim.Optimizer) -> None:
    remove_first(engine, optimizer)
    train(engine, 20, 21)
    engine.state_dict()
    optimizer.add_param_group({"params": [engine.model.first.weight.requires_grad_()], "lr": 0.02})


@pytest.mark.parametrize("act", [exchange, load_after_write, load_with_whole_weights, remove_first, remove_and_add])
def test_weights_continue_with_equal_bits(act: Act):
    assert_same(act)


def test_window_with_whole_weights_is_refused():
    engine, _ = make("master")
    train(engine, 0, 1)
    with engine.whole_weights():
        assert engine.state_dict()["model"]["first.weight"].dtype is torch.float32
        with pytest.raises(
            WindowStateError, match=r"^whole_weights\(\) is open: leave its block before the next window"
        ):
            train(engine, 1, 2)
    train(engine, 1, 2)


def test_hook_that_would_miss_gradients_is_refused():
    engine, optimizer = make("master")
    train(engine, 0, 1)
    before = values(engine.model)
    handle = optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(
        RuntimeError,
        match=r"^AdamW\.step\(\) has a pre-hook, which would not see the gradients of weights that are bfloat16 on the "
        r'device: remove the hook, or pass offload="optimizer"\.$',
    ):
        train(engine, 1, 2)
    assert torch.equal(before, values(engine.model))
    handle.remove()
    train(engine, 1, 2)


class Frozen(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.first.weight.requires_grad_(False)


def penalized(model: Decoder, tokens: Tensor) -> tuple[Tensor, int]:
    loss, items = decoder_loss(model, tokens)
    return loss + len(tokens) * model.first.weight.square().sum(), items


def test_weight_that_was_frozen_when_loss_was_read_stays_float32():
    def unfreeze(engine: bigbatch.Engine, _optimizer: torch.optim.Optimizer) -> None:
        engine.model.first.weight.requires_grad_()

    assert_same(unfreeze, model=Frozen, loss_fn=penalized)


class FollowsDtype(nn.Module):
    """Casts inputs to the dtype of the weight, as some code without autocast does."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(30, 8), nn.Linear(8, 20, bias=False)
        self.head = nn.Linear(20, 30, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = F.gelu(self.inner(self.embedding(tokens).to(self.inner.weight.dtype)))
        with torch.autocast(tokens.device.type, enabled=False):
            return self.head(hidden.to(self.head.weight.dtype))


def plain_loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten(), reduction="sum"), tokens.numel()


@pytest.mark.parametrize("loss_fn", [plain_loss, decoder_loss])
def test_layer_outside_of_autocast_stays_float32(loss_fn: Callable[..., Any]):
    assert_same(nothing, model=FollowsDtype, loss_fn=loss_fn)
    engine, _ = make("master", model=FollowsDtype, loss_fn=loss_fn)
    train(engine, 0, 1)
    assert engine.model.head.weight.dtype is torch.float32
    assert engine.model.inner.weight.dtype is (torch.float32 if loss_fn is plain_loss else torch.bfloat16)


def test_parameter_that_moves_to_another_group_is_stepped_with_its_settings():
    found = []
    for level in ("none", "optimizer"):
        model = make_model()
        first, *rest = model.parameters()
        optimizer = torch.optim.AdamW([{"params": [*rest[:3], first], "lr": 0.1}, {"params": rest[3:], "lr": 0.001}])
        engine = make_engine(model, optimizer, level)
        engine.step(make_batch(0))
        optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
        engine.step(make_batch(1))
        found.append(values(model).tolist())
    assert found[0] == found[1]


class Scaled(nn.Module):
    """Has parameters of two dtypes in one chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(5, 3), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) * self.scale


def test_state_of_several_dtypes_can_be_saved():
    model = Scaled()
    engine = make_engine(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    engine.step(make_batch(0))
    file = io.BytesIO()
    torch.save(engine.state_dict(), file)
    file.seek(0)
    saved = torch.load(file)
    engine.step(make_batch(1))
    expected = values(model)
    engine.load_state_dict(saved)
    engine.step(make_batch(1))
    assert torch.equal(expected, values(model))


def test_saved_weights_take_their_own_bytes_only():
    engine, _ = make("master")
    train(engine, 0, 1)
    with engine.whole_weights():
        sizes = [tensor.untyped_storage().nbytes() for tensor in engine.model.state_dict().values()]
        assert sizes == [tensor.nbytes for tensor in engine.model.state_dict().values()]
