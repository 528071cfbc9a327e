"""Unavailable devices and precisions are reported in one sentence."""

import pytest
import torch

from bigbatch.errors import InputError
from bigbatch.lm.device import resolve_device


def test_cpu_uses_float32_by_default() -> None:
    machine = resolve_device("cpu", "auto")
    assert (machine.device.type, machine.precision, machine.weights_dtype) == ("cpu", "float32", torch.float32)
    assert machine.scaler() is None
    assert str(machine) == "cpu, float32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_missing_gpu_is_named_with_reason(device: str) -> None:
    with pytest.raises(InputError, match=rf"^--device {device} is not available: .*CUDA.*; use --device cpu\.$"):
        resolve_device(device, "auto")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="needs a machine without an Apple GPU")
def test_missing_apple_gpu_is_named() -> None:
    with pytest.raises(InputError, match="--device mps is not available: torch finds no Apple GPU"):
        resolve_device("mps", "float32")


def test_float16_has_scaler_and_autocast() -> None:
    machine = resolve_device("cpu", "fp16")
    assert machine.scaler() is not None
    with machine.autocast():
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
