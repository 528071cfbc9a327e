"""What the tracker counts, beside bytes that are worked out by hand; float32 is 4 bytes a number."""

import gc
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bigbatch.memory import allocation_tracker as module
from bigbatch.memory.allocation_tracker import AllocationTracker, MemoryCategory

CPU, META = torch.device("cpu"), torch.device("meta")


class Checked(AllocationTracker):
    """A tracker that looks at every moment whether its parts are its total."""

    moments = 0

    def __torch_dispatch__(self, *call: object, **more: object) -> object:  # type: ignore[override]
        result = super().__torch_dispatch__(*call, **more)  # type: ignore[arg-type]
        check(self)
        self.moments += 1
        return result


def check(tracker: AllocationTracker) -> None:
    assert tracker.live_bytes.total() == tracker._total_bytes <= tracker.peak_bytes == tracker.parts_at_peak.total()
    assert min(tracker.live_bytes.values(), default=0) >= 0


def live(tracker: AllocationTracker) -> int:
    return tracker.live_bytes.total()


def test_peak_of_few_operations_matches_manual_count() -> None:
    with AllocationTracker(CPU) as tracker:
        a = torch.ones(100)  # 400
        b = a * 2  # 800
        c = a + b  # 1,200
        del a, b  # 400
        d = torch.cat([c, c])  # 1,200
        e = torch.zeros(3)  # 1,212
        del c, d, e
        torch.ones(2)
    assert tracker.peak_bytes == 1212
    assert live(tracker) == 0


def test_peak_of_linear_layer_matches_manual_count() -> None:
    layer, inputs = nn.Linear(3, 5), torch.ones(7, 3)
    with AllocationTracker(CPU) as tracker:
        tracker.track(layer.parameters(), MemoryCategory.PARAMETERS)
        loss = layer(inputs).sum()  # the outputs are freed at once: a sum keeps nothing
        assert (tracker.peak_bytes, live(tracker)) == (4 * (20 + 35 + 1), 4 * (20 + 1))
        tracker.reset_peak()
        loss.backward()
    # Beside the loss: its gradient, which the outputs' gradient is an expansion of, and those of weight and bias.
    assert live(tracker) == 4 * (20 + 1 + 20)
    assert tracker.peak_bytes == 4 * (20 + 1 + 20 + 1)
    assert tracker.live_bytes[MemoryCategory.PARAMETERS] == 4 * 20


def test_views_count_once_until_last_is_freed() -> None:
    with AllocationTracker(CPU) as tracker:
        whole = torch.zeros(10, 10)
        views = [whole.view(100), whole.t(), whole[3:], whole[2, 2], whole.detach(), whole.expand(5, 10, 10)]
        views += [*whole.unbind(), *whole.split(3), whole.as_strided((2, 2), (1, 1))]
        assert live(tracker) == tracker.peak_bytes == 400
        del whole
        while len(views) > 1:
            views.pop()
            assert live(tracker) == 400
        views.clear()
        assert live(tracker) == 0


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_memory_is_freed_in_any_order(order: tuple[int, ...]) -> None:
    with Checked(CPU) as tracker:
        tensors = {i: torch.zeros(10 ** (i + 1)) for i in range(3)}
        left = 4 * 1110
        for i in order:
            assert live(tracker) == left
            del tensors[i]
            left -= 4 * 10 ** (i + 1)
            check(tracker)
    assert live(tracker) == left == 0
    assert tracker.peak_bytes == 4440


def test_memory_at_reused_address_counts_again() -> None:
    with Checked(CPU) as tracker:
        addresses = set()
        for i in range(1000):
            tensor = torch.zeros(1 + i % 3)
            addresses.add(tensor.untyped_storage()._cdata)
            assert live(tracker) == 4 * (1 + i % 3)
            del tensor
    assert len(addresses) < 1000, "none was used twice"
    assert tracker.peak_bytes <= 4 * 6


def test_tensors_freed_after_exit_are_subtracted() -> None:
    with AllocationTracker(CPU) as tracker:
        tensor = torch.zeros(10)
    torch.zeros(1000)
    assert (live(tracker), tracker.peak_bytes) == (40, 40)
    del tensor
    assert live(tracker) == 0


