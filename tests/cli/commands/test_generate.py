"""``bigbatch generate``: text from a run, or one sentence."""

import os
import sys
from pathlib import Path

import pytest

from bigbatch.cli import main
from bigbatch.cli.output import visible
from support.command_line import LIMIT_S, SENTENCE, command
from support.forked_processes import ForkedProcess, bigbatch
from support.language_models import records, run, save_model_folder, write_jsonl


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    data, base = write_jsonl(folder / "data.jsonl", records(40)), save_model_folder(folder / "base")
    run(folder / "runs" / "mine", data=str(data), model=str(base), steps=2, global_batch=8, microbatch=8)
    return folder / "runs" / "mine"


def written(capfd: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["generate", *map(str, words)]) == 0
    printed, complained = capfd.readouterr()
    assert complained == ""
    return printed


def test_process_prints_prompt_and_continuation(trained: Path, tmp_path: Path) -> None:
    done = command("generate", str(trained), "def ", "--max-new-tokens", "20", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("def ")
    assert len(done.stdout) > len("def \n")
    assert list(tmp_path.iterdir()) == []


def test_same_seed_generates_same_text(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one, again, other = (written(capfd, trained, "def ", "--seed", seed) for seed in ("3", "3", "4"))
    assert one == again != other


def test_temperature_zero_ignores_seed(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    greedy = {written(capfd, trained, "def ", "--temperature", "0", "--seed", seed) for seed in ("0", "1")}
    assert len(greedy) == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("prompt", ["", "für 日本語 ", "--x"])
def test_any_prompt_is_continued(tmp_path: Path, kind: str, prompt: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save_model_folder(tmp_path, kind=kind)
    assert written(capfd, folder, "--max-new-tokens", "9", "--top-k", "0", "--", prompt).startswith(prompt)


def test_control_characters_are_printed_as_escapes(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    printed = written(capfd, trained, "\x1b[2J\r[red]\x07\n\tx \u202e", "--max-new-tokens", "3")
    assert printed.startswith("\\x1b[2J\\r[red]\\x07\n\tx \\u202e")
    assert visible(printed, keep="\n\t") == printed


def test_generation_ends_at_model_positions(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save_model_folder(tmp_path, kind="gpt2")
    written(capfd, folder, "☃" * 15, "--max-new-tokens", "500")


def refused(capfd: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["generate", *map(str, words)]) == 2
    printed, complained = capfd.readouterr()
    assert printed == ""
    assert SENTENCE.fullmatch(complained)
    return complained.removeprefix("bigbatch generate: ").rstrip("\n")


def test_prompt_that_fills_model_is_rejected(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = refused(capfd, save_model_folder(tmp_path, kind="gpt2"), "☃" * 40)
    assert said.startswith("the prompt has ")
    assert said.endswith(" tokens and the model supports 64 positions: shorten it to leave room for new tokens.")


def test_missing_run_suggests_nearest(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    near = trained.with_name("mien")
    assert refused(capfd, near) == f"run {near} does not exist: did you mean {trained}?"
    far = trained / "nowhere" / "at-all"
    assert refused(capfd, far) == f"run {far} does not exist: create one with bigbatch train."


def test_run_without_model_is_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert refused(capfd, tmp_path) == (
        f"{tmp_path} contains no trained model: a run saves it in {tmp_path / 'model'} when it ends, its LoRA adapters "
        f"in {tmp_path / 'adapter'}."
    )


def test_broken_model_is_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_model_folder(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"nothing")
    assert "does not load as a causal language model" in refused(capfd, tmp_path)


def test_pipe_in_model_folder_is_rejected(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    os.mkfifo(tmp_path / "model" / "model.safetensors")
    pipe = tmp_path / "model" / "model.safetensors"
    assert refused(capfd, tmp_path) == f"{pipe} is not a regular file: remove it."


def test_unavailable_device_is_rejected(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert refused(capfd, trained, "--device", "cuda:77").startswith("--device cuda:77 is not available: ")


# chats -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model that has learned to answer, as a whole in run and with adapters in adapted."""
    folder = tmp_path_factory.mktemp("chats")
    turns = [[("system", "be brief"), ("user", f"say {i}"), ("assistant", "für 日本\x07")] for i in range(3)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    data, base = write_jsonl(folder / "data.jsonl", rows), save_model_folder(folder / "base", kind="qwen2")
    words = ["train", "--data", str(data), "--device", "cpu", "--validation-fraction", "0", "--microbatch", "3"]
    words += ["--checkpoint-every", "1000"]
    learn = ["--epochs", "60", "--lr", "2e-2", "--model", str(base)]
    assert main([*words, *learn, "--out", str(folder / "run")]) == 0
    adapt = ["--epochs", "5", "--lora-rank", "2", "--model", str(folder / "run" / "model")]
    assert main([*words, *adapt, "--out", str(folder / "adapted")]) == 0
    return folder


@pytest.mark.parametrize("name", ["run", "adapted"])
def test_chat_prints_the_learned_answer(chats: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        words = ("--chat", f"say {i}", "--system", "be brief", "--temperature", "0")
        assert written(capfd, chats / name, *words) == "für 日本\\x07\n"


def test_cut_answer_is_reported(chats: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(chats / "run"), "--chat", "say 1", "--max-new-tokens", "2"]) == 0
    assert capfd.readouterr().err == "bigbatch generate: the answer is cut: it reached --max-new-tokens 2.\n"


def typed(folder: Path, keys: bytes, *words: str) -> tuple[int | None, str, str]:
    """Run a conversation on a terminal on which some keys are pressed; return exit code, stdout and stderr."""
    screen, keyboard = os.openpty()
    try:
        os.write(screen, keys)
        words = ("generate", str(folder), *words, "--temperature", "0", "--chat")
        with ForkedProcess(bigbatch, *words, stdin=keyboard) as process:
            printed, complained = process.communicate(timeout=LIMIT_S)
            return process.returncode, printed, complained
    finally:
        os.close(screen)
        os.close(keyboard)


def test_lines_of_a_terminal_are_answered(chats: Path) -> None:
    code, printed, complained = typed(chats / "run", b"say 1\n\n\x04", "--system", "be brief")
    assert (code, complained) == (0, "")
    assert printed == "> für 日本\\x07\n> > \n"  # an empty line is no message


def test_earlier_turns_are_part_of_the_conversation(tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path)  # with 64 positions
    code, printed, complained = typed(folder, b"say one\nsay two\n", "--max-new-tokens", "20")
    assert code == 2
    assert printed.count("> ") == 2
    assert "tokens and the model supports 64 positions: begin a new one" in complained


def test_conversation_that_fills_the_model_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save_model_folder(tmp_path)
    assert refused(capfd, folder, "--chat", "☃" * 70) == (
        "the conversation has 227 tokens and the model supports 64 positions: begin a new one, or shorten it."
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--chat",), '--chat needs a message, such as --chat "Hello"; a conversation needs a terminal.'),
        (("text", "--chat", "a"), "PROMPT and --chat exclude each other: give one of them."),
        (("--system", "a"), "--system does nothing without --chat: give both."),
    ],
)  # fmt: skip
def test_unusable_chat_is_one_sentence(
    chats: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    message: str,
) -> None:
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert refused(capfd, chats / "run", *words) == message
