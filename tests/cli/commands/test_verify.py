"""``bigbatch verify``: a table or JSON, and an exit code that says whether every cut is exact."""

import json
import re
from pathlib import Path

import pytest

from bigbatch.cli import main
from bigbatch.cli.commands.verify import default_cuts
from support.command_line import SENTENCE, command, files_below, pretend_terminal, terminal_lines
from support.language_models import conversations, records, save_model_folder, write_jsonl
from support.tiers import slow


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_jsonl(tmp_path / "data.jsonl", records(40))
    save_model_folder(tmp_path / "base")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


SMALL = ("verify", "--data", "../data.jsonl", "--model", "../base")


def test_table_shows_every_cut_and_mean_of_means(folder: Path) -> None:
    done = command(*SMALL, "--samples", "9", folder=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "../base on ../data.jsonl, cpu, float32\ngradient of 9 samples" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line[:12].strip().isdigit()]
    assert [(int(cut), int(number)) for cut, number, *_ in rows] == [(1, 9), (2, 5), (3, 3), (4, 3), (8, 2)]
    assert all(float(exact) < 1e-5 and float(naive) > 1e-2 for _, _, exact, naive in rows)
    assert done.stdout.endswith("exact: every cut gives the full-batch gradient\n")
    assert files_below(folder) == set()


def test_json_is_one_object_and_nothing_else(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json", "--precision", "float64", "--cuts", "2,5", "--samples", "10"]) == 0
    printed, complained = capfd.readouterr()
    assert complained == ""
    proof = json.loads(printed)
    assert (proof["exact"], proof["dtype"], proof["num_samples"]) == (True, "float64", 10)
    assert [cut["microbatch"] for cut in proof["cuts"]] == [2, 5]
    assert proof["relative_error"] < 1e-12


def test_dropout_is_inexact_and_named(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_model_folder(folder.parent / "drops", kind="gpt2", dropout=0.1)
    words = ["verify", "--data", "../data.jsonl", "--model", "../drops"]
    assert main(words) == 1
    printed = capfd.readouterr().out
    assert "NOT exact" in printed
    assert "cause: " in printed
    assert "ropout" in printed[printed.index("cause: ") :]
    assert main([*words, "--json"]) == 1
    proof = json.loads(capfd.readouterr().out)
    assert not proof["exact"]
    assert any("ropout" in cause for cause in proof["causes"])


@pytest.mark.parametrize(
    "extra", [slow(["--lora-rank", "2"]), slow(["--precision", "bf16-weights"]), ["--precision", "bf16"]]
)
def test_every_training_setting_is_verified(folder: Path, extra: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *extra]) == 0
    assert capfd.readouterr().err == ""


def test_conversations_are_verified(folder: Path) -> None:
    write_jsonl(folder.parent / "chat.jsonl", conversations(12))
    assert main(["verify", "--data", "../chat.jsonl", "--model", "../base", "--cuts", "1,3"]) == 0


def test_cut_larger_than_batch_is_one_microbatch(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--samples", "4", "--cuts", "100"]) == 0
    assert [line.split()[:2] for line in capfd.readouterr().out.splitlines() if line[:12].strip().isdigit()] == [
        ["100", "1"]
    ]


def test_one_sequence_cannot_be_cut(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--samples", "1"]) == 2
    said = capfd.readouterr().err
    assert SENTENCE.fullmatch(said)
    assert said == "bigbatch verify: a batch of 1 sequence cannot be split: pass --samples 2 or more, or more data.\n"
    write_jsonl(folder.parent / "one.jsonl", records(1))
    assert main(["verify", "--data", "../one.jsonl", "--model", "../base"]) == 2
    assert capfd.readouterr().err == said
    assert files_below(folder) == set()


def test_default_cuts_are_powers_of_two_and_three() -> None:
    assert default_cuts(2) == [1]
    assert default_cuts(3) == [1, 2]
    assert default_cuts(4) == [1, 2, 3]
    assert default_cuts(16) == [1, 2, 3, 4, 8]


def test_table_fits_forty_columns(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pretend_terminal(monkeypatch, 40)
    assert main([*SMALL, "--samples", "5", "--cuts", "1,3"]) == 0
    lines = terminal_lines(capfd.readouterr().out)
    assert max(map(len, lines)) <= 40
    text = " ".join(" ".join(lines).split())
    assert re.search(
        r" micro-batches of 1: 5, bigbatch \d\.\de-\d+, mean of means \d\.\de-\d+ micro-batches of 3: 2, ", text
    )
    assert text.endswith(" exact: every cut gives the full-batch gradient")


def test_order_row_compares_random_orders(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--samples", "6", "--order"]) == 0
    last = capfd.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        r"order: 8 random orders and cuts differ by at most \d\.\de-\d\d, the full batch in these orders by "
        r"\d\.\de-\d\d",
        last,
    )
    assert main([*SMALL, "--samples", "6", "--order", "--json"]) == 0
    order = json.loads(capfd.readouterr().out)["order"]
    assert order["num_orders"] == 8
    assert 0 < order["relative_error"] < 2e-5
    assert main([*SMALL, "--samples", "6", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["order"] is None


def test_reproducible_gradient_of_dropout_is_verified(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_model_folder(folder.parent / "drops", kind="gpt2", dropout=0.1)
    words = ["verify", "--data", "../data.jsonl", "--model", "../drops", "--samples", "7", "--reproducible"]
    assert main(words) == 0
    assert capfd.readouterr().out.endswith("gradient of 7 samples in quanta of 2: the same bits in 8 random orders\n")
    assert main([*words, "--json", "--quantum", "3"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["reproducible"], found["quantum"], found["differing"]) == (True, 3, [])
