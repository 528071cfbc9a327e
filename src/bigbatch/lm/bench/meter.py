"""Measurements of one update: time, peak memory, and the gradient that the optimizer receives."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bigbatch.lm.bench.shared_model import SharedModel

CHUNK_VALUES = 2**22  # compared at a time, so that the device need not hold a second gradient


class Meter(Protocol):
    """Receiver of the beginning and the end of an update."""

    def start(self) -> None:
        """Begin, before the first micro-batch."""

    def stop(self) -> None:
        """End, after the optimizer step."""


class NoMeter:
    """Meter that measures nothing, for warm-up."""

    def start(self) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""


class Timer:
    """Time of an update on its device, from before the first micro-batch until after the step, and peak memory.

    Args:
        device: Synchronized at the beginning and at the end.

    Attributes:
        elapsed_s: Seconds; None before the end.
        peak_bytes: Peak of memory allocated by torch since the last reset; None before the end and without CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started_s = self._paused_s = 0.0
        self.elapsed_s: float | None = None
        self.peak_bytes: int | None = None

    def start(self) -> None:
        """Begin."""
        self._paused_s = 0.0
        self._started_s = self._now_s()

    def stop(self) -> None:
        """End."""
        self.elapsed_s = self._now_s() - self._started_s - self._paused_s
        if self._device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude a block from the time."""
        began_s = self._now_s()
        try:
            yield
        finally:
            self._paused_s += self._now_s() - began_s

    def _now_s(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class Similarity(NamedTuple):
    """Cosine similarity of two gradients, and the ratio of their norms."""

    cosine: float
    norm_ratio: float


class GradientMeter:
    """Meter that compares the gradient that the optimizer receives with that of the whole batch.

    Args:
        stage: The shared model; its optimizer is hooked between start and stop.
        reference: Result of `reference_gradient`.
        timer: Started and stopped as well, and paused during the comparison.

    Attributes:
        similarity: Similarity at the first step; None if there was none.
    """

    def __init__(self, stage: SharedModel, reference: Sequence[Tensor], *, timer: Timer | None = None) -> None:
        self._stage = stage
        self._reference = reference
        self._timer = timer
        self._handle: Any = None
        self.similarity: Similarity | None = None

    def start(self) -> None:
        """Hook the optimizer, and start the timer."""
        self._handle = self._stage.optimizer.register_step_pre_hook(self._before_step)
        if self._timer is not None:
            self._timer.start()

    def stop(self) -> None:
        """Stop the timer, and remove the hook."""
        if self._timer is not None:
            self._timer.stop()
        self.close()

    def close(self) -> None:
        """Remove the hook, even if the update failed."""
        if self._handle is not None:
            self._handle.remove()

    def _before_step(self, _optimizer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        closure = kwargs.get("closure")
        if closure is None:
            self._compare()
            return None

        def closure_then_compare() -> Any:  # Lightning runs the last micro-batch within the step
            result = closure()
            self._compare()
            return result

        return args, {**kwargs, "closure": closure_then_compare}

    def _compare(self) -> None:
        if self.similarity is None:
            with nullcontext() if self._timer is None else self._timer.paused():
                self.similarity = similarity((p.grad for p in self._stage.parameters), self._reference)


def reference_gradient(stage: SharedModel) -> list[Tensor]:
    """Compute the gradient of the mean loss over all labels of the batch, in float32, one sequence at a time.

        Σ_i ∇ loss_sum_i / Σ_i labels_i

    Returns:
        One tensor per parameter, on the CPU.
    """
    num_labels = sum(len(sample["labels"]) - 1 for sample in stage.samples)
    with stage.isolated(), stage.in_float32():
        for sample in stage.samples:
            ids = sample["input_ids"].to(stage.device)
            logits = stage.model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            loss = F.cross_entropy(logits.float(), ids[1:], reduction="sum") / num_labels
            torch.autograd.backward(loss)
        return [_gradient_of(parameter) for parameter in stage.parameters]


def _gradient_of(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, device="cpu") if parameter.grad is None else parameter.grad.to("cpu", copy=True)


@torch.no_grad()
def similarity(found: Iterable[Tensor | None], expected: Iterable[Tensor]) -> Similarity:
    """Compare two gradients in float64, in chunks of 4 million values on the device of the first.

    Args:
        found: One tensor per parameter, on any device; None counts as zeros.
        expected: One tensor per parameter.
    """
    product = found_square = expected_square = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        ours = torch.zeros_like(theirs) if ours is None else ours
        for a, b in zip(
            torch.split(ours.flatten(), CHUNK_VALUES), torch.split(theirs.flatten(), CHUNK_VALUES), strict=True
        ):
            a, b = a.double(), b.to(a.device).double()
            product += torch.dot(a, b).item()
            found_square += torch.dot(a, a).item()
            expected_square += torch.dot(b, b).item()
    norms = math.sqrt(found_square * expected_square)
    ratio = math.sqrt(found_square / expected_square) if expected_square else math.nan
    return Similarity(product / norms if norms else math.nan, ratio)
