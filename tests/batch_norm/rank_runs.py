"""Windows with batch norm over all ranks, run by a pool of processes."""

import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import bigbatch
from batch_norm.models import (
    WIDTH,
    Batch,
    Small,
    buffer_error,
    classify,
    engine_of,
    gradient_error,
    images,
    plain,
    resnet,
    rows,
    squares,
    whole,
)
from support.distributed_windows import parallelize


def part(batch: Batch, sizes: list[int]) -> Batch:
    """Return the samples of this rank."""
    rank = dist.get_rank()
    return tuple(values[sum(sizes[:rank]) : sum(sizes[: rank + 1])] for values in batch)  # type: ignore[return-value]


def bare(model: nn.Module) -> nn.Module:
    return getattr(model, "module", model)


def run_windows(how: str, sizes: list[int], cut: int, momentum: float | None, syncs: bool = False) -> dict[str, Any]:
    """Run two windows of a residual network on this rank; return its errors against one process."""
    batches = [images(sum(sizes), seed) for seed in (1, 2)]
    model = resnet(momentum)
    expected = whole(model, classify, batches)
    if syncs:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model, sync = parallelize(model, how)
    engine = engine_of(model, classify, cut, sync=sync)
    for batch in batches:
        report = engine.backward(part(batch, sizes))
    return {
        "error": gradient_error(bare(model), expected),
        "buffers": buffer_error(bare(model), expected),
        "items": report.items,
    }


def small(forward: Any = plain, **modules: nn.Module) -> Any:
    return nn.parallel.DistributedDataParallel(Small(forward, **modules), find_unused_parameters=True)


def attempt(model: nn.Module, loss_fn: Any, batch: Batch, *, cut: int = 2, **call: Any) -> str:
    """Return the error of a window as a sentence; nothing has changed, and no thread is left."""
    before = [value.clone() for value in model.state_dict().values()]
    try:
        engine_of(model, loss_fn, cut).backward(batch, **call)
    except Exception as error:  # noqa: BLE001 - returned
        assert all(map(torch.equal, model.state_dict().values(), before))
        assert "bigbatch" not in [thread.name for thread in threading.enumerate()]
        return f"{type(error).__name__}: {error}"
    return "no error"


def run_failing(where: str) -> list[str]:
    """Run a window in which rank 1 fails, and then one in which it does not."""
    model = small()

    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, int]:
        fails = dist.get_rank() == 1 and len(batch[0]) == 1
        if fails and where == "forward":
            raise ArithmeticError("broken")
        loss_sum, items = squares(model, batch)
        if fails and where == "backward":
            loss_sum.register_hook(fail)
        return loss_sum, items

    def fail(_gradient: Tensor) -> None:
        raise ArithmeticError("broken")

    own = part(rows(10), [5, 5])
    broken = (own[0][:3], own[1]) if where == "batch" and dist.get_rank() == 1 else own
    return [attempt(model, loss_fn, broken), attempt(model, squares, own)]


def run_abandoned(call: int) -> list[str]:
    """Abandon a window on rank 1, and run another one."""
    model, calls, rank = small(), iter(range(99)), dist.get_rank()
    own = part(rows(10), [5, 5])
    found = attempt(model, squares, own, should_abandon=lambda: rank == 1 and next(calls) == call)
    return [found, attempt(model, squares, own)]


def run_other_order() -> str:
    """Run another norm on rank 1."""

    def forward(model: Any, x: Tensor) -> Tensor:
        norm = model.other if dist.get_rank() else model.norm
        return model.last(norm(model.first(x)).tanh())

    return attempt(small(forward, other=nn.BatchNorm1d(WIDTH)), squares, part(rows(10), [5, 5]))


def run_out_of_memory(sizes: list[int]) -> dict[str, Any]:
    """Run out of memory above two samples on the last rank."""
    model, used = small(), list[int]()

    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, int]:
        used.append(len(batch[0]))
        loss_sum, items = squares(model, batch)
        if dist.get_rank() == len(sizes) - 1 and len(batch[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss_sum, items

    batch = rows(sum(sizes))
    expected = whole(Small(plain), squares, [batch])
    report = engine_of(model, loss_fn, 4).backward(part(batch, sizes))
    return {
        "error": gradient_error(model.module, expected),
        "buffers": buffer_error(model.module, expected),
        "retries": report.retries,
        "used": used[-report.num_microbatches :] if report.num_microbatches else [],
    }


def run_single_sample_out_of_memory() -> str:
    """Run out of memory with every sample of rank 1."""

    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, int]:
        if dist.get_rank():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return squares(model, batch)

    return attempt(small(), loss_fn, part(rows(10), [5, 5]))


def run_refused(what: str) -> str:
    """Make an engine that is not supported over ranks."""
    settings: dict[str, Any] = {"batch_norm": "exact", "microbatch": 2}
    model: Any = Small(plain)
    if what == "sharded":
        model, _ = parallelize(model, "fsdp")
    elif what == "group":
        groups = [dist.new_group([rank]) for rank in range(2)]
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model, groups[dist.get_rank()])
    elif what == "float16":
        model = model.half()
    elif what == "lockstep":
        settings["lockstep"] = True
    if what != "sharded":
        settings["sync"] = bigbatch.Replicated(model)
    try:
        bigbatch.Engine(model, None, squares, **settings)
    except bigbatch.InputError as error:
        return str(error)
    return "no error"


def run_functional_without_samples() -> list[str]:
    """Update running statistics outside of modules where rank 0 has no samples."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH).double()
            self.register_buffer("mean", torch.zeros(WIDTH, dtype=torch.float64))
            self.register_buffer("variance", torch.ones(WIDTH, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.batch_norm(self.first(x), self.mean, self.variance, training=True)

    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Functional())
    return [attempt(model, squares, part(rows(10), sizes)) for sizes in ([0, 10], [4, 6])]
