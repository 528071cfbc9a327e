"""Windows with offload over several ranks, run by a pool of processes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import bigbatch
from bigbatch.errors import InputError
from offload.models import (
    OPTIMIZERS,
    Decoder,
    decoder_loss,
    make_batch,
    make_engine,
    make_model,
    make_tokens,
    plain_state,
    small_chunks,
    values,
)


def train(name: str, level: str, updates: int) -> dict[str, Any]:
    """Train on this rank's part of each batch; return parameters, state and transfers."""
    rank = dist.get_rank()
    with small_chunks():
        model = make_model(seed=1 + rank)
        sync = bigbatch.Replicated(model)
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        engine = make_engine(model, optimizer, level, sync=sync)
        for number in range(updates):
            inputs, labels = make_batch(number, 11)
            cut = slice(0, 7) if rank == 0 else slice(7, 11)
            engine.step((inputs[cut], labels[cut]))
    offload = engine.accumulator.update.offload
    num_copies = 0 if offload is None else sum(s.transfers.counts.num_to_device for s in offload.streamed)
    states = [plain_state(each) for each in engine.accumulator.update.optimizers]
    return {"values": values(model).tolist(), "states": states, "copies": num_copies}


def train_decoder(level: str, updates: int) -> dict[str, Any]:
    """Train a model under autocast on this rank's rows of each batch; return its float32 parameters and its state."""
    rank = dist.get_rank()
    with small_chunks():
        torch.manual_seed(rank)
        model = Decoder()
        sync = bigbatch.Replicated(model)
        optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
        engine = make_engine(model, optimizer, level, sync=sync, loss_fn=decoder_loss)
        for number in range(updates):
            tokens = make_tokens(number)
            engine.step(tokens[:5] if rank == 0 else tokens[5:])
    weights = {name: tensor.tolist() for name, tensor in engine.state_dict()["model"].items()}
    return {"weights": weights, "state": plain_state(optimizer)}


def train_moved(level: str, updates: int) -> dict[str, Any]:
    """Train as `train_decoder`, with a model that is moved for the level."""
    rank = dist.get_rank()
    with small_chunks():
        torch.manual_seed(0)
        model = bigbatch.move_to_device(Decoder(), "cpu", offload=level)  # type: ignore[arg-type]
        sync = bigbatch.Replicated(model)
        optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
        engine = make_engine(model, optimizer, level, sync=sync, loss_fn=decoder_loss)
        for number in range(updates):
            tokens = make_tokens(number)
            engine.step(tokens[:5] if rank == 0 else tokens[5:])
    weights = {name: tensor.tolist() for name, tensor in engine.state_dict()["model"].items()}
    return {"weights": weights, "state": plain_state(optimizer)}


def train_wrapped(level: str, updates: int) -> dict[str, Any]:
    """Train in ``DistributedDataParallel``; return the float32 parameters."""
    rank = dist.get_rank()
    with small_chunks():
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(Decoder())
        optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
        engine = make_engine(model, optimizer, level, loss_fn=decoder_loss)
        for number in range(updates):
            tokens = make_tokens(number)
            engine.step(tokens[:5] if rank == 0 else tokens[5:])
    return {name: tensor.tolist() for name, tensor in engine.state_dict()["model"].items()}


def refuse_wrapped() -> str:
    """Return the message that refuses master weights under ``DistributedDataParallel``."""
    model = nn.parallel.DistributedDataParallel(Decoder())
    try:
        make_engine(model, OPTIMIZERS["adamw"](list(model.parameters())), "master", loss_fn=decoder_loss)
    except InputError as error:
        return str(error)
    return "no error"
