"""Unavailable devices and precisions are reported in one sentence."""

from contextlib import nullcontext

import pytest
import torch

from bigbatch.errors import InputError
from bigbatch.lm.device import DeviceSpec, computes_bf16, fp8_obstacle, resolve_device


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
    ("capability", "allows_fp16", "precision"),
    [
        ((9, 0), True, "bf16"),  # H100
        ((8, 0), False, "bf16"),  # A100
        ((7, 5), True, "fp16"),  # T4
        ((7, 0), True, "fp16"),  # V100
        ((7, 0), False, "float32"),  # no gradient scaler for sharded models and reproducible updates
        ((6, 1), True, "float32"),  # its fp16 is slower than float32
    ],
)
def test_auto_precision_follows_card(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], allows_fp16: bool, precision: str
) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation or capability[0] >= 8  # as torch answers on these cards

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert resolve_device("cuda:1", "auto", allows_fp16=allows_fp16).precision == precision
    assert computes_bf16(torch.device("cuda", 1)) == (capability[0] >= 8)


def test_float16_of_sharded_model_is_rejected() -> None:
    with pytest.raises(InputError) as caught:
        resolve_device("cpu", "fp16", allows_fp16=False)
    assert str(caught.value) == ("--precision fp16 is not supported with --parallel fsdp or hsdp: use bf16 or float32.")


def test_fp8_is_refused_without_gpu() -> None:
    with pytest.raises(InputError) as caught:
        resolve_device("cpu", "fp8")
    assert str(caught.value) == (
        "--precision fp8 needs a GPU of NVIDIA, and this run is on cpu: use --precision bf16 or float32."
    )


@pytest.mark.parametrize(
    ("capability", "is_amd", "has_torchao", "obstacle"),
    [
        ((8, 0), False, True, "needs compute capability 8.9 or later, and A card has 8.0: use --precision bf16."),
        ((8, 9), False, False, 'needs torchao, which is not installed: pip install "bigbatch[fp8]".'),
        ((9, 4), True, True, "has not been tested on A card: use --precision bf16."),
        ((8, 9), False, True, None),
        ((10, 0), False, True, None),
    ],
)
def test_fp8_needs_card_and_torchao(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], is_amd: bool, has_torchao: bool, obstacle: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", "7.0" if is_amd else None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if has_torchao else None)
    assert fp8_obstacle(torch.device("cuda", 0)) == obstacle


def test_fp8_computes_the_rest_in_bf16() -> None:
    machine = DeviceSpec(torch.device("cpu"), "fp8")
    assert machine.is_half_precision
    assert machine.weights_dtype == torch.float32
    assert machine.scaler() is None
    with machine.autocast():
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
