"""The load-balancing loss of mixtures of experts on CUDA: its gradient, compiled and packed layers, whole runs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bigbatch.cli import main
from bigbatch.lm.model.setup import ModelSetup
from bigbatch.lm.training.engine_factory import make_engine
from bigbatch.lm.training.window_routing import run_update
from bigbatch.verification.tolerances import TOLERANCES
from support.expert_models import (
    expert_model,
    expert_samples,
    gradients,
    relative_error,
    save_expert_folder,
    set_up,
    whole_batch,
)
from support.language_models import metrics, records, write_jsonl

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # of compilers
COEFFICIENT = 0.5
TRANSFORMERS = 1e-7  # its function computes in float32
SAMPLES = expert_samples()
FAMILIES = ["mixtral", "qwen2", "gpt-oss"]


def model_on_gpu(family: str, **settings: Any) -> Any:
    return expert_model(family, **settings).to("cuda")


def gradient_of(model_setup: ModelSetup, microbatch: int) -> dict[str, torch.Tensor]:
    """Return the gradient of one update, whose learning rate is 0."""
    found: dict[str, torch.Tensor] = {}
    optimizer = torch.optim.SGD(model_setup.model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: found.update(gradients(model_setup.model)))
    run_update(make_engine(model_setup, optimizer, microbatch=microbatch), model_setup, SAMPLES)
    return found


@pytest.mark.parametrize("microbatch", [1, 5, len(SAMPLES)])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_that_of_transformers(family: str, microbatch: int) -> None:
    model = model_on_gpu(family)
    expected, _ = whole_batch(model, SAMPLES, COEFFICIENT)
    assert relative_error(gradient_of(set_up(model), microbatch), expected) <= TRANSFORMERS


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_cuts_have_the_same_gradient(family: str) -> None:
    model = model_on_gpu(family, dtype=torch.float32)
    whole = gradient_of(set_up(model, "float32"), len(SAMPLES))
    assert relative_error(gradient_of(set_up(model, "float32"), 3), whole) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize(("family", "precision"), [("mixtral", "float32"), ("qwen2", "bf16"), ("gpt-oss", "bf16")])
def test_default_run_trains(family: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_expert_folder(tmp_path / "experts", family)
    write_jsonl(tmp_path / "data.jsonl", records(40))
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", "data.jsonl", "--steps", "3", "--global-batch", "8", "--lr", "0.01"]
    assert main(["train", "--model", "experts", *arguments, "--precision", precision, "--out", "run"]) == 0
    found = [row["router_aux_loss"] for row in metrics(tmp_path / "run") if "router_aux_loss" in row]
    assert len(found) == 3
    assert all(value > 0 for value in found)
