"""Several sources, splits and validation data reach every command, and a run resumes only on the same ones."""

import json
from pathlib import Path

import pytest

from bigbatch.cli import main

FLAGS = ("--device", "cpu", "--microbatch", "2")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b:c d.jsonl", "v.jsonl"):
        (tmp_path / name).write_text("".join(f'{{"text": "{name} {i}"}}\n' for i in range(4)))
    return tmp_path


def refused(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    capfd.readouterr()
    assert main([*words]) == 2
    return capfd.readouterr().err


def test_run_resumes_on_same_sources_only(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--data", "a.jsonl", "b:c d.jsonl", "--validation-data", "v.jsonl", "--steps", "2"]
    assert main([*words, "--out", "run", *FLAGS]) == 0
    printed = capfd.readouterr().out
    assert "reading a.jsonl 'b:c d.jsonl' …" in printed
    assert "training data: 8 documents" in printed
    assert "validation data: 4 documents" in printed
    assert "bigbatch verify --data a.jsonl 'b:c d.jsonl'   checks" in printed
    config = json.loads((folder / "run" / "config.json").read_text())
    assert (config["data"], config["validation_data"]) == (["a.jsonl", "b:c d.jsonl"], "v.jsonl")
    assert main(["resume", "run", "--data", "a.jsonl", "b:c d.jsonl"]) == 0
    assert "run is already finished" in capfd.readouterr().out
    assert refused(capfd, "resume", "run", "--data", "a.jsonl") == (
        "bigbatch resume: run was started with --data a.jsonl 'b:c d.jsonl', and --data a.jsonl would change the data. "
        "Leave the flag out, or pass --allow-data-change.\n"
    )
    assert refused(capfd, "resume", "run", "--validation-data", "a.jsonl").startswith(
        "bigbatch resume: run was started with --validation-data v.jsonl, and --validation-data a.jsonl would change"
    )
    assert refused(capfd, "resume", "--data", "a.jsonl", "run") == (
        "bigbatch resume: RUN is missing: pass the directory of a run, such as runs/tiny-python-stdlib, before --data, "
        "which accepts every value after it.\n"
    )
    assert main(["report", "run"]) == 0
    assert "a.jsonl, b:c d.jsonl" in (folder / "run" / "report.html").read_text()


def test_interrupted_run_of_several_sources_resumes(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--data", "a.jsonl", "--data", "b:c d.jsonl", "--steps", "3", "--checkpoint-every", "1"]
    assert main([*words, "--out", "run", "--global-batch", "2", *FLAGS]) == 0
    final = max((folder / "run" / "checkpoints").iterdir())
    metrics = (folder / "run" / "metrics.jsonl").read_text()
    for path in sorted(final.rglob("*"), reverse=True):
        path.unlink()
    final.rmdir()
    capfd.readouterr()
    assert main(["resume", "run"]) == 0
    assert "resuming run after update 2" in capfd.readouterr().out
    losses = [[json.loads(line)["loss"] for line in text.splitlines()] for text in
              (metrics, (folder / "run" / "metrics.jsonl").read_text())]  # fmt: skip
    assert losses[0] == losses[1]


def test_plan_and_verify_accept_several_sources(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "a.jsonl", "b:c d.jsonl", *FLAGS]
    assert main(["plan", *words, "--memory", "2GiB"]) == 0
    capfd.readouterr()
    assert main(["verify", *words, "--samples", "4", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["data"] == "a.jsonl 'b:c d.jsonl'"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data a.jsonl --split dev", "--split dev does nothing: a.jsonl has no splits. Leave it out."),
        ("--data a.jsonl --split x --split y", "--split is given twice, as 'x' and 'y': give it once."),
        (
            "--data a.jsonl v.jsonl --validation-data v.jsonl",
            "v.jsonl would be trained on and validated on: it is in v.jsonl, given twice. Leave it out of one of them.",
        ),
        ("--data a.jsonl no.jsonl", "there is no file or folder 'no.jsonl'. Did you mean v.jsonl or a.jsonl?"),
        ("--data a.jsonl --validation-data no.txt", "there is no file or folder 'no.txt'. The built-in sources are "
         "python-stdlib and python-stdlib-functions."),
        ("--data a.jsonl,v.jsonl", "there is no file or folder 'a.jsonl,v.jsonl'. Separate several sources with "
         "spaces: --data a.jsonl v.jsonl."),
        ("--train-file a.jsonl", "unknown flag --train-file: did you mean --data?"),
    ],
)  # fmt: skip
def test_bad_data_flags_are_one_sentence(words: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert refused(capfd, "train", *words.split()) == f"bigbatch train: {message}\n"
