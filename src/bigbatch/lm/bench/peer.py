"""Interface of a contestant, and base class of the tools that bigbatch is compared with."""

import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from bigbatch.lm.bench.meter import Meter, NoMeter
from bigbatch.lm.bench.shared_model import SharedModel
from bigbatch.lm.bench.workload import Sample
from bigbatch.lm.data.dataset import collate

WARM_SAMPLES = 8


class Contestant(Protocol):
    """A tool that runs the update of a workload.

    Attributes:
        notes: Remarks for the reader of its row.
        first_update_s: Seconds from the beginning of its first turn until the end of its first update, compilation and
            tuning included; None before.
    """

    notes: list[str]
    first_update_s: float | None

    def turn(self, stage: SharedModel, meter: Meter) -> None:
        """Warm up, then run one whole update from the initial weights, between ``meter.start`` and ``meter.stop``."""


class Peer(ABC):
    """A contestant with a fixed number of samples per micro-batch, independent of their length.

    Args:
        samples: Samples per micro-batch.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.notes: list[str] = []
        self.first_update_s: float | None = None

    def turn(self, stage: SharedModel, meter: Meter) -> None:
        """Warm up with the longest sequences, so that the memory is allocated, then run the whole update."""
        started_s = time.perf_counter()
        longest = sorted(stage.samples, key=lambda sample: -len(sample["input_ids"]))
        self.update(stage, longest[: max(WARM_SAMPLES, self.samples)], NoMeter())
        if self.first_update_s is None:
            stage.synchronize()
            self.first_update_s = time.perf_counter() - started_s
        stage.restore_model()
        self.update(stage, stage.samples, meter)

    @abstractmethod
    def update(self, stage: SharedModel, samples: Sequence[Sample], meter: Meter) -> None:
        """Run one update of the shared model on some samples, with its optimizer."""

    def num_microbatches(self, samples: Sequence[Sample]) -> int:
        """Return the number of micro-batches of some samples."""
        return -(-len(samples) // self.samples)

    def loader(self, stage: SharedModel, samples: Sequence[Sample]) -> "DataLoader[Any]":
        """Create the data loader of a training script."""
        return DataLoader(
            list(samples),  # type: ignore[arg-type]
            batch_size=self.samples,
            shuffle=True,
            collate_fn=pad,
            pin_memory=stage.device.type == "cuda",
        )


def pad(samples: Sequence[Sample]) -> Sample:
    """Pad samples on the right to the longest, with an attention mask."""
    return collate(samples, pad_id=0)


def liger_obstacle(device: torch.device) -> str | None:
    """Return why Liger Kernel cannot be used; None if it can."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "it is not installed"
    return None if device.type == "cuda" else "it needs a GPU"
