"""``--scale-from`` and ``--lr-rule``: told, applied when a run begins, and once in its life."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

from bigbatch.cli import main
from bigbatch.errors import InputError
from bigbatch.lm.checkpoint.run_checkpoint import load
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.training.optimizer import make_optimizer
from bigbatch.lm.training.setup import set_up_training
from bigbatch.lm.training.trainer import Trainer
from bigbatch.scaling.rules import RULES
from support.language_models import RecordingCallback, metrics, records, save_model_folder, write_jsonl


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the data and the model; nothing is held out, so that no update is validated."""
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "data": str(write_jsonl(folder / "data.jsonl", records(40))),
        "model": str(save_model_folder(folder / "base")),
        "validation_fraction": 0.0,
    }


@pytest.fixture
def settings(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        **inputs,
        "device": "cpu",
        "global_batch": 8,
        "microbatch": 4,
        "steps": 4,
        "lr": 1e-2,
        "max_length": 32,
        "warmup_steps": 1,
        "checkpoint_every": 2,
    }


def go_on(run: Path, config: TrainConfig, *, until: int | None = None) -> tuple[Trainer, RecordingCallback]:
    """Begin or resume a run, and stop after an update."""
    recorder = RecordingCallback()
    prepared = set_up_training(config)
    if not run.exists():
        RunDirectory.create(run, prepared.config.model_dump(mode="json"))
    trainer = Trainer(prepared, checkpoint=load(run)[0])
    trainer.run(RunDirectory(run), callback=recorder, should_stop=lambda: recorder.rows[-1]["step"] == until)
    return trainer, recorder


def hyperparameters(trainer: Trainer) -> list[Any]:
    return [[g["initial_lr"], *g["betas"], g["eps"]] for g in trainer.optimizer.param_groups]


def tensors(trainer: Trainer) -> list[torch.Tensor]:
    states = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    return [*trainer.setup.model.parameters(), *states]


RULED = {
    "none": [1e-2, 0.9, 0.95, 1e-8],
    "linear": [4e-2, 0.9, 0.95, 1e-8],
    "sqrt": [2e-2, 0.9, 0.95, 1e-8],
    "sde": [2e-2, 0.6, 0.8, 5e-9],
    "half-life": [1e-2, 0.9, 0.95**4, 1e-8],
    "sqrt+half-life": [2e-2, 0.9, 0.95**4, 1e-8],
}


@pytest.mark.parametrize("rule", RULED)
def test_run_starts_with_values_of_its_rule(settings: dict[str, Any], rule: str) -> None:
    trainer = Trainer(set_up_training(TrainConfig(**settings, scale_from=2, lr_rule=rule)))
    assert hyperparameters(trainer) == [pytest.approx(RULED[rule])] * 2
    assert trainer.scheduler.base_lrs == pytest.approx([RULED[rule][0]] * 2)


def test_run_without_rule_is_bit_identical(tmp_path: Path, settings: dict[str, Any]) -> None:
    plain, told = (
        go_on(tmp_path / name, TrainConfig(**settings, **more))[0]
        for name, more in (("plain", {}), ("told", {"scale_from": 2}))
    )
    assert all(map(torch.equal, tensors(plain), tensors(told)))


def test_rate_of_every_update_is_scaled(tmp_path: Path, settings: dict[str, Any]) -> None:
    plain, scaled = (
        [row["lr"] for row in go_on(tmp_path / name, TrainConfig(**settings, **more))[1].rows]
        for name, more in (("plain", {}), ("scaled", {"scale_from": 2, "lr_rule": "sqrt"}))
    )
    assert scaled == pytest.approx([2 * lr for lr in plain])


@pytest.mark.parametrize("rule", ["sde", "sqrt+half-life"])
def test_resumed_run_is_not_rescaled(tmp_path: Path, settings: dict[str, Any], rule: str) -> None:
    config = TrainConfig(**settings, precision="float64", scale_from=2, lr_rule=rule)
    whole, _ = go_on(tmp_path / "whole", config)
    go_on(tmp_path / "parts", config, until=2)
    parts, recorder = go_on(tmp_path / "parts", config)
    assert [row["step"] for row in recorder.rows] == [3, 4]
    assert hyperparameters(parts) == [pytest.approx(RULED[rule])] * 2
    assert [tuple(h) for h in hyperparameters(parts)] == [tuple(h) for h in hyperparameters(whole)]
    assert all(map(torch.equal, tensors(parts), tensors(whole)))
    assert [row["lr"] for row in metrics(tmp_path / "parts")] == [row["lr"] for row in metrics(tmp_path / "whole")]


