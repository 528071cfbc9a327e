"""Functions that ranks run in test_out_of_memory.py: the last rank runs out of memory in forward or backward."""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn

import bigbatch
from support import distributed_windows as cases
from support import full_batch_reference as ref

MESSAGE = "CUDA out of memory. Tried to allocate 20.00 MiB.\nmore"


class OomInjector:
    """Raises an out-of-memory error at some of its calls."""

    def __init__(self, *at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, gradient: Tensor | None = None) -> None:
        self.calls += 1
        if self.calls in self.at:
            raise torch.OutOfMemoryError(MESSAGE)


def _is_last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def in_backward(how: str, name: str, *at: int) -> tuple[float, int, bool]:
    """Fail when the gradient of a parameter is computed; return error, retries, and whether state is restored."""
    model = ref.make_model()
    reference = copy.deepcopy(model)
    spread_model, sync = cases.parallelize(model, how)
    before = cases.sync_flags(spread_model)
    optimizer = cases.GradientRecorder(spread_model)
    engine = bigbatch.Engine(spread_model, optimizer, ref.loss_and_items, microbatch=3, sync=sync)
    injector = OomInjector(*at if _is_last() else ())
    handle = dict(model.named_parameters())[name].register_hook(injector)
    batch = ref.ragged_batch(13)
    report = engine.step(_share(batch))
    handle.remove()
    clean = before == cases.sync_flags(spread_model) and all(p.grad is None for p in model.parameters())
    return ref.relative_error(optimizer.seen[0], ref.full_gradient(reference, batch)), report.retries, clean


def _share(batch: ref.Batch) -> ref.Batch:
    number = ref.num_samples(batch)
    return cases.select_rows(batch, range(number)[2:] if _is_last() else range(2))


def in_forward(how: str, *at: int) -> tuple[str, str, float, int]:
    """Fail in some forwards of the last rank; return the exception, and the error and retries of the window."""
    model = ref.make_model()
    reference = copy.deepcopy(model)
    spread_model, sync = cases.parallelize(model, how)
    optimizer = cases.GradientRecorder(spread_model)
    injector = OomInjector(*at if _is_last() else ())

    def loss_fn(model: nn.Module, batch: ref.Batch) -> tuple[Tensor, int]:
        result = ref.loss_and_items(model, batch)
        injector()
        return result

    engine = bigbatch.Engine(spread_model, optimizer, loss_fn, microbatch=3, sync=sync)
    batch = ref.ragged_batch(13)
    kind = message = ""
    retries = 0
    try:
        retries = engine.step(_share(batch)).retries
    except Exception as error:  # noqa: BLE001 - checked by the test
        kind, message = type(error).__name__, str(error)
        engine.step(_share(batch))
    return kind, message, ref.relative_error(optimizer.seen[0], ref.full_gradient(reference, batch)), retries


def of_shards(how: str) -> tuple[str, str]:
    """Fail before the first layer of a sharded model on the last rank; return the error."""
    spread_model, _ = cases.parallelize(ref.make_model(), how)
    injector = OomInjector(*(1,) if _is_last() else ())

    def loss_fn(model: nn.Module, batch: ref.Batch) -> tuple[Tensor, int]:
        if _is_last():
            injector()
        return ref.loss_and_items(model, batch)

    engine = bigbatch.Engine(spread_model, cases.GradientRecorder(spread_model), loss_fn, microbatch=7)
    if not _is_last():
        engine.sync.set_padding_microbatch(_share(ref.ragged_batch(9)))
        engine.accumulator.agree_on_start(
            1
        )  # and no further: it would wait for a layer that never runs, until it is ended
        return "", ""
    try:
        engine.step(_share(ref.ragged_batch(9)))
    except Exception as error:  # noqa: BLE001 - checked by the test
        return type(error).__name__, str(error)
    return "", ""
