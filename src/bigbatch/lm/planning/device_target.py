"""What a run is planned for: a device of this machine, or a card that is somewhere else, and its memory."""

from dataclasses import dataclass

import torch

from bigbatch.autotune.fake_tensors import proxy_device
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec, resolve_device
from bigbatch.memory.limit import describe_bytes, gpu_limit, parse_memory
from bigbatch.memory.usage import MemoryBudget, resolve_memory_budget


@dataclass(frozen=True)
class PlanTarget:
    """What is planned for.

    Attributes:
        name: Of the device, with the precision.
        device: Its kind; it need not be here.
        device_spec: Where the step is rehearsed, and in which precision it is to run.
        budget: The memory; None where it is not known.
        is_local: Whether the run could begin on this machine.
    """

    name: str
    device: torch.device
    device_spec: DeviceSpec
    budget: MemoryBudget | None
    is_local: bool

    @property
    def notes(self) -> list[str]:
        """What is behind the figures that a user would not expect."""
        if self.device.type == self.device_spec.device.type:
            return []
        why = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
        return [f"torch {why} here: memory is that of the CPU's operations, counted as CUDA counts"]


def resolve_target(config: TrainConfig) -> PlanTarget:
    """Find what a plan is for: a card by its name, a device of this machine, or a CUDA device that is not here.

    Raises:
        InputError: The memory that is asked for is more than there is, a share of what is not known, or not known where
            the micro-batch depends on it; or a card is named beside another device.
    """
    if config.gpu is not None and not config.device.startswith(("auto", "cuda")):
        raise InputError(f"--gpu {config.gpu} and --device {config.device} exclude each other: give one of them.")
    elsewhere = config.gpu is not None or (config.device.startswith("cuda") and not torch.cuda.is_available())
    try:
        return _elsewhere(config) if elsewhere else _here(config)
    except InputError:
        raise
    except ValueError as error:  # about the memory, which it calls by the name of the flag
        raise InputError(f"--{error}") from error


def _here(config: TrainConfig) -> PlanTarget:
    device_spec = resolve_device(config.device, config.precision)
    return PlanTarget(
        str(device_spec),
        device_spec.device,
        device_spec,
        resolve_memory_budget(config.memory, device_spec.device, ()),
        True,
    )


def _elsewhere(config: TrainConfig) -> PlanTarget:
    device = torch.device("cuda")
    device_spec = DeviceSpec(proxy_device(device), "bf16" if config.precision == "auto" else config.precision)
    budget = None
    if config.gpu is not None:
        limit_bytes = gpu_limit(config.gpu)
        budget = MemoryBudget.from_limit(
            limit_bytes, f"the {describe_bytes(limit_bytes)} that are usually free on {config.gpu}"
        )
    elif config.memory is not None:
        budget = MemoryBudget.from_limit(parse_memory(config.memory).to_bytes(), config.memory)
    elif config.microbatch == "auto":
        raise InputError(
            f"--device {config.device} is not here, so its memory is not known: name a card, such as --gpu h100, or an "
            "amount, such as --memory 24GiB, or give --microbatch or --token-budget."
        )
    return PlanTarget(f"{config.gpu or 'a CUDA device'}, {device_spec.precision}", device, device_spec, budget, False)
