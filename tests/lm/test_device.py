"""Unavailable devices and precisions are reported in one sentence."""

from contextlib import nullcontext

import pytest
import torch

from bigbatch.errors import InputError
from bigbatch.lm.device import computes_bf16, resolve_device


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


@pytest.mark.parametrize(
    ("capability", "is_sharded", "precision"),
    [
        ((9, 0), False, "bf16"),  # H100
        ((8, 0), True, "bf16"),  # A100
        ((7, 5), False, "fp16"),  # T4
        ((7, 0), False, "fp16"),  # V100
        ((7, 0), True, "float32"),  # no gradient scaler for sharded models
        ((6, 1), False, "float32"),  # its fp16 is slower than float32
    ],
)
def test_auto_precision_follows_card(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], is_sharded: bool, precision: str
) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation or capability[0] >= 8  # as torch answers on these cards

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert resolve_device("cuda:1", "auto", is_sharded=is_sharded).precision == precision
    assert computes_bf16(torch.device("cuda", 1)) == (capability[0] >= 8)


def test_float16_of_sharded_model_is_rejected() -> None:
    with pytest.raises(InputError) as caught:
        resolve_device("cpu", "fp16", is_sharded=True)
    assert str(caught.value) == ("--precision fp16 is not supported with --parallel fsdp or hsdp: use bf16 or float32.")
