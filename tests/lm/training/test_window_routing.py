"""One update with a load-balancing loss: its metrics, what it restores, out of memory, and abandoned windows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bigbatch.cli import main
from bigbatch.engine.engine import Engine
from bigbatch.errors import InputError, MemoryLimitError, WindowAbandonedError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.model.setup import ModelSetup
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.runs.identity import digest_of
from bigbatch.lm.training.engine_factory import make_engine
from bigbatch.lm.training.evaluation import validation_loss
from bigbatch.lm.training.resume import check_facts, run_facts
from bigbatch.lm.training.setup import set_up_training
from bigbatch.lm.training.trainer import Trainer
from bigbatch.lm.training.window_routing import counted_window, run_update
from support.expert_models import (
    expert_model,
    expert_samples,
    gradients,
    relative_error,
    save_expert_folder,
    set_up,
    whole_batch,
)
from support.language_models import RecordingCallback, metrics, records, run, write_jsonl
from support.tiers import slow

COEFFICIENT = 0.5
EXACT = 1e-12
SAMPLES = expert_samples()
MESSAGE = "CUDA out of memory. Tried to allocate 20.00 MiB.\nmore"


def engine_of(model_setup: ModelSetup, microbatch: int = 4) -> Engine:
    return make_engine(model_setup, torch.optim.SGD(model_setup.model.parameters(), lr=0.0), microbatch=microbatch)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with data and a model, which is the working directory."""
    save_expert_folder(tmp_path / "experts")
    write_jsonl(tmp_path / "data.jsonl", records(40))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(**more: Any) -> dict[str, Any]:
    return {
        "data": "data.jsonl", "model": "experts", "steps": 6, "global_batch": 8, "microbatch": 3, "lr": 0.01,
        "precision": "float64", "deterministic": True, "checkpoint_every": 2, **more,
    }  # fmt: skip


# one update ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "microbatch"])
def test_metrics_separate_the_two_losses(scope: str) -> None:
    model = expert_model("mixtral")
    model_setup = set_up(model, router_aux_loss=scope)
    report, more = run_update(engine_of(model_setup, len(SAMPLES)), model_setup, SAMPLES)
    _, own = whole_batch(model, SAMPLES, COEFFICIENT)
    assert more["router_aux_loss"] == pytest.approx(own, rel=1e-6)
    assert more["loss"] + COEFFICIENT * more["router_aux_loss"] == pytest.approx(report.loss, rel=EXACT)
    plain = engine_of(set_up(model, router_aux_loss_coef=0.0)).step(SAMPLES)
    assert more["loss"] == pytest.approx(plain.loss, rel=EXACT)


def test_dense_model_has_no_more_metrics() -> None:
    model_setup = set_up(expert_model("mixtral"), router_aux_loss_coef=0.0)
    assert run_update(engine_of(model_setup), model_setup, SAMPLES)[1] == {}


def test_gradient_noise_is_measured() -> None:
    model_setup = set_up(expert_model("mixtral", dtype=torch.float32), "float32")
    engine = engine_of(model_setup)
    reports = [run_update(engine, model_setup, SAMPLES)[0] for _ in range(4)]
    assert reports[-1].noise is not None


def test_empty_batch_is_skipped() -> None:
    model_setup = set_up(expert_model("mixtral"))
    report, more = run_update(engine_of(model_setup), model_setup, [])
    assert report.skipped == "no items"
    assert more["router_aux_loss"] == 0


def test_both_passes_draw_the_same_random_numbers() -> None:
    model = expert_model("mixtral", attention_dropout=0.3, router_jitter_noise=0.1)
    model_setup = set_up(model)
    torch.manual_seed(5)
    report, more = run_update(engine_of(model_setup), model_setup, SAMPLES)
    torch.manual_seed(5)
    plain_setup = set_up(model, router_aux_loss_coef=0.0)
    torch.manual_seed(5)
    plain = engine_of(plain_setup).step(SAMPLES)
    assert more["loss"] == pytest.approx(plain.loss, rel=EXACT), "the second pass has another balance otherwise"
    assert report.num_microbatches == 6


