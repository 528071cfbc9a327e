"""Fused linear layers on a CUDA device: bf16 products into float32, CUDA graphs, compiled layers, out-of-memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch
from bigbatch.execution.cuda_graphs import CudaGraphRunner
from bigbatch.gradients import direct_sums, weight_products

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
WIDTH = 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(F.gelu(self.up(hidden)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def make(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to("cuda", dtype)


def make_batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(24, 16, WIDTH, generator=generator).to(dtype)
    targets = torch.randn(24, 16, 8, generator=generator).to(dtype)
    return inputs, targets, torch.rand(24, 16, generator=generator) < torch.rand(24, 1, generator=generator)


def loss_fn(model: nn.Module, microbatch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    inputs, targets, mask = microbatch
    outputs = model(inputs)
    outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
    return ((outputs - targets).square() * mask[..., None]).sum(), mask.sum()


def autocast_loss_fn(model: nn.Module, microbatch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return loss_fn(model, microbatch)


class RecordingSGD(torch.optim.SGD):
    def step(self, closure: None = None) -> None:
        self.seen = [*getattr(self, "seen", []), [p.grad.clone() for g in self.param_groups for p in g["params"]]]
        super().step()


def run(
    model: nn.Module, loss: Callable[..., Any], *, fuse: Any, num_steps: int = 3, microbatch: int = 4, **settings: Any
) -> tuple[RecordingSGD, bigbatch.Engine]:
    optimizer = RecordingSGD(model.parameters(), lr=1e-3)
    settings = {"noise": False, "check": False, **settings}
    engine = bigbatch.Engine(model, optimizer, loss, microbatch=microbatch, fuse_gradients=fuse, **settings)
    dtype = next(model.parameters()).dtype
    for _ in range(num_steps):
        engine.step(make_batch(dtype))
    return optimizer, engine


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    total = sum((a.double() - b.double()).square().sum() for a, b in zip(found, expected, strict=True))
    return (total / sum(b.double().square().sum() for b in expected)).sqrt().item()


def errors(found: RecordingSGD, expected: RecordingSGD) -> list[float]:
    return [error(one, other) for one, other in zip(found.seen, expected.seen, strict=True)]


def are_equal(one: RecordingSGD, other: RecordingSGD) -> bool:
    pairs = zip(one.seen, other.seen, strict=True)
    return all(torch.equal(a, b) for first, second in pairs for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_product_is_added_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    total = torch.randn(96, 64, device="cuda")
    left, right = torch.randn(200, 96, device="cuda").to(dtype), torch.randn(200, 64, device="cuda").to(dtype)
    exact = left.double().t() @ right.double()
    fresh = weight_products.weight_gradient(left, right, torch.float32)
    assert fresh.dtype == torch.float32
    assert error([fresh], [exact]) < 1e-6
    before, version = total.double(), total._version
    weight_products.add_weight_gradient_(total, left, right)
    assert error([total], [before + exact]) < 1e-6
    assert total._version > version


def test_float64_is_exact_for_any_microbatch() -> None:
    expected = run(make(torch.float64), loss_fn, fuse=False, microbatch=24)[0]
    for microbatch in (1, 5, 24):
        assert max(errors(run(make(torch.float64), loss_fn, fuse=True, microbatch=microbatch)[0], expected)) <= 1e-12


def test_autocast_is_at_least_as_close_as_the_ordinary_path() -> None:
    expected = run(make(torch.float64), loss_fn, fuse=False, num_steps=1)[0]
    ordinary = run(make(), autocast_loss_fn, fuse=False, num_steps=1)[0]
    fused, engine = run(make(), autocast_loss_fn, fuse=True, num_steps=1)
    assert errors(fused, expected)[0] <= 1.01 * errors(ordinary, expected)[0]
    assert engine.fused.copies.num_bytes == 2 * sum(
        w.numel() for n, w in engine.model.named_parameters() if "weight" in n
    )


def test_copies_change_no_bit() -> None:
    ordinary = run(make(), autocast_loss_fn, fuse=False)[0]
    assert are_equal(run(make(), autocast_loss_fn, fuse="copies")[0], ordinary)


def test_float32_without_autocast_drops_expected_copies() -> None:
    _, engine = run(make(), loss_fn, fuse=True, num_steps=1)
    assert engine.fused.copies.num_bytes == 0


def test_narrow_parameters_are_summed_within_products() -> None:
    expected = run(make(torch.float64), loss_fn, fuse=False, num_steps=1)[0]
    both = [run(make(torch.bfloat16), loss_fn, fuse=fuse, num_steps=1)[0] for fuse in (True, False)]
    assert errors(both[0], expected)[0] <= 1.05 * errors(both[1], expected)[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_replay_the_same_update(compiled: bool) -> None:
    def model() -> Net:
        found = make()
        torch._dynamo.reset()
        for block in found.blocks:
            if compiled:
                block.compile(dynamic=True)
        return found

    directly, _ = run(model(), autocast_loss_fn, fuse=True, num_steps=4)
    replayed, engine = run(model(), autocast_loss_fn, fuse=True, num_steps=4, cuda_graphs=True)
    assert isinstance(engine.runner, CudaGraphRunner)
    assert engine.runner.disabled_reason is None
    assert engine.runner.num_graphs == 1
    assert max(errors(replayed, directly)) <= 1e-5
    ordinary = run(model(), autocast_loss_fn, fuse=False, num_steps=4)[0]
    assert max(errors(replayed, ordinary)) <= 1e-2
    engine.release_cuda_graphs()
    engine.step(make_batch())
    assert engine.fused.num_layers == 7


def test_graphs_of_measured_and_fused_windows_alternate() -> None:
    ordinary, other = run(make(torch.float64), loss_fn, fuse=False, num_steps=18, noise=True, cuda_graphs=True)
    fused, engine = run(make(torch.float64), loss_fn, fuse=True, num_steps=18, noise=True, cuda_graphs=True)
    assert engine.runner.disabled_reason is None
    assert engine.runner.num_graphs == 2
    assert max(errors(fused, ordinary)) <= 1e-12
    measured = engine.accumulator.noise.estimator.estimate()
    assert measured.num_windows == 10
    assert other.accumulator.noise.estimator.estimate().num_windows == 18
    assert measured.scale_items > 0


def test_first_fused_window_fits_beside_graphs_of_measured_windows() -> None:
    """Windows that are measured, and fused ones, need about the same memory, and there is no room for both."""
    torch.manual_seed(0)
    batch = torch.randn(8, 8192, WIDTH), torch.randn(8, 8192, 8), torch.ones(8, 8192, dtype=torch.bool)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    settings: dict[str, Any] = {"check": False, "cuda_graphs": True, "fuse_gradients": True}
    engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch=4, **settings)
    for _ in range(2):
        engine.step(batch)
    graphs_bytes = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    assert engine.runner.num_graphs == 1
    total_bytes = torch.cuda.get_device_properties("cuda").total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + graphs_bytes // 4) / total_bytes)
    try:
        reports = [engine.step(batch) for _ in range(20)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert graphs_bytes > 2**28
    assert [report.retries for report in reports] == [0] * 20
    assert engine.runner.disabled_reason is None
    assert engine.runner.num_graphs == 2


def test_compiled_layers_are_exact() -> None:
    expected = run(make(torch.float64), loss_fn, fuse=False)[0]
    model = make(torch.float64)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(dynamic=True)
    assert max(errors(run(model, loss_fn, fuse=True)[0], expected)) <= 1e-12


@pytest.mark.parametrize("loss", [loss_fn, autocast_loss_fn])
def test_samples_count_once_after_out_of_memory(loss: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(make(), loss, fuse=True, num_steps=1)[0]
    for at in (1, 3, 7, 10, 20):
        num_seen = 0

        def fail_in_turn(original: Callable[..., Any]) -> Callable[..., Any]:
            def product(*operands: Any) -> Any:
                nonlocal num_seen
                num_seen += 1
                if num_seen == at:  # noqa: B023 - called within this round
                    raise torch.OutOfMemoryError("CUDA out of memory (injected)")
                return original(*operands)

            return product

        with monkeypatch.context() as patch:
            for name in ("weight_gradient", "add_weight_gradient_"):
                patch.setattr(direct_sums, name, fail_in_turn(getattr(weight_products, name)))
            found, engine = run(make(), loss, fuse=True, num_steps=1)
        assert engine.runner.retries == 1
        assert errors(found, expected)[0] <= 1e-5


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_microbatch_waits_for_the_device() -> None:
    model = make()

    def watched(model: nn.Module, microbatch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        torch.cuda.set_sync_debug_mode("error")
        return autocast_loss_fn(model, microbatch)

    before = torch.cuda.get_sync_debug_mode()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine = bigbatch.Engine(
        model, optimizer, autocast_loss_fn, microbatch=4, fuse_gradients=True, noise=False, check=False
    )
    for _ in range(3):  # copies are checked by value in the first windows
        engine.step(make_batch())
    on_device = tuple(tensor.cuda() for tensor in make_batch())
    engine.loss_fn = watched
    original = engine.runner.end

    def end(*arguments: Any) -> None:
        torch.cuda.set_sync_debug_mode(before)
        original(*arguments)

    engine.runner.end = end  # type: ignore[method-assign]
    try:
        engine.step(on_device)
    finally:
        torch.cuda.set_sync_debug_mode(before)