def test_cyclic_garbage_counts_until_collected() -> None:
    class Loop:
        def __init__(self) -> None:
            self.me, self.tensor = self, torch.zeros(10)

    gc.collect()
    with AllocationTracker(CPU) as tracker:
        Loop()
        gc.collect()
    assert (live(tracker), tracker.peak_bytes) == (0, 40)


def test_inplace_operations_allocate_nothing() -> None:
    tensor, other = torch.ones(100), torch.ones(100)
    with AllocationTracker(CPU) as tracker:
        tracker.track([tensor], MemoryCategory.PARAMETERS)
        tensor.mul_(2).add_(other).relu_()
        tensor[3:5] = 7
        torch._foreach_mul_([tensor], 0.5)
        torch.add(tensor, other, out=tensor)
    assert tracker.peak_bytes == 400 + 4, "the value 7 is a tensor for a moment"


RESIZES: dict[str, Callable[[Tensor], object]] = {
    "resize_": lambda tensor: tensor.resize_(50),
    "out=": lambda tensor: torch.mul(torch.ones(50), 2, out=tensor),
    "set_": lambda tensor: tensor.set_(torch.ones(50)),
}


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("start", [0, 10, 49])
@pytest.mark.parametrize("name", RESIZES)
def test_growing_tensor_counts_its_new_size(name: str, start: int) -> None:
    with Checked(CPU) as tracker:
        tensor = torch.empty(start)
        RESIZES[name](tensor)
        assert live(tracker) == 4 * 50
        del tensor
        assert live(tracker) == 0


def test_shrunk_storage_counts_less_from_next_operation() -> None:
    with Checked(CPU) as tracker:
        tensor = torch.zeros(100)
        tensor.untyped_storage().resize_(40)
        tensor.resize_(10)
        assert (live(tracker), tracker.peak_bytes) == (40, 400)
    assert live(tracker) == 40


def test_several_results_count_each() -> None:
    with Checked(CPU) as tracker:
        values, indices = torch.ones(10).max(0)
        sums = torch._foreach_add([torch.ones(3), torch.ones(4)], 1)
        results = torch.ones(4, 6).sort()
        assert live(tracker) == 4 + 8 + 4 * 7 + 24 * (4 + 8)
        del values, indices, sums, results
    assert live(tracker) == 0


LAYOUTS = [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc]


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_tensors_count_indices_and_values(layout: torch.layout) -> None:
    blocks = {"blocksize": (1, 1)} if layout in LAYOUTS[3:] else {}
    dense = torch.eye(10)
    with Checked(CPU) as tracker:
        sparse = dense.to_sparse(layout=layout, **blocks)
        indices = 2 * 10 + (0 if layout is torch.sparse_coo else 11)  # rows and columns, and where rows begin
        assert live(tracker) == 10 * 4 + indices * 8
        tracker.track([sparse], MemoryCategory.GRADIENTS)
        assert tracker.live_bytes[MemoryCategory.GRADIENTS] == live(tracker)
        del sparse
    assert live(tracker) == 0
    held = AllocationTracker(CPU)
    held.track([dense.to_sparse(layout=layout, **blocks)], MemoryCategory.GRADIENTS)
    assert held.peak_bytes == 10 * 4 + indices * 8


def test_sparse_embedding_gradient_counts() -> None:
    table = nn.Embedding(1000, 8, sparse=True)
    with Checked(CPU) as tracker:
        table(torch.tensor([1, 2, 3])).sum().backward()
        gradient = table.weight.grad
        assert gradient is not None
        assert gradient.is_sparse
        tracker.track([gradient], MemoryCategory.GRADIENTS)
    assert tracker.live_bytes[MemoryCategory.GRADIENTS] == 3 * 8 + 3 * 8 * 4


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_wrapper_tensors_count_inner_tensors() -> None:
    with Checked(CPU) as tracker:
        nested = torch.nested.nested_tensor([torch.ones(3), torch.ones(4)], layout=torch.jagged)
        tracker.track([nested], MemoryCategory.LOSS)
    assert tracker.live_bytes[MemoryCategory.LOSS] >= 4 * 7 + 8 * 3, "the values, and the offsets"


