"""What is measured of one update: how long it takes and its peak, or the gradient that the optimizer is given."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bigbatch.lm.bench.shared_model import SharedModel

PIECE = 2**22  # values compared at a time, so that no second gradient is needed on the device


class Meter(Protocol):
    """Told by a contestant where its update begins and ends."""

    def start(self) -> None:
        """Hear that the first micro-batch is next."""

    def stop(self) -> None:
        """Hear that the optimizer has stepped."""


class NoMeter:
    """Measures nothing: for warming up."""

    def start(self) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""


class Timer:
    """Seconds from before the first micro-batch until the device has made the step, and the peak in between.

    Args:
        device: Waited for at both ends.

    Attributes:
        elapsed_s: None before the end.
        peak_bytes: The most that torch allocated on the device since the stage last forgot it; None on others than
            CUDA, and before the end.
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
        """Leave something out."""
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
    """How near a gradient is to another: the cosine of their angle, and the ratio of their norms."""

    cosine: float
    norm_ratio: float


class GradientMeter:
    """Compares the gradient that the optimizer is given with that of the whole batch.

    Args:
        stage: Whose optimizer is watched between start and stop.
        reference: As from `reference_gradient`.
        timer: Told of start and stop as well, and paused while the two are compared.

    Attributes:
        similarity: Of the first step; None if there was none.
    """

    def __init__(self, stage: SharedModel, reference: Sequence[Tensor], *, timer: Timer | None = None) -> None:
        self._stage = stage
        self._reference = reference
        self._timer = timer
        self._handle: Any = None
        self.similarity: Similarity | None = None

    def start(self) -> None:
        """Watch the optimizer."""
        self._handle = self._stage.optimizer.register_step_pre_hook(self._look)
        if self._timer is not None:
            self._timer.start()

    def stop(self) -> None:
        """Watch it no longer."""
        if self._timer is not None:
            self._timer.stop()
        self.close()

    def close(self) -> None:
        """Watch it no longer, whether the update came to its end or not."""
        if self._handle is not None:
            self._handle.remove()

    def _look(self, _optimizer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        closure = kwargs.get("closure")
        if closure is None:
            self._compare()
            return None

        def look_after() -> Any:  # Lightning runs the last micro-batch within the step
            result = closure()
            self._compare()
            return result

        return args, {**kwargs, "closure": look_after}

    def _compare(self) -> None:
        if self.similarity is None:
            with nullcontext() if self._timer is None else self._timer.paused():
                self.similarity = similarity((p.grad for p in self._stage.parameters), self._reference)


def reference_gradient(stage: SharedModel) -> list[Tensor]:
    """Compute the gradient of the mean loss over all labels of the batch, in float32, one sequence at a time.

        Σ_i ∇ loss_sum_i / Σ_i labels_i

    Returns:
        On the CPU, one tensor for each parameter.
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
    """Compare two gradients, in float64, in pieces of 4 million values on the device of the first.

    Args:
        found: One tensor for each parameter, on any device; None counts as zeros.
        expected: The same, with values.
    """
    product = found_square = expected_square = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        ours = torch.zeros_like(theirs) if ours is None else ours
        for a, b in zip(torch.split(ours.flatten(), PIECE), torch.split(theirs.flatten(), PIECE), strict=True):
            a, b = a.double(), b.to(a.device).double()
            product += torch.dot(a, b).item()
            found_square += torch.dot(a, a).item()
            expected_square += torch.dot(b, b).item()
    norms = math.sqrt(found_square * expected_square)
    ratio = math.sqrt(found_square / expected_square) if expected_square else math.nan
    return Similarity(product / norms if norms else math.nan, ratio)
