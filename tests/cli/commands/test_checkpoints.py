"""``bigbatch checkpoints``: lines or JSON, verdicts in the exit code, and no torch."""

import json
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from bigbatch.cli import main
from support.checkpoints import save
from support.command_line import files_below


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "mine"
    run.mkdir()
    for step in (20, 100, 3):
        save(run / "checkpoints", step)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "mine")


def printed(capfd: pytest.CaptureFixture[str], code: int, *words: str | Path) -> str:
    assert main(["checkpoints", *map(str, words)]) == code
    out, complained = capfd.readouterr()
    assert complained == ""
    return out


def refused(capfd: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["checkpoints", *map(str, words)]) == 2
    out, complained = capfd.readouterr()
    assert out == ""
    return complained.removeprefix("bigbatch checkpoints: ").rstrip("\n")


def test_every_checkpoint_has_line_and_newest_is_last(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = files_below(run)
    lines = printed(capfd, 0, run).splitlines()
    assert lines[0] == "verifying checkpoints …"
    assert [line.split()[0] for line in lines[1:4]] == ["step-3", "step-20", "step-100"]
    for line in lines[1:4]:
        assert re.fullmatch(r"step-\d+ +\d\.\d KiB  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d  whole", line)
    assert lines[4:] == ["newest whole checkpoint: step-100"]
    assert files_below(run) == before


def test_broken_checkpoint_and_newest_intact_are_named(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.truncate(run / "checkpoints" / "step-100" / "state.json", 1)
    (run / "checkpoints" / "step-20" / "manifest.json").write_bytes(b"")
    said = printed(capfd, 0, run)
    assert "NOT whole: state.json has 1 bytes, and the manifest says " in said
    assert re.search(r"\nstep-20 .* time unknown         NOT whole: manifest\.json is not JSON\n", said)
    assert said.endswith("\nnewest whole checkpoint: step-3\n")


def test_exit_code_is_1_without_intact_checkpoint(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for path in (run / "checkpoints").iterdir():
        (path / "model.safetensors").unlink()
    assert printed(capfd, 1, run).endswith("\nno checkpoint is whole\n")
    assert json.loads(printed(capfd, 1, run, "--json"))["newest_whole_step"] is None


def test_json_has_same_entries_and_utc_times(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step-100" / "extra").touch()
    found = json.loads(printed(capfd, 0, run, "--json"))
    assert (found["run"], found["newest_whole_step"]) == (str(run), 20)
    assert [kept["step"] for kept in found["checkpoints"]] == [3, 20, 100]
    first, _, last = found["checkpoints"]
    assert (first["whole"], first["reason"]) == (True, None)
    assert datetime.fromisoformat(first["written_at"]).utcoffset() is not None
    assert first["bytes"] == sum(file.stat().st_size for file in (run / "checkpoints" / "step-3").iterdir())
    assert (last["whole"], last["reason"]) == (False, "extra does not belong to it")


def test_bad_input_is_one_sentence(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    near = run.with_name("mien")
    assert refused(capfd, near) == f"run {near} does not exist: did you mean {run}?"
    shutil.rmtree(run / "checkpoints")
    (run / "config.json").write_text("{}")
    assert refused(capfd, run) == (f"{run} has no checkpoint yet: a run saves them in {run / 'checkpoints'}.")
    assert refused(capfd) == "RUN is missing: pass the directory of a run, such as runs/tiny-python-stdlib."
    assert refused(capfd, "a", "b") == "unexpected argument 'b': checkpoints accepts one RUN."
    assert refused(capfd, run, "--jsn") == "unknown flag --jsn: did you mean --json?"


def test_folder_of_runs_is_no_run_and_names_them(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = run.with_name("first")
    other.mkdir()
    (other / "run-manifest.json").touch()
    folder = run.parent
    for name in ("model", "notes"):
        (folder / name).mkdir()
    (folder / "model" / "config.json").touch()
    assert refused(capfd, folder) == (
        f"{folder} is no run: it has no config.json. Name one of the runs in it: {other}, {run}."
    )
    for number in range(5):
        (folder / f"old-{number}" / "checkpoints").mkdir(parents=True)
    assert refused(capfd, folder).endswith(f"{run}, {folder}/old-0, {folder}/old-1, {folder}/old-2 and 2 more.")
    assert refused(capfd, folder / "notes") == f"{folder / 'notes'} is no run: it has no config.json."


def test_unreadable_folder_is_a_failure(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").touch()
    assert main(["checkpoints", str(run)]) == 1
    complained = f"bigbatch checkpoints: the checkpoints in {run / 'checkpoints'} cannot be listed: not a directory.\n"
    assert capfd.readouterr() == ("", complained)


@pytest.mark.parametrize(("words", "watched"), [(["--help"], ("torch", "rich", "safetensors")), (["RUN"], ("torch",))])
def test_command_loads_no_torch(words: list[str], watched: tuple[str, ...], run: Path) -> None:
    words = [str(run) if word == "RUN" else word for word in words]
    script = (
        f"import sys; from bigbatch.cli import main; code = main(['checkpoints', *{words!r}]);"
        f"print(code, [name for name in {watched!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