def test_tensors_without_visible_memory_are_skipped() -> None:
    lazy = nn.LazyLinear(3)
    with AllocationTracker(CPU) as tracker:
        tracker.track([*lazy.parameters(), torch.ones(4, 4).to_mkldnn()], MemoryCategory.PARAMETERS)
    assert tracker.live_bytes[MemoryCategory.PARAMETERS] == 0


def test_existing_tensors_count_once_tracked() -> None:
    early = torch.zeros(10)
    with Checked(CPU) as tracker:
        tracker.track([early], MemoryCategory.PARAMETERS)
        late = early + early
        assert tracker.live_bytes == {MemoryCategory.PARAMETERS: 40, MemoryCategory.ACTIVATIONS: 40}
        del early
        assert tracker.live_bytes[MemoryCategory.PARAMETERS] == 0
        del late
    assert tracker.parts_at_peak == {MemoryCategory.PARAMETERS: 40, MemoryCategory.ACTIVATIONS: 40}


def test_tracking_twice_counts_once_under_last_name() -> None:
    early = torch.zeros(10)
    tracker = AllocationTracker(CPU)
    tracker.track([early, early, early.view(2, 5)], MemoryCategory.PARAMETERS)
    tracker.track([early], MemoryCategory.PARAMETERS)
    assert (tracker.live_bytes, tracker.peak_bytes) == ({MemoryCategory.PARAMETERS: 40}, 40)
    tracker.track([early[2:]], MemoryCategory.GRADIENTS)
    assert tracker.live_bytes[MemoryCategory.PARAMETERS] == 0
    assert tracker.live_bytes[MemoryCategory.GRADIENTS] == tracker.peak_bytes == 40
    check(tracker)
    del early
    assert live(tracker) == 0
    check(tracker)


def test_parts_add_up_throughout_training_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 50))
    optimizer = torch.optim.AdamW(model.parameters())
    with Checked(CPU) as tracker:
        tracker.track(model.parameters(), MemoryCategory.PARAMETERS)
        for part in (MemoryCategory.ACTIVATIONS, MemoryCategory.LOSS):
            tracker.set_category(part)
            nn.functional.cross_entropy(model(torch.arange(50)), torch.arange(50)).backward()
            tracker.set_category(lambda: MemoryCategory.OPTIMIZER)
            optimizer.step()
            optimizer.zero_grad()
            tracker.reset_peak()
            check(tracker)
    assert tracker.moments > 200
    assert all(tracker.live_bytes[part] for part in (MemoryCategory.PARAMETERS, MemoryCategory.OPTIMIZER))


def test_peak_parts_are_those_at_peak() -> None:
    with AllocationTracker(CPU) as tracker:
        tracker.set_category(MemoryCategory.LOSS)
        one = torch.zeros(10)
        tracker.set_category(MemoryCategory.GRADIENTS)
        two = torch.zeros(20)
        del one
        three = torch.zeros(5)
        del two, three
    assert tracker.parts_at_peak == {MemoryCategory.LOSS: 40, MemoryCategory.GRADIENTS: 80}


def test_reset_peak_starts_at_live_memory() -> None:
    with AllocationTracker(CPU) as tracker:
        kept = torch.zeros(10)
        torch.zeros(100)
        tracker.reset_peak()
        assert (tracker.peak_bytes, tracker.parts_at_peak) == (40, {MemoryCategory.ACTIVATIONS: 40})
        torch.zeros(3)
        assert tracker.peak_bytes == 52
        del kept
    assert tracker.peak_bytes == 52


def test_nested_trackers_both_count() -> None:
    with Checked(CPU) as outer:
        first = torch.zeros(10)
        with Checked(CPU) as inner:
            second = torch.zeros(20)
            del first
        third = torch.zeros(5)
    assert (outer.peak_bytes, live(outer)) == (120, 100)
    assert (inner.peak_bytes, live(inner)) == (80, 80)
    del second, third
    assert live(outer) == live(inner) == 0


