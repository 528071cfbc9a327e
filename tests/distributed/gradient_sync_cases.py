"""Functions that ranks run in test_gradient_sync.py: collectives per window, parallelization settings and refusals."""

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import bigbatch
from support import distributed_windows as cases
from support import full_batch_reference as ref

DDP = nn.parallel.DistributedDataParallel


def _own(batch: ref.Batch) -> ref.Batch:
    return cases.select_rows(batch, range(dist.get_rank(), ref.num_samples(batch), dist.get_world_size()))


def collectives_of_engine(how: str, size: int, several: bool = False) -> tuple[Counter[str], Counter[str], int]:
    """Return the small and large collectives of one engine step, and ``report.syncs``."""
    model, sync = cases.parallelize(ref.make_model(), how)
    loss = cases.terms_and_items if several else ref.loss_and_items
    settings: dict[str, Any] = {"count_items": cases.count_terms} if several else {}
    engine = bigbatch.Engine(model, cases.GradientRecorder(model), loss, microbatch=size, sync=sync, **settings)
    engine.step(_own(ref.ragged_batch(12)))
    with cases.CollectiveCounter() as collectives:
        report = engine.step(_own(ref.ragged_batch(12)))
    return collectives.small, collectives.large, report.syncs


def collectives_of_loop(how: str, num_microbatches: int, several: bool = False) -> tuple[Counter[str], Counter[str]]:
    """Return the small and large collectives of one window of an accumulator loop."""
    model, sync = cases.parallelize(ref.make_model(), how)
    accumulator = bigbatch.Accumulator(model, cases.GradientRecorder(model), sync=sync)
    parts = ref.cut(_own(ref.ragged_batch(4 * num_microbatches)), 1)
    windows = accumulator.windows(
        parts, num_microbatches=num_microbatches, count_items=cases.count_terms if several else None
    )
    loss = cases.terms_and_items if several else ref.loss_and_items
    with cases.CollectiveCounter() as collectives:
        window = next(windows)
        for part in window:
            window.backward(loss(model, part))
        in_passes = collectives.large.copy()
        window.step()
    assert how not in ("ddp", "plain") or not in_passes, "forward and backward send nothing"
    windows.close()
    return collectives.small, collectives.large


def collectives_of_naive_ddp(num_microbatches: int) -> Counter[str]:
    """Return the large collectives of DDP without no_sync."""
    model = DDP(ref.make_model())
    with cases.CollectiveCounter() as collectives:
        for part in ref.cut(_own(ref.ragged_batch(2 * num_microbatches)), 1):
            (ref.loss_and_items(model, part)[0] / num_microbatches).backward()
    return collectives.large


def with_settings(settings: dict[str, Any], used_before: bool = False) -> tuple[list[float], bool, int]:
    """Train windows under DDP with the given settings.

    Returns:
        The error of each window; whether DDP's flags are restored; large collectives of the last window.
    """
    model = ref.make_model()
    reference = copy.deepcopy(model)
    wrapped = DDP(model, **settings)
    if used_before:  # creates DDP's buckets, views and graph
        for _ in range(2):
            ref.loss_and_items(wrapped, _own(ref.ragged_batch(12)))[0].backward()
            wrapped.zero_grad()
    optimizer = cases.GradientRecorder(wrapped)
    engine = bigbatch.Engine(wrapped, optimizer, ref.loss_and_items, microbatch=2)
    before = cases.sync_flags(wrapped)
    errors = []
    for batch in ref.batches(3, 12):
        with cases.CollectiveCounter() as collectives:
            engine.step(_own(batch))
        errors.append(ref.relative_error(optimizer.seen[-1], ref.full_gradient(reference, batch)))
    return errors, before == cases.sync_flags(wrapped), collectives.large.total()


