"""Optimizers and schedules of a run: the update of a plain loop, resumed runs, and refused settings."""

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    MambaConfig,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from bigbatch.cli import main
from bigbatch.errors import InputError
from bigbatch.lm.config.optimizer_settings import SETTINGS
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.training.engine_factory import make_engine
from bigbatch.lm.training.lion import Lion
from bigbatch.lm.training.muon import MuonWithAdamW
from bigbatch.lm.training.optimizer import lr_factor, make_optimizer, optimizer_notes, split_for_muon
from bigbatch.lm.training.schedule import TrainingSchedule
from bigbatch.lm.training.setup import set_up_training
from bigbatch.lm.training.trainer import Trainer
from support.language_models import RecordingCallback, metrics, records, run, save_model_folder, write_jsonl
from support.run_comparison import differing_results
from support.tiers import slow, slow_except
from support.torchrun_ranks import Launch

LR, STEPS, DECAY = 1e-2, 10, 0.1
Update = Callable[[float], None]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "data": str(write_jsonl(tmp_path / "data.jsonl", records(40))),
        "model": str(save_model_folder(tmp_path / "base")),
        "global_batch": 12,
        "microbatch": 12,
        "steps": STEPS,
        "lr": LR,
        "max_length": 32,
        "precision": "float64",
        "validation_fraction": 0,
    }


def plain_update(name: str, model: nn.Module) -> Update:
    """Return an update by torch's optimizers, or by the formula of the paper, given the learning rate."""
    named = list(model.named_parameters())
    decayed, others = ([p for _, p in named if (p.ndim > 1) == wide] for wide in (True, False))
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    if name == "lion":
        return lion_by_formula(groups)
    optimizers: list[torch.optim.Optimizer]
    if name == "muon":
        outer = [p for n, p in named if "embed_tokens" in n or "lm_head" in n]
        inner = [p for n, p in named if p.ndim > 1 and "embed_tokens" not in n and "lm_head" not in n]
        muon = torch.optim.Muon(inner, lr=LR, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        groups = [{"params": outer, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
        optimizers = [muon, torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))]
    elif name == "adafactor":
        optimizers = [torch.optim.Adafactor(groups, lr=LR)]
    elif name == "sgd":
        optimizers = [torch.optim.SGD(groups, lr=LR, momentum=0.9)]
    else:
        optimizers = [torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))]

    def update(lr: float) -> None:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

    return update


def lion_by_formula(groups: list[dict[str, Any]]) -> Update:
    momenta: dict[nn.Parameter, torch.Tensor] = {}

    @torch.no_grad()
    def update(lr: float) -> None:
        for group in groups:
            for p in group["params"]:
                momentum = momenta.get(p, torch.zeros_like(p))
                direction = torch.sign(0.9 * momentum + 0.1 * p.grad)
                p.copy_(p - lr * (direction + group["weight_decay"] * p))
                momenta[p] = 0.99 * momentum + 0.01 * p.grad

    return update


def rate(schedule: str, step: int) -> float:
    """Return the learning rate of an update of 10 with 2 warm-up updates, from the definitions."""
    if step < 2:
        return LR * (step + 1) / 3
    done = (step - 2) / 7
    return (
        LR
        * {
            "cosine": 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)),
            "linear": 1 - 0.7 * done,
            "wsd": 1 - max(0, step - 5) / 5,
            "constant": 1.0,
        }[schedule]
    )


