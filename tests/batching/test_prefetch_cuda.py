"""Prefetching to a CUDA device: one micro-batch ahead, no waiting on the host, and no memory reused too early."""

from collections import UserDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch
from bigbatch.batching.prefetch import Prefetcher
from bigbatch.batching.split import Split, split, split_into

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
MIB = 1 << 20
LONG = 1_000_000_000  # cycles: about half a second, far longer than the host needs for what follows
SHORT = 10_000_000


def column(samples: int, *shape: int) -> Tensor:
    return torch.arange(samples * max(1, torch.Size(shape).numel())).reshape(samples, *shape)


def take_all(parts: Split) -> list[Any]:
    with Prefetcher(parts) as feed:
        return [feed.take(rows) for rows in parts.groups]


@dataclass(frozen=True)
class Holder:
    held: Tensor


class Counting:
    """A collate that writes down what it was asked for, and fails as often as it is told to."""

    def __init__(self, errors: Sequence[tuple[int, Exception]] = ()) -> None:
        self.calls: list[list[int]] = []
        self._errors = list(errors)

    def __call__(self, samples: Sequence[int]) -> Tensor:
        self.calls.append(list(samples))
        for index, (sample, error) in enumerate(self._errors):
            if sample in samples:
                del self._errors[index]
                raise error
        return torch.tensor(samples)


