"""The arithmetic in which a trainer's loss is probed: float32 if the model and its memory allow it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import nn

from bigbatch.errors import InputError
from bigbatch.integrations.transformers.traceless import bare_model, modules_of, traceless, without_autocast
from bigbatch.integrations.transformers.unit_decision import Inconclusive
from bigbatch.integrations.transformers.unit_probe import ComputeLoss, LossProbe
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory

T = TypeVar("T")

MAX_UPCAST = 1_000_000_000  # parameters whose float32 copies are made, 4 GB
SHARE_OF_FREE = 0.5  # of the free memory of a device that the copies may need


class Precision(Enum):
    """Arithmetic of a probe.

    Attributes:
        FLOAT32: Parameters in half precision are copied to float32 for its duration; without autocast.
        OWN: In the dtype of the parameters, without autocast.
        AUTOCAST: As in training.
    """

    FLOAT32 = "float32"
    OWN = "own"
    AUTOCAST = "autocast"


def precisions_for(trainer: Any) -> list[Precision]:
    """Return what can be tried for a trainer, the most precise first."""
    found = [Precision.FLOAT32] if _can_upcast(trainer) else []
    found.append(Precision.OWN)
    if "_original_forward" in vars(bare_model(trainer)):
        found.append(Precision.AUTOCAST)
    return found


@contextmanager
def in_precision(trainer: Any, precision: Precision) -> Iterator[None]:
    """Run the models of a trainer in a precision; call inside `traceless`, which restores the parameters."""
    if precision is Precision.AUTOCAST:
        yield
        return
    with without_autocast(bare_model(trainer)):
        if precision is Precision.FLOAT32:
            for module in modules_of(trainer):
                if not isinstance(module, nn.parallel.DistributedDataParallel):
                    module.float()
        yield


def run_precisely(trainer: Any, compute_loss: ComputeLoss, function: Callable[[LossProbe], T]) -> T:
    """Return a function of a probe of a trainer's loss, in the most precise arithmetic that the model runs in.

    Args:
        trainer: Nothing is changed on it.
        compute_loss: Its loss.
        function: Called inside `traceless`, once for each precision that fails.
    """
    precisions = precisions_for(trainer)
    for number, precision in enumerate(precisions, 1):
        try:
            with traceless(trainer, compute_loss) as model, in_precision(trainer, precision):
                is_rounded = precision is Precision.AUTOCAST
                return function(LossProbe(trainer, model, compute_loss, autocast=is_rounded))
        except (InputError, Inconclusive):
            raise
        except Exception as error:  # kernels such as flash attention need half precision
            is_last = number == len(precisions)
            if is_last or (is_out_of_memory(error) and precision is not Precision.FLOAT32):
                raise
        free_cached_memory()
    raise AssertionError("the last precision returns or raises")


def _can_upcast(trainer: Any) -> bool:
    """Return whether parameters are in half precision, whole, not quantized, and fit in memory once more."""
    parameters = {p for module in modules_of(trainer) for p in module.parameters()}
    half = [p for p in parameters if p.dtype in (torch.bfloat16, torch.float16)]
    if not half or any(not p.is_floating_point() or hasattr(p, "device_mesh") for p in parameters):
        return False
    num_elements = sum(p.numel() for p in half)
    devices = {p.device for p in half}
    for device in devices:
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            if 4 * num_elements > SHARE_OF_FREE * free:
                return False
    return num_elements <= MAX_UPCAST