@pytest.mark.parametrize(
    ("name", "schedule", "more"),
    [
        slow("adamw", "linear", {"min_lr": 0.3 * LR}),
        ("adamw", "cosine", {}),
        ("muon", "wsd", {"decay_steps": 4}),
        slow("lion", "constant", {}),
        slow("adafactor", "cosine", {}),
        slow("sgd", "wsd", {"decay_steps": 4}),
    ],
)
def test_ten_updates_equal_those_of_plain_loop(
    tmp_path: Path, settings: dict[str, Any], name: str, schedule: str, more: dict[str, Any]
) -> None:
    settings |= {"optimizer": name, "schedule": schedule, "warmup_steps": 2, "weight_decay": DECAY, **more}
    setup = set_up_training(TrainConfig(device="cpu", **settings))
    update = plain_update(name, setup.model)
    gradient = make_engine(setup.model_setup, None, microbatch=12)
    for step, window in enumerate(TrainingSchedule(setup.config, setup.training.lengths).windows(0, 0)):
        gradient.backward([setup.training[index] for index in window])  # exact: tests/exactness
        torch.nn.utils.clip_grad_norm_(setup.model.parameters(), 1.0)
        update(rate(schedule, step))
        setup.model.zero_grad()
    trained, recorder, _ = run(tmp_path / "run", **settings)
    assert [row["lr"] for row in recorder.rows] == pytest.approx([rate(schedule, step) for step in range(STEPS)])
    for found, expected in zip(trained.model.parameters(), setup.model.parameters(), strict=True):
        assert (found - expected).norm() <= 1e-7 * expected.norm()  # Adam divides rounding by 1e-8


@pytest.mark.parametrize("name", slow_except(sorted(SETTINGS), "adamw", "adamw-8bit"))
def test_resumed_run_equals_uninterrupted(tmp_path: Path, settings: dict[str, Any], name: str) -> None:
    settings |= {"optimizer": name, "steps": 6, "checkpoint_every": 2, "deterministic": True}
    if name == "adamw-8bit":
        settings |= {"precision": "float32"}  # embeddings and head have 8-bit moments, the rest 32 bits
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items() if key != "deterministic"]
    assert main(["train", *flags, "--deterministic", "--device", "cpu", "--out", str(whole)]) == 0
    setup = set_up_training(TrainConfig(device="cpu", **settings | {"out": cut}))
    trainer = Trainer(setup)
    directory = RunDirectory.create(cut, setup.config.model_dump(mode="json"))
    directory.record_facts(trainer.initial_facts)
    updates = RecordingCallback()
    trainer.run(directory, callback=updates, should_stop=lambda: len(updates.rows) >= 3)
    assert len(metrics(cut)) == 3
    assert main(["resume", str(cut)]) == 0
    assert differing_results(cut, whole) == []


def test_muon_updates_matrices_of_layers(settings: dict[str, Any]) -> None:
    setup = set_up_training(TrainConfig(device="cpu", **settings | {"optimizer": "muon"}))
    matrices, others = split_for_muon(setup.model, list(setup.model.named_parameters()))
    assert all(p.ndim == 2 and ".layers." in name for name, p in matrices)
    assert {name.split(".")[-2] for name, p in others if p.ndim == 2} == {"embed_tokens", "lm_head"}
    assert optimizer_notes(setup.model, setup.config) == [
        "Muon updates 5,120 parameters in 14 matrices, AdamW the other "
        f"{sum(p.numel() for p in setup.model.parameters()) - 5120:,}"
    ]


@pytest.mark.parametrize(
    ("config", "others"),
    [
        (MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=64, state_size=4), {"embeddings", "A_log"}),
        (
            CohereConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
                use_qk_norm=True,
            ),
            {"embed_tokens", "q_norm", "k_norm"},
        ),
    ],
    ids=["mamba", "cohere"],
)  # fmt: skip
def test_muon_leaves_states_and_norms_to_adamw(config: Any, others: set[str]) -> None:
    model = AutoModelForCausalLM.from_config(config)
    matrices, rest = split_for_muon(model, list(model.named_parameters()))
    assert {name.removesuffix(".weight").split(".")[-1] for name, p in rest if p.ndim == 2} == others
    assert matrices
    assert all(name.endswith("proj.weight") for name, _ in matrices)