@pytest.mark.parametrize(
    "batch",
    [
        column(7),
        column(7, 3),
        {"a": column(7, 2).double(), "b": [column(7) % 2 == 0, None]},
        (column(7), torch.tensor(0.5)),
        column(5, 7).t(),
        torch.ones(1, 3).expand(7, 3),
        column(7, 4, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.randn(7, 2, dtype=torch.complex64).conj(),
        torch.empty(7, 0),
    ],
)
@pytest.mark.parametrize("groups", [[], [[2, 0]], [range(3), range(3, 6), range(6, 7)], [[6], [1, 5, 0], [2, 4, 3]]])
def test_every_microbatch_equals_split(batch: Any, groups: list[Sequence[int]]) -> None:
    parts = split_into(batch, groups, device=DEVICE)
    for part, rows in zip(take_all(parts), groups, strict=True):
        expected = parts.take(rows)
        assert torch.utils._pytree.tree_structure(part) == torch.utils._pytree.tree_structure(expected)
        leaves = [torch.utils._pytree.tree_leaves(tree) for tree in (part, expected)]
        for found, wanted in zip(*leaves, strict=True):
            if wanted is None:
                assert found is None
            else:
                assert found.device == DEVICE
                assert found.dtype == wanted.dtype
                assert torch.equal(found, wanted)


def test_channels_last_format_is_kept() -> None:
    batch = column(6, 4, 3, 2).contiguous(memory_format=torch.channels_last)
    for part in take_all(split(batch, 2, device=DEVICE)):
        assert part.is_contiguous(memory_format=torch.channels_last)


def test_values_not_prefetched_still_reach_device() -> None:
    def collate(samples: list[int]) -> dict[str, Any]:
        return {
            "plain": torch.tensor(samples),
            "sparse": torch.eye(len(samples)).to_sparse(),
            "parameter": torch.ones(2, requires_grad=True),
            "there": torch.tensor(samples, device=DEVICE),
            "text": [str(sample) for sample in samples],
            "count": len(samples),
            "none": None,
        }

    for index, part in enumerate(take_all(split(list(range(6)), 2, device=DEVICE, collate=collate))):
        rows = [2 * index, 2 * index + 1]
        assert part["plain"].tolist() == part["there"].tolist() == rows
        assert torch.equal(part["sparse"].to_dense(), torch.eye(2, device=DEVICE))
        assert all(part[name].device == DEVICE for name in ("plain", "sparse", "parameter", "there"))
        assert part["parameter"].requires_grad
        assert (part["text"], part["count"], part["none"]) == ([str(row) for row in rows], 2, None)


def test_parts_along_other_dimension_are_prefetched_dense() -> None:
    batch = {"x": column(4, 7, 3), "y": column(4, 7), "scale": torch.tensor(0.5)}
    for groups in ([range(3), range(3, 6), range(6, 7)], [[6], [1, 5, 0], [2, 4, 3]]):
        parts = split_into(batch, groups, device=DEVICE, batch_dim=1)
        for part, rows in zip(take_all(parts), groups, strict=True):
            assert part["x"].is_contiguous()
            assert torch.equal(part["x"].cpu(), batch["x"][:, list(rows)])
            assert torch.equal(part["y"].cpu(), batch["y"][:, list(rows)])
            assert part["scale"].device == DEVICE


def test_containers_keep_their_type_on_device() -> None:
    batch = (UserDict(x=column(6, 2)), Holder(column(6)))
    parts = split(batch, 4, device=DEVICE)
    with Prefetcher(parts) as feed:
        for rows in parts.groups:
            named, holder = feed.take(rows)
            assert (type(named), type(holder)) == (UserDict, Holder)
            assert named["x"].device == holder.held.device == DEVICE
            assert holder.held.tolist() == list(rows)
    assert not batch[1].held.is_cuda


def test_jagged_and_packed_rows_reach_device() -> None:
    jagged = torch.nested.nested_tensor([torch.full((n,), n) for n in (3, 1, 2)], layout=torch.jagged)
    found = [row.tolist() for part in take_all(split(jagged, 2, device=DEVICE)) for row in part.unbind()]
    assert found == [[3, 3, 3], [1], [2, 2]]
    samples = [torch.ones(n, 1) for n in (3, 2, 2)]
    for part in take_all(split(samples, 2, device=DEVICE, collate=nn.utils.rnn.pack_sequence)):
        assert part.data.device == DEVICE
        assert part.batch_sizes.device.type == "cpu"
        assert nn.GRU(1, 2, device=DEVICE)(part)[0].data.shape[1] == 2


def test_samples_are_collated_once_one_microbatch_ahead() -> None:
    collate = Counting()
    parts = split(list(range(5)), 2, device=DEVICE, collate=collate)
    with Prefetcher(parts) as feed:
        assert collate.calls == []
        for rows, calls in zip(parts.groups, (2, 3, 3), strict=True):
            assert feed.take(rows).tolist() == list(rows)
            assert len(collate.calls) == calls
    assert collate.calls == [[0, 1], [2, 3], [4]]


def test_batch_on_device_is_not_prefetched() -> None:
    batch = column(6, 4).to(DEVICE)
    parts = split(batch, 2, device=DEVICE)
    with Prefetcher(parts) as feed:
        for rows in parts.groups:
            assert feed.take(rows).untyped_storage().data_ptr() == batch.untyped_storage().data_ptr()
            assert feed._fetched is None
    calls: list[list[int]] = []

    def collate(samples: list[int]) -> Tensor:
        calls.append(samples)
        return torch.tensor(samples, device=DEVICE)

    parts = split(list(range(4)), 2, device=DEVICE, collate=collate)
    with Prefetcher(parts) as feed:
        assert feed.take(parts.groups[0]).tolist() == [0, 1]
        assert calls == [[0, 1]]
        assert feed.take(parts.groups[1]).tolist() == [2, 3]


def test_repeated_rows_do_not_disturb_prefetch_order() -> None:
    collate = Counting()
    parts = split(list(range(6)), 2, device=DEVICE, collate=collate)
    with Prefetcher(parts) as feed:
        first, second, third = parts.groups
        assert feed.take(first).tolist() == [0, 1]
        assert feed._fetched is not None
        assert feed.take(first).tolist() == [0, 1]
        assert feed._fetched is None  # the retry needs the memory
        assert feed.take(first[:1]).tolist() == [0]
        assert feed.take(first[1:]).tolist() == [1]
        assert feed.take(second).tolist() == [2, 3]
        assert feed.take(third).tolist() == [4, 5]
    assert collate.calls == [[0, 1], [2, 3], [0, 1], [0], [1], [2, 3], [4, 5]]


def test_prefetch_error_is_raised_at_its_rows() -> None:
    errors = [(3, ValueError("no three")), (3, ValueError("still no three"))]
    parts = split(list(range(6)), 2, device=DEVICE, collate=Counting(errors))
    with Prefetcher(parts) as feed:
        assert feed.take(parts.groups[0]).tolist() == [0, 1]
        with pytest.raises(ValueError, match="still no three"):
            feed.take(parts.groups[1])
        assert feed.take(parts.groups[1]).tolist() == [2, 3]
        assert feed.take(parts.groups[2]).tolist() == [4, 5]


@contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
    """Let torch take no more than so many bytes of the device beyond what it has."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(DEVICE) + num_bytes) / total, DEVICE)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


def test_prefetch_oom_is_raised_at_its_rows() -> None:
    def collate(samples: list[int]) -> Tensor:
        return torch.full((samples[0] * MIB,), samples[0], dtype=torch.uint8)

    parts = split([1, 200, 2], 1, device=DEVICE, collate=collate)
    with Prefetcher(parts) as feed:
        with at_most(64 * MIB):
            assert feed.take(parts.groups[0]).sum() == MIB
            with pytest.raises(torch.OutOfMemoryError):
                feed.take(parts.groups[1])
        assert feed.take(parts.groups[1]).sum() == 200 * 200 * MIB
        assert feed.take(parts.groups[2]).sum() == 4 * MIB


@pytest.mark.parametrize("sleep", [0, SHORT])
@pytest.mark.parametrize("pinned", [False, True])
def test_no_copy_is_read_or_overwritten_too_early(sleep: int, pinned: bool) -> None:
    batch = torch.arange(16, dtype=torch.int32)[:, None].repeat(1, 2 * MIB)
    parts = split(batch.pin_memory() if pinned else batch, 1, device=DEVICE)
    sums = []
    with Prefetcher(parts) as feed:
        for rows in parts.groups:
            part = feed.take(rows)
            if sleep:
                torch.cuda._sleep(sleep)
            sums.append(part.sum())
            del part
            torch.full((1, 2 * MIB), -1, dtype=torch.int32, device=DEVICE)  # takes its memory, after the sum
    assert [total.item() for total in sums] == [row * 2 * MIB for row in range(16)]


@pytest.mark.parametrize("again", [False, True])
def test_freed_memory_is_not_written_by_pending_copy(again: bool) -> None:
    torch.cuda.empty_cache()  # so that what is given back is what the next one gets
    batch = torch.ones(2, 64 * MIB, dtype=torch.int8).pin_memory()
    parts = split(batch, 1, device=DEVICE)
    with Prefetcher(parts) as feed:
        first = feed.take(parts.groups[0])
        assert feed._fetched is not None
        pointer = feed._fetched.leaves[0].data_ptr()
        if again:
            feed.take(range(0))
            assert feed._fetched is None
            later = torch.zeros(1, 64 * MIB, dtype=torch.int8, device=DEVICE)
    if not again:
        later = torch.zeros(1, 64 * MIB, dtype=torch.int8, device=DEVICE)
    torch.cuda.synchronize()
    assert later.data_ptr() == pointer
    assert not later.any()
    assert first.all()


def test_next_copy_overlaps_compute_without_host_wait() -> None:
    parts = split(torch.ones(3, MIB), 1, device=DEVICE)
    take_all(parts)  # the first pinned memory of a size may wait for the device
    torch.cuda.synchronize()
    with Prefetcher(parts) as feed:
        feed.take(parts.groups[0])
        torch.cuda._sleep(LONG)
        computed = torch.cuda.current_stream().record_event()
        feed._copying.synchronize()  # the copy of the second
        assert not computed.query()
        feed.take(parts.groups[1])  # and the third is begun
        assert not computed.query()
    torch.cuda.synchronize()


def test_device_holds_at_most_two_microbatches() -> None:
    size = 32 * MIB
    parts = split(torch.zeros(12, size, dtype=torch.uint8), 1, device=DEVICE)
    take_all(split(torch.zeros(12, size, dtype=torch.uint8), 1, device=DEVICE))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda._sleep(LONG)
    with Prefetcher(parts) as feed:
        for rows in parts.groups:
            feed.take(rows).add_(1)
    assert torch.cuda.max_memory_allocated() - allocated == 2 * size
    assert torch.cuda.max_memory_reserved() - reserved <= 2 * size + 2 * MIB
    torch.cuda.synchronize()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 8)).to(DEVICE, torch.float64)


def loss_fn(model: nn.Module, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    inputs, mask = part
    return (model(inputs).square() * mask).sum(), mask.sum()


def ragged(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, 16, generator=generator, dtype=torch.float64)
    return inputs, torch.rand(rows, 8, generator=generator) < torch.rand(rows, 1, generator=generator)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("collated", [False, True])
@pytest.mark.parametrize("looks_ahead", [True, False])
def test_no_microbatch_waits_for_device(collated: bool, looks_ahead: bool) -> None:
    model, batch = mlp(), ragged(32)
    accumulator = bigbatch.Accumulator(model, torch.optim.AdamW(model.parameters(), fused=True))
    if collated:
        samples = list(zip(*batch, strict=True))
        parts = split(samples, 4, device=DEVICE, collate=torch.utils.data.default_collate)
    else:
        parts = split(batch, 4, device=DEVICE)
    window = accumulator.window()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with Prefetcher(parts, looks_ahead=looks_ahead) as feed:
            for rows in parts.groups:
                loss_sum, items = loss_fn(model, feed.take(rows))
                window.backward(loss_sum, items=items)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert window.step().items == batch[1].sum().item()


def test_without_looking_ahead_nothing_is_collated_before_it_is_taken_or_waits() -> None:
    collate = Counting()
    parts = split(list(range(6)), 2, device=DEVICE, collate=collate)
    torch.cuda._sleep(LONG)
    with Prefetcher(parts, looks_ahead=False) as feed:
        found = []
        for number, rows in enumerate(parts.groups, start=1):
            found.append(feed.take(rows))
            assert len(collate.calls) == number
        assert not torch.cuda.current_stream().query(), "the host has waited for the device"
    assert [part.tolist() for part in found] == [[0, 1], [2, 3], [4, 5]]


def test_quanta_are_collated_with_the_random_numbers_of_their_own() -> None:
    events = []

    def collate(samples: Sequence[Tensor]) -> Tensor:
        events.append("collate")
        return torch.stack(list(samples)).float()

    def loss(model: nn.Module, part: Tensor) -> tuple[Tensor, int]:
        events.append("loss")
        return model(part).sum(), len(part)

    model = nn.Linear(3, 2, device=DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings: dict[str, Any] = {"reproducible": True, "quantum": 2, "collate": collate, "check": False}
    engine = bigbatch.Engine(model, optimizer, loss, microbatch=4, **settings)
    for _ in range(2):
        events.clear()
        engine.step(list(column(6, 3)))
        assert events in (["collate", "loss"] * 3, ["collate", "loss"] * 6), "nothing is collated ahead"


class RecordingSGD(torch.optim.SGD):
    """Plain SGD that keeps the gradients it was given."""

    def step(self, closure: None = None) -> None:
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        super().step(closure)


@pytest.mark.parametrize("fails", [None, 0, 1, 2])
def test_engine_counts_every_sample_once_despite_oom(fails: int | None) -> None:
    model, batch = mlp(), ragged(10)
    loss_sum, items = loss_fn(model, tuple(tensor.to(DEVICE) for tensor in batch))
    expected = torch.autograd.grad(loss_sum / items, list(model.parameters()))
    failures = [] if fails is None else [torch.OutOfMemoryError("once"), torch.OutOfMemoryError("twice")]

    def failing(model: nn.Module, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if failures and fails is not None and torch.equal(part[0][:1].cpu(), batch[0][4 * fails : 4 * fails + 1]):
            raise failures.pop()
        return loss_fn(model, part)

    optimizer = RecordingSGD(model.parameters(), lr=0.1)
    samples = list(zip(*batch, strict=True))
    engine = bigbatch.Engine(
        model, optimizer, failing, microbatch=4, collate=lambda some: tuple(map(torch.stack, zip(*some, strict=True)))
    )
    report = engine.step(samples)
    assert report.retries == (0 if fails is None else 2)
    for found, wanted in zip(optimizer.seen, expected, strict=True):
        assert F.mse_loss(found, wanted).sqrt() <= 1e-12 * wanted.square().mean().sqrt()