def test_inner_error_passes_through_and_ends_tracking() -> None:
    kept = []

    def fail() -> None:
        kept.append(torch.zeros(10))
        with tracker:
            kept.append(torch.zeros(10))
            torch.ones(3) + torch.ones(4)

    tracker = AllocationTracker(CPU)
    with pytest.raises(RuntimeError, match="size of tensor"):
        fail()
    torch.zeros(1000)
    gc.collect()
    assert (live(tracker), tracker.peak_bytes) == (40, 40 + 12 + 16)
    with tracker:
        torch.zeros(20)
    assert tracker.peak_bytes == 40 + 80


def test_inner_out_of_memory_keeps_counts_consistent() -> None:
    with Checked(CPU) as tracker:
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            torch.empty(2**60, dtype=torch.uint8)
        check(tracker)
        torch.zeros(10)
    assert tracker.peak_bytes == 40


@pytest.mark.parametrize(("numbers", "expected"), [(0, 0), (1, 512), (128, 512), (129, 1024), (1000, 4096)])
def test_allocations_are_rounded_up_to_unit(numbers: int, expected: int) -> None:
    with Checked(CPU, unit=512) as tracker:
        tensor = torch.zeros(numbers)
        assert live(tracker) == tracker.peak_bytes == expected
        tracker.track([tensor], MemoryCategory.LOSS)
        assert tracker.live_bytes[MemoryCategory.LOSS] == expected
        tensor.resize_(2000)
        assert live(tracker) == 8192
        del tensor
    assert live(tracker) == 0


def test_cuda_rounds_to_512_and_cpu_does_not() -> None:
    with FakeTensorMode():
        for device, expected in ((torch.device("cuda"), 512), (CPU, 12)):
            with AllocationTracker(device) as tracker:
                torch.zeros(3, device=device)
            assert tracker.peak_bytes == expected


def test_tensors_elsewhere_do_not_count() -> None:
    elsewhere = torch.zeros(1000, device=META)
    with AllocationTracker(CPU) as tracker:
        tracker.track([elsewhere], MemoryCategory.PARAMETERS)
        both = elsewhere + torch.zeros(1000, device=META)
        here = torch.zeros(3)
    assert tracker.peak_bytes == here.nbytes
    assert both.device == META


def test_another_device_of_same_type_does_not_count() -> None:
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    with FakeTensorMode():
        held = [torch.zeros(1000, device=device) for device in (first, second)]
        trackers = {device: AllocationTracker(device) for device in (first, second, torch.device("cuda"))}
        for tracker in trackers.values():
            tracker.track(held, MemoryCategory.PARAMETERS)
            with tracker:
                torch.zeros(2000, device=second)
    assert [tracker.peak_bytes for tracker in trackers.values()] == [4096, 4096 + 8192, 2 * 4096 + 8192]


def test_values_without_data_read_as_one() -> None:
    with FakeTensorMode(), AllocationTracker(CPU):
        assert torch.zeros(()).item() == 1.0
        assert torch.zeros((), dtype=torch.int64).item() == 1
        assert torch.zeros((), dtype=torch.bool).item() is True
        assert bool(torch.zeros(3).any())
        assert torch.equal(torch.zeros(3), torch.ones(3))


def test_values_with_data_are_unchanged() -> None:
    with AllocationTracker(CPU):
        assert torch.full((), 3.5).item() == 3.5
        assert not torch.zeros(3).any()
        assert not torch.equal(torch.zeros(3), torch.ones(3))


def test_loop_waiting_for_absent_value_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_READS", 1234)
    times = []

    def wait() -> None:
        running = torch.ones(3)
        while running.any():
            running = running - 1
            times.append(1)

    with FakeTensorMode(), AllocationTracker(CPU), pytest.raises(RuntimeError) as raised:
        wait()
    assert str(raised.value) == "more than 1,234 tensor values were read, perhaps in a loop that waits for one"
    assert len(times) == 1234