def ddp_after_windows(settings: dict[str, Any]) -> float:
    """Run plain DDP after a window; return the error of its gradient."""
    model = ref.make_model()
    reference = copy.deepcopy(model)
    wrapped = DDP(model, **settings)
    engine = bigbatch.Engine(wrapped, cases.GradientRecorder(wrapped), ref.loss_and_items, microbatch=2)
    batch = ref.ragged_batch(12)
    engine.step(_own(batch))
    loss_sum, _ = ref.loss_and_items(wrapped, _own(batch))
    (loss_sum * dist.get_world_size() / ref.count(batch)).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return ref.relative_error(found, ref.full_gradient(reference, batch))


def compiled() -> float:
    """Train a window of a compiled DDP model; return the gradient error."""
    model = ref.make_model()
    reference = copy.deepcopy(model)
    wrapped = torch.compile(DDP(model), backend="eager")
    optimizer = cases.GradientRecorder(model)
    engine = bigbatch.Engine(wrapped, optimizer, ref.loss_and_items, microbatch=2)
    assert isinstance(engine.sync, bigbatch.Replicated)
    batch = ref.ragged_batch(12)
    engine.step(_own(batch))
    return ref.relative_error(optimizer.seen[-1], ref.full_gradient(reference, batch))


def sub_group() -> tuple[float, bigbatch.WindowReport]:
    """Train two pairs of ranks, each on its own batch; return the error and the report."""
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    pair, rank = dist.get_rank() // 2, dist.get_rank() % 2
    model = ref.make_model(seed=dist.get_rank())  # the constructor broadcasts the first rank's
    sync = bigbatch.Replicated(model, group=pairs[pair])
    reference = copy.deepcopy(model)
    optimizer = cases.GradientRecorder(model)
    engine = bigbatch.Engine(model, optimizer, ref.loss_and_items, microbatch=2, sync=sync)
    batch = ref.ragged_batch(7, seed=pair)
    report = engine.step(cases.select_rows(batch, range(rank, 7, 2)))
    expected = ref.full_gradient(reference, batch)
    first = ref.full_gradient(ref.make_model(seed=2 * pair), batch)
    return max(ref.relative_error(optimizer.seen[0], other) for other in (expected, first)), cases.plain(report)


def alone(how: str) -> tuple[cases.WindowResult, cases.WindowResult]:
    """Run a window and an engine step with a world size of one."""
    return cases.window_of(how, [[[0, 1, 2], [3], [4, 5, 6, 7, 8, 9, 10, 11]]]), cases.engine_of(how, [range(12)], [5])


def refusal(what: str) -> tuple[str, str]:
    """Make an invalid call; return the error."""
    try:
        REFUSED[what]()
    except Exception as error:  # noqa: BLE001 - checked by the test
        return type(error).__name__, str(error)
    return "", ""


def _accumulate(model: nn.Module, sync: Any = None) -> None:
    bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), sync=sync)


def _engine(how: str, **settings: Any) -> None:
    model, sync = cases.parallelize(ref.make_model(), how)
    bigbatch.Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), ref.loss_and_items, sync=sync, **settings)


def _fsdp(**settings: Any) -> nn.Module:
    return cases.parallelize(ref.make_model(), "fsdp", **settings)[0]


def _narrow() -> nn.Module:
    return cases.parallelize(ref.make_model(dtype=torch.bfloat16), "fsdp")[0]


def _nothing_at_first() -> None:
    model, _ = cases.parallelize(ref.make_model(), "fsdp")
    engine = bigbatch.Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), ref.loss_and_items, microbatch=2)
    engine.step(cases.select_rows(ref.ragged_batch(4), range(2 * dist.get_rank())))


def _two_windows() -> None:
    model, _ = cases.parallelize(ref.make_model(), "fsdp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = (bigbatch.Accumulator(model, optimizer) for _ in range(2))
    window = first.window()
    try:
        second.window()
    finally:
        window.abort()


def _nine_terms() -> None:
    def loss_fn(model: nn.Module, batch: ref.Batch) -> dict[str, tuple[Tensor, int]]:
        return {f"term {i}": ref.loss_and_items(model, batch) for i in range(9)}

    def count_items(batch: ref.Batch) -> dict[str, int]:
        return {f"term {i}": ref.count(batch) for i in range(9)}

    model, sync = cases.parallelize(ref.make_model(), "plain")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch=2, sync=sync, count_items=count_items)
    engine.step(ref.ragged_batch(4))


