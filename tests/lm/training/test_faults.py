"""What can go wrong in a run, and what it says and keeps: updates that are not finite, signals, other data, no room."""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bigbatch.autotune.choice import MicrobatchChoice
from bigbatch.cli import main
from bigbatch.errors import InputError
from bigbatch.lm.checkpoint import newest, read, verify
from bigbatch.lm.checkpoint.hashed_file import HashedFile
from bigbatch.lm.checkpoint.run_checkpoint import load
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.runs.lock import RunLock
from bigbatch.lm.training import model_saver
from bigbatch.lm.training.resume import merge_config
from bigbatch.lm.training.setup import set_up_training
from bigbatch.lm.training.trainer import Trainer
from support.command_line import LIMIT_S, running
from support.forked_processes import wait_for
from support.kill_points import poison
from support.language_models import RecordingCallback, metrics, records, save_model_folder, write_jsonl
from support.rank_faults import wait_for_signal_in_window
from support.run_comparison import CLOCK, differences, differing_results, wrong_learning_rates
from support.tiers import slow

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout, so that random states matter, with data beside it."""
    model = save_model_folder(tmp_path_factory.mktemp("base") / "dropping", kind="gpt2", dropout=0.1, layers=1)
    write_jsonl(model.parent / "data.jsonl", records(40))
    return model


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without dropout, which another micro-batch does not change."""
    model = save_model_folder(tmp_path_factory.mktemp("plain") / "plain", layers=1)
    write_jsonl(model.parent / "data.jsonl", records(40))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "data.jsonl", records(40))
    return tmp_path


def words(model: Path, *more: str) -> list[str]:
    """Ten updates over two passes, with a checkpoint after every third."""
    settings = {
        "data": model.parent / "data.jsonl", "model": model, "device": "cpu", "global-batch": 8, "microbatch": 3,
        "lr": 0.01, "max-length": 32, "checkpoint-every": 3, "validation-every": 4,
    }  # fmt: skip
    if not {"--steps", "--epochs"} & set(more):
        settings["epochs"] = 2
    return [
        *(word for name, value in settings.items() if f"--{name}" not in more for word in (f"--{name}", str(value))),
        *more,
    ]


@pytest.fixture(scope="module")
def uninterrupted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that returns the run of `words` to which nothing has happened; trained once."""
    folder = tmp_path_factory.mktemp("uninterrupted")

    def run_of(*more: str) -> Path:
        run = folder / " ".join(("run", *more))
        if not run.exists():
            assert main(["train", *words(base, *more, "--out", str(run))]) == 0
        return run

    return run_of


@pytest.fixture
def reference(folder: Path, uninterrupted: Callable[..., Path]) -> Path:
    """A copy of the run of `words` to which nothing has happened."""
    return shutil.copytree(uninterrupted(), folder / "reference")


def config_of(run: Path) -> TrainConfig:
    return TrainConfig.model_validate_json((run / "config.json").read_bytes())


def go_on(
    run: Path, *, until: Callable[[int], bool] = lambda step: False, config: TrainConfig | None = None, **how: Any
) -> RecordingCallback:
    """Begin or resume the run of a configuration, without the command line; stop after an update of some number."""
    config = config_of(run) if config is None else config
    recorder = RecordingCallback()
    found, _ = load(run)
    stop = {"should_stop": lambda: bool(recorder.rows) and until(recorder.rows[-1]["step"])}
    Trainer(set_up_training(config), checkpoint=found).run(RunDirectory(run), callback=recorder, **stop | how)
    return recorder


def begin(run: Path, base: Path, *more: str, **how: Any) -> RecordingCallback:
    """Begin a run of `words` without the command line."""
    names = iter(words(base, *more))
    config = TrainConfig(
        **{name[2:].replace("-", "_"): _value(value) for name, value in zip(names, names, strict=True)}
    )
    RunDirectory.create(run, set_up_training(config).config.model_dump(mode="json"))
    return go_on(run, **how)


def _value(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word


def failed(code: int, words: list[str], capfd: Capture) -> str:
    """The one sentence that a command ends with."""
    capfd.readouterr()
    assert main(words) == code
    complained = capfd.readouterr().err
    assert re.fullmatch(r"bigbatch (train|resume): [^\n]+[.?]\n", complained), complained
    return complained.split(": ", 1)[1].rstrip("\n")


def said(words: list[str], capfd: Capture) -> str:
    """What a command that succeeds prints."""
    capfd.readouterr()
    assert main(words) == 0
    return capfd.readouterr().out


def everything_in(run: Path) -> dict[str, tuple[int, bytes]]:
    """All files, when they were written and what they hold; the lock is taken and given back by whoever looks."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(run)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# updates that are not finite -------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "__init__", Trainer.__init__)  # put back at the end
    poison()


