"""Rules between the precision of a run, in 8 bits, and its other settings. No torch here."""

from __future__ import annotations

from pydantic_core import PydanticCustomError

from bigbatch.lm.config.train_fields import TrainFields


def check_fp8(config: TrainFields) -> None:
    """Refuse the settings that products in float8 exclude.

    Raises:
        PydanticCustomError: There is such a setting.
    """
    if config.reproducible:
        raise _refusal("reproducible", "excludes {second}: its rounding depends on what is computed together: use bf16")
    if config.objective != "sft":
        raise _refusal("objective", f"is not supported with {{second}} {config.objective}: use bf16")
    if config.quantize is not None:
        raise _refusal("quantize", "is not supported with {second}, whose weights are multiplied in 16 bits: use bf16")
    if config.parallel != "ddp":
        raise _refusal("parallel", f"is not supported with {{second}} {config.parallel}: use {{second}} ddp, or bf16")
    if config.offload not in ("none", "optimizer"):
        why = f"is not supported with {{second}} {config.offload}: its layers read float32 weights on the device"
        raise _refusal("offload", why + ": use {second} none or optimizer")


def _refusal(setting: str, why: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported", "{first} fp8 " + why, {"first": "precision", "second": setting})


def check_8bit(config: TrainFields) -> None:
    """Refuse the settings that AdamW with 8-bit moments excludes.

    Raises:
        PydanticCustomError: There is such a setting.
    """
    names = {"first": "optimizer", "second": "precision", "third": "parallel"}
    if config.precision == "float64":
        raise PydanticCustomError(
            "idle", "{first} adamw-8bit computes in float32, not in {second} float64: use adamw", names
        )
    if config.parallel != "ddp":
        raise PydanticCustomError(
            "sharded", "{first} adamw-8bit needs whole tensors, which {third} fsdp and hsdp shard: use ddp", names
        )
