"""Training loops of accelerate that record the gradient of each update, on one rank or several."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, GradientAccumulationPlugin
from torch import Tensor
from torch.distributed.tensor import DTensor

from bigbatch.integrations.accelerate import ExactAccelerator
from support import distributed_windows as windows
from support import full_batch_reference as ref

STEPS = 3
SIZES = (5, 2, 4, 3, 3, 1, 2, 6)
"""Samples of each micro-batch: two full windows of STEPS, and a last one of two micro-batches."""


@contextmanager
def fresh_state() -> Iterator[None]:
    """Forget accelerate's global state around a block, in which this process is a rank of the process group, if any."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (None, None)
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": 1}
    with ExitStack() as stack:
        if world is not None:
            stack.enter_context(patch.dict(os.environ, {name: str(value) for name, value in launched.items()}))
        for reset in (partial(AcceleratorState._reset_state, reset_partial_state=True), GradientState._reset_state):
            reset()
            stack.callback(reset)
        yield


def microbatches(rank: int = 0, size: int = 1, sizes: Sequence[int] = SIZES) -> list[ref.Batch]:
    """Return the micro-batches of a rank, ragged and of other sizes on each."""
    return [
        windows.select_rows(ref.ragged_batch(40, seed=index), range(rank * 9, rank * 9 + 1 + (number + 3 * rank) % 9))
        for index, number in enumerate(sizes)
    ]


class OwnMicrobatches(torch.utils.data.Dataset):
    """Micro-batches by index, for a loader without batching."""

    def __init__(self, parts: Sequence[ref.Batch]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> ref.Batch:
        return self.parts[index]


def expected_gradients(sizes: Sequence[int], world: int, steps: int = STEPS) -> list[dict[str, Tensor]]:
    """Return the gradient of each window over all ranks, from one backward of the whole batch."""
    parts = [microbatches(rank, world, sizes) for rank in range(world)]
    found = []
    for start in range(0, len(sizes), steps):
        rows = [part for rank in parts for part in rank[start : start + steps]]
        found.append(ref.full_gradient(ref.make_model(), windows.pad(rows)))
    return found


def errors(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> list[float]:
    """Return the relative error of each window."""
    return [ref.relative_error(one, other) for one, other in zip(found, expected, strict=True)]


def make_loader(rank: int = 0, world: int = 1, sizes: Sequence[int] = SIZES) -> DataLoaderShard:
    """Return accelerate's loader over this rank's own micro-batches."""
    return DataLoaderShard(OwnMicrobatches(microbatches(rank, world, sizes)), batch_size=None)


def loop(accelerator: Accelerator, *, exact: bool, how: str = "accumulate") -> list[float]:
    """Run an epoch; return the error of the gradient at each update of the optimizer."""
    rank, world = accelerator.process_index, accelerator.num_processes
    model = ref.make_model()
    model = accelerator.prepare(model)
    recorder = windows.GradientRecorder(model)
    optimizer = accelerator.prepare(recorder)
    for index, part in enumerate(make_loader(rank, world)):
        is_last = index % STEPS == STEPS - 1 or index == len(SIZES) - 1
        no_sync = nullcontext() if is_last else accelerator.no_sync(model)
        with accelerator.accumulate(model) if how == "accumulate" else no_sync:
            loss_sum, items = ref.loss_and_items(model, part)
            if exact:
                accelerator.backward(loss_sum, items=items)
            else:
                accelerator.backward(ref.loss_mean(model, part) if items else loss_sum)
            if how == "accumulate" or is_last:
                optimizer.step()
                optimizer.zero_grad()
    assert len(recorder.seen) == 3
    return errors(recorder.seen, expected_gradients(SIZES, world))


def run_loop(settings: dict[str, Any], *, exact: bool, how: str = "accumulate") -> list[float]:
    """Run `loop` with a new accelerator on the ranks that exist."""
    with fresh_state():
        return loop((ExactAccelerator if exact else Accelerator)(cpu=True, **settings), exact=exact, how=how)


def make_sharded(plugin: GradientAccumulationPlugin) -> tuple[ExactAccelerator, Any, Any]:
    """Return an accelerator, a model and an optimizer with FSDP2 on gloo ranks, which it offers for GPUs only."""
    accelerator = ExactAccelerator(cpu=True, gradient_accumulation_plugin=plugin)
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=50, reshard_after_forward=True
    )
    assert accelerator.is_fsdp2
    model = ref.make_model()
    return accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))


def full_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return copies of the whole gradients of a sharded model. Collective."""
    return {name: p.grad.full_tensor().clone() for name, p in model.named_parameters()}


def run_sharded(plugin: GradientAccumulationPlugin) -> tuple[list[float], int]:
    """Run an epoch with FSDP2.

    Returns:
        The errors, and the number of parameters that are sharded.
    """
    with fresh_state():
        accelerator, model, optimizer = make_sharded(plugin)
        rank, world = accelerator.process_index, accelerator.num_processes
        seen = []
        for part in make_loader(rank, world):
            with accelerator.accumulate(model):
                loss_sum, items = ref.loss_and_items(model, part)
                accelerator.backward(loss_sum, items=items)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1e9)
                    seen.append(full_gradients(model))
                optimizer.step()
                optimizer.zero_grad()
        assert accelerator.is_fsdp2
        num_sharded = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
        return errors(seen, expected_gradients(SIZES, world)), num_sharded