def test_counting_restores_random_state_and_buffers() -> None:
    model_setup = set_up(expert_model("mixtral", attention_dropout=0.3))
    model_setup.model.register_buffer("calls", torch.zeros(()))

    def count(*_: Any) -> None:
        model_setup.model.calls.add_(1)

    model_setup.model.model.register_forward_hook(count)
    before = torch.get_rng_state()
    with counted_window(engine_of(model_setup), model_setup, SAMPLES):
        assert torch.equal(torch.get_rng_state(), before)
        assert float(model_setup.model.calls) == 0
    assert all(parameter.grad is None for parameter in model_setup.model.parameters())


# out of memory, and abandoned windows -------------------------------------------------------------------------------


class FailingForwards:
    """Raises an out-of-memory error in forwards of more than some rows, or in some calls."""

    def __init__(self, model: Any, *, most: int, calls: range = range(0)) -> None:
        self.most, self.calls, self.number = most, calls, 0
        model.model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, _model: Any, _inputs: Any, options: dict[str, Any]) -> None:
        self.number += 1
        if self.number in self.calls or options["input_ids"].shape[0] > self.most:
            raise torch.OutOfMemoryError(MESSAGE)


def test_counting_halves_what_does_not_fit() -> None:
    model = expert_model("mixtral")
    samples = SAMPLES[:5]
    expected, _ = whole_batch(model, samples, COEFFICIENT)
    model_setup = set_up(model)
    engine = engine_of(model_setup, 5)
    FailingForwards(model_setup.model, most=3)
    with counted_window(engine, model_setup, samples):
        report = engine.backward(samples)
    assert relative_error(gradients(model_setup.model), expected) < 1e-7
    assert report.retries > 0


def test_out_of_memory_in_the_second_pass_keeps_the_gradient() -> None:
    model = expert_model("mixtral")
    model_setup = set_up(model)
    failing = FailingForwards(model_setup.model, most=99)
    engine = engine_of(model_setup)
    with counted_window(engine, model_setup, SAMPLES):
        failing.calls = range(failing.number + 2, failing.number + 4)
        report = engine.backward(SAMPLES)
    assert report.retries == 2
    assert relative_error(gradients(model_setup.model), whole_batch(model, SAMPLES, COEFFICIENT)[0]) < 1e-7


def test_halves_draw_the_random_numbers_of_the_second_pass() -> None:
    model = expert_model("mixtral", attention_dropout=0.3)
    losses = []
    for settings_of_run in ({}, {"router_aux_loss_coef": 0.0}):
        model_setup = set_up(model, **settings_of_run)

        def fail(_layer: Any, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].shape[0] > 2:  # after the first layer has drawn its random numbers
                raise torch.OutOfMemoryError(MESSAGE)

        model_setup.model.model.layers[1].register_forward_pre_hook(fail)
        torch.manual_seed(5)
        report, more = run_update(engine_of(model_setup), model_setup, SAMPLES[:4])
        losses.append(more.get("loss", report.loss))
    assert losses[0] == pytest.approx(losses[1], rel=EXACT)


def test_sample_that_does_not_fit_is_named() -> None:
    model_setup = set_up(expert_model("mixtral"))
    FailingForwards(model_setup.model, most=0)
    with pytest.raises(MemoryLimitError) as caught:
        run_update(engine_of(model_setup), model_setup, SAMPLES)
    assert str(caught.value) == (
        "sample 0 of the batch, 3 tokens long, does not fit in memory by itself, even without gradient (CUDA out of "
        "memory. Tried to allocate 20.00 MiB). Shorten it, or use weights in a lower precision."
    )


def test_window_is_abandoned_while_it_is_counted() -> None:
    model_setup = set_up(expert_model("mixtral"))
    answers = iter([False, False, True])
    with pytest.raises(WindowAbandonedError, match="abandoned while the tokens of each expert were counted"):
        run_update(engine_of(model_setup), model_setup, SAMPLES, should_abandon=lambda: next(answers))


# runs -----------------------------------------------------------------------------------------------------------------


