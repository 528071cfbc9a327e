"""Base class of the tools that bigbatch is compared with."""

import importlib.util
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
    """Takes the update of a stage.

    Attributes:
        notes: What a reader of its row should know.
    """

    notes: list[str]

    def turn(self, stage: SharedModel, meter: Meter) -> None:
        """Warm up, then take one whole update from the first weights, between ``meter.start`` and ``meter.stop``."""


class Peer(ABC):
    """A contestant that takes a fixed number of samples at a time, whatever their length.

    Args:
        samples: Of a micro-batch.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.notes: list[str] = []

    def turn(self, stage: SharedModel, meter: Meter) -> None:
        """Warm up with the longest sequences, so that the memory is there, then take the whole update."""
        longest = sorted(stage.samples, key=lambda sample: -len(sample["input_ids"]))
        self.update(stage, longest[: max(WARM_SAMPLES, self.samples)], NoMeter())
        stage.restore_model()
        self.update(stage, stage.samples, meter)

    @abstractmethod
    def update(self, stage: SharedModel, samples: Sequence[Sample], meter: Meter) -> None:
        """Take one update of the stage's model, by its optimizer, on some samples."""

    def num_microbatches(self, samples: Sequence[Sample]) -> int:
        """Count the micro-batches of some samples."""
        return -(-len(samples) // self.samples)

    def loader(self, stage: SharedModel, samples: Sequence[Sample]) -> "DataLoader[Any]":
        """Make the loader of a training script."""
        return DataLoader(
            list(samples),  # type: ignore[arg-type]
            batch_size=self.samples,
            shuffle=True,
            collate_fn=pad,
            pin_memory=stage.device.type == "cuda",
        )


def pad(samples: Sequence[Sample]) -> Sample:
    """Pad on the right to the longest; the attention mask says where."""
    return collate(samples, pad_id=0)


def liger_runs(device: torch.device) -> str | None:
    """Say why Liger Kernel cannot be used; None if it can."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "it is not installed"
    return None if device.type == "cuda" else "it needs a GPU"
