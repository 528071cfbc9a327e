"""``bigbatch plan --offload`` and ``--cards``: a table, JSON with the same figures, and an exit code."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bigbatch.cli import main
from bigbatch.memory.limit import describe_bytes
from bigbatch.offload.levels import LEVELS
from support.language_models import records, save_model_folder, write_jsonl

SMALL = ("plan", "--data", "data.jsonl", "--model", "base", "--max-length", "32")
FULL = ("--gradient-checkpointing", "full")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "data.jsonl", records(20))
    save_model_folder(tmp_path / "base")
    monkeypatch.chdir(tmp_path)


def planned(capfd: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main([*SMALL, *words]) == code
    printed, complained = capfd.readouterr()
    assert complained == ""
    return printed


def test_table_is_printed_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    printed = planned(capfd, "--gpu", "h100", "--offload", "auto", *FULL, "--microbatch", "4", "--host-memory", "64GiB")
    cell = r" +[\d.]+ \wiB"
    rows = [rf"(h100)?  +{level} +full +4{cell}( +–|{cell}) +[\d.]+ ms(  ◀ fastest)?" for level in LEVELS]
    expected = [
        r"reading data\.jsonl …",
        r"measuring the documents …",
        r"predicting the memory …",
        r"base, 15,056 parameters, all trained, bf16",
        r"layers are compiled in training and need less memory than this eager-mode estimate",
        r"first update: \d+ tokens; 64\.0 GiB of host memory are available",
        "",
        r"memory  offload +checkpointing  micro-batch +card +host +update",
        *rows,
        "",
        r"card: peak of an update; host: pinned; micro-batch: in samples; update: predicted, with",
        r"  h100: 778 TFLOP/s, 3\.0 TB/s, link 48 GB/s in each direction \(assumed for PCIe 5\)",
    ]
    lines = printed.splitlines()
    assert len(lines) == len(expected), printed
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    assert sum("◀ fastest" in line for line in lines) == 1


def test_json_and_table_have_same_figures(capfd: pytest.CaptureFixture[str]) -> None:
    words = ("--gpu", "t4", "--offload", "optimizer", *FULL, "--cards", "2")
    found: dict[str, Any] = json.loads(planned(capfd, *words, "--json"))
    printed = planned(capfd, *words)
    assert f"\nfirst update: {found['tokens']} tokens on each of 2 GPUs\n" in printed
    assert "host: of all GPUs, pinned" in printed
    (row,) = found["rows"]
    assert (row["memory"], row["gpu"], row["offload"], row["checkpointing"]) == ("t4", "t4", "optimizer", "full")
    assert row["fits"] is row["supported"] is row["fastest"] is True
    assert row["host_bytes"] == 2 * -(-row["host_bytes"] // 2 // 4096) * 4096, "whole pages on two GPUs"
    figures = rf"{row['microbatch']} +{describe_bytes(row['card_bytes'])} +{describe_bytes(row['host_bytes'])} "
    assert re.search(figures, printed)
    assert row["link_is_measured"] is False


def test_nothing_that_fits_is_exit_code_one(capfd: pytest.CaptureFixture[str]) -> None:
    words = ("--memory", "1MiB", "--device", "cuda", "--offload", "optimizer", *FULL)
    if torch.cuda.is_available():
        pytest.skip("about a machine without CUDA")
    printed = planned(capfd, *words, code=1)
    assert "  does not fit\n" in printed
    assert re.search(
        r"\nno level of offload fits: the least, offload optimizer with checkpointing full, needs ", printed
    )
    assert "fastest" not in printed


def test_cards_without_offload_are_planned(capfd: pytest.CaptureFixture[str]) -> None:
    found = json.loads(planned(capfd, "--gpu", "h100", "--cards", "4", *FULL, "--json"))
    assert {row["offload"] for row in found["rows"]} == {"none"}
    assert found["cards"] == 4


def test_host_memory_without_offload_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--host-memory", "64GiB"]) == 2
    assert capfd.readouterr().err == (
        "bigbatch plan: --host-memory is for --offload: add --offload auto, or leave it out.\n"
    )
