"""The script benchmarks/rivals.py, on a tiny workload."""

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bigbatch.lm.bench.bigbatch_runner import BigbatchRunner
from bigbatch.lm.bench.entries import Entry
from bigbatch.lm.bench.workload import WORKLOADS
from support.language_models import TINY_WORKLOAD

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "rivals.py"
lab = SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def test_defaults_are_contestants_of_every_workload() -> None:
    for (workload, _), names in lab.DEFAULTS.items():
        assert workload in WORKLOADS
        assert next(iter(lab.entries_of(names))) == Entry("bigbatch", None)
    assert lab.entries_of("bigbatch-torch,bigbatch-by-hand:6,torchtitan-varlen:3") == [
        Entry("bigbatch-torch", None),
        Entry("bigbatch-by-hand", 6),
        Entry("torchtitan-varlen", 3),
    ]
    by_hand = lab.make(Entry("bigbatch-by-hand", 6))
    assert isinstance(by_hand, BigbatchRunner)
    assert by_hand._tokens == 12_288


def test_dry_run_ends_with_short_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(lab.main.__globals__, "DRY", TINY_WORKLOAD)
    names = "bigbatch,bigbatch-by-hand:1,torchtitan-varlen:1,hand-written:1,hand-written-sdpa:1"
    monkeypatch.setattr(sys, "argv", ["rivals.py", "--dry", "--only", names, "--out", str(tmp_path), "--rounds", "2"])
    lab.main()
    printed, said = capsys.readouterr()
    path = tmp_path / "rivals-w-small-unlimited-cpu.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert "\n".join(lines) in printed
    assert re.search(r"^\[ *\d+\.\d s\] hand-written:1: [\d,]+ tokens/s, first update after \d", said, re.MULTILINE)
    assert "bigbatch: choosing the micro-batch" in said
    assert sum(line.startswith("  hand-written:1  ") and len(line.split()) == 3 for line in lines) == 1
    *_, titan, by_hand, across, ratio = lines
    figures = r" +[\d,]+ +– +– +{} +\d+\.\d s"
    assert re.fullmatch("hand-written:1" + figures.format(r"1\.00000"), by_hand)
    assert re.fullmatch("hand-written-sdpa:1" + figures.format(r"0\.\d{5}"), across)
    assert titan.startswith("torchtitan-varlen:1  ")
    assert re.fullmatch(r"bigbatch is × [\d.]+ of hand-written(-sdpa)?:1, the fastest hand-written", ratio)
    assert any(re.fullmatch("bigbatch-by-hand:1" + figures.format(r"1\.00000"), line) for line in lines)
