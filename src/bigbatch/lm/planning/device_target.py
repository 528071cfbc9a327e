"""Target of a plan: a device of this machine or a GPU elsewhere, and its memory."""

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
    """Device and memory of a planned run.

    Attributes:
        name: Device and precision, for display.
        device: Device of the run; it need not exist on this machine.
        device_spec: Device on which the step is predicted, and precision of the run.
        budget: The memory; None if unknown.
        is_local: Whether the run can start on this machine.
    """

    name: str
    device: torch.device
    device_spec: DeviceSpec
    budget: MemoryBudget | None
    is_local: bool

    @property
    def notes(self) -> list[str]:
        """Return what a user would not expect of the estimates."""
        if self.device.type == self.device_spec.device.type:
            return []
        why = "No CUDA build of PyTorch" if torch.version.cuda is None else "No CUDA device found"
        return [f"{why}: estimated from CPU kernels with CUDA's allocation rounding."]


def resolve_target(config: TrainConfig) -> PlanTarget:
    """Return the target of a plan: a GPU by name, a device of this machine, or a CUDA device elsewhere.

    Raises:
        InputError: The requested memory is more than the device has or a share of an unknown amount, the memory is
            unknown but determines the micro-batch, or --gpu is combined with a device that is not CUDA.
    """
    if config.gpu is not None and not config.device.startswith(("auto", "cuda")):
        raise InputError(f"--gpu {config.gpu} and --device {config.device} exclude each other: pass one of them.")
    elsewhere = config.gpu is not None or (config.device.startswith("cuda") and not torch.cuda.is_available())
    try:
        return _elsewhere(config) if elsewhere else _here(config)
    except InputError:
        raise
    except ValueError as error:  # its message begins with the name of the flag
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
            f"--device {config.device} is not in this machine, so its memory is unknown. Pass a GPU, such as --gpu "
            "h100, or an amount, such as --memory 24GiB, or pass --microbatch or --token-budget."
        )
    return PlanTarget(f"{config.gpu or 'a CUDA device'}, {device_spec.precision}", device, device_spec, budget, False)
