"""``bigbatch train`` under a memory limit: the chosen micro-batch, its reuse by the next run, and refusals."""

import json
import re
import shutil
from pathlib import Path

import pytest

from bigbatch.cli import main
from support.command_line import SENTENCE, files_below
from support.language_models import metrics, records, save_model_folder, write_jsonl


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, with data and a model beside it."""
    write_jsonl(tmp_path / "data.jsonl", records(40))
    save_model_folder(tmp_path / "base")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


SMALL = ("train", "--data", "../data.jsonl", "--model", "../base", "--device", "cpu", "--steps", "1")


def trained(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*SMALL, *words]) == 0
    printed, complained = capfd.readouterr()
    assert complained == ""
    return printed


def test_microbatch_fits_memory_and_next_run_reuses_it(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reason = (
        r"\nat most [\d,]+ tokens per micro-batch(, longer samples alone)?: about [\d,]+ tokens/s, peak .* of 4\.0 GiB"
    )
    first = trained(capfd, "--memory", "4GiB")
    assert re.search(rf"{reason}[^(\n]*\n", first), first
    again = trained(capfd, "--memory", "4GiB")
    assert re.search(rf"{reason}.* \(cached by runs/base-data: same model, device and settings\)\n", again), again
    chosen = [re.search(r"\nat most ([\d,]+) tokens", printed)[1] for printed in (first, again)]
    assert chosen[0] == chosen[1]
    other = trained(capfd, "--memory", "3GiB")
    assert " of 3.0 GiB" in other
    assert "cached by" not in other
    kept = [(folder / "runs" / name / "microbatch.json").read_bytes() for name in ("base-data", "base-data-2")]
    assert kept[0] == kept[1]


def test_token_budget_is_reported_and_saved(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    printed = trained(capfd, "--token-budget", "64", "--gradient-checkpointing", "--out", "run")
    number = metrics(folder / "run")[0]["num_microbatches"]
    assert number > 1
    assert f"\nsplit into {number} micro-batches of up to 64 tokens, on cpu, float32 (affects memory only" in printed
    assert " tokens per micro-batch: " not in printed
    assert not (folder / "run" / "microbatch.json").exists()
    config = json.loads((folder / "run" / "config.json").read_text(encoding="utf-8"))
    assert (config["token_budget"], config["microbatch"], config["gradient_checkpointing"]) == (64, None, "full")


@pytest.mark.parametrize("kind", ["fsdp", "hsdp"])
def test_single_process_says_that_it_shards_nothing(folder: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    line = (
        f"\n--parallel {kind} shards nothing in a single process, which holds the whole model. Several are started "
        "with torchrun --nproc-per-node N -m bigbatch train\n"
    )
    assert line in trained(capfd, "--parallel", kind, "--microbatch", "4", "--out", "run")
    for written in ("model", "checkpoints"):
        shutil.rmtree(folder / "run" / written)
    assert main(["resume", "run"]) == 0
    assert line in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "--memory 4GiB --microbatch 4",
            r"--memory limits --microbatch auto and cannot be combined with --microbatch 4\. Remove one of them\.",
        ),
        (
            "--gpu t4 --token-budget 64",
            r"--gpu limits --microbatch auto and cannot be combined with --token-budget 64\. Remove one of them\.",
        ),
        ("--gpu t4", r"--gpu t4 needs a CUDA device, and this run is on cpu\. Pass --memory\."),
        (
            "--token-budget 31",
            r"--token-budget 31 is less than the longest sequence, which has 32 tokens and is never cut: pass "
            r"--token-budget 32 or more, or a smaller --max-length\.",
        ),
        (
            "--memory 100TiB",
            r"--memory 100TiB is more than the [\d.]+GiB that the device has: pass [\d.]+GiB or less, or a share such "
            r"as 90%\.",
        ),
        (
            "--memory 1MiB",
            r"a sample of 32 tokens needs [\d.]+ KiB \(parameters .*\), but memory is limited to 1MiB, all of "
            r"which this process uses outside of tensors\. .*\. "
            r"Here that is --max-length, --gradient-checkpointing, --precision bf16-weights and --lora-rank\.",
        ),
        (
            "--token-budget 64 --microbatch auto",
            r"--microbatch and --token-budget exclude each other: give one of them\.",
        ),
    ],
)
def test_invalid_memory_settings_are_one_sentence_without_files(
    folder: Path, words: str, expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = files_below(folder.parent)
    assert main([*SMALL, *words.split()]) == 2
    printed, complained = capfd.readouterr()
    assert SENTENCE.fullmatch(complained), complained
    assert re.fullmatch(f"bigbatch train: {expected}\n", complained), complained
    assert all(line.endswith(" …") for line in printed.splitlines()), printed
    assert files_below(folder.parent) == before
