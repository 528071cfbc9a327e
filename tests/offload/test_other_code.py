"""What other code does with weights and optimizers of an engine: the bits of a run without offload, or an error."""

import io
from typing import Any

import torch
from torch import Tensor, nn

import bigbatch
from offload.models import OPTIMIZERS, Decoder, decoder_loss, make_batch, make_engine, make_tokens, values


def make(level: str, **settings: Any) -> tuple[bigbatch.Engine, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = settings.pop("model", Decoder)()
    optimizer = settings.pop("optimizer", OPTIMIZERS["adamw"])(list(model.parameters()))
    return make_engine(model, optimizer, level, **({"loss_fn": decoder_loss} | settings)), optimizer


def train(engine: bigbatch.Engine, first: int, last: int) -> None:
    for number in range(first, last):
        engine.step(make_tokens(number))


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
