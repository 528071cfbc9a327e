"""Windows of ``offload="auto"`` over several ranks that are described as cards, run by a pool of processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import bigbatch
from bigbatch.engine import card_target
from bigbatch.engine.card_target import CardTarget
from bigbatch.errors import BigbatchError, InputError
from bigbatch.offload import costs
from bigbatch.offload.cards import card
from bigbatch.offload.level_choice import LevelLimits
from offload.models import (
    CHUNK_BYTES,
    OPTIMIZERS,
    Decoder,
    decoder_loss,
    make_engine,
    make_tokens,
    small_chunks,
)


@contextmanager
def on_card(card_bytes: int) -> Iterator[None]:
    """Describe the device of this rank as a card."""
    target = CardTarget(torch.device("cuda"), card("h200"), LevelLimits(card_bytes, 2**50))
    with small_chunks(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "CHUNK_BYTES", CHUNK_BYTES)
        patch.setattr(costs, "SUM_SLOT_BYTES", CHUNK_BYTES)
        patch.setattr(card_target, "is_card", lambda device: True)
        patch.setattr(card_target, "describe_card", lambda *_: target)
        yield


def make(offload: str, **settings: Any) -> bigbatch.Engine:
    torch.manual_seed(dist.get_rank())
    model = Decoder()
    sync = bigbatch.Replicated(model)
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    return make_engine(model, optimizer, offload, sync=sync, **({"loss_fn": decoder_loss} | settings))


def run(engine: bigbatch.Engine, updates: int, *, is_uneven: bool = False) -> None:
    for number in range(updates):
        tokens, cut = make_tokens(number), 8 if is_uneven else 5
        engine.step(tokens[:cut] if dist.get_rank() == 0 else tokens[cut:])


def weights(engine: bigbatch.Engine) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in engine.state_dict()["model"].items()}


def needs() -> dict[str, int]:
    """Return what each level needs on the card."""
    with on_card(2**50):
        engine = make("auto")
        run(engine, 1)
    choice = engine.offload_choice
    assert choice is not None
    return {case.level: case.card_bytes for case in choice.cases}


def train(card_bytes: list[int], updates: int, is_uneven: bool = False) -> dict[str, Any]:
    """Train on this rank's part of each batch; return the level and the float32 parameters."""
    with on_card(card_bytes[dist.get_rank()]):
        engine = make("auto")
        run(engine, updates, is_uneven=is_uneven)
    return {"level": engine.offload, "weights": weights(engine)}


def train_at(level: str, updates: int) -> dict[str, Any]:
    """Train at a level by name; return the float32 parameters."""
    with small_chunks():
        engine = make(level)
        run(engine, updates)
    return weights(engine)


def train_wrapped(is_sharded: bool) -> list[Any]:
    """Train a model that is wrapped or sharded; return the level, and those that are supported."""
    torch.manual_seed(0)
    model: Any = Decoder()
    if is_sharded:
        fully_shard(model)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    with on_card(2**50):
        engine = make_engine(model, OPTIMIZERS["adamw"](list(model.parameters())), "auto", loss_fn=decoder_loss)
        run(engine, 2)
    choice = engine.offload_choice
    assert choice is not None
    return [choice.level, [case.level for case in choice.cases], list(choice.unsupported)]


def fail_on_one() -> str:
    """Fail on the first rank while its card is described; return the error of this rank, then train."""

    def describe(*_: object) -> CardTarget:
        raise KeyError("no memory")

    with on_card(2**50):
        engine = make("auto")
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == 0:
                patch.setattr(card_target, "describe_card", describe)
            try:
                run(engine, 1)
            except (KeyError, BigbatchError) as error:
                message = f"{type(error).__name__}: {error}"
        run(engine, 1)
    return message


def train_too_large() -> str:
    """Return the refusal of ranks of which one has no memory."""
    with on_card(2**50 if dist.get_rank() == 0 else 1000):
        try:
            run(make("auto"), 1)
        except BigbatchError as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def refuse_lockstep() -> str:
    """Return the message that refuses a loss that calls collectives."""
    with on_card(2**50):
        try:
            make("auto", lockstep=True)
        except InputError as error:
            return str(error)
    return "no error"