@pytest.mark.usefixtures("poisoned")
def test_nonfinite_updates_are_skipped_reported_and_quarantined(folder: Path, base: Path, capfd: Capture) -> None:
    printed = said(["train", *words(base, "--out", str(folder / "run"))], capfd)
    rows = metrics(folder / "run")
    skipped = [row["step"] for row in rows if row["skipped"]]
    assert 0 < len(skipped) < len(rows) == 10
    assert {row["skipped"] for row in rows} == {None, "non-finite gradient"}
    assert all(row["loss"] is None for row in rows if row["skipped"])
    for step in skipped:
        assert f"update {step} was skipped and changed nothing: non-finite gradient\n" in printed
    assert f"10 updates, {len(skipped)} of them skipped, in " in printed
    lines = [json.loads(line) for line in (folder / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["step"], line["reason"]) for line in lines] == [(step, "non-finite gradient") for step in skipped]
    training = set_up_training(config_of(folder / "run")).training
    for line in lines:
        assert len(line["samples"]) in (7, 8)
        assert any(sum(training[i]["input_ids"].tolist()) % 13 == 3 for i in line["samples"])
    assert wrong_learning_rates(folder / "run") == [], "the schedule goes by the updates that were applied"


@pytest.mark.parametrize("max_skipped", ["1", "3"])
def test_too_many_consecutive_skips_fail(
    folder: Path, base: Path, max_skipped: str, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    command = ["train", *words(base, "--out", str(folder / "run"), "--max-skipped", max_skipped)]
    with monkeypatch.context() as patch:
        patch.setattr("bigbatch.lm.model.causal_lm_loss.CausalLMLoss.__call__", nothing_finite)
        patch.setattr("bigbatch.lm.model.chunked_loss.ChunkedCausalLMLoss.__call__", nothing_finite)
        sentence = failed(1, command, capfd)
    assert sentence == (
        f"the last {max_skipped} updates were skipped (non-finite gradient), so the model does not learn any more: try "
        "a lower --lr, or another --precision."
    )
    assert len(metrics(folder / "run")) == int(max_skipped)
    assert not (folder / "run" / "model").exists()


def nothing_finite(_self: Any, model: Any, microbatch: dict[str, torch.Tensor]) -> Any:
    loss_sum = model(microbatch["input_ids"]).logits.sum() * torch.nan
    return loss_sum, (microbatch["labels"] != -100).sum()


# signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, slow(3), slow(4), slow(5), 8, slow(9)])
def test_run_stopped_after_update_resumes_bit_identically(folder: Path, base: Path, reference: Path, step: int) -> None:
    """After 4 and 8 it would have validated, after 5 written a sample, after 3 and 9 saved anyway."""
    run = folder / "run"
    before = begin(run, base, until=lambda done: done == step)
    assert (len(metrics(run)), before.validations) == (step, before.validations[: (step - 1) // 4])
    after = go_on(run)
    assert [at for at, _ in (*before.validations, *after.validations)] == [4, 8, 10]
    assert [at for at, _ in (*before.samples, *after.samples)] == [5, 10]
    assert differences(run, reference) == []


@pytest.mark.parametrize("microbatch", [slow(0), slow(2), slow(3), 7, slow(14), 28])
def test_abandoned_update_leaves_result_unchanged(folder: Path, base: Path, reference: Path, microbatch: int) -> None:
    asked = iter(range(100))
    begin(folder / "run", base, should_abandon=lambda: next(asked) == microbatch)
    saved, _ = load(folder / "run")
    assert saved is not None
    assert saved.progress.step == len(metrics(folder / "run")) == microbatch // 3
    go_on(folder / "run")
    assert differences(folder / "run", reference) == []


def test_abandoned_first_update_of_restart_can_resume(folder: Path, base: Path, reference: Path) -> None:
    run = folder / "run"
    begin(run, base, should_abandon=lambda: True)
    shutil.rmtree(run / "checkpoints")  # as if it had been killed before its first one
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"st', encoding="utf-8")
    go_on(run, should_abandon=lambda: True)
    go_on(run)
    assert differences(run, reference) == []


def test_model_saved_at_stop_is_not_final(
    folder: Path, base: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    run = folder / "run"
    begin(run, base, until=lambda step: step == 4)
    assert (run / "model" / "model.safetensors").exists()

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model_saver, "save_model", die)
        with pytest.raises(KeyboardInterrupt):
            go_on(run)
    assert "after update 10" in said(["resume", str(run)], capfd)
    assert differences(run, reference) == []


@pytest.mark.parametrize(("number", "grace_s"), [(signal.SIGTERM, "30"), (signal.SIGINT, "30"), (signal.SIGTERM, "0")])
def test_signal_saves_and_resume_is_bit_identical(
    folder: Path, base: Path, reference: Path, number: signal.Signals, grace_s: str, capfd: Capture
) -> None:
    """The signal comes in update 5, after the first of its micro-batches."""
    run, reached = str(folder / "run"), folder / "reached"
    job, waiting = words(base, "--out", run, "--grace-s", grace_s), wait_for_signal_in_window(5, reached)
    with running("train", *job, folder=folder, patch=waiting) as process:
        wait_for(process, reached.exists)
        refused = failed(2, ["resume", run], capfd)
        process.send_signal(number)
        printed, complained = process.communicate(timeout=LIMIT_S)
    assert refused.startswith(f"{run} is in use by process {process.pid} on ")
    assert process.returncode == 75
    assert complained == "\nstopping after this update, then saving; signal again to stop immediately\n"
    name, step = "Ctrl-C" if number == signal.SIGINT else "SIGTERM", 4 if grace_s == "0" else 5
    assert f"stopped by {name} after update {step} of 10; the model is saved\n" in printed
    assert f"\nto continue: bigbatch resume {run}\n" in printed
    assert len(metrics(Path(run))) == step
    assert f"resuming {run} after update {step}\n" in said(["resume", run], capfd)
    assert differences(Path(run), reference) == []


def test_second_signal_exits_and_resume_is_bit_identical(folder: Path, base: Path, reference: Path) -> None:
    reached = folder / "reached"
    waiting = wait_for_signal_in_window(5, reached, number=2)
    with running("train", *words(base), "--out", "run", folder=folder, patch=waiting) as process:
        assert process.stderr is not None
        wait_for(process, reached.exists)
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline().startswith("stopping after this update")
        process.send_signal(signal.SIGTERM)
        _, complained = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert complained.endswith("bigbatch train: interrupted.\n")
    assert main(["resume", str(folder / "run")]) == 0
    assert differences(folder / "run", reference) == []


def test_resumed_run_restores_random_state_of_caller(folder: Path, base: Path) -> None:
    begin(folder / "run", base, until=lambda step: step == 4)
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    go_on(folder / "run")
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


# what is otherwise than it was -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_once(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten updates that was stopped after seven; in float64, without dropout."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    begin(run, plain, "--precision", "float64", until=lambda step: step == 7)
    return run


@pytest.fixture(scope="module")
def resumed_once(stopped_once: Path) -> Path:
    """The same run, resumed."""
    run = shutil.copytree(stopped_once, stopped_once.with_name("resumed"))
    assert main(["resume", str(run)]) == 0
    return run


@pytest.fixture
def stopped(folder: Path, stopped_once: Path) -> Path:
    """A copy of the stopped run."""
    return shutil.copytree(stopped_once, folder / "stopped")


def weights(run: Path) -> torch.Tensor:
    tensors = load_file(run / "model" / "model.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def test_changed_data_is_rejected_unless_allowed(folder: Path, plain: Path, capfd: Capture) -> None:
    stopped = folder / "stopped"
    begin(stopped, plain, "--data", str(folder / "data.jsonl"), until=lambda step: step == 7)
    write_jsonl(folder / "data.jsonl", [*records(39), {"prompt": "x", "completion": "another"}])
    before = everything_in(stopped)
    assert failed(2, ["resume", str(stopped)], capfd) == (
        f"the data of {stopped} has changed since the run started: {folder / 'data.jsonl'} has 39 sequences now and "
        "had 39, or their content differs. Restore it, or pass --allow-data-change."
    )
    assert everything_in(stopped) == before
    said(["resume", str(stopped), "--allow-data-change"], capfd)
    assert [row["step"] for row in metrics(stopped)] == [*range(1, 11)]


@pytest.mark.parametrize(
    ("flag", "value", "kind", "total"), [("--global-batch", "4", "batch", 13), ("--seed", "5", "seed", 10)]
)
def test_changed_batch_or_seed_is_rejected_unless_allowed(
    stopped: Path, flag: str, value: str, kind: str, total: int, capfd: Capture
) -> None:
    before = everything_in(stopped)
    sentence = failed(2, ["resume", str(stopped), flag, value], capfd)
    assert sentence.startswith(f"{stopped} was started with {flag} ")
    assert sentence.endswith(f"Leave the flag out, or pass --allow-{kind}-change.")
    assert everything_in(stopped) == before
    said(["resume", str(stopped), flag, value, f"--allow-{kind}-change"], capfd)
    assert [row["step"] for row in metrics(stopped)] == [*range(1, total + 1)]


def test_changed_settings_persist_on_next_resume(stopped: Path, capfd: Capture) -> None:
    again = stopped.with_name("again")
    shutil.copytree(stopped, again)
    change = ["--global-batch", "4", "--seed", "5", "--allow-batch-change", "--allow-seed-change"]
    said(["resume", str(stopped), *change], capfd)
    asked = TrainConfig(global_batch=4, seed=5)
    go_on(again, until=lambda step: step == 9, config=merge_config(config_of(again), asked, allowed=("batch", "seed")))
    said(["resume", str(again)], capfd)
    assert differing_results(again, stopped) == []


def test_batch_that_leaves_no_update_ends_run(stopped: Path, capfd: Capture) -> None:
    said(["resume", str(stopped), "--global-batch", "39", "--allow-batch-change"], capfd)
    assert [row["step"] for row in metrics(stopped)] == [*range(1, 9)]


def test_changed_defining_setting_is_rejected_on_resume(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        merge_config(TrainConfig(out=tmp_path, lr=0.01), TrainConfig(lr=0.5), allowed=("batch", "seed", "data"))
    assert str(caught.value) == (
        f"{tmp_path} was started with --lr 0.01 and cannot be resumed with --lr 0.5. Leave the flag out, or start a "
        "new run."
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--microbatch", "1"],
        slow(["--microbatch", "100"]),
        ["--microbatch", "auto"],
        slow(["--microbatch", "auto", "--memory", "100%"]),
        ["--token-budget", "70"],
        slow(["--gradient-checkpointing"]),
        ["--async-checkpoint", "--keep", "1", "--checkpoint-every", "1"],
    ],
    ids=" ".join,
)
def test_another_microbatch_resumes_to_same_model(
    stopped: Path, resumed_once: Path, flags: list[str], capfd: Capture
) -> None:
    said(["resume", str(stopped), *flags], capfd)
    expected = weights(resumed_once)
    assert torch.linalg.norm(weights(stopped) - expected) / torch.linalg.norm(expected) < 1e-12
    assert [row["items"] for row in metrics(stopped)] == [row["items"] for row in metrics(resumed_once)]


def test_given_microbatch_replaces_memory_limit_on_resume(tmp_path: Path) -> None:
    stored = TrainConfig(out=tmp_path, microbatch="auto", memory="24GiB").resolved()
    for given in ({"microbatch": 4}, {"token_budget": 512}):
        now = merge_config(stored, TrainConfig(**given), allowed=())
        assert now.memory is None
        assert {name: getattr(now, name) for name in given} == given
    assert merge_config(stored, TrainConfig(memory="8GiB"), allowed=()).memory == "8GiB"


def test_recomputation_can_be_set_on_resume(folder: Path, plain: Path, capfd: Capture) -> None:
    begin(folder / "run", plain, "--microbatch", "auto", until=lambda step: step == 4)
    stored = config_of(folder / "run")
    asked = merge_config(stored, TrainConfig(gradient_checkpointing="full"), allowed=())
    saved, _ = load(folder / "run")
    trainer = Trainer(set_up_training(asked), checkpoint=saved)
    trainer.run(RunDirectory(folder / "run"), callback=RecordingCallback())
    assert trainer.model_setup.checkpointing_mode == "full"
    assert trainer.engine.choice is not None
    assert saved is not None
    assert trainer.engine.choice == MicrobatchChoice.from_dict(saved.engine["engine"]["choice"])


def test_finished_run_is_reported_and_unchanged(reference: Path, capfd: Capture) -> None:
    before = everything_in(reference)
    printed = said(["resume", str(reference)], capfd)
    assert printed.endswith(f"{reference} is already finished: all 10 updates are done, the model is saved\n")
    assert everything_in(reference) == before
    assert not list(reference.rglob("*.partial"))


def test_finished_run_without_model_saves_it_again(reference: Path, capfd: Capture) -> None:
    model = (reference / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(reference / "model")
    said(["resume", str(reference)], capfd)
    assert (reference / "model" / "model.safetensors").read_bytes() == model


def test_path_without_run_is_one_sentence(folder: Path, capfd: Capture) -> None:
    run = folder / "run"
    assert failed(2, ["resume", str(run)], capfd) == f"run {run} does not exist: create one with bigbatch train."
    run.mkdir()
    assert failed(2, ["resume", str(run)], capfd) == (
        f"{run} is no run: {run / 'config.json'} cannot be read (no such file or directory)."
    )
    for content in ('{"lr": 0.1', "[]", '{"colour": "red"}', '{"lr": "fast"}', "\udce9"):
        (run / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        sentence = failed(2, ["resume", str(run)], capfd)
        assert sentence.startswith(f"{run / 'config.json'} is not the configuration of a run: ")


def test_process_killed_during_config_write_starts_nothing(folder: Path, base: Path, capfd: Capture) -> None:
    run = folder / "run"
    run.mkdir()
    (run / "config.json.1.partial").write_text('{"data": "py', encoding="utf-8")
    failed(2, ["resume", str(run)], capfd)
    said(["train", *words(base, "--out", str(run), "--steps", "1")], capfd)
    assert not (run / "config.json.1.partial").exists()


def test_changed_frozen_weights_are_rejected(folder: Path, capfd: Capture) -> None:
    base = save_model_folder(folder / "base")
    begin(folder / "run", base, "--lora-rank", "2", until=lambda step: step == 4)
    before = everything_in(folder / "run")
    save_model_folder(folder / "base")  # other random weights
    assert failed(2, ["resume", str(folder / "run")], capfd).endswith(
        "differ from those that its adapters were trained with. Restore the original model."
    )
    assert everything_in(folder / "run") == before


def test_adapters_resume_in_another_precision(folder: Path, plain: Path, capfd: Capture) -> None:
    begin(folder / "run", plain, "--lora-rank", "2", until=lambda step: step == 4)
    said(["resume", str(folder / "run"), "--precision", "float64"], capfd)
    assert len(metrics(folder / "run")) == 10


def test_model_of_another_shape_is_one_sentence(folder: Path, capfd: Capture) -> None:
    base = save_model_folder(folder / "base")
    begin(folder / "run", base, until=lambda step: step == 4)
    shutil.rmtree(base)
    save_model_folder(base, kind="gpt2")
    sentence = failed(2, ["resume", str(folder / "run")], capfd)
    assert re.fullmatch(
        r".*/step-4 is not of this model: the state lacks \d+ tensors of this model, such as .*", sentence
    )


def test_tiny_model_tokenizer_must_be_unchanged(folder: Path, capfd: Capture) -> None:
    run = folder / "run"
    settings = {"data": str(folder / "data.jsonl"), "steps": 2, "global_batch": 4, "microbatch": 4}
    config = TrainConfig(**settings, checkpoint_every=1, max_length=32, device="cpu")
    RunDirectory.create(run, set_up_training(config).config.model_dump(mode="json"))
    go_on(run, until=lambda step: step == 1)
    write_jsonl(folder / "data.jsonl", [{"text": f"quite another vocabulary {i} " * 3} for i in range(40)])
    sentence = failed(2, ["resume", str(run), "--allow-data-change"], capfd)
    assert sentence.startswith(f"the tokenizer of {run} has changed since the run started, ")


# checkpoints that are broken -------------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_broken_checkpoint_is_skipped_and_result_unchanged(
    folder: Path, base: Path, reference: Path, capfd: Capture
) -> None:
    run = folder / "run"
    begin(run, base, until=lambda step: step == 7)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-6", "step-7"]
    flip_a_byte(run / "checkpoints" / "step-7" / "optimizer.safetensors")
    printed = said(["resume", str(run)], capfd)
    assert (
        f"skipping checkpoint {run}/checkpoints/step-7: optimizer.safetensors differs from what was written (SHA"
        in printed
    )
    assert f"resuming {run} after update 6\n" in printed
    assert differences(run, reference) == []


def test_run_with_only_broken_checkpoints_restarts(folder: Path, base: Path, reference: Path, capfd: Capture) -> None:
    run = folder / "run"
    begin(run, base, until=lambda step: step == 7)
    flip_a_byte(run / "checkpoints" / "step-7" / "state.json")
    (run / "checkpoints" / "step-6" / "model.safetensors").unlink()
    printed = said(["resume", str(run)], capfd)
    assert printed.count("skipping checkpoint ") == 2
    assert "/step-6: model.safetensors is missing\n" in printed
    assert f"resuming {run} from the beginning (no checkpoint)\n" in printed
    assert differences(run, reference) == []


# no room ---------------------------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Let the system refuse longer files, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Let no file of a run be longer than eight lines of metrics."""
    run = Trainer.run

    def limited(*words: Any, **options: Any) -> Any:
        with files_of_at_most(2500):
            return run(*words, **options)

    patch.setattr(Trainer, "run", limited)


@pytest.mark.parametrize(
    ("every", "sentence"),
    [
        ("1000", "{run}/metrics.jsonl cannot be written: file too large."),
        (
            "3",
            "checkpoint step-3 could not be written to {run}/checkpoints: file too large; no other valid one exists.",
        ),
    ],
)
def test_full_disk_is_one_sentence_and_run_resumes(
    folder: Path,
    base: Path,
    uninterrupted: Callable[..., Path],
    every: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Capture,
) -> None:
    run = folder / "run"
    job = words(base, "--checkpoint-every", every)
    with monkeypatch.context() as patch:
        shorten(patch)
        assert failed(1, ["train", *job, "--out", str(run)], capfd) == sentence.format(run=run)
    assert newest(run / "checkpoints") == (None, [])
    said(["resume", str(run)], capfd)
    assert differences(run, uninterrupted("--checkpoint-every", every)) == []


@pytest.mark.parametrize("number", [slow(0), slow(3), 36, 82, slow(83), slow(164)])
@pytest.mark.parametrize("beside", [[], ["--async-checkpoint"]], ids=["", "async"])
def test_checkpoint_without_space_is_never_partial(
    folder: Path,
    base: Path,
    reference: Path,
    number: int,
    beside: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: Capture,
) -> None:
    """The writes of a checkpoint are 73."""
    run = folder / "run"
    left, counted = [number], HashedFile.write

    def full(file: HashedFile, data: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            file._file.write(bytes(data)[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        counted(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(HashedFile, "write", full)
        sentence = failed(1, ["train", *words(base, "--out", str(run), *beside)], capfd)
    assert re.fullmatch(
        rf"checkpoint step-\d+ could not be written to {run}/checkpoints: no space left on device; "
        r"(no other valid one exists|the last valid one is step-\d+)\.",
        sentence,
    )
    for path in (run / "checkpoints").iterdir():
        assert verify(path) is None
    said(["resume", str(run)], capfd)
    assert differences(run, reference) == []


def test_unsaved_model_is_saved_by_resume(
    folder: Path, base: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    run = folder / "run"

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(model_saver, "save_model", full)
        assert failed(1, ["train", *words(base, "--out", str(run))], capfd) == (
            f"{run}/model cannot be written: no space left on device. The checkpoints are complete: continue "
            f"from the last one with bigbatch resume {run}."
        )
    said(["resume", str(run)], capfd)
    assert differences(run, reference) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "quarantine.jsonl"])
@pytest.mark.usefixtures("poisoned")
def test_unopenable_line_file_is_one_sentence(folder: Path, base: Path, name: str, capfd: Capture) -> None:
    run = folder / "run"
    begin(run, base, should_abandon=lambda: True)
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    shutil.rmtree(run / "checkpoints")
    sentence = failed(1, ["resume", str(run)], capfd)
    assert sentence == f"{run / name} cannot be written: is a directory."


def test_run_in_unwritable_folder_is_rejected(folder: Path, base: Path, capfd: Capture) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    run = folder / "run"
    begin(run, base, until=lambda step: step == 4)
    (run / ".lock").unlink(missing_ok=True)
    run.chmod(0o555)
    try:
        assert failed(2, ["resume", str(run)], capfd) == f"{run} cannot be written: permission denied."
    finally:
        run.chmod(0o755)


def test_two_processes_cannot_resume_one_run(stopped: Path, capfd: Capture) -> None:
    before = everything_in(stopped)
    with RunLock(stopped):
        sentence = failed(2, ["resume", str(stopped)], capfd)
    assert sentence.startswith(f"{stopped} is in use by process {os.getpid()} on ")
    assert everything_in(stopped) == before


# the same bytes --------------------------------------------------------------------------------------------------


def test_two_deterministic_runs_give_same_bytes(folder: Path, base: Path, capfd: Capture) -> None:
    runs = [folder / "one", folder / "other"]
    for run in runs:
        said(["train", *words(base, "--out", str(run), "--deterministic", "--microbatch", "auto")], capfd)
    one, other = ({name: data for name, (_, data) in everything_in(run).items()} for run in runs)
    assert one.keys() == other.keys()
    alike = [name for name in one if not name.endswith(("manifest.json", "config.json"))]
    assert {name for name in alike if one[name] != other[name]} == set()
    assert {"metrics.jsonl", "model/model.safetensors", "checkpoints/step-10/optimizer.safetensors"} <= set(alike)
    assert all(row[name] is None for row in metrics(runs[0]) for name in CLOCK)
    assert one["model/config.json"] == other["model/config.json"]
    assert read(runs[0] / "checkpoints" / "step-10").values == read(runs[1] / "checkpoints" / "step-10").values


def test_determinism_setting_is_restored(folder: Path, base: Path) -> None:
    begin(folder / "run", base, "--deterministic", "true", "--steps", "1")
    assert not torch.are_deterministic_algorithms_enabled()


# records that are broken -----------------------------------------------------------------------------------------


def test_broken_records_are_rejected_or_skipped_and_counted(folder: Path, base: Path, capfd: Capture) -> None:
    data = folder / "data.jsonl"
    lines = data.read_text(encoding="utf-8").splitlines()
    lines[4:4] = ['{"text": ', '{"text": 3}']
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    job = words(base, "--data", str(data), "--out", str(folder / "run"))
    refused = failed(2, ["train", *job], capfd)
    assert refused.startswith(f"{data}:5: ")
    assert not (folder / "run").exists()
    printed = said(["train", *job, "--skip-broken"], capfd)
    first = refused.removesuffix(" Pass --skip-broken to leave out and count what is broken.")
    assert f"2 broken records left out; the first: {first}\n" in printed.replace("\n ", " ")
    assert f"40 records in 1 file from {data}\n" in printed
