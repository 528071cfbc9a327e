"""Batch norm over the whole batch on a CUDA device: saved tensors on the host, threads, and memory that runs out."""

import gc
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batch_norm.models import (
    NUM_SAMPLES,
    TOLERANCE,
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

pytestmark = pytest.mark.gpu


def on_cuda(batch: Batch) -> Batch:
    return batch[0].cuda(), batch[1].cuda()


def workers() -> int:
    return sum(thread.name == "bigbatch" for thread in threading.enumerate())


@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving", "cumulative"])
@pytest.mark.parametrize("cut", [1, 4, 10, NUM_SAMPLES])
def test_resnet_is_exact(cut: int, momentum: float | None) -> None:
    model, batches = resnet(momentum).cuda(), [images(seed=1), images(7, seed=2)]
    expected = whole(model, classify, [on_cuda(batch) for batch in batches])
    engine = engine_of(model, classify, cut)
    for batch in batches:  # on the host: micro-batches are prefetched
        engine.backward(batch)
    assert gradient_error(model, expected) <= TOLERANCE
    assert buffer_error(model, expected) <= 1e-13


def test_threads_are_kept_until_release() -> None:
    gc.collect()
    before = workers()  # of engines of other tests
    model = Small(plain).cuda()
    engine = engine_of(model, squares, 4)
    for _ in range(3):
        engine.backward(rows())
        assert workers() == before + 3
    engine.release_cuda_graphs()
    assert workers() == before


def convolutions(channels: int = 32, layers: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    stack: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for _ in range(layers):
        stack += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False)]
    return nn.Sequential(*stack, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)).cuda()


def peak_bytes(cut: int, num_samples: int, batch_norm: Any) -> int:
    """Return the peak of the second window on the device, without parameters."""
    engine = engine_of(convolutions(), classify, cut, batch_norm=batch_norm)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(num_samples, 3, 64, 64, generator=generator), torch.zeros(num_samples, dtype=torch.int64)
    engine.backward(batch)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    engine.backward(batch)
    peak = torch.cuda.max_memory_allocated() - before
    engine.release_cuda_graphs()
    return peak


def test_saved_tensors_on_host_reduce_peak_of_device() -> None:
    num_samples, cut = 64, 8
    whole_batch, plain_cut, exact = (
        peak_bytes(size, num_samples, norm) for size, norm in ((num_samples, None), (cut, None), (cut, "exact"))
    )
    one_map = num_samples * 32 * 64 * 64 * 4  # an activation of the whole batch
    assert plain_cut < whole_batch / 4
    assert exact < plain_cut + 3 * one_map  # of the whole batch the input of one norm and its gradient, and the images
    assert exact < whole_batch / 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_near(dtype: torch.dtype) -> None:
    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, int]:
        with torch.autocast("cuda", dtype):
            return classify(model, batch)

    model = resnet().float().cuda()
    pixels, labels = images()
    expected = whole(model, loss_fn, [on_cuda((pixels.float(), labels))])
    engine_of(model, loss_fn, 4).backward((pixels.float(), labels))
    assert gradient_error(model, expected) <= 0.1
    assert buffer_error(model, expected) <= 0.02


def test_channels_last_is_exact() -> None:
    model = resnet().cuda().to(memory_format=torch.channels_last)
    pixels, labels = images()
    batch = pixels.contiguous(memory_format=torch.channels_last), labels
    expected = whole(model, classify, [on_cuda(batch)])
    engine_of(model, classify, 4).backward(batch)
    assert gradient_error(model, expected) <= TOLERANCE


def test_checkpoint_repeats_norm_and_dropout_of_device() -> None:
    def body(model: Any, hidden: Tensor) -> Tensor:
        return F.dropout(model.second(model.norm(F.dropout(model.first(hidden), 0.3)).tanh()), 0.3)

    def forward(model: Any, x: Tensor) -> Tensor:
        return model.last(checkpoint(body, model, x, use_reentrant=False) if model.checkpoints else body(model, x))

    found = []
    for checkpoints in (False, True):
        model = Small(forward).cuda()
        model.checkpoints = checkpoints
        torch.manual_seed(5)
        engine_of(model, squares, 3).backward(rows())
        found.append(model)
    assert gradient_error(found[1], found[0]) <= TOLERANCE
    assert buffer_error(*found) <= 1e-13


def test_random_states_of_device_move_on() -> None:
    masks = []

    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, int]:
        masks.append(tuple(F.dropout(torch.ones(50, device="cuda")).tolist()))
        return squares(model, batch)

    engine = engine_of(Small(plain).cuda(), loss_fn, 4)
    for _ in range(2):
        engine.backward(rows())
    assert len(set(masks)) == 6


def test_out_of_memory_starts_window_again() -> None:
    sizes = []

    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, int]:
        sizes.append(len(batch[0]))
        loss_sum, items = squares(model, batch)
        if len(batch[0]) > 3:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        return loss_sum, items

    model = Small(plain).cuda()
    expected = whole(model, squares, [on_cuda(rows())])
    report = engine_of(model, loss_fn, NUM_SAMPLES).backward(rows())
    assert report.retries == 2
    assert sizes[-4:] == [3, 3, 3, 2]
    assert gradient_error(model, expected) <= TOLERANCE
    assert buffer_error(model, expected) <= 1e-13


def test_other_stream_is_used_by_every_thread() -> None:
    streams = set()

    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, int]:
        streams.add(torch.cuda.current_stream().cuda_stream)
        return squares(model, batch)

    model, stream = Small(plain).cuda(), torch.cuda.Stream()
    expected = whole(model, squares, [on_cuda(rows())])
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        engine_of(model, loss_fn, 4).backward(rows())
    torch.cuda.current_stream().wait_stream(stream)
    assert streams == {stream.cuda_stream}
    assert gradient_error(model, expected) <= TOLERANCE
