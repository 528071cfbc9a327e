"""``bigbatch inspect``: what is trained on and what is wrong with data, with an exit code that scripts can use."""

from pathlib import Path
from typing import Any

import pytest

from bigbatch.cli import main
from bigbatch.cli.commands.inspect import histogram, shown
from bigbatch.lm.planning.inspection import InspectedSample, Inspection, Segment
from support.command_line import command, pretend_terminal, terminal_lines
from support.language_models import conversations, save_model_folder, write_jsonl

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello.\nYou?"}
CHAT = {"messages": [USER, ANSWER]}


def inspect(*words: Any, code: int, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["inspect", *map(str, words)]) == code
    printed = capsys.readouterr()
    return printed.err if code == 2 else printed.out


def test_sample_shows_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [CHAT])
    text = inspect(path, code=0, capsys=capsys)
    assert "\x1b" not in text
    assert (
        text.endswith(
            f"sample 1: {path}:1, 30 tokens, 11 trained on\n"
            "   masked │ <|begin|>user:\n"
            "          │ Hi\n"
            "          │ assistant:\\n\n"
            "  trained │ Hello.\n"
            "          │ You?<|end|>\n"
            "\n"
            "no problems found\n"
        )
        or "trained │ Hello." in text
    )
    assert f"1 record in 1 file from {path}\n1 document: 1 messages\n" in text
    assert "chat template: the model's own, with {% generation %} marks\n" in text


def test_colour_is_for_terminals_that_want_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [CHAT])
    pretend_terminal(monkeypatch, 100)  # with NO_COLOR
    assert "\x1b[32m" not in inspect(path, code=0, capsys=capsys)
    monkeypatch.delenv("NO_COLOR")
    text = inspect(path, code=0, capsys=capsys)
    assert "\x1b[32m  trained │ Hello." in text
    assert "  trained │ Hello." in terminal_lines(text)


def test_problems_are_listed_with_exit_code_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [
            CHAT,
            {"messages": [USER]},
            {"messages": [USER, {"role": "assistant", "content": " "}, USER, ANSWER]},
            {"text": "over <|end|> and"},
            {"messages": [USER, USER, ANSWER]},
        ],
    )
    text = inspect(path, "--chat-template", "gemma", "--samples", 0, code=1, capsys=capsys)
    problems = [line.removeprefix("problem: ") for line in text.splitlines() if line.startswith("problem: ")]
    assert problems == [
        f"1 broken record, refused by a run without --skip-broken; the first: {path}:2: "
        "the record yields no training token: no message of the "
        "assistant has content.",
        f"1 document cannot be trained on; the first: {path}:5: the chat template rejects the conversation: in the "
        "gemma format, user and assistant take turns, and the user begins.",
        "1 document with special tokens of the tokenizer in the text, which are encoded as such; the first: <|end|> in "
        f"{path}:4",
        f"1 conversation with an empty answer that is trained on; the first: {path}:3. Remove it, or give it the "
        "weight 0",
    ]
    assert "sample 1" not in text


def test_every_kind_of_broken_record_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [CHAT, *({"question": n} for n in range(5)), {"text": 5}, {"text": 6}])
    with path.open("a") as file:
        file.write("{\n")
    text = inspect(path, "--samples", 0, code=1, capsys=capsys)
    place = f"{path}:"
    lines = text[text.index("problem: ") :].splitlines()
    refused = "refused by a run without --skip-broken; the first:"
    assert [line.partition(" A record must have")[0] for line in lines] == [
        f"problem: 5 broken records, {refused} {place}2: the record has 'question'.",
        f"  {place}3: the record has 'question'.",
        f"  {place}4: the record has 'question'.",
        "  and 2 more",
        f"problem: 2 broken records, {refused} {place}7: the field 'text' is a number and must be a string.",
        f"  {place}8: the field 'text' is a number and must be a string.",
        f"problem: 1 broken record, {refused} {place}9: not valid JSON: Expecting property name enclosed in "
        "double quotes at column 2.",
    ]


