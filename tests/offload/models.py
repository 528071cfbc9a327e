"""A small model with seeded batches, and engines whose optimizer state passes through the device in many chunks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch
from bigbatch.offload import streamed_optimizer, sum_streamer

CHUNK_BYTES = 1024
"""Of the tests: the models have several chunks of one and of several parameters, and one larger than a slot.

Gradients in host memory pass in pieces of as many bytes.
"""

Batch = tuple[Tensor, Tensor]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True, amsgrad=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "sgd-plain": lambda p: torch.optim.SGD(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "muon": lambda p: [
        torch.optim.Muon([each for each in p if each.ndim == 2], lr=0.02),
        torch.optim.AdamW([each for each in p if each.ndim != 2], lr=0.01),
    ],  # type: ignore[dict-item]
}


def make_model(seed: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(5, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 3)]
    return nn.Sequential(*layers).to(device, dtype)


def make_batch(number: int, samples: int = 10, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(100 + number)
    inputs = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), torch.randint(3, (samples,), generator=generator)


def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    inputs, labels = batch
    return F.cross_entropy(model(inputs).float(), labels, reduction="sum"), len(labels)


class Decoder(nn.Module):
    """Has an embedding, a norm and linear layers, and runs under autocast to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(30, 16), nn.LayerNorm(16)
        self.first, self.second = nn.Linear(16, 40), nn.Linear(40, 16, bias=False)
        self.head = nn.Linear(16, 30, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        return self.head(hidden + self.second(F.gelu(self.first(self.norm(hidden)))))


def make_tokens(number: int, rows: int = 8) -> Tensor:
    return torch.randint(30, (rows, 6), generator=torch.Generator().manual_seed(number))


def decoder_loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        logits = model(tokens)
    loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="sum")
    return loss, tokens.numel()


def make_engine(model: nn.Module, optimizer: Any, offload: Any = "optimizer", **settings: Any) -> bigbatch.Engine:
    given = {"microbatch": 4, "max_grad_norm": 0.1, "check": False} | settings
    return bigbatch.Engine(model, optimizer, given.pop("loss_fn", loss_fn), offload=offload, **given)


def values(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


def plain_state(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the state of every parameter as plain values."""
    return [
        {k: v.tolist() if isinstance(v, Tensor) else v for k, v in optimizer.state.get(parameter, {}).items()}
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def make(level: str, name: str = "adamw", *, seed: int = 0, **settings: Any) -> bigbatch.Engine:
    """Return an engine over `Decoder`, or the setting ``model``, and the optimizer of that name."""
    torch.manual_seed(seed)
    model = settings.pop("model", None) or Decoder()
    return make_engine(
        model, OPTIMIZERS[name](list(model.parameters())), level, **({"loss_fn": decoder_loss} | settings)
    )


def train(engine: bigbatch.Engine, first: int, last: int) -> list[bigbatch.WindowReport]:
    """Train on the batches of tokens from one number up to another."""
    return [engine.step(make_tokens(number)) for number in range(first, last)]


def weights(engine: bigbatch.Engine) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in engine.state_dict()["model"].items()}


def states(engine: bigbatch.Engine) -> list[Any]:
    return [plain_state(optimizer) for optimizer in engine.accumulator.update.optimizers]


def streamed_of(engine: bigbatch.Engine, index: int = 0) -> streamed_optimizer.StreamedOptimizer:
    offload = engine.accumulator.update.offload
    assert offload is not None
    return offload.streamed[index]


def is_in_buffers(tensor: Tensor, streamed: streamed_optimizer.StreamedOptimizer) -> bool:
    """Return whether the memory of a tensor is part of a buffer of a chunk."""
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    hosts = [chunk.host for chunk in streamed.chunks if chunk.host is not None]
    return any(host.data_ptr() <= start and end <= host.data_ptr() + host.nbytes for host in hosts)


@contextmanager
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed_optimizer, "CHUNK_BYTES", CHUNK_BYTES)
        patch.setattr(sum_streamer, "SUM_SLOT_BYTES", CHUNK_BYTES)
        yield
