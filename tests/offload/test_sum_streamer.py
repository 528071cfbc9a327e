"""Gradients that are added on the device to sums in host memory: bits, order on the device, and failures."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bigbatch.errors import WindowStateError
from bigbatch.offload.chunk_sizes import NUM_SUM_SLOTS
from bigbatch.offload.sum_streamer import SumStreamer
from bigbatch.offload.transfers import Transfers

CPU = torch.device("cpu")
SLOT_BYTES = 1024


def streamer_of(transfers: Transfers | None = None) -> SumStreamer:
    return SumStreamer(transfers or Transfers(CPU), SLOT_BYTES)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 2000), min_size=1, max_size=30),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_sums_are_those_of_one_addition_after_the_other(sizes: Sequence[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(len(sizes))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    totals = [torch.zeros(2000, dtype=wide) for _ in range(2)]
    streamer = streamer_of()
    for size in sizes:
        gradient = torch.randn(size, generator=generator).to(dtype)
        streamer.add(totals[0][:size], gradient, replaces=False)
        totals[1][:size] += gradient
    streamer.wait()
    assert torch.equal(*totals)


def test_first_gradient_replaces_what_was_in_memory() -> None:
    total, streamer = torch.full((700,), torch.nan), streamer_of()
    streamer.add(total, torch.full((700,), -0.0, dtype=torch.bfloat16), replaces=True)
    streamer.wait()
    assert torch.equal(torch.signbit(total), torch.ones(700, dtype=torch.bool))


def test_first_gradient_only_leaves_the_device() -> None:
    transfers = Transfers(CPU)
    streamer, total = streamer_of(transfers), torch.zeros(700)
    streamer.add(total, torch.ones(700), replaces=True)
    assert (transfers.counts.bytes_to_device, transfers.counts.bytes_to_host) == (0, 2800)
    streamer.add(total, torch.ones(700), replaces=False)
    assert (transfers.counts.bytes_to_device, transfers.counts.bytes_to_host) == (2800, 5600)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 500, 1024])
def test_parts_fit_in_slots_and_have_similar_sizes(size: int) -> None:
    sizes: list[int] = []

    class Noting(Transfers):
        def to_host(self, target: Tensor, source: Tensor) -> Any:
            sizes.append(target.nbytes)
            return super().to_host(target, source)

    streamer_of(Noting(CPU)).add(torch.zeros(size), torch.ones(size), replaces=True)
    assert len(sizes) == -(-4 * size // SLOT_BYTES)
    assert max(sizes) <= SLOT_BYTES
    assert max(sizes) - min(sizes) <= 256 * len(sizes)


# order on the device -----------------------------------------------------------------------------------------------


class Streams(Transfers):
    """Copies and additions that run in `finish`, each as late as possible: only what is waited for is in order."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.current = "main"
        self._jobs: list[tuple[Callable[[], Any], set[int]]] = []
        self._last: dict[str, set[int]] = {}  # by stream: what the next job waits for

    def submit(self, stream: str, job: Callable[[], Any], after: Sequence[int | None] = ()) -> int:
        needed = {each for each in after if each is not None} | self._last.get(stream, set())
        self._jobs.append((job, needed))
        self._last[stream] = {len(self._jobs) - 1}
        return len(self._jobs) - 1

    def use(self, done: Any, by: Any = None) -> None:
        self._last.setdefault(by or self.current, set()).add(done)

    def computed(self) -> Any:
        return self.submit(self.current, lambda: None)

    def computation(self) -> Any:
        return self.current

    @contextmanager
    def beside(self) -> Iterator[None]:
        self.use(self.computed(), "beside")
        self.current, before = "beside", self.current
        try:
            with Late(self):
                yield
        finally:
            self.current = before

    def _copy_to_device(self, target: Tensor, source: Tensor, after: Sequence[Any]) -> Any:
        return self.submit("in", lambda: target.copy_(source), after)

    def _copy_to_host(self, target: Tensor, source: Tensor) -> Any:
        return self.submit("out", lambda: target.copy_(source), [self.computed()])

    def finish(self) -> None:
        done: set[int] = set()
        while len(done) < len(self._jobs):
            index = max(i for i, (_, needed) in enumerate(self._jobs) if i not in done and needed <= done)
            self._jobs[index][0]()
            done.add(index)
        self._jobs.clear()
        self._last.clear()


class Late(TorchFunctionMode):
    """Submits what is written to slots, in place of doing it."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.add_, Tensor.copy_):
            target, source = args[0].detach(), args[1].detach().numpy()  # no reference to the tensor of the gradient
            self._streams.submit(self._streams.current, lambda: function(target, torch.from_numpy(source)))
            return target
        return function(*args, **(kwargs or {}))


class Gradients:
    """Gradients that backward computes one after the other, in memory of those that nothing refers to any more."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._blocks: list[tuple[Tensor, ReferenceType[Tensor] | None]] = []

    def compute(self, values: Tensor) -> Tensor:
        found = next((i for i, (_, user) in enumerate(self._blocks) if user is None or user() is None), None)
        if found is None:
            found = len(self._blocks)
            self._blocks.append((torch.full_like(values, torch.nan), None))
        block = self._blocks[found][0]
        gradient = block.detach()
        self._blocks[found] = block, ref(gradient)
        self._streams.submit("main", lambda: block.copy_(values))
        return gradient

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)


