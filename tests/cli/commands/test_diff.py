"""``bigbatch diff``: equal runs, the first update that differs, and runs that cannot be compared."""

import json
from pathlib import Path

import pytest

from bigbatch.cli import main
from bigbatch.lm.runs.fingerprints import begin_fingerprints
from bigbatch.lm.runs.identity import new_identity
from support.command_line import SENTENCE, command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, last, threads in (("one", 5, 1), ("two", 5, 1), ("three", 6, 2)):
        run = tmp_path / name
        run.mkdir()
        begin_fingerprints(run, [f"layer{i}.weight" for i in range(7)], {"num_threads": threads}, done=0)
        for step in (1, 2):
            digits = "".join(f"{last * (step - 1) + i:08x}" for i in range(7))
            with (run / "fingerprints.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "gradients": digits, "parameters": digits}) + "\n")
    return tmp_path


def test_equal_runs_exit_with_0(folder: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["diff", "one", "two"]) == 0
    assert capfd.readouterr().out == "equal in 2 updates and 7 parameters\n"
    lines = (folder / "two" / "fingerprints.jsonl").read_text().splitlines(keepends=True)
    (folder / "two" / "fingerprints.jsonl").write_text("".join(lines[:-1]))
    assert main(["diff", "one", "two"]) == 0
    assert capfd.readouterr().out == "equal in 1 update and 7 parameters; 1 update of one run only\n"


def test_different_runs_exit_with_1_and_name_parameters(folder: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["diff", "one", "three"]) == 1
    assert capfd.readouterr().out.splitlines() == [
        "update 2 is the first that differs: the gradients of 7 of 7 parameters",
        *(f"  layer{i}.weight" for i in range(5)),
        "  and 2 more",
        "the runs have another num_threads: 1 and 2",
    ]


@pytest.mark.parametrize("compiled", [False, True])
def test_settings_and_data_that_differ_are_named(folder: Path, capfd: pytest.CaptureFixture[str], compiled: bool):
    same = {
        "seed": 0,
        "num_threads": 1,
        "lr": None,
        "data": "a.jsonl",
        "out": "one",
        "microbatch": "auto",
        "parallel": "ddp",
    }
    (folder / "one" / "run-manifest.json").write_bytes(
        new_identity(same, {"data_sha256": "a", "weights_sha256": "b", "model": {"n_layer": 2}})
    )
    (folder / "three" / "run-manifest.json").write_bytes(
        new_identity(
            same | {"seed": 1, "num_threads": 2, "lr": 0.1, "out": "three", "microbatch": 4},
            {"data_sha256": "c", "weights_sha256": "d", "model": {"n_layer": 2}, "compiled_layers": compiled},
        )
    )
    assert main(["diff", "one", "three"]) == 1
    assert capfd.readouterr().out.splitlines()[6:] == [
        "  and 2 more",
        "the runs have another num_threads: 1 and 2",
        "the runs have another --lr: none and 0.1",
        "the runs have another --seed: 0 and 1",
        "the runs have other documents",
        "the runs have other initial weights",
        *["the runs have compiled layers in one and layers in eager mode in the other"] * compiled,
    ]
    assert main(["diff", "one", "two"]) == 0
    assert capfd.readouterr().out == "equal in 2 updates and 7 parameters\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["one"], "bigbatch diff: diff compares two runs, not 1: pass two run directories.\n"),
        (["one", "two", "three"], "bigbatch diff: diff compares two runs, not 3: pass two run directories.\n"),
        (["one", "tow"], "bigbatch diff: run tow does not exist: create one with bigbatch train.\n"),
        (
            ["one", "empty"],
            "bigbatch diff: empty has no fingerprints.jsonl: start it with bigbatch train --reproducible.\n",
        ),
    ],
)
def test_runs_that_cannot_be_compared_exit_with_2(folder: Path, words: list[str], sentence: str):
    (folder / "empty").mkdir()
    done = command("diff", *words, folder=folder)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence)
    assert SENTENCE.fullmatch(done.stderr)
