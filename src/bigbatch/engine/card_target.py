"""What ``offload="auto"`` knows about the card of an engine: its rates, and the memory of card and host."""

import gc
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bigbatch.engine.host_check import num_local_processes
from bigbatch.memory.limit import known_gpu
from bigbatch.memory.usage import bytes_on, resolve_memory_budget
from bigbatch.offload.cards import Card, card, card_of_size
from bigbatch.offload.host_memory import available_host_bytes
from bigbatch.offload.level_choice import LevelLimits
from bigbatch.offload.link_rate import measure_link_rate


@dataclass(frozen=True)
class CardTarget:
    """The card that a model is trained on.

    Attributes:
        device: Whose memory is predicted.
        card: Rates.
        limits: Memory that this process may use.
    """

    device: torch.device
    card: Card
    limits: LevelLimits


def is_card(device: torch.device) -> bool:
    """Return whether a device has memory of its own, and a link to that of the host."""
    return device.type == "cuda"


def describe_card(device: torch.device, memory: str | int | None, resident: Iterable[Tensor]) -> CardTarget:
    """Return what is known about a CUDA device of this machine; its link is measured.

    Args:
        device: Of the model.
        memory: As for `bigbatch.Engine`.
        resident: Tensors of the training that are allocated already.

    Raises:
        ValueError: ``memory`` is not an amount, or more than the device has.
    """
    resident = list(resident)
    budget = resolve_memory_budget(memory, device, resident)
    host_bytes = available_host_bytes(num_processes=num_local_processes())
    usable_bytes = max(0, budget.usable_bytes - _bytes_beside(resident, device))
    rates = local_card(device).with_link_rate(measure_link_rate(device))
    return CardTarget(device, rates, LevelLimits(usable_bytes, host_bytes))


def _bytes_beside(resident: Iterable[Tensor], device: torch.device) -> int:
    """Return the memory of tensors of this process that are not part of the training, such as another model."""
    gc.collect()
    return max(0, torch.cuda.memory_allocated(device) - bytes_on(resident, device))


def local_card(device: torch.device) -> Card:
    """Return the rates of a CUDA device of this machine; of an unknown one, those of the typical card of its size."""
    try:
        return card(known_gpu(torch.cuda.get_device_name(device)))
    except ValueError:  # not in the table
        return card_of_size(torch.cuda.get_device_properties(device).total_memory)
