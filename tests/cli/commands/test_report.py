"""``bigbatch report``: the page and its path, error messages, and ``--watch``."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from html import unescape
from pathlib import Path

import pytest

from bigbatch.cli import main
from bigbatch.cli.arguments import parse
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.lock import RunLock
from support.command_line import LIMIT_S, files_below, running
from support.forked_processes import wait_for
from support.run_directories import BEGIN, make_rich_run, make_run, rows

REFRESH = 'http-equiv="refresh"'


def printed(capfd: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["report", *map(str, words)]) == 0
    out, complained = capfd.readouterr()
    assert complained == ""
    return out


def refused(capfd: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["report", *map(str, words)]) == 2
    out, complained = capfd.readouterr()
    assert out == ""
    return complained.removeprefix("bigbatch report: ").rstrip("\n")


def test_page_is_written_to_run_directory_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_rich_run(tmp_path / "rich")
    before = files_below(run)
    said = printed(capfd, run)
    assert re.fullmatch(rf"{re.escape(str(run))}/report\.html: \d+\.\d KiB, finished after 300 updates\n", said)
    assert files_below(run) == before | {"report.html"}
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "Finished: 300 of 300 updates done." in html
    assert REFRESH not in html
    printed(capfd, run)  # over the page before


def test_out_sets_the_path_of_the_page(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", rows(3))
    before = files_below(run)
    printed(capfd, run, "--out", tmp_path / "page.html")
    assert (tmp_path / "page.html").is_file()
    assert files_below(run) == before


def words_of(page: Path) -> str:
    return " ".join(unescape(re.sub("<[^>]*>", " ", page.read_text(encoding="utf-8"))).split())


def test_advice_is_that_of_advise(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    noise = {"noise_scale_sequences": 60.0, "noise_low_sequences": 40.0, "noise_high_sequences": 90.0}
    run = make_run(tmp_path / "run", [row | noise | {"noise_scale_items": 7000.0} for row in rows(9)])
    printed(capfd, run)
    assert main(["advise", str(run)]) == 0
    first = " ".join(capfd.readouterr().out.split()).partition(". ")[0]
    assert first.startswith(
        "The batch of 32 sequences is 0.53 times the gradient noise scale, about 60 sequences (40 to 90)"
    )
    assert f"{first}. See also bigbatch advise {run}" in words_of(run / "report.html")


def test_commands_suit_state_of_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stopped = make_run(tmp_path / "stopped", rows(3), events=[BEGIN, {"event": "stopped", "step": 3, "why": "SIGTERM"}])
    printed(capfd, stopped)
    assert f"Next: bigbatch resume {stopped} updates" in words_of(stopped / "report.html")
    settings = {"steps": 3, "sample_prompt": "a b", "max_length": 64, "global_batch": 48}
    done = make_run(tmp_path / "done", rows(3), settings=settings)
    (done / "model").mkdir()
    printed(capfd, done)
    longer = f"bigbatch train --model {done}/model --max-length 64 --global-batch 48 --steps 3"
    assert "bigbatch resume" not in words_of(done / "report.html")
    assert f"{longer} trains the model for longer, as a new run" in words_of(done / "report.html")
    assert f'bigbatch generate {done} "a b"' in words_of(done / "report.html")
    config, *_ = parse("train", shlex.split(longer)[2:])
    assert isinstance(config, TrainConfig)
    assert (config.model, config.max_length, config.steps) == (f"{done}/model", 64, 3)
    events = [BEGIN | {"chats": True}, {"event": "finished"}]
    for message, given in (("a b", settings), ("Hello", {"steps": 3})):
        chat = make_run(tmp_path / message, rows(3), settings=given, events=events)
        (chat / "model").mkdir()
        printed(capfd, chat)
        assert f'bigbatch generate {shlex.quote(str(chat))} --chat "{message}"' in words_of(chat / "report.html")


def test_running_run_has_no_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", rows(3))
    with RunLock(run):
        printed(capfd, run)
    assert "Next:" not in words_of(run / "report.html")


def test_several_runs_share_page_in_first_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / name, rows(5, seed=place)) for place, name in enumerate(("one", "two", "three"))]
    said = printed(capfd, *runs)
    assert said.startswith(f"{runs[0]}/comparison.html: ")
    assert said.endswith("one finished, two finished, three finished\n")
    html = (runs[0] / "comparison.html").read_text(encoding="utf-8")
    assert "one vs. two vs. three" in html
    assert not (runs[0] / "report.html").exists()


def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "mine", rows(3))
    (tmp_path / "empty").mkdir()
    before = files_below(tmp_path)
    near = tmp_path / "mien"
    assert refused(capfd) == "RUN is missing: pass the directory of a run, such as runs/tiny-python-stdlib."
    assert refused(capfd, run, near) == f"run {near} does not exist: did you mean {run}?"
    assert refused(capfd, tmp_path / "empty").startswith(f"{tmp_path / 'empty'} is not a run: it has neither ")
    assert refused(capfd, run, "--out", run / "config.json") == (
        f"--out {run / 'config.json'} exists and is not a report: it would be overwritten. Name another file."
    )
    assert refused(capfd, run, "--out", run) == f"--out {run} is a folder: name a file, such as {run / 'report.html'}."
    assert refused(capfd, run, "--out", tmp_path / "no" / "a.html") == (
        f"--out {tmp_path / 'no' / 'a.html'} cannot be written: there is no folder {tmp_path / 'no'}."
    )
    assert refused(capfd, run, "--out", "/dev/zero") == "--out /dev/zero is a device: name a file, such as report.html."
    assert refused(capfd, run, "--wacth") == "unknown flag --wacth: did you mean --watch?"
    assert refused(capfd, *[run] * 9) == "9 runs are too many for one page: name at most 8."
    assert files_below(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_run_directory_of_another_user_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", rows(3))
    run.chmod(0o500)
    try:
        said = refused(capfd, run)
    finally:
        run.chmod(0o700)
    assert said == f"{run / 'report.html'} cannot be written: {run} is not writable. Pass --out FILE."


def test_folder_without_write_access_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", rows(3))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert refused(capfd, run) == (f"{run / 'report.html'} cannot be written: {run} is not writable. Pass --out FILE.")


def add(run: Path, step: int) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(f'{{"step": {step}, "loss": {step / 10}}}\n')


def test_watched_run_is_rewritten_until_it_ends(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows(4), events=[BEGIN | {"total_steps": 9}])
    place = run / "report.html"

    def holds(words: str) -> Callable[[], bool]:
        return lambda: place.is_file() and words in place.read_text(encoding="utf-8")

    held = ExitStack()
    held.enter_context(RunLock(run))
    with held, running("report", str(run), "--watch", folder=tmp_path) as process:
        wait_for(process, holds("Running: 4 of 9 updates done."))
        assert holds(REFRESH)()
        add(run, 5)
        wait_for(process, holds("Running: 5 of 9 updates done."))
        assert holds(REFRESH)()
        add(run, 6)
        held.close()
        out, complained = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, complained) == (0, "")
    assert out.endswith("report.html: ended unexpectedly after 6 updates\n")
    assert holds("not finished: 6 of 9 updates done.")()
    assert not holds(REFRESH)()


def test_ctrl_c_ends_watch_with_static_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows(4), events=[BEGIN | {"total_steps": 9}])
    with RunLock(run), running("report", str(run), "--watch", folder=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline().endswith("running after 4 updates\n")
        assert process.stdout.readline() == "rewriting the page after every update; press Ctrl-C to stop\n"
        process.send_signal(signal.SIGINT)
        out, complained = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, complained) == (0, "")
    assert out.endswith(f"\n{run / 'report.html'}: running after 4 updates\n")
    html = (run / "report.html").read_text(encoding="utf-8")
    assert REFRESH not in html
    assert "Running: 4 of 9 updates done." in html


def test_watch_of_an_ended_run_writes_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", rows(4))
    assert len(printed(capfd, run, "--watch").splitlines()) == 1
    assert REFRESH not in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("words", [["--help"], ["RUN"], ["RUN", "RUN"]])
def test_command_loads_no_torch(words: list[str], tmp_path: Path) -> None:
    run = make_rich_run(tmp_path / "run")
    words = [str(run) if word == "RUN" else word for word in words]
    script = (
        f"import sys; from bigbatch.cli import main; code = main(['report', *{words!r}]);"
        "print(code, [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
