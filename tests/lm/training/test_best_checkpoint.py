"""The best checkpoint, early stopping and named validation sets: the same choice after any stop, and what is saved."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bigbatch.cli import main
from bigbatch.errors import InputError
from bigbatch.lm.checkpoint import read
from bigbatch.lm.checkpoint.run_checkpoint import Progress, load
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.training.best_checkpoint import record_validation, stops_early
from bigbatch.lm.training.evaluation import validation_loss
from bigbatch.lm.training.setup import set_up_training
from bigbatch.lm.training.trainer import Trainer
from support.language_models import RecordingCallback, load_peft, metrics, records, run, save_model_folder, write_jsonl
from support.tiers import slow

BEST = 2  # update with the lowest validation loss of 10


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """A run whose learning rate rises until it diverges."""
    torch.manual_seed(0)
    return {
        "data": str(write_jsonl(tmp_path / "data.jsonl", records(40))),
        "model": str(save_model_folder(tmp_path / "base", kind="gpt2")),
        "global_batch": 8,
        "microbatch": 4,
        "steps": 10,
        "lr": 1.0,
        "schedule": "constant",
        "warmup_steps": 10,
        "max_length": 32,
        "validation_fraction": 0.2,
        "validation_every": 1,
    }


def losses(folder: Path) -> list[float]:
    return [row["validation_loss"] for row in metrics(folder)]


def best_of(folder: Path) -> int:
    found = losses(folder)
    return 1 + found.index(min(found))


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def saved_loss(folder: Path, settings: dict[str, Any], **more: Any) -> float:
    """Return the validation loss of the model folder of a run."""
    trainer = Trainer(set_up_training(TrainConfig(**settings | more | {"model": str(folder / "model")})))
    return trainer.validate()


# decisions -------------------------------------------------------------------------------------------------------


def recorded(found: list[float], *, patience: int, min_delta: float = 0.0) -> tuple[int, int | None]:
    """Return the best update and the one after which the run ends, of one validation after every update."""
    now = Progress()
    config = TrainConfig(early_stopping=patience)
    for loss in found:
        now.step += 1
        record_validation(now, loss, min_delta=min_delta)
        if stops_early(now, config):
            return now.best_step, now.step
    return now.best_step, None


def test_lowest_loss_is_best_and_first_of_equal_ones() -> None:
    assert recorded([3.0, 2.0, 2.0, 2.5], patience=9) == (2, None)


def test_run_ends_after_patience_without_improvement() -> None:
    assert recorded([3.0, 2.0, 2.5, 2.1, 2.0, 1.0], patience=3) == (2, 5)


def test_small_decreases_add_up_to_an_improvement() -> None:
    slowly = [3.0, 2.94, 2.88, 2.82, 2.76]  # less than 0.1 each, more than 0.1 over two
    assert recorded(slowly, patience=2, min_delta=0.1) == (5, None)
    assert recorded([3.0, 2.99, 2.98, 2.97], patience=2, min_delta=0.1) == (3, 3)


def test_loss_that_is_not_finite_is_never_best() -> None:
    assert recorded([math.nan, 2.0, -math.inf, math.nan], patience=2) == (2, 4)
    assert recorded([math.nan, math.inf], patience=2) == (0, 2)


# runs ------------------------------------------------------------------------------------------------------------


def test_best_weights_are_saved_and_two_checkpoints_kept(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    prepared, _, outcome = run(folder, **settings, keep="best")
    best = best_of(folder)
    assert 1 < best < 10, "the last model is not the best here"
    assert (outcome.best_step, outcome.saved_step, outcome.best_loss) == (best, best, min(losses(folder)))
    assert (outcome.finished, outcome.stopped_early) == (True, False)
    assert checkpoints(folder) == sorted([f"step-{best}", "step-10"])
    assert saved_loss(folder, settings) == pytest.approx(min(losses(folder)), rel=1e-6)
    stored = read(folder / "checkpoints" / f"step-{best}").tensors["model"]
    loaded = dict(AutoModelForCausalLM.from_pretrained(folder / "model").named_parameters())
    assert all(
        torch.equal(loaded[name], stored[f"/engine/model/{name}"]) for name, _ in prepared.model.named_parameters()
    )


def test_number_of_checkpoints_saves_last_weights(tmp_path: Path, settings: dict[str, Any]) -> None:
    _, _, outcome = run(tmp_path / "run", **settings, keep=1)
    assert (outcome.best_step, outcome.saved_step) == (best_of(tmp_path / "run"), 10)
    assert checkpoints(tmp_path / "run") == ["step-10"]
    assert saved_loss(tmp_path / "run", settings) == pytest.approx(losses(tmp_path / "run")[-1], rel=1e-6)


def test_best_adapters_are_saved(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    prepared, _, outcome = run(folder, **settings, keep="best", lora_rank=2)
    assert outcome.saved_step == best_of(folder)
    adapted = dict(load_peft(Path(settings["model"]), folder / "adapter").named_parameters())
    stored = read(folder / "checkpoints" / f"step-{outcome.best_step}").tensors["model"]
    trained = [name for name, p in prepared.model.named_parameters() if p.requires_grad]
    assert trained
    assert all(torch.equal(adapted[name], stored[f"/engine/model/{name}"]) for name in trained)


def test_early_stopping_ends_run_and_saves_best(
    tmp_path: Path, settings: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(["train", *words(settings), "--early-stopping", "2", "--out", str(folder)]) == 0
    best = best_of(folder)
    assert len(losses(folder)) == best + 2 < 10
    printed = capfd.readouterr().out
    assert f"ended early after update {best + 2} of 10: 2 validations without a lower validation loss\n" in printed
    assert (
        f"{'':<17}weights after update {best}, which has the lowest validation loss: {min(losses(folder)):.3f}\n"
    ) in printed
    assert main(["resume", str(folder)]) == 0
    assert (
        f"{folder} is already finished: --early-stopping 2 ended it after update {best + 2} of 10, the model is saved\n"
    ) in capfd.readouterr().out
    assert main(["resume", str(folder), "--early-stopping", "none"]) == 0
    assert len(losses(folder)) == 10


def test_early_stopping_says_by_how_much_loss_is_lower(
    tmp_path: Path, settings: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    flags = ["--early-stopping", "1", "--early-stopping-min-delta", "12.5", "--out", str(folder)]
    assert main(["train", *words(settings), *flags]) == 0
    assert best_of(folder) == 2, "the last validation has a lower loss, by less than 12.5"
    printed = capfd.readouterr().out
    expected = "1 validation without a validation loss that is lower by more than 12.5"
    assert f"\nended early after update 2 of 10: {expected}\n" in printed
    assert f"{'':<17}weights after update 2, which has the lowest validation loss: " in printed


def words(settings: dict[str, Any]) -> list[str]:
    return [
        "--device",
        "cpu",
        *(w for name, value in settings.items() for w in (f"--{name.replace('_', '-')}", str(value))),
    ]


@pytest.mark.parametrize("number", [slow(1), BEST, slow(BEST + 1), slow(BEST + 2)])
def test_stop_before_validation_leaves_choice_unchanged(tmp_path: Path, settings: dict[str, Any], number: int) -> None:
    settings |= {"early_stopping": 2, "deterministic": True}
    _, _, expected = run(tmp_path / "whole", **settings)
    recorder = RecordingCallback()
    prepared = set_up_training(TrainConfig(**settings, out=tmp_path / "run"))
    directory = RunDirectory.create(tmp_path / "run", prepared.config.model_dump(mode="json"))
    stopped = Trainer(prepared).run(directory, callback=recorder, should_stop=lambda: len(recorder.rows) == number)
    assert (stopped.step, stopped.finished, stopped.saved_step) == (number, False, number)
    checkpoint, _ = load(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint.progress.pending_metrics_row is not None
    setup = set_up_training(TrainConfig(**settings))
    outcome = Trainer(setup, checkpoint=checkpoint).run(RunDirectory(tmp_path / "run"), callback=RecordingCallback())
    for name in ("step", "best_step", "best_loss", "saved_step", "stopped_early"):
        assert getattr(outcome, name) == getattr(expected, name), name
    assert outcome.stopped_early
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    one, other = (tmp_path / name / "model" / "model.safetensors" for name in ("run", "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_missing_best_checkpoint_is_noted_on_resume(
    tmp_path: Path, settings: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(["train", *words(settings), "--keep", "1", "--early-stopping", "1", "--out", str(folder)]) == 0
    best, ended = best_of(folder), len(losses(folder))
    assert best < ended < 10
    assert main(["resume", str(folder), "--early-stopping", "3", "--keep", "best"]) == 0
    printed = capfd.readouterr().out
    assert (
        f"validation losses are compared from here on: the checkpoint of update {best}, with the lowest one, was not "
        "kept\n"
    ) in printed
    later = losses(folder)[ended:]
    assert f"weights after update {ended + 1 + later.index(min(later))}, which" in printed


def test_damaged_best_checkpoint_saves_last_weights(tmp_path: Path, settings: dict[str, Any]) -> None:
    prepared = set_up_training(TrainConfig(**settings, keep="best"))
    directory = RunDirectory.create(tmp_path / "run", prepared.config.model_dump(mode="json"))
    trainer, notes = Trainer(prepared), []

    class Damaging(RecordingCallback):
        def on_sample(self, step: int, text: str) -> None:
            if step == 10:
                path = directory.checkpoints / f"step-{best_of(directory.path)}" / "model.safetensors"
                path.write_bytes(path.read_bytes()[:-1] + b"?")

    outcome = trainer.run(directory, callback=Damaging(), on_note=notes.append)
    assert outcome.saved_step == 10 != outcome.best_step
    beginning = f"the weights of update {outcome.best_step} cannot be loaded, so those of the last update are saved: "
    assert any(note.startswith(beginning) for note in notes)
    assert saved_loss(tmp_path / "run", settings) == pytest.approx(losses(tmp_path / "run")[-1], rel=1e-6)


@pytest.mark.parametrize(
    ("more", "flag"), [({"keep": "best"}, "--keep best"), ({"early_stopping": 3}, "--early-stopping")]
)
def test_choice_without_validation_data_is_rejected(settings: dict[str, Any], more: dict[str, Any], flag: str) -> None:
    prepared = set_up_training(TrainConfig(**settings | more | {"validation_fraction": 0.0}))
    with pytest.raises(InputError) as caught:
        Trainer(prepared)
    assert str(caught.value) == (
        f"{flag} compares validation losses, and this run has no validation data: pass --validation-data, or a larger "
        "--validation-fraction."
    )


# named validation sets -------------------------------------------------------------------------------------------


@pytest.fixture
def named(tmp_path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """A run with two validation sets, one of them of two sources."""
    rows = records(70)[40:]
    files = [write_jsonl(tmp_path / f"{i}.jsonl", rows[10 * i : 10 * i + 10]) for i in range(3)]
    for name in ("validation_fraction", "warmup_steps"):
        del settings[name]
    sources = [f"web={files[0]}", f"code={files[1]}", f"code={files[2]}"]
    return settings | {"validation_data": sources, "steps": 2, "lr": 1e-2}


@pytest.mark.parametrize("best_metric", [None, "code"])
def test_every_set_has_its_loss_and_perplexity(tmp_path: Path, named: dict[str, Any], best_metric: str | None) -> None:
    prepared, recorder, outcome = run(tmp_path / "run", **named, best_metric=best_metric)
    assert {name: len(data) for name, data in prepared.validation_sets.items()} == {"web": 10, "code": 20}
    row = metrics(tmp_path / "run")[-1]
    for name, data in prepared.validation_sets.items():
        trainer = Trainer(set_up_training(TrainConfig(**named | {"model": str(tmp_path / "run" / "model")})))
        assert row[f"validation_loss/{name}"] == pytest.approx(
            validation_loss(trainer.setup, trainer.engine, data), rel=1e-6
        )
        assert row[f"validation_perplexity/{name}"] == math.exp(row[f"validation_loss/{name}"])
    primary = best_metric or "web"
    assert row["validation_loss/web"] != row["validation_loss/code"]
    assert row["validation_loss"] == row[f"validation_loss/{primary}"] == outcome.validation_loss
    assert recorder.validations[-1] == (2, row["validation_loss"])
    assert recorder.evaluations[-1] == (2, {name: row[f"validation_loss/{name}"] for name in ("web", "code")})


def test_unnamed_sources_are_one_set_as_before(tmp_path: Path, named: dict[str, Any]) -> None:
    sources = [source.partition("=")[2] for source in named["validation_data"]]
    prepared, recorder, _ = run(tmp_path / "run", **named | {"validation_data": sources})
    assert prepared.validation is not None
    assert len(prepared.validation) == 30
    assert recorder.evaluations == []
    keys = {key for row in metrics(tmp_path / "run") for key in row if key.startswith("validation")}
    assert keys == {"validation_loss", "validation_perplexity"}


def test_sets_are_printed_with_perplexity(
    tmp_path: Path, named: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {name: value for name, value in named.items() if name != "validation_data"}
    given = ["--validation-data", *named["validation_data"]]
    assert main(["train", *words(settings), *given, "--out", str(tmp_path / "run")]) == 0
    row = metrics(tmp_path / "run")[-1]
    parts = [
        f"{name} {row[f'validation_loss/{name}']:.3f} (perplexity {row[f'validation_perplexity/{name}']:,.4g})"
        for name in ("web", "code")
    ]
    printed = capfd.readouterr().out
    assert f"update 2: validation loss of {', '.join(parts)}\n" in printed
    assert f"update 2: validation loss {row['validation_loss']:.3f}, perplexity " in printed


def refusal(*given: str, capfd: pytest.CaptureFixture[str]) -> str:
    assert main(["train", *given]) == 2
    return capfd.readouterr().err.removeprefix("bigbatch train: ").removesuffix("\n")


def test_unclear_validation_sets_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "year=2024"):
        write_jsonl(tmp_path / name, records(4))
    assert refusal("--validation-data", "web=a.jsonl", "b.jsonl", capfd=capfd) == (
        "--validation-data names the set web, but not that of b.jsonl: write NAME=b.jsonl."
    )
    assert refusal("--validation-data", "web=a.jsonl", "code=b.jsonl", "--best-metric", "c", capfd=capfd) == (
        "--best-metric c is not the name of a validation set: pass web or code."
    )
    assert refusal("--validation-data", "a.jsonl", "--best-metric", "c", capfd=capfd) == (
        "--best-metric c is not the name of a validation set: name the sets, as in --validation-data web=web.jsonl."
    )
    assert refusal("--best-metric", "c", capfd=capfd) == (
        "--best-metric does nothing without --validation-data: give both."
    )
    assert refusal("--validation-data", "year=2024", capfd=capfd) == (
        "--validation-data year=2024 is a file or folder of that name, and could be 2024 as the set year: write "
        "./year=2024 for the file or folder, or rename it."
    )
    assert refusal("--validation-data", "web=c.jsonl", capfd=capfd).startswith("there is no file or folder 'c.jsonl'. ")
    assert refusal("--early-stopping-min-delta", "1", capfd=capfd) == (
        "--early-stopping-min-delta does nothing without --early-stopping: give both."
    )
    assert refusal("--keep", "all", capfd=capfd) == "--keep is 'all': it must be best or a whole number."


def test_other_validation_data_restarts_comparison(tmp_path: Path, settings: dict[str, Any]) -> None:
    recorder = RecordingCallback()
    prepared = set_up_training(TrainConfig(**settings, keep="best", out=tmp_path / "run"))
    directory = RunDirectory.create(tmp_path / "run", prepared.config.model_dump(mode="json"))
    Trainer(prepared).run(directory, callback=recorder, should_stop=lambda: len(recorder.rows) == BEST + 2)
    checkpoint, _ = load(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint.progress.best_step == BEST
    other = str(write_jsonl(tmp_path / "other.jsonl", records(70)[40:]))
    more = {key: value for key, value in settings.items() if key != "validation_fraction"} | {"validation_data": other}
    notes: list[str] = []
    trainer = Trainer(set_up_training(TrainConfig(**more, keep="best")), checkpoint=checkpoint)
    outcome = trainer.run(RunDirectory(tmp_path / "run"), callback=RecordingCallback(), on_note=notes.append)
    assert "validation losses are compared from here on: the data has changed" in notes
    assert outcome.best_step > BEST
    assert json.loads((tmp_path / "run" / "config.json").read_text())["keep"] == "best"