def _other_terms() -> None:
    name = f"loss of {dist.get_rank()}"
    model, sync = cases.parallelize(ref.make_model(), "plain")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = bigbatch.Engine(model, optimizer, lambda m, b: {name: ref.loss_and_items(m, b)}, microbatch=2, sync=sync)
    engine.step(ref.ragged_batch(4))


def _part_in_ddp() -> None:
    _accumulate(nn.Sequential(DDP(nn.Linear(2, 2)), nn.Linear(2, 2)))


REFUSED: dict[str, Callable[[], None]] = {
    "auto": lambda: _engine("fsdp", microbatch="auto"),
    "every for ddp": lambda: _accumulate(DDP(ref.make_model()), bigbatch.SyncPolicy.EVERY),
    "shard for one dimension": lambda: _accumulate(_fsdp(), bigbatch.SyncPolicy.SHARD),
    "another model": lambda: _accumulate(ref.make_model(), bigbatch.Replicated(ref.make_model())),
    "inner model": lambda: _inner(DDP(ref.make_model())),
    "part in ddp": _part_in_ddp,
    "data parallel": lambda: _accumulate(nn.DataParallel(ref.make_model())),
    "a name": lambda: _accumulate(ref.make_model(), "ddp"),
    "replicated of a sharded model": lambda: _replicated(_fsdp()),
    "scaler for shards": lambda: _scaler(_fsdp()),
    "narrow sums": lambda: _accumulate(_narrow(), bigbatch.SyncPolicy.LAST),
    "nothing at first": _nothing_at_first,
    "two windows": _two_windows,
    "nine terms": _nine_terms,
    "other terms": _other_terms,
}


def _inner(model: DDP) -> None:
    _accumulate(model, bigbatch.Replicated(model.module))


def _replicated(model: nn.Module) -> None:
    _accumulate(model, bigbatch.Replicated(model))


def _scaler(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bigbatch.Accumulator(model, optimizer, scaler=torch.amp.GradScaler("cpu"))


def auto(how: str, fails: str = "") -> tuple[str, str, Any, float]:
    """Choose the micro-batch automatically; return the exception, the choice, and the gradient error."""
    model = ref.make_model()
    reference = copy.deepcopy(model)
    spread_model, sync = cases.parallelize(model, how)
    optimizer = cases.GradientRecorder(spread_model)
    may_fail = [bool(fails)]

    def loss_fn(model: nn.Module, batch: ref.Batch) -> tuple[Tensor, int]:
        if may_fail[0] and dist.get_rank() == 0:
            raise (ArithmeticError if fails == "other" else torch.OutOfMemoryError)("CUDA out of memory: too much")
        return ref.loss_and_items(model, batch)

    engine = bigbatch.Engine(spread_model, optimizer, loss_fn, microbatch="auto", memory="4GiB", sync=sync)
    batch = ref.ragged_batch(12)
    kind = message = ""
    try:
        engine.step(_own(batch))
    except Exception as error:  # noqa: BLE001 - checked by the test
        kind, message = type(error).__name__, str(error)
    if fails:
        may_fail[0] = False
        engine.step(_own(batch))
    return kind, message, engine.choice, ref.relative_error(optimizer.seen[0], ref.full_gradient(reference, batch))


def reports(how: str) -> bigbatch.WindowReport:
    """Train two windows with lengths; return the second report."""
    model, sync = cases.parallelize(ref.make_model(), how)
    batch = ref.ragged_batch(12)
    engine = bigbatch.Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        ref.loss_and_items,
        microbatch=bigbatch.TokenBudget(12),
        lengths=lambda batch: [ref.LENGTH] * len(batch["tokens"]),
        sync=sync,
    )
    rows = [range(3), range(3, 12)][dist.get_rank()]
    for _ in range(2):
        report = engine.step(cases.select_rows(batch, rows), should_stop=lambda: dist.get_rank() == 1)
    return cases.plain(report)


