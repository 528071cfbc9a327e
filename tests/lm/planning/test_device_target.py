"""The target of a plan knows which GPUs compute in bf16."""

from typing import Any

import pytest

from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.planning.device_target import WITH_FP8, WITHOUT_BF16, PlanTarget, resolve_target
from bigbatch.memory.limit import GPU_GIB


def target_of(**settings: Any) -> PlanTarget:
    return resolve_target(TrainConfig(**settings).resolved())


@pytest.mark.parametrize(
    ("gpu", "precision"),
    [
        ("t4", "fp16"),
        ("Tesla V100-SXM2-32GB", "fp16"),
        ("v100", "fp16"),
        ("NVIDIA A100-SXM4-80GB", "bf16"),
        ("4090", "bf16"),
    ],
)
def test_auto_precision_follows_gpu(gpu: str, precision: str) -> None:
    target = target_of(gpu=gpu)
    assert target.device_spec.precision == precision
    assert target.name.endswith(f", {precision}")
    assert target.computes_bf16 == (precision == "bf16")


def test_gpus_without_bf16_are_known() -> None:
    assert set(GPU_GIB) > WITHOUT_BF16


@pytest.mark.parametrize("precision", ["bf16", "bf16-weights"])
def test_emulated_bf16_is_reported(precision: str) -> None:
    note = "v100-16gb only emulates bf16, which is slow: use --precision fp16 or float32."
    assert note in target_of(gpu="v100", precision=precision).notes
    assert not [line for line in target_of(gpu="l4", precision=precision).notes if "emulates" in line]
    assert note not in target_of(gpu="v100", precision="float32").notes


def test_memory_alone_assumes_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert target_of(device="cuda", memory="24GiB").device_spec.precision == "bf16"


def test_fp8_is_planned_for_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigbatch.lm.planning.device_target.torchao_obstacle", lambda: None)
    assert set(GPU_GIB) > WITH_FP8
    for gpu in GPU_GIB:
        if gpu in WITH_FP8:
            target = target_of(gpu=gpu, precision="fp8")
            assert target.name == f"{gpu}, fp8"
            assert "fp8: not the update of bf16, and one whose rounding depends on the micro-batch" in target.notes
        else:
            with pytest.raises(InputError) as caught:
                target_of(gpu=gpu, precision="fp8")
            assert str(caught.value) == (
                "--precision fp8 needs a GPU of NVIDIA with products in float8 (Ada, Hopper or Blackwell), and "
                f"{gpu} has none: use --precision bf16."
            )


def test_plan_in_fp8_needs_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        target_of(gpu="h100", precision="fp8")
    assert str(caught.value) == ('--precision fp8 needs torchao, which is not installed: pip install "bigbatch[fp8]".')