def test_skipped_input_is_left_out_and_no_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [CHAT, {"text": 5}, {"messages": [USER, USER, ANSWER]}, {"text": None}])
    words = (path, "--chat-template", "gemma", "--samples", 0)
    assert inspect(*words, code=1, capsys=capsys).count("\nproblem: ") == 3
    text = inspect(*words, "--skip-broken", code=0, capsys=capsys)
    assert f"\n2 broken records left out; the first: {path}:2: the field 'text' is a number" in text
    assert text.endswith(
        f"left out: 1 broken record; the first: {path}:2: the field 'text' is a number and must be a string.\n"
        f"left out: 1 broken record; the first: {path}:4: the record cannot be trained on: its 'text' is null.\n"
        f"left out: 1 document cannot be trained on; the first: {path}:3: the chat template rejects the conversation: "
        "in the gemma format, user and assistant take turns, and the user begins.\n"
        "no other problems found\n"
    )


def test_other_problems_remain_with_skipped_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [CHAT, {"text": 5}, {"text": "over <|end|> and"}])
    text = inspect(path, "--skip-broken", "--samples", 0, code=1, capsys=capsys)
    assert [line.partition(":")[0] for line in text.splitlines()[-2:]] == ["left out", "problem"]


def test_bad_input_has_exit_code_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(code=2, capsys=capsys) == (
        "bigbatch inspect: DATA is missing: pass the data to inspect, such as chats.jsonl.\n"
    )
    missing = tmp_path / "none.jsonl"
    assert f"there is no file or folder '{missing}'" in inspect(missing, code=2, capsys=capsys)
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "a"}])
    assert "the record has 'question'." in inspect(path, code=2, capsys=capsys)
    path = write_jsonl(tmp_path / "a.jsonl", [CHAT])
    assert "Did you mean chatml?" in inspect(path, "--chat-template", "chatmll", code=2, capsys=capsys)
    assert "unknown flag --steps" in inspect(path, "--steps", 3, code=2, capsys=capsys)


def test_flags_of_training_data_are_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model_folder(tmp_path / "model")
    rows = [{"talk": row["messages"] * 2} for row in conversations(30)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    text = inspect(
        *(path, "--model", folder, "--messages-column", "talk", "--chat-template", "qwen3", "--max-length", 40),
        *("--train-on", "last-turn", "--skip-broken", "--samples", 2, "--seed", 3),
        code=0,
        capsys=capsys,
    )
    assert "sample 2: " in text
    assert "30 sequences with " in text  # only the last turns
    assert "longer than --max-length 40 will be cut into pieces" in text
    assert "the tokenizer splits <|im_start|>" in text
    text = inspect(
        path, "--model", folder, "--messages-column", "talk", "--chat-template", "qwen3", code=0, capsys=capsys
    )
    assert "60 sequences with " in text
    assert "30 conversations trained turn by turn" in text


def test_training_skips_and_counts_the_same_problems(tmp_path: Path) -> None:
    rows = [*conversations(40), {"messages": [USER, USER, ANSWER]}, {"messages": "none"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    trained = command(
        *("train", "--data", "a.jsonl", "--chat-template", "gemma", "--skip-broken"),
        *("--steps", "1", "--device", "cpu", "--microbatch", "8"),
        folder=tmp_path,
    )
    assert trained.returncode == 0, trained.stderr
    assert "1 broken record left out; the first: a.jsonl:42: " in trained.stdout
    assert "1 document left out; the first: a.jsonl:41: the chat template rejects the conversation" in trained.stdout


def test_weights_and_long_parts_are_shown() -> None:
    sample = InspectedSample(
        "a:1\x1b", 9, 3, (Segment("x" * 2000 + "\n", 0), Segment("\x07b", 0.5), Segment("c\n\n", 1))
    )
    lines = [text.plain for text in shown(sample, 2)]
    assert lines == [
        "",
        "sample 2: a:1\\x1b, 9 tokens, 3 trained on",
        f"   masked │ {'x' * 400} … 1,201 characters … {'x' * 399}\\n",
        "    × 0.5 │ \\x07b",
        "  trained │ c",
        "          │ \\n",
    ]


def test_histogram_has_every_power_of_two() -> None:
    inspection = Inspection((), {1: 1, 8: 30}, (), ())
    assert list(histogram(inspection)) == [
        "",
        "           tokens   sequences",
        "      1 –       1           1  █",
        "      2 –       2           0",
        "      3 –       4           0",
        "      5 –       8          30  " + "█" * 30,
    ]
    assert list(histogram(Inspection((), {}, (), ()))) == []


def test_samples_are_the_same_for_a_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", conversations(50))
    texts = {inspect(path, "--seed", seed, code=0, capsys=capsys) for seed in (1, 1, 2)}
    assert len(texts) == 2