@pytest.mark.parametrize("num_sums", [1, 2, 3, 10])
@pytest.mark.parametrize("size", [200, 256, 600])
def test_every_step_waits_for_those_before(num_sums: int, size: int) -> None:
    """Of four micro-batches: the slot of a part, the sum of the micro-batch before, the gradient and its memory."""
    streams, generator = Streams(), torch.Generator().manual_seed(0)
    streamer, gradients = streamer_of(streams), Gradients(streams)
    totals = [torch.full((size,), torch.nan) for _ in range(num_sums)]
    values = torch.randn(4, num_sums, size, generator=generator)
    for number in range(4):
        for index, total in enumerate(totals):
            streamer.add(total, gradients.compute(values[number, index]), replaces=not number)
    assert all(total.isnan().all() for total in totals)  # nothing has run
    streamer.wait()
    expected = values[0] + values[1] + values[2] + values[3]
    assert torch.equal(torch.stack(totals), expected)


def test_slot_of_a_failed_part_waits_for_its_addition() -> None:
    class Full(Streams):
        is_full = True

        def _copy_to_host(self, target: Tensor, source: Tensor) -> Any:
            if self.is_full:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super()._copy_to_host(target, source)

    streams = Full()
    streamer, gradients = streamer_of(streams), Gradients(streams)
    totals = torch.zeros(NUM_SUM_SLOTS, 200)
    with pytest.raises(torch.OutOfMemoryError):
        streamer.add(totals[0], gradients.compute(torch.ones(200)), replaces=False)
    streams.is_full = False
    for total in totals:
        streamer.add(total, gradients.compute(torch.ones(200)), replaces=False)
    streamer.wait()
    assert torch.equal(totals, torch.ones(NUM_SUM_SLOTS, 200))


def test_memory_of_gradients_in_use_is_bounded() -> None:
    """Those of 4 KiB, and one that is being computed."""
    streams = Streams()
    streamer, gradients = streamer_of(streams), Gradients(streams)
    total = torch.zeros(100)
    for _ in range(50):
        streamer.add(total, gradients.compute(torch.ones(100)), replaces=False)
    assert gradients.num_blocks <= NUM_SUM_SLOTS * SLOT_BYTES // 400 + 1
    streamer.wait()
    assert torch.equal(total, torch.full((100,), 50.0))


def test_gradient_above_the_bound_is_held_alone() -> None:
    streams = Streams()
    streamer, gradients = streamer_of(streams), Gradients(streams)
    total = torch.zeros(2000)
    for _ in range(5):
        streamer.add(total, gradients.compute(torch.ones(2000)), replaces=False)
    assert gradients.num_blocks == 2
    streamer.wait()
    assert torch.equal(total, torch.full((2000,), 5.0))


def test_backwards_of_several_threads_add_whole_gradients() -> None:
    streamer, total = streamer_of(), torch.zeros(900)
    threads = [
        threading.Thread(target=lambda: [streamer.add(total, torch.ones(900), replaces=False) for _ in range(20)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    streamer.wait()
    assert torch.equal(total, torch.full((900,), 80.0))


# failures ----------------------------------------------------------------------------------------------------------


class Failing(Transfers):
    """Raises an error at one of the copies to the host."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__(CPU)
        self.at, self._error = at, error

    def to_host(self, target: Tensor, source: Tensor) -> Any:
        if self.counts.num_to_host == self.at:
            raise self._error
        return super().to_host(target, source)


def test_failure_before_the_first_copy_adds_nothing() -> None:
    transfers = Failing(0, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    streamer, total = streamer_of(transfers), torch.zeros(700)
    with pytest.raises(torch.OutOfMemoryError):
        streamer.add(total, torch.ones(700), replaces=False)
    transfers.at = -1
    streamer.add(total, torch.ones(700), replaces=False)
    streamer.wait()
    assert torch.equal(total, torch.ones(700))


@pytest.mark.parametrize(
    ("at", "error"),
    [(1, RuntimeError("CUDA error: unspecified launch failure")), (0, KeyboardInterrupt()), (1, KeyboardInterrupt())],
)
def test_gradient_that_was_added_in_part_spoils_the_window(at: int, error: BaseException) -> None:
    """An interrupt may come at any time within the first copy."""
    transfers = Failing(at, error)
    streamer, total = streamer_of(transfers), torch.zeros(700)
    message = r"in host memory in part \(.+\), and the window has changed nothing: run it again\.$"
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else WindowStateError):
        streamer.add(total, torch.ones(700), replaces=True)
    transfers.at = -1
    with pytest.raises(WindowStateError, match=message):
        streamer.add(total, torch.ones(700), replaces=True)
    with pytest.raises(WindowStateError, match=message):
        streamer.wait()
    streamer.discard()
    streamer.add(total, torch.ones(700), replaces=True)
    streamer.wait()
    assert torch.equal(total, torch.ones(700))


def test_memory_of_the_device_is_freed_by_wait() -> None:
    found: list[ReferenceType[Tensor]] = []

    class Noting(Transfers):
        def device_memory(self, num_bytes: int) -> Tensor:
            memory = super().device_memory(num_bytes)
            found.append(ref(memory))
            return memory

    streamer, gradient = streamer_of(Noting(CPU)), torch.ones(100)
    for end in (streamer.wait, streamer.discard):
        streamer.add(torch.zeros(100), gradient, replaces=True)
        assert found[-1]() is not None
        end()
        assert found[-1]() is None
    found.append(ref(gradient))
    del gradient
    assert found[-1]() is None
