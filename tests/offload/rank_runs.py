"""Windows with offload over several ranks, run by a pool of processes."""

from typing import Any

import torch.distributed as dist

import bigbatch
from offload.models import OPTIMIZERS, make_batch, make_engine, make_model, plain_state, small_chunks, values


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
