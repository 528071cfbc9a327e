"""What only a CUDA device can show: the exact step there, and that no micro-batch waits for it."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch

pytestmark = pytest.mark.gpu


def mlp(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 8)).to("cuda", dtype)


def masked_loss(model: nn.Module, microbatch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    inputs, targets, mask = microbatch
    return (F.mse_loss(model(inputs), targets, reduction="none") * mask).sum(), mask.sum()


def masked_batch(rows: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, 16, generator=generator)
    targets = torch.randn(rows, 8, generator=generator)
    mask = torch.rand(rows, 8, generator=generator) < torch.rand(rows, 1, generator=generator)
    mask[3] = False  # a sample without items
    return inputs.to(device, dtype), targets.to(device, dtype), mask.to(device)


def full_gradient(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    loss_sum, items = masked_loss(model, tuple(tensor.cuda() for tensor in batch))
    (loss_sum / items).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return gradients


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    total = sum((a.double() - b.double()).square().sum() for a, b in zip(found, expected, strict=True))
    return (total / sum(b.double().square().sum() for b in expected)).sqrt().item()


class RecordingSGD(torch.optim.SGD):
    """Plain SGD that keeps the gradients it was given."""

    def step(self, closure: None = None) -> None:
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        super().step(closure)


@pytest.mark.parametrize("microbatch", [1, 3, 5, 12])
def test_cpu_batch_gives_full_gradient_on_device(microbatch: int) -> None:
    model, batch = mlp(torch.float64), masked_batch(12, torch.float64)
    expected = full_gradient(model, batch)
    optimizer = RecordingSGD(model.parameters(), lr=0.1)
    report = bigbatch.Engine(model, optimizer, masked_loss, microbatch=microbatch).step(batch)
    assert report.peak_bytes == torch.cuda.max_memory_allocated()
    assert report.items == batch[2].sum().item()
    assert difference(optimizer.seen, expected) <= 1e-12


def test_verify_passes_on_device_and_shows_naive_error() -> None:
    verification = bigbatch.verify(mlp(torch.float32), masked_loss, masked_batch(24, torch.float32), microbatch=[2, 5])
    assert verification.exact
    assert not any(cut.mean_of_means_error < 1e-2 for cut in verification.cuts)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_microbatch_waits_for_device(dtype: torch.dtype) -> None:
    model, batch = mlp(dtype), masked_batch(32, dtype, "cuda")
    accumulator = bigbatch.Accumulator(model, torch.optim.AdamW(model.parameters(), fused=True), max_grad_norm=1.0)
    window = accumulator.window()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rows in range(0, 32, 4):
            loss_sum, items = masked_loss(model, tuple(tensor[rows : rows + 4] for tensor in batch))
            window.backward(loss_sum, items=items)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            report = window.step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert report.skipped is None
    assert 1 <= len([w for w in waits if "synchroniz" in str(w.message)]) <= 3  # items twice and the norm: one wait


def test_float16_autocast_with_scaler_does_not_overflow() -> None:
    model, batch = mlp(torch.float32), masked_batch(4096, torch.float32)
    expected = full_gradient(model, batch)

    def loss_fn(model: nn.Module, microbatch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", dtype=torch.float16):
            return masked_loss(model, microbatch)

    optimizer, scaler = RecordingSGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cuda")
    report = bigbatch.Engine(model, optimizer, loss_fn, microbatch=512, scaler=scaler).step(batch)
    assert report.skipped is None
    assert scaler.get_scale() == 65536.0
    assert difference(optimizer.seen, expected) < 5e-3


def test_bfloat16_parameters_sum_in_float32() -> None:
    model, batch = mlp(torch.bfloat16), masked_batch(128, torch.bfloat16)
    micro = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    for row in range(128):
        loss_sum, _ = masked_loss(model, tuple(tensor[row : row + 1].cuda() for tensor in batch))
        for total, gradient in zip(micro, torch.autograd.grad(loss_sum, list(model.parameters())), strict=True):
            total += gradient.double()
    expected = [total / batch[2].sum().item() for total in micro]
    optimizer = RecordingSGD(model.parameters(), lr=0.1)
    bigbatch.Engine(model, optimizer, masked_loss, microbatch=1).step(batch)
    assert difference(optimizer.seen, expected) <= 3e-3


def test_peak_memory_does_not_grow_with_microbatches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 2048), nn.Tanh(), nn.Linear(2048, 256)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def loss_fn(model: nn.Module, inputs: Tensor) -> tuple[Tensor, int]:
        return model(inputs).square().sum(), inputs.numel()

    engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch=512)
    engine.step(torch.randn(1024, 256))  # optimizer state and workspaces are there from now on
    peaks = []
    for num_microbatches in (2, 64):
        torch.cuda.reset_peak_memory_stats()
        engine.step(torch.randn(512 * num_microbatches, 256))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] / peaks[0] <= 1.01


def test_tuning_leaves_no_memory_in_pieces() -> None:
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = bigbatch.Engine(
        model, optimizer, lambda model, rows: (model(rows).square().sum(), len(rows)), microbatch="auto", memory="2GiB"
    )
    engine.tune(torch.randn(20_000, 1024))
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() <= 2**26
