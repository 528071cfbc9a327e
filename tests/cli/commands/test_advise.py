"""``bigbatch advise``: verdicts beside the noise scale in plain words, and branches that leave the run as it is."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from bigbatch.cli import main
from bigbatch.lm.advice.batch_advice import advise, classify, one_line
from bigbatch.lm.advice.run_evidence import RunEvidence, evidence
from bigbatch.lm.config.train_config import TrainConfig
from support.command_line import files_below, pretend_terminal, terminal_lines


def found(**changes: Any) -> RunEvidence:
    usual: dict[str, Any] = {
        "step": 100, "batch": 64.0, "microbatches": 8, "update_s": 4.0, "scale": 64.0, "low": 50.0, "high": 80.0,
        "beta2": 0.95,
    }  # fmt: skip
    return RunEvidence(**usual | changes)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "near"),
        ({"batch": 8.0}, "far below"),
        ({"batch": 1000.0}, "far above"),
        ({"batch": 17.0}, "near"),
        ({"scale": None, "low": None, "high": None}, "unknown"),
        ({"scale": math.inf, "low": 0.0, "high": None}, "unknown"),
        ({"scale": math.inf, "low": 4000.0, "high": None}, "far below"),
        ({"scale": 64.0, "low": 0.0, "high": None}, "unknown"),
        ({"batch": 1000.0, "scale": 64.0, "low": 0.0, "high": 100.0}, "far above"),
        ({"batch": 0.0}, "unknown"),
    ],
)
def test_batch_is_judged_by_noise_scale_interval(changes: dict[str, Any], verdict: str) -> None:
    assert classify(found(**changes)) == verdict


def test_advice_has_figures_and_smaller_batch() -> None:
    text = " ".join(advise(found(batch=1024.0, microbatches=16)).sentences)
    assert "The batch of 1,020 sequences is far above the gradient noise scale, about 64 sequences (50 to 80)" in text
    assert "An update takes 16 micro-batches and 4 s:" in text
    assert "a batch of 64 would reach the same loss about 8.5 times sooner" in text  # (1 + 16) / (1 + 1)
    assert "beta2 0.95 → 0.9968" in text
    assert "--global-batch 64 --scale-from 1,020" not in text, "a command takes no commas"
    assert "This is an estimate" in text


def test_advice_without_adamw_names_no_rule() -> None:
    text = " ".join(advise(found(batch=1024.0, microbatches=16, beta2=None)).sentences)
    assert (
        "about 8.5 times sooner, with a lower learning rate, to be tuned: bigbatch train --global-batch 64. The" in text
    )


def test_advice_counts_pairs_of_preference_runs() -> None:
    measured = evidence_of([{"noise_scale_sequences": 64.0, "noise_low_sequences": 10.0}] * 3, objective="dpo")
    assert (
        advise(measured).sentences[0].startswith("The batch of 32 pairs is near the gradient noise scale, about 64 p")
    )


def test_smaller_batch_gains_nothing_far_below_scale() -> None:
    advice = advise(found(batch=8.0, microbatches=4, scale=4000.0, low=3000.0, high=5000.0))
    assert (advice.verdict, advice.smaller_batch) == ("far below", None)
    assert "less than 5 % sooner: keep the batch" in " ".join(advice.sentences)


def test_single_microbatch_needs_no_accumulation() -> None:
    assert "nothing is accumulated" in advise(found(microbatches=1)).sentences[1]


def evidence_of(rows: list[dict[str, Any]], **settings: Any) -> RunEvidence:
    usual = {"num_microbatches": 4, "sequences": 32, "elapsed_s": 1.0, "skipped": None}
    numbered = [{"step": step, **usual, **row} for step, row in enumerate(rows, start=1)]
    return evidence(numbered, TrainConfig(**settings).resolved())


@pytest.mark.parametrize(
    ("rows", "settings", "reason"),
    [
        (
            [{}] * 30,
            {"precision": "fp16"},
            "it is not measured with --precision fp16, whose gradients are scaled. Train with bf16 or float32",
        ),
        (
            [{"ranks": 4}] * 30,
            {"parallel": "hsdp"},
            "it is not measured for a model that is sharded with --parallel hsdp",
        ),
        (
            [{"num_microbatches": 1}] * 30,
            {},
            "it compares micro-batches, and every update is a single one. Train with a smaller --microbatch",
        ),
        ([{}], {}, "it needs 4 updates of at least two micro-batches, and the run has 1"),
        (
            [{}, {"num_microbatches": 1}, {}, {"num_microbatches": 1}, {"skipped": "NaN gradient"}],
            {},
            "it needs 4 updates of at least two micro-batches, and the run has 2",
        ),
        ([{"skipped": "Inf gradient"}] * 9, {}, "every update was skipped (Inf gradient)"),
        (
            [{"retries": 1}] * 9,
            {},
            "micro-batches ran out of memory and were repeated in smaller pieces. Train with a smaller --microbatch",
        ),
        ([{}] * 9, {}, "the run did not record it"),
    ],
)
def test_unknown_scale_names_missing_condition(rows: list[Any], settings: dict[str, Any], reason: str) -> None:
    measured = evidence_of(rows, **settings)
    updates = "1 update" if len(rows) == 1 else f"{len(rows)} updates"
    assert advise(measured).verdict == "unknown"
    assert advise(measured).sentences[0] == f"After {updates} the gradient noise scale is unknown: {reason}."


def test_known_scale_misses_nothing() -> None:
    row = {"noise_scale_sequences": 64.0, "noise_low_sequences": 1.0, "noise_high_sequences": 90.0}
    assert evidence_of([row] * 3, precision="bf16").missing is None
    assert evidence_of([{"noise_low_sequences": 1.0}], precision="fp16").missing is None  # infinite


def test_hidden_signal_and_unknown_batch_are_distinguished() -> None:
    hidden = advise(found(scale=math.inf, low=0.0, high=None)).sentences[0]
    assert hidden == (
        "After 100 updates the gradient noise scale cannot be estimated yet: the noise hides the signal. More updates "
        "narrow the estimate."
    )
    assert advise(found(batch=0.0)).sentences[0] == (
        "After 100 updates the gradient noise scale cannot be compared with the batch: the run did not record its "
        "sequences."
    )


def test_run_prints_advice_line_only_when_known() -> None:
    assert one_line(found(scale=None, low=None, high=None)) is None
    assert one_line(found(batch=8.0)) == (
        "batch: 8 sequences, far below the gradient noise scale about 64 sequences (50 to 80): a larger batch would "
        "need few additional samples"
    )


def test_infinite_scale_is_read_from_null() -> None:
    row = {"step": 9, "num_microbatches": 2, "sequences": 32, "elapsed_s": 1.0}
    noise = {"noise_scale_items": None, "noise_scale_sequences": None, "noise_low_sequences": 5.0}
    assert evidence([{**row, **noise}], TrainConfig().resolved()).scale == math.inf
    assert evidence([row], TrainConfig().resolved()).scale is None


def test_shorter_last_window_does_not_define_batch() -> None:
    rows = [{"step": i, "num_microbatches": n, "sequences": s} for i, (n, s) in enumerate([(4, 30), (4, 30), (1, 7)])]
    asked = TrainConfig(global_batch=30).resolved()
    assert (evidence(rows, asked).batch, evidence(rows, asked).microbatches) == (30, 4)
    assert evidence(rows, TrainConfig(global_batch_tokens=900).resolved()).batch == 30
    assert evidence([*rows[:2], {**rows[2], "global_batch": 60}], asked).batch == 60


# the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("advised")
    data = folder / "data.jsonl"
    words = ("alpha", "beta", "gamma", "delta", "epsilon")
    texts = [" ".join(words[(i * j + j) % 5] for j in range(3 + i % 9)) for i in range(120)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    flags = {
        "data": data, "out": folder / "run", "steps": 6, "global-batch": 8, "microbatch": 2, "max-length": 16,
        "checkpoint-every": 3, "validation-fraction": 0.1, "device": "cpu",
    }  # fmt: skip
    assert main(["train", *(f"--{name}={value}" for name, value in flags.items())]) == 0
    return folder / "run"


def test_command_prints_sentences_and_writes_nothing(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = files_below(run)
    assert main(["advise", str(run)]) == 0
    out, complained = capfd.readouterr()
    assert complained == ""
    assert "gradient noise scale" in out
    assert "An update takes 4 micro-batches" in out
    assert files_below(run) == before


def test_json_is_one_object(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", str(run), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["batch"] == 8
    assert told["verdict"] in ("far below", "near", "far above", "unknown")


def test_branch_table_fits_forty_columns(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pretend_terminal(monkeypatch, 40)
    assert main(["advise", str(run), "--branch", "--branch-updates", "1"]) == 0
    lines = terminal_lines(capfd.readouterr().out)
    assert "  batch updates     loss  penalty      ±" in lines
    assert max(map(len, lines)) <= 40


@pytest.mark.slow
def test_branches_of_pairs_have_their_unit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"{i} plus {i}", "chosen": f"is {2 * i}", "rejected": "is odd"} for i in range(40)]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    flags = {
        "data": data, "out": tmp_path / "run", "steps": 2, "global-batch": 2, "microbatch": 1, "max-length": 32,
        "validation-fraction": 0.1, "device": "cpu", "objective": "dpo",
    }  # fmt: skip
    assert main(["train", *(f"--{name}={value}" for name, value in flags.items())]) == 0
    capfd.readouterr()
    assert main(["advise", str(tmp_path / "run"), "--branch", "--branch-updates", "1"]) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert "loss: of the held-out pairs, in nats per pair; ±: half" in out
    assert "token" not in out
    assert "sequences" not in out


def test_branches_use_same_samples_and_keep_run_unchanged(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["advise", str(run), "--branch", "--branch-updates", "1", "--json"]) == 0
    branches = json.loads(capfd.readouterr().out)["branches"]
    assert [(branch["batch"], branch["updates"]) for branch in branches] == [(8, 8), (16, 4), (32, 2), (64, 1)]
    assert branches[0]["penalty"] == branches[0]["spread"] == 0
    assert branches[0]["verdict"] == "baseline"
    assert all(branch["verdict"] in ("no penalty", "penalty", "inconclusive") for branch in branches[1:])
    assert all(branch["spread"] > 0 for branch in branches[1:])
    assert len({branch["loss"] for branch in branches}) == 4
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == kept


def test_path_without_run_is_rejected(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", str(tmp_path / "none")]) == 2
    assert "none does not exist" in capfd.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["advise", str(tmp_path / "empty")]) == 2
    assert "is not a readable run" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
def test_pipe_in_run_is_rejected(run: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    for file in {"metrics.jsonl", "config.json"} - {name}:
        (tmp_path / file).write_bytes((run / file).read_bytes())
    os.mkfifo(tmp_path / name)
    assert main(["advise", str(tmp_path)]) == 2
    assert capfd.readouterr().err == f"bigbatch advise: {tmp_path} is not a readable run: {name} is a pipe.\n"


def test_damaged_rows_are_left_out(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    rows = ['{"step": "x", "num_microbatches": 2}', '{"step": 1, "num_microbatches": null}', "[" * 100_000, "7", "{"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert main(["advise", str(tmp_path)]) == 2
    assert "has no updates yet" in capfd.readouterr().err
    good = '{"step": 3, "num_microbatches": 2, "elapsed_s": "long", "noise_scale_sequences": [1], "skipped": null}'
    (tmp_path / "metrics.jsonl").write_text("\n".join([good, *rows]), encoding="utf-8")
    assert main(["advise", str(tmp_path)]) == 0
    printed, complained = capfd.readouterr()
    assert complained == ""
    assert printed.startswith("After 3 updates the gradient noise scale is unknown: it needs 4 updates")


def test_run_without_checkpoint_has_no_branches(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    assert main(["advise", str(tmp_path), "--branch"]) == 2
    assert f"--branch needs a checkpoint, but {tmp_path} has no whole one." in capfd.readouterr().err
