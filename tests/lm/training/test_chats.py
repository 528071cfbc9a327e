"""Runs on conversations: the template is saved and compared on resume, and weights of messages count as items."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from bigbatch.cli import main
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.named_templates import NAMED_TEMPLATES
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.runs.samples import read_samples
from bigbatch.lm.training import text_sample
from bigbatch.lm.training.setup import set_up_training
from bigbatch.lm.training.trainer import Trainer
from support.language_models import RecordingCallback, metrics, run, save_model_folder, write_jsonl

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endfor %}"
)


def chats(count: int, **entries: Any) -> list[dict[str, Any]]:
    answer = {"role": "assistant", **entries}
    return [
        {
            "messages": [
                {"role": "user", "content": f"say {i}"},
                answer | {"content": f"here is {i}"},
                {"role": "user", "content": "why?"},
                answer | {"content": "because"},
            ]
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model_folder(tmp_path_factory.mktemp("base"), kind="qwen2"))


def settings(base: str, data: Path, **more: Any) -> dict[str, Any]:
    return {"model": base, "data": str(data), "global_batch": 4, "microbatch": 3, "steps": 2, "max_length": 512, **more}


def test_template_is_saved_with_the_model(base: str, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", chats(12))
    setup, _, _ = run(tmp_path / "run", **settings(base, data, chat_template="qwen3"))
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert saved.chat_template == NAMED_TEMPLATES["qwen3"].template
    counts = next(note for note in setup.notes if note.startswith("training data: "))
    assert counts.endswith("trained turn by turn, because the chat template renders earlier turns in another way")
    num_documents = int(counts.removeprefix("training data: ").split()[0])
    assert len(setup.training) == 2 * num_documents
    assert any(note.startswith("--chat-template qwen3: the tokenizer splits ") for note in setup.notes)


def test_last_turns_are_half_of_the_samples(base: str, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", chats(12))
    both, last = (
        run(tmp_path / on, **settings(base, data, chat_template="qwen3", train_on=on, steps=1))[0]
        for on in ("all-assistant", "last-turn")
    )
    assert len(both.training) == 2 * len(last.training)


def test_weights_change_items_and_relative_shares(base: str, tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "plain.jsonl", chats(12))
    halved = write_jsonl(tmp_path / "halved.jsonl", chats(12, weight=0.5))
    rows = {}
    for data in (plain, halved):
        run(tmp_path / data.stem, **settings(base, data, validation_fraction=0, global_batch=12, precision="float64"))
        rows[data.stem] = metrics(tmp_path / data.stem)
    for row, other in zip(rows["plain"], rows["halved"], strict=True):
        assert other["items"] == row["items"] / 2  # and the mean of the same losses
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-6)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-5)


def test_changed_template_is_rejected_on_resume(base: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", chats(12))
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    folder = tmp_path / "run"
    config = settings(base, data, chat_template=str(template), device="cpu", checkpoint_every=1)
    prepared = set_up_training(TrainConfig(**config))
    directory = RunDirectory.create(folder, prepared.config.model_dump(mode="json"))
    recorder = RecordingCallback()
    Trainer(prepared).run(directory, callback=recorder, should_stop=lambda: len(recorder.rows) == 1)
    capfd.readouterr()
    for changed in (TEMPLATE + " ", TEMPLATE.replace("m.role", "m.role | upper")):
        template.write_text(changed)
        assert main(["resume", str(folder)]) == 2
        assert capfd.readouterr().err == (
            f"bigbatch resume: the chat template of {folder} has changed since the run started. Restore that of "
            f"{template}, or start a new run.\n"
        )
    template.unlink()
    assert main(["resume", str(folder)]) == 2
    assert capfd.readouterr().err.startswith(f"bigbatch resume: --chat-template '{template}' is no file and no name.")
    template.write_text(TEMPLATE)
    assert main(["resume", str(folder)]) == 0
    assert [row["step"] for row in metrics(folder)] == [1, 2]


def test_samples_of_a_run_on_chats_are_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_sample, "SAMPLE_TOKENS", 8)
    torch.manual_seed(0)
    base = str(save_model_folder(tmp_path / "base", kind="qwen2"))
    data = write_jsonl(tmp_path / "a.jsonl", chats(12))
    common = settings(base, data, chat_template="chatml", train_on="last-turn", steps=120, lr=2e-2, microbatch=4)
    asked, _, _ = run(tmp_path / "asked", **common, sample_prompt="why?")
    assert asked.config.prompt(is_chat=True) == "why?"
    samples = read_samples(tmp_path / "asked")
    assert [(sample.step, sample.prompt) for sample in samples] == [(60, "why?"), (120, "why?")]
    assert samples[-1].text.startswith("why?\nbecause")  # as learned, in the format of the template
    run(tmp_path / "default", **common | {"steps": 1})
    (sample,) = read_samples(tmp_path / "default")
    assert (sample.prompt, sample.text.split("\n")[0]) == ("Hello", "Hello")


def test_message_that_fills_the_model_is_rejected(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", chats(12))
    short = str(save_model_folder(tmp_path / "short"))
    words = settings(short, data, chat_template="chatml", max_length=64, sample_prompt="x y z " * 9)
    with pytest.raises(InputError, match=r"^the conversation has \d+ tokens and the model supports 64 positions: "):
        run(tmp_path / "run", **words)