def test_restart_without_checkpoint_is_rescaled(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = TrainConfig(**settings, scale_from=2, lr_rule="sde")
    whole, _ = go_on(tmp_path / "run", config)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    again, _ = go_on(tmp_path / "run", config)
    assert all(map(torch.equal, tensors(again), tensors(whole)))


def test_settings_are_saved_in_config_json(tmp_path: Path, settings: dict[str, Any]) -> None:
    go_on(tmp_path / "run", TrainConfig(**settings, scale_from=2, lr_rule="sqrt"))
    written = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert (written["scale_from"], written["lr_rule"], written["lr"]) == (2, "sqrt", 1e-2)
    assert TrainConfig.model_validate(written).lr_rule == "sqrt"


def test_command_reports_and_applies_rescaling(tmp_path: Path, settings: dict[str, Any], capfd: Any) -> None:
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["train", *words, "--out", str(tmp_path / "told"), "--scale-from", "2"]) == 0
    printed = capfd.readouterr().out
    assert "tuned at a global batch of 2 sequences, now 8: k = 4; not applied unless selected by --lr-rule\n" in printed
    assert "\n  sde             lr 0.01 → 0.02: " in printed
    assert "learning rate 0.01, cosine decay, 1 warm-up update\n" in printed
    run = tmp_path / "ruled"
    assert main(["train", *words, "--out", str(run), "--scale-from", "2", "--lr-rule", "sqrt"]) == 0
    printed = capfd.readouterr().out
    assert "k = 4; --lr-rule sqrt changes\n  sqrt            lr 0.01 → 0.02: gradients are divided" in printed
    assert "(Malladi et al. 2022, arXiv 2205.10287)\n" in printed
    assert "learning rate 0.02, cosine decay, 1 warm-up update\n" in printed
    assert max(row["lr"] for row in metrics(run)) == pytest.approx(0.02)


def resolved(**given: Any) -> TrainConfig:
    return TrainConfig(**given).resolved()


def test_token_batches_are_compared_in_tokens() -> None:
    lines = resolved(global_batch_tokens=4096, scale_from=1024).batch_scaling().lines()
    assert lines[0].startswith("tuned at a global batch of 1,024 tokens, now 4,096: k = 4;")


def test_unsupported_rule_is_reported_with_alternatives() -> None:
    lines = resolved(scale_from=2).batch_scaling().lines()
    assert "  sde             not applicable at this k: beta1 would be -0.6, below 0" in lines
    assert sum("→" in line for line in lines) == 4


def test_sgd_rule_is_applied_with_warning() -> None:
    assert "warning: derived for SGD; AdamW" in resolved(scale_from=8, lr_rule="linear").batch_scaling().lines()[1]
    lines = resolved(scale_from=32, lr_rule="linear").batch_scaling().lines()
    assert lines[1].endswith("no change: the batch is the same")
    assert resolved().batch_scaling().lines() == []


@pytest.mark.parametrize("scale_from", [1, 8, 39])
def test_nearest_batch_works_and_next_fails(scale_from: int) -> None:
    given = {"global_batch": 397, "lr_rule": "sde"}
    with pytest.raises(ValidationError, match="the nearest scale_from that works is 40"):
        TrainConfig(**given, scale_from=scale_from)
    assert TrainConfig(**given, scale_from=40).scale_from == 40


def test_larger_batch_at_tuning_is_in_range() -> None:
    assert resolved(global_batch=1, scale_from=2**31 - 1, lr_rule="sde").batch_scaling().problem() is None


def test_unvalidated_configuration_is_rejected_when_applied(settings: dict[str, Any]) -> None:
    config = TrainConfig(**settings, scale_from=2, lr_rule="sde").model_copy(update={"global_batch": 800})
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(InputError, match="--lr-rule sde at 400 times the batch of --scale-from would make beta1"):
        config.batch_scaling().apply(optimizer)


def test_command_knows_every_applicable_rule() -> None:
    annotation = get_args(TrainConfig.model_fields["lr_rule"].annotation)
    assert set(annotation) == set(RULES) - {"adascale"}


def test_lines_describe_the_actual_optimizer(settings: dict[str, Any]) -> None:
    prepared = set_up_training(TrainConfig(**settings))
    optimizer = make_optimizer(prepared.model, prepared.config, prepared.device_spec)
    assert all((g["betas"], g["eps"]) == ((0.9, 0.95), 1e-8) for g in optimizer.param_groups)
    assert type(optimizer).__name__ == "AdamW"