def test_coefficients_train_different_weights(folder: Path) -> None:
    models = {}
    for coefficient in (None, 0.0, 1.0):
        prepared, recorder, _ = run(folder / f"run-{coefficient}", **settings(router_aux_loss_coef=coefficient))
        models[coefficient] = dict(prepared.model.named_parameters())
        assert all(("router_aux_loss" in row) == (coefficient != 0) for row in recorder.rows)
    for name in ("model.layers.0.mlp.gate.weight", "model.embed_tokens.weight"):
        own, off, one = (models[coefficient][name] for coefficient in (None, 0.0, 1.0))
        assert not torch.equal(own, off)
        assert not torch.equal(one, off)
        assert not torch.equal(one, own)


@pytest.mark.parametrize("precision", ["bf16", slow("bf16-weights"), slow("fp16"), "float32"])
@pytest.mark.parametrize("scope", ["global", "microbatch"])
def test_every_precision_trains_the_term(folder: Path, precision: str, scope: str) -> None:
    rows = run(folder / "run", **settings(precision=precision, router_aux_loss=scope, lr=0.05))[1].rows
    assert [row["skipped"] for row in rows] == [None] * 6
    assert rows[0]["router_aux_loss"] == pytest.approx(2.04, rel=0.02), "2 of 4 experts for each token"
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_metrics_do_not_depend_on_the_microbatch(folder: Path) -> None:
    rows = [run(folder / f"run-{size}", **settings(microbatch=size))[1].rows for size in (1, 8)]
    for small, large in zip(*rows, strict=True):
        for name in ("loss", "router_aux_loss", "grad_norm"):
            assert small[name] == pytest.approx(large[name], rel=1e-9)
    assert metrics(folder / "run-1")[0]["router_aux_loss"] == rows[0][0]["router_aux_loss"]


def test_validation_is_the_cross_entropy_alone(folder: Path) -> None:
    found = []
    for coefficient in (1.0, 0.0):
        setup = set_up_training(TrainConfig(device="cpu", **settings(router_aux_loss_coef=coefficient)))
        found.append(validation_loss(setup, Trainer(setup).engine))
    assert found[0] == pytest.approx(found[1], rel=EXACT)


def stop_after(folder: Path, updates: int, **more: Any) -> None:
    """Train, and stop after some updates."""
    setup = set_up_training(TrainConfig(device="cpu", **settings(**more)))
    directory = RunDirectory.create(folder, setup.config.model_dump(mode="json"))
    recorder, trainer = RecordingCallback(), Trainer(setup)
    directory.record_facts(trainer.initial_facts)
    trainer.run(directory, callback=recorder, should_stop=lambda: len(recorder.rows) >= updates)


