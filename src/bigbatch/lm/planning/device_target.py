"""Target of a plan: a device of this machine or a GPU elsewhere, and its memory."""

from dataclasses import dataclass

import torch

from bigbatch.autotune.fake_tensors import proxy_device
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec, computes_bf16, resolve_device, torchao_obstacle
from bigbatch.memory.limit import describe_bytes, gpu_limit, parse_memory
from bigbatch.memory.usage import MemoryBudget, resolve_memory_budget

WITH_FP8 = frozenset(["h100", "h100-nvl", "h200", "b200", "l4", "l40s", "rtx-4080", "rtx-4090", "rtx-5090"])
WITHOUT_BF16 = frozenset(["t4", "v100-16gb", "v100-32gb"])  # before Ampere: training chooses fp16 there


@dataclass(frozen=True)
class PlanTarget:
    """Device and memory of a planned run.

    Attributes:
        name: Device and precision, for display.
        device: Device of the run; it need not exist on this machine.
        device_spec: Device on which the step is predicted, and precision of the run.
        budget: The memory; None if unknown.
        is_local: Whether the run can start on this machine.
        computes_bf16: Whether the device computes in bfloat16 itself and does not emulate it.
    """

    name: str
    device: torch.device
    device_spec: DeviceSpec
    budget: MemoryBudget | None
    is_local: bool
    computes_bf16: bool = True

    @property
    def notes(self) -> list[str]:
        """Return what a user would not expect of the estimates."""
        notes = []
        if self.device.type != self.device_spec.device.type:
            why = "No CUDA build of PyTorch" if torch.version.cuda is None else "No CUDA device found"
            notes.append(f"{why}: estimated from CPU kernels with CUDA's allocation rounding.")
        if self.device_spec.precision == "fp8":
            notes.append("fp8: not the update of bf16, and one whose rounding depends on the micro-batch")
        if not self.computes_bf16 and self.device_spec.precision.startswith("bf16"):
            notes.append(
                f"{self.name.partition(',')[0]} only emulates bf16, which is slow: use --precision fp16 or float32."
            )
        return notes


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
    device_spec = resolve_device(config.device, config.precision, allows_fp16=not config.reproducible)
    return PlanTarget(
        str(device_spec),
        device_spec.device,
        device_spec,
        resolve_memory_budget(config.memory, device_spec.device, ()),
        True,
        computes_bf16(device_spec.device),
    )


def _elsewhere(config: TrainConfig) -> PlanTarget:
    device = torch.device("cuda")
    if config.precision == "fp8":
        _check_fp8(config.gpu)
    with_bf16 = config.gpu not in WITHOUT_BF16
    fastest = "bf16" if with_bf16 else "float32" if config.reproducible else "fp16"
    device_spec = DeviceSpec(proxy_device(device), fastest if config.precision == "auto" else config.precision)
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
    name = f"{config.gpu or 'a CUDA device'}, {device_spec.precision}"
    return PlanTarget(name, device, device_spec, budget, False, with_bf16)


def _check_fp8(gpu: str | None) -> None:
    if gpu is not None and gpu not in WITH_FP8:
        raise InputError(
            f"--precision fp8 needs a GPU of NVIDIA with products in float8 (Ada, Hopper or Blackwell), and {gpu} has "
            "none: use --precision bf16."
        )
    if (why := torchao_obstacle()) is not None:
        raise InputError(f"--precision fp8 {why}")