class TwoHeads(nn.Module):
    """A trunk with two heads, each used by a different loss term."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.trunk(inputs))
        return self.left(hidden), self.right(hidden)


def _questions(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
    left, right = model(batch["inputs"])
    asks = batch["asks"]
    return {
        "left": (left[asks].square().sum(), int(asks.sum())),
        "right": (right[~asks].square().sum(), int((~asks).sum())),
    }


def _count_questions(batch: dict[str, Tensor]) -> dict[str, int]:
    return {"left": int(batch["asks"].sum()), "right": int((~batch["asks"]).sum())}


def two_heads(how: str) -> float:
    """Use one head on the first rank and the other on the second; return the error."""
    torch.manual_seed(0)
    model = TwoHeads().double()
    reference = copy.deepcopy(model)
    batch = {"inputs": torch.randn(6, 3, dtype=torch.float64), "asks": torch.arange(6) % 2 == 0}
    expected = ref.gradients_of(reference, cases.total(_questions(reference, batch)))
    spread_model, sync = cases.parallelize(model, how)
    optimizer = cases.GradientRecorder(spread_model)
    engine = bigbatch.Engine(spread_model, optimizer, _questions, microbatch=2, sync=sync, count_items=_count_questions)
    engine.step(_own(batch | {"tokens": batch["inputs"]}))
    return ref.relative_error(optimizer.seen[0], expected)


def called_twice(how: str) -> float:
    """Call the model twice per micro-batch, some without items (loss 0/0); return the error."""
    model = ref.make_model()
    reference = copy.deepcopy(model)
    batch = ref.ragged_batch(12)

    def loss_fn(model: nn.Module, part: ref.Batch) -> tuple[Tensor, int]:
        loss, items = ref.mean_times_items(model, part)
        again, _ = ref.mean_times_items(model, {**part, "tokens": part["tokens"].flip(1)})
        return loss + again, items

    expected = ref.gradients_of(reference, loss_fn(reference, batch)[0] / ref.count(batch))
    spread_model, sync = cases.parallelize(model, how)
    optimizer = cases.GradientRecorder(spread_model)
    bigbatch.Engine(spread_model, optimizer, loss_fn, microbatch=1, sync=sync).step(_own(batch))
    return ref.relative_error(optimizer.seen[0], expected)


def failing_on_all(how: str, place: str) -> list[float] | str:
    """Raise inside a layer on all ranks, in forward or backward; return the errors of the next windows."""
    model = ref.make_model()
    reference = copy.deepcopy(model)
    spread_model, sync = cases.parallelize(model, how)
    optimizer = cases.GradientRecorder(spread_model)
    engine = bigbatch.Engine(spread_model, optimizer, ref.loss_and_items, microbatch=2, sync=sync)
    at = {"forward": _raise, "backward": lambda output: output.register_hook(_raise) and None}[place]
    handle = model.hidden.register_forward_hook(lambda module, inputs, output: at(output))
    try:
        engine.step(_own(ref.ragged_batch(12)))
    except ArithmeticError:
        handle.remove()
    errors = []
    try:
        for batch in ref.batches(2, 12):
            engine.step(_own(batch))
            errors.append(ref.relative_error(optimizer.seen[-1], ref.full_gradient(reference, batch)))
    except bigbatch.WindowStateError as error:
        return str(error)
    return errors


def _raise(gradient: Tensor) -> None:
    raise ArithmeticError("half-way")


def warnings_of_plain_model(sync: bool) -> list[str]:
    """Make an accumulator of a model that is not distributed; return the warnings."""
    model = ref.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bigbatch.Accumulator(model, optimizer, sync=bigbatch.Replicated(model) if sync else None)
    return [str(warning.message) for warning in caught]