@pytest.mark.parametrize("scope", ["global", "microbatch"])
def test_resumed_run_is_the_same_to_the_last_bit(folder: Path, scope: str) -> None:
    run(folder / "whole", **settings(router_aux_loss=scope))
    stop_after(folder / "stopped", 3, router_aux_loss=scope)
    assert len(metrics(folder / "stopped")) == 3
    assert main(["resume", "stopped"]) == 0
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (folder / "stopped" / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_resume_with_another_coefficient_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stop_after(folder / "stopped", 3)
    flag = ["--router-aux-loss-coef", "2"]
    capfd.readouterr()
    assert main(["resume", "stopped", *flag]) == 2
    assert "--router-aux-loss-coef" in capfd.readouterr().err
    assert main(["train", "--data", "data.jsonl", "--model", "experts", "--out", "stopped", *flag]) == 2
    assert capfd.readouterr().err.startswith("bigbatch train: --out stopped holds another run")
    config = json.loads((folder / "stopped" / "config.json").read_text())
    (folder / "stopped" / "config.json").write_text(json.dumps(config | {"router_aux_loss_coef": 2.0}))
    assert main(["resume", "stopped"]) == 2
    assert "and the run was started with --router-aux-loss-coef None. Restore the file" in capfd.readouterr().err


def test_run_of_an_earlier_version_resumes_without_the_loss(folder: Path) -> None:
    run(folder / "whole", **settings(router_aux_loss_coef=0.0))
    stop_after(folder / "stopped", 3, router_aux_loss_coef=0.0)
    config, manifest = (folder / "stopped" / name for name in ("config.json", "run-manifest.json"))
    settings_then, identity = json.loads(config.read_text()), json.loads(manifest.read_text())
    del identity["digest"]
    for name in ("router_aux_loss_coef", "router_aux_loss"):
        del settings_then[name], identity["settings"][name], identity["facts"]["learning"][name]
    config.write_text(json.dumps(settings_then))
    manifest.write_text(json.dumps({**identity, "digest": digest_of(identity)}))
    assert main(["resume", "stopped"]) == 0
    assert "router_aux_loss" not in metrics(folder / "stopped")[-1]
    name = "model/model.safetensors"
    assert (folder / "stopped" / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_checkpoint_without_the_setting_is_refused(folder: Path) -> None:
    setup = set_up_training(TrainConfig(device="cpu", **settings(out=folder / "run")))
    now = run_facts(setup)
    learning = {name: value for name, value in now["learning"].items() if not name.startswith("router_aux_loss")}
    with pytest.raises(InputError) as caught:
        check_facts(setup.config, now | {"learning": learning, "fingerprint": ""}, now, allowed=())
    assert str(caught.value) == (
        f"{folder / 'run'} was started by an earlier version of bigbatch, which did not train the load-balancing loss "
        "of the experts of experts, and this version would. Start a new run."
    )


# commands -------------------------------------------------------------------------------------------------------------


def test_train_says_how_the_loss_is_trained(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--data", "data.jsonl", "--model", "experts", "--steps", "1", "--microbatch", "8"]
    assert main(words) == 0
    printed = capfd.readouterr().out
    assert (
        "the load-balancing loss of the experts has weight 0.5 of the model, over the whole batch of each update: "
        "every sequence runs one forward more (--router-aux-loss microbatch avoids it, for another loss; "
        "--router-aux-loss-coef 0 leaves the loss out)\n" in printed
    )
    assert main([*words, "--router-aux-loss-coef", "0"]) == 0
    assert (
        "the load-balancing loss of the experts is not trained, by --router-aux-loss-coef 0\n" in capfd.readouterr().out
    )


@pytest.mark.parametrize("command", ["train", "verify", "plan"])
def test_flag_without_experts_exits_with_two(folder: Path, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = [command, "--data", "data.jsonl", "--device", "cpu", "--microbatch", "8"]
    assert main([*words, "--router-aux-loss-coef", "0.1"]) == 2
    assert capfd.readouterr().err == (
        f"bigbatch {command}: --router-aux-loss-coef 0.1 is for a mixture of experts with a load-balancing loss, and "
        "tiny has none. Leave it out.\n"
    )


@pytest.mark.parametrize(("value", "code"), [("-1", 2), ("nan", 2), ("many", 2)])
def test_invalid_coefficient_is_refused(folder: Path, value: str, code: int) -> None:
    assert main(["train", "--data", "data.jsonl", "--model", "experts", "--router-aux-loss-coef", value]) == code


def test_microbatch_scope_of_no_loss_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--router-aux-loss", "microbatch", "--router-aux-loss-coef", "0"]) == 2
    assert "does nothing with" in capfd.readouterr().err


def test_verify_is_exact_over_the_global_batch(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["verify", "--data", "data.jsonl", "--model", "experts", "--precision", "float64", "--samples", "4"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["exact"]
    assert all(cut["relative_error"] < EXACT for cut in result["cuts"])
    assert main([*words, "--router-aux-loss", "microbatch", "--json"]) == 1
    assert not json.loads(capfd.readouterr().out)["exact"]


def test_plan_times_the_forward_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model_setup = set_up(expert_model("mixtral"))
    engine = engine_of(model_setup)
    plain = engine.step
    seconds: list[float] = []

    def step(samples: list[dict[str, Tensor]], **options: Any) -> Any:
        report = plain(samples, **options)
        seconds.append(report.elapsed_s)
        return report

    monkeypatch.setattr(engine, "step", step)
    assert run_update(engine, model_setup, SAMPLES)[0].elapsed_s > seconds[0]