def test_named_parameters_have_no_weight_decay(settings: dict[str, Any]) -> None:
    setup = set_up_training(TrainConfig(device="cpu", **settings | {"no_weight_decay": "embed_tokens, lm_head"}))
    optimizer = make_optimizer(setup.model, setup.config, setup.device_spec)
    without = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    names = {name for name, p in setup.model.named_parameters() if id(p) in without and p.ndim > 1}
    assert names == {"model.embed_tokens.weight", "lm_head.weight"}


def test_unknown_name_without_weight_decay_is_rejected(settings: dict[str, Any]) -> None:
    setup = set_up_training(TrainConfig(device="cpu", **settings | {"no_weight_decay": "wte"}))
    with pytest.raises(
        InputError,
        match=r"--no-weight-decay wte: no trained parameter has 'wte' in its name, such as model.embed_tokens.weight\.",
    ):
        make_optimizer(setup.model, setup.config, setup.device_spec)


def test_lion_leaves_parameters_without_gradient() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = Lion([used, unused], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    used.sum().backward()
    optimizer.step()
    assert unused.tolist() == [1, 1, 1]
    assert used.tolist() == pytest.approx([1 * (1 - 0.05) - 0.1] * 3)
    assert unused not in optimizer.state


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("wsd", [0.5, 1.0, 1.0, 1.0, 0.6, 0.2]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rate_ends_at_its_minimum(schedule: str, expected: list[float]) -> None:
    found = [
        lr_factor(step, total_steps=6, warmup_steps=1, schedule=schedule, final=0.2, decay_steps=2) for step in range(6)
    ]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_zero_rate_is_reached_after_last_update(warmup_steps: int) -> None:
    """As in transformers, after the warm-up; its warm-up starts at 0."""
    theirs = {
        "linear": get_linear_schedule_with_warmup,
        "cosine": get_cosine_schedule_with_warmup,
    }
    for schedule, make in theirs.items():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        rates = make(optimizer, warmup_steps, 10).lr_lambdas[0]
        for step in range(warmup_steps, 10):
            found = lr_factor(step, total_steps=10, warmup_steps=warmup_steps, schedule=schedule, final=0.0)
            assert found == pytest.approx(rates(step), rel=1e-12)
            assert found > 0
    found = [lr_factor(s, total_steps=9, warmup_steps=0, schedule="wsd", final=0.0, decay_steps=4) for s in range(9)]
    assert found == pytest.approx([1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_only_update_has_peak_learning_rate(schedule: str) -> None:
    assert lr_factor(0, total_steps=1, warmup_steps=0, schedule=schedule, final=0.0, decay_steps=1) == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer sgd has no default learning rate: pass lr"),
        ({"optimizer": "sgd", "lr": 1.0, "beta1": 0.5}, "beta1 does nothing with optimizer sgd: remove it"),
        ({"momentum": 0.5}, "momentum does nothing with optimizer adamw: remove it"),
        ({"optimizer": "lion", "eps": 1e-6}, "eps does nothing with optimizer lion: remove it"),
        ({"schedule": "constant", "min_lr": 1e-6}, "min_lr does nothing with schedule constant: remove it"),
        ({"decay_steps": 5}, "decay_steps does nothing with schedule cosine: remove it"),
        ({"lr": 1e-3, "min_lr": 1e-2}, "min_lr 0.01 is more than lr 0.001: pass less"),
        (
            {"optimizer": "muon", "parallel": "fsdp"},
            "optimizer muon needs whole matrices, which parallel fsdp and hsdp shard: use ddp",
        ),
        (
            {"optimizer": "adamw-8bit", "parallel": "fsdp"},
            "optimizer adamw-8bit needs whole tensors, which parallel fsdp and hsdp shard: use ddp",
        ),
        (
            {"optimizer": "adamw-8bit", "precision": "float64"},
            "optimizer adamw-8bit computes in float32, not in precision float64: use adamw",
        ),
        (
            {"optimizer": "lion", "scale_from": 8, "lr_rule": "sqrt"},
            "lr_rule does nothing with optimizer lion: remove it",
        ),
        (
            {"optimizer": "muon", "global_batch_schedule": "0:4 100:8", "rebase_second_moment": True},
            "rebase_second_moment does nothing with optimizer muon: remove it",
        ),
    ],
)
def test_setting_without_effect_is_rejected(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as raised:
        TrainConfig(**given)
    assert [error["msg"] for error in raised.value.errors()] == [message]


def test_decay_longer_than_run_is_rejected(settings: dict[str, Any]) -> None:
    config = TrainConfig(**settings | {"schedule": "wsd", "warmup_steps": 4, "decay_steps": 7})
    with pytest.raises(
        InputError,
        match=r"--warmup-steps 4 and --decay-steps 7 are more than the 10 updates of the run together. Lower one",
    ):
        TrainingSchedule(config.resolved(), [5] * 40)


def test_seesaw_with_rate_of_zero_is_rejected(settings: dict[str, Any]) -> None:
    config = TrainConfig(**settings | {"global_batch": 4, "schedule": "linear", "global_batch_schedule": "seesaw 0.5"})
    with pytest.raises(InputError, match=r"--schedule linear lowers it to 0. Pass a --min-lr above 0\."):
        TrainingSchedule(config.resolved(), [5] * 40)


def test_summary_names_optimizer_and_decay(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    settings |= {"optimizer": "sgd", "schedule": "wsd", "steps": 5, "decay_steps": 2, "min_lr": 1e-3}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    out = Path(settings["data"]).parent / "run"
    assert main(["train", *flags, "--device", "cpu", "--out", str(out)]) == 0
    assert "SGD, learning rate 0.01, linear decay to 0.001 in the last 2 updates, no warm-up" in capsys.readouterr().out


def test_start_names_parts_of_muon_and_duration(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    settings |= {"optimizer": "muon", "steps": 2, "microbatch": "auto"}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    assert main(["train", *flags, "--device", "cpu", "--out", str(Path(settings["data"]).parent / "run")]) == 0
    shown = capsys.readouterr().out
    assert "Muon updates 5,120 parameters in 14 matrices, AdamW the other" in shown
    assert re.search(r"about [\d.]+ s of forward and backward for 2 updates\n", shown)


def small_muon(matrix: nn.Parameter, bias: nn.Parameter) -> MuonWithAdamW:
    parts = [{"params": [parameter]} for parameter in (matrix, bias)]
    return MuonWithAdamW(parts[:1], parts[1:], lr=LR, momentum=0.9, betas=(0.9, 0.95), eps=1e-8)


def test_copy_of_muon_continues() -> None:
    parameters = nn.Parameter(torch.eye(3)), nn.Parameter(torch.ones(3))
    optimizer = small_muon(*parameters)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = parameter.detach().sin()
        optimizer.step()
    copied, copied_optimizer = copy.deepcopy((parameters, optimizer))
    for each, updates in ((parameters, optimizer), (copied, copied_optimizer)):
        for parameter in each:
            parameter.grad = parameter.detach().cos()
        updates.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, copied, strict=True))


def test_later_group_of_muon_is_refused() -> None:
    optimizer = small_muon(nn.Parameter(torch.eye(3)), nn.Parameter(torch.ones(3)))
    with pytest.raises(InputError, match=r"^MuonWithAdamW takes no further parameter group, because"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 2


def test_sharded_lion_makes_the_same_updates(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"optimizer": "lion", "steps": 3, "precision": "float64", "device": "cpu", "lr": 1e-3}
    words = ["train", *(f"--{key.replace('_', '-')}={value}" for key, value in settings.items())]
    sharded = Launch([*words, "--parallel=fsdp", "--out=sharded"], 2, folder=tmp_path)
    assert sharded.wait() == [0, 0], sharded.stderr(0)
    alone = Launch([*words, "--out=alone"], 1, folder=tmp_path, alone=True)
    assert alone.wait() == [0], alone.stderr(0)
    losses = [[row["loss"] for row in metrics(tmp_path / out)] for out in ("sharded", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
