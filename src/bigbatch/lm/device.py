"""Resolve the names of a device and a precision to torch objects, or raise one readable error."""

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from bigbatch.errors import InputError

TENSOR_CORES = (7, 0)  # compute capability from which fp16 is faster than float32: V100, T4
FP8_CORES = (8, 9)  # from which tensor cores multiply in float8: L4, RTX 4090, H100


@dataclass(frozen=True)
class DeviceSpec:
    """A device and a precision.

    Attributes:
        device: Device of the model and the micro-batches.
        precision: float32, float64, bf16, bf16-weights, fp16 or fp8.
    """

    device: torch.device
    precision: str

    @property
    def is_half_precision(self) -> bool:
        """Whether matrix products are computed in 16 bits or fewer."""
        return self.precision in ("bf16", "bf16-weights", "fp16", "fp8")

    @property
    def weights_dtype(self) -> torch.dtype:
        """Dtype of the parameters: float32 except for float64 and bf16-weights."""
        return {"float64": torch.float64, "bf16-weights": torch.bfloat16}.get(self.precision, torch.float32)

    @property
    def gathered_dtype(self) -> torch.dtype | None:
        """Dtype in which ranks gather sharded weights of decoder layers: that of autocast, on CUDA; None for theirs."""
        return torch.bfloat16 if self.precision == "bf16" and self.device.type == "cuda" else None

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context for forward and loss."""
        dtype = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def scaler(self) -> torch.amp.GradScaler | None:
        """Return a gradient scaler for float16; None for other precisions."""
        return torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None

    def limit_memory(self, limit_bytes: int) -> None:
        """Limit the memory of this process on a CUDA device; no effect on other devices."""
        if self.device.type == "cuda":
            total_bytes = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total_bytes), self.device)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
        return f"{name}, {self.precision}"


def resolve_device(device: str, precision: str, *, allows_fp16: bool = True) -> DeviceSpec:
    """Resolve ``auto`` and check that device and precision are available.

        auto    bf16 on CUDA devices that compute in it, fp16 on older ones with tensor cores, float32 elsewhere

    Args:
        device: auto, cpu, mps, cuda or cuda:N.
        precision: auto, or one of `DeviceSpec`.
        allows_fp16: False for models that are sharded over ranks, and for reproducible updates.

    Raises:
        InputError: The device is not available, or does not support the precision.
    """
    found = _find_device(device)
    if precision == "auto":
        precision = _fastest_precision(found, allows_fp16=allows_fp16)
    if precision == "float64" and found.type == "mps":
        raise InputError("--precision float64 is not supported on mps: use --device cpu or --precision float32.")
    if precision == "fp16" and not allows_fp16:  # with reproducible updates refused before
        raise InputError("--precision fp16 is not supported with --parallel fsdp or hsdp: use bf16 or float32.")
    if precision.startswith("bf16") and found.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise InputError(
            f"--precision {precision} is not supported on {torch.cuda.get_device_name(found)}: use fp16 or float32."
        )
    if precision == "fp8" and (why := fp8_obstacle(found)) is not None:
        raise InputError(f"--precision fp8 {why}")
    return DeviceSpec(found, precision)


def fp8_obstacle(device: torch.device) -> str | None:
    """Return why products in float8 are not possible on a device, as the end of a sentence; None if they are."""
    if device.type != "cuda":
        return f"needs a GPU of NVIDIA, and this run is on {device}: use --precision bf16 or float32."
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        return f"has not been tested on {name}: use --precision bf16."
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CORES:
        return (
            f"needs compute capability {FP8_CORES[0]}.{FP8_CORES[1]} or later, and {name} has "
            f"{capability[0]}.{capability[1]}: use --precision bf16."
        )
    return torchao_obstacle()


def torchao_obstacle() -> str | None:
    """Return that torchao is not installed, as the end of a sentence; None if it is."""
    if importlib.util.find_spec("torchao") is None:
        return 'needs torchao, which is not installed: pip install "bigbatch[fp8]".'
    return None


def check_gpu(gpu: str | None, device: torch.device) -> None:
    """Check that ``--gpu`` is given for a CUDA device only.

    Raises:
        InputError: It is given for another one.
    """
    if gpu is not None and device.type != "cuda":
        raise InputError(f"--gpu {gpu} needs a CUDA device, and this run is on {device}. Pass --memory.")


def computes_bf16(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16 itself; False for a CUDA device that only emulates it."""
    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _fastest_precision(device: torch.device, *, allows_fp16: bool) -> str:
    if device.type != "cuda":
        return "float32"
    if computes_bf16(device):
        return "bf16"
    has_tensor_cores = torch.cuda.get_device_capability(device) >= TENSOR_CORES
    return "fp16" if has_tensor_cores and allows_fp16 else "float32"


def _find_device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps is not available: torch finds no Apple GPU; use --device cpu.")
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        why = "this build of torch has no CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise InputError(f"--device {name} is not available: {why}; use --device cpu.")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise InputError(f"--device {name} is not available: the last one is cuda:{torch.cuda.device_count() - 1}.")
    return torch.device("cuda", index)
