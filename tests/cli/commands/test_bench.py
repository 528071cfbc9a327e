"""``bigbatch bench``: a table or JSON, a file only where one is asked for, and one sentence where it cannot begin."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from bigbatch.cli import main
from bigbatch.cli.commands import bench
from bigbatch.cli.commands.bench import describe
from bigbatch.cli.options import BenchOptions
from bigbatch.errors import MemoryLimitError
from bigbatch.lm.bench import bigbatch_runner
from bigbatch.lm.bench.benchmark import BenchmarkResult, ContestantResult
from bigbatch.lm.bench.entries import SAMPLES, missing
from bigbatch.lm.bench.meter import Similarity
from bigbatch.lm.bench.workload import WORKLOADS
from bigbatch.lm.device import DeviceSpec
from support.command_line import SENTENCE, files_below
from support.language_models import TINY_WORKLOAD


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, and a workload that takes a second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(WORKLOADS, "w-small", TINY_WORKLOAD)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    return tmp_path


SMALL = ("bench", "--workload", "w-small", "--rounds", "1")


@pytest.mark.slow
def test_table_lists_every_tool_and_nothing_is_written(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL]) == 0
    printed, said = capfd.readouterr()
    first, second, *_ = printed.splitlines()
    assert re.fullmatch(r"CPU \(.+ threads\), torch .+, transformers .+, bigbatch .+, Python 3.+", first)
    assert re.fullmatch(
        r"w-small: Qwen2, 0\.\dM parameters, float32; 8 sequences, \d+ tokens per update; no memory limit; 1 round",
        second,
    )
    assert re.search(r"^bigbatch +auto +[\d,]+ +× 1\.00 +1\.00000 +1\.000$", printed, re.MULTILINE)
    for name in [name for name in SAMPLES if name != "bigbatch"]:
        figures = r"[\d,]+ +× [\d.]+ +[01]\.\d{5} +\d\.\d{3}"
        expected = re.escape(reason) if (reason := missing(name)) else figures
        assert re.search(rf"^{name} +\d+ +{expected}$", printed, re.MULTILINE), name
        assert f"\n{name}: " in printed
    assert "GiB" not in printed.partition("\n\n")[2].partition("\n\n")[0]  # no peak where nothing counts it
    assert said.splitlines()[0] == "loading torch and transformers …"
    assert "round 1 of 1: trainer:1 …" in said.splitlines()
    assert files_below(folder) == set()


def test_json_is_one_object_and_file_has_table(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert main([*SMALL, "--only", "bigbatch,accelerate:3,bigbatch", "--json", "--save", "a table.txt"]) == 0
    found = json.loads(capfd.readouterr().out)
    command = (
        "PYTORCH_ALLOC_CONF=expandable_segments:True bigbatch bench --workload w-small --rounds 1 "
        "--only bigbatch,accelerate:3,bigbatch --save 'a table.txt'"
    )
    assert (found["command"], found["workload"], found["sequences"], found["memory"]) == (command, "w-small", 8, None)
    assert found["versions"]["torch"] == torch.__version__
    ours, theirs = found["rows"]
    assert (ours["name"], ours["samples"], ours["ratio"], ours["problem"]) == ("bigbatch", None, 1.0, None)
    assert (theirs["name"], theirs["samples"]) == ("accelerate", 3)
    assert theirs["ratio"] == pytest.approx(ours["tokens_per_s"] / theirs["tokens_per_s"])
    assert ours["cosine"] > 1 - 1e-6
    assert theirs["cosine"] < 0.99
    assert files_below(folder) == {"a table.txt"}
    lines = (folder / "a table.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"$ {command}"
    assert lines[1].startswith("CPU (")
    assert any(line.startswith("accelerate ") for line in lines)


def test_exit_code_reports_missing_own_figures(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_little(*_: object, **__: object) -> None:
        raise MemoryLimitError("a single sample does not fit")

    monkeypatch.setattr(bigbatch_runner, "make_engine", too_little)
    assert main([*SMALL, "--only", "bigbatch"]) == 1
    assert re.search(r"^bigbatch +auto  out of memory$", capfd.readouterr().out, re.MULTILINE)


NAMES = (
    "it must be bigbatch, trainer, trainer-checkpointing, trainer-expert, accelerate, lightning, torchtitan, "
    "torchtitan-varlen, hand-written or hand-written-sdpa"
)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--only", "trianer"], f"--only contains 'trianer': {NAMES}."),
        (["--only", "trainer,"], f"--only contains '': {NAMES}."),
        (
            ["--only", "trainer:0"],
            "--only contains 'trainer:0': after the colon comes a number of samples, such as trainer:4.",
        ),
        (
            ["--only", "bigbatch:4"],
            "--only contains 'bigbatch:4': bigbatch chooses its micro-batch; only the others accept a number of "
            "samples.",
        ),
        (["--rounds", "0"], "--rounds is 0: it must be at least 1."),
        (["--workload", "x"], "--workload is 'x': it must be auto, w, w-1.5b, w-lora, w-7b-lora or w-small."),
        (["--memory", "24"], "--memory is 24: it needs a unit, such as 24GiB."),
        (["--save", ""], "--save is '': it must not be empty."),
        (["--save", "."], "--save . is a folder: pass a file, such as bench.txt."),
        (
            ["--save", "no/file"],
            "--save no/file cannot be written: the folder no does not exist. Create it, or pass another file.",
        ),
        (["--samples", "4"], "unknown flag --samples: see bigbatch bench --help."),
    ],
)
def test_invalid_comparison_is_one_sentence(
    words: list[str], expected: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 2
    printed, said = capfd.readouterr()
    assert printed == ""
    assert SENTENCE.fullmatch(said)
    assert said == f"bigbatch bench: {expected}\n"
    assert files_below(folder) == set()


def test_large_workload_needs_cuda(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.find_workload("auto") is TINY_WORKLOAD
    for name in ("w", "w-1.5b", "w-7b-lora"):
        assert main(["bench", "--workload", name]) == 2
        said = capfd.readouterr().err.splitlines()[-1]
        assert said == (
            f"bigbatch bench: --workload {name} needs a CUDA device, but torch finds none: use --workload w-small."
        )


def test_known_card_adds_share_of_matrix_rate() -> None:
    row = ContestantResult(
        "bigbatch", "one line", None, (1200.0,), 3 * 2**30, Similarity(1.0, 1.0), first_update_s=12.34
    )
    device = DeviceSpec(torch.device("cpu"), "bf16")
    result = BenchmarkResult(TINY_WORKLOAD, device, None, 1, 10**6, 8, 64, (row,), 64 * 10**9, 2e12)
    assert result.share(row) == pytest.approx(0.6)  # 1,200 tokens/s of a billion operations each
    table = list(describe(result))
    assert table[3].split() == ["samples", "tokens/s", "speedup", "share", "GiB", "cosine", "norm"]
    assert table[4].split() == ["bigbatch", "auto", "1,200", "×", "1.00", "0.600", "3.00", "1.00000", "1.000"]
    assert len(table[4]) == len(table[3])
    assert "bigbatch: one line; first update after 12.3 s" in table
    text = " ".join(line.strip() for line in table)
    assert (
        "share: of 2 TFLOP/s, the rate of large bf16 matrix products on this card; per token 6 operations for each "
        "weight (4 for a frozen one), and those of attention within documents."
    ) in text
    assert ", share 0.600, 3.00 GiB" in list(describe(result, width=89))[3]
    assert list(describe(result, width=90))[3].split()[0] == "samples"
    assert bench.as_json(result, BenchOptions())["rows"][0]["share"] == pytest.approx(0.6)
    assert bench.as_json(result, BenchOptions())["rows"][0]["first_update_s"] == 12.34


@pytest.mark.parametrize("peak_bytes", [None, 3 * 2**30])
def test_rows_become_sentences_below_table_width(peak_bytes: int | None) -> None:
    rows = (
        ContestantResult("bigbatch", "one line", None, (1200.0,), peak_bytes, (1.0, 1.0)),
        ContestantResult("trainer", "per_device_train_batch_size", 4, (600.0,), peak_bytes, (0.98765, 1.25)),
        ContestantResult("lightning", "Fabric", 8, problem="out of memory"),
    )
    result = BenchmarkResult(TINY_WORKLOAD, DeviceSpec(torch.device("cpu"), "float32"), None, 1, 10**6, 8, 64, rows)
    peak = "" if peak_bytes is None else ", 3.00 GiB"
    assert list(describe(result, width=40))[3:6] == [
        f"bigbatch: samples auto, tokens/s 1,200, speedup × 1.00{peak}, cosine 1.00000, norm 1.000",
        f"trainer: samples 4, tokens/s 600, speedup × 2.00{peak}, cosine 0.98765, norm 1.250",
        "lightning: samples 8, out of memory",
    ]
    assert max(map(len, list(describe(result, width=40))[7:])) <= 40
    columns = 82 if peak_bytes else 74
    assert list(describe(result, width=columns))[3].split()[:2] == ["samples", "tokens/s"]
    assert list(describe(result, width=columns - 1))[3].startswith("bigbatch: ")
    assert max(map(len, list(describe(result, width=columns))[3:7])) == columns


def test_output_file_must_be_regular(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(folder / "pipe")
    assert main(["bench", "--save", "pipe"]) == 2
    assert capfd.readouterr().err == "bigbatch bench: --save pipe is a pipe: pass a file, such as bench.txt.\n"
