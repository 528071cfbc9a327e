"""Preparing a run: what is checked before it, from every kind of data, and what it says."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.dataset import IGNORED
from bigbatch.lm.training.setup import set_up_training
from support.language_models import conversations, records, save_model_folder, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model_folder(tmp_path_factory.mktemp("model")))


def learned(prepared: Any) -> set[str]:
    samples = [prepared.training[i] for i in range(len(prepared.training))]
    labels = [sample["labels"][sample["labels"] != IGNORED] for sample in samples]
    return {prepared.tokenizer.decode(row, skip_special_tokens=True) for row in labels}


def test_configuration_has_every_default_written_out(tmp_path: Path, model: str) -> None:
    data = str(write_jsonl(tmp_path / "a.jsonl", records(10)))
    config = set_up_training(TrainConfig(data=data, model=model, device="cpu", lora_rank=2)).config
    assert (config.device, config.precision) == ("cpu", "float32")
    assert (config.max_length, config.global_batch, config.epochs) == (64, 32, 1)
    assert (config.lr, config.lora_alpha) == (2e-4, 4.0)


def test_prompts_are_masked_and_completions_learned(tmp_path: Path, model: str) -> None:
    rows = records(20)
    data = str(write_jsonl(tmp_path / "a.jsonl", rows))
    prepared = set_up_training(TrainConfig(data=data, model=model, validation_fraction=0))
    assert learned(prepared) == {row["completion"] for row in rows}


def test_only_assistant_answers_are_learned(tmp_path: Path, model: str) -> None:
    data = str(write_jsonl(tmp_path / "chat.jsonl", conversations(9)))
    prepared = set_up_training(TrainConfig(data=data, model=model, validation_fraction=0))
    assert learned(prepared) == {f"here is {i}" for i in range(9)}


def test_parquet_and_json_lines_set_up_equally(tmp_path: Path, model: str) -> None:
    rows = records(12)
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows)
    parquet = tmp_path / "a.parquet"
    datasets.Dataset.from_list(rows).to_parquet(parquet)
    one, other = (set_up_training(TrainConfig(data=str(path), model=model)) for path in (jsonl, parquet))
    assert len(one.training) == len(other.training)
    for i in range(len(one.training)):
        assert torch.equal(one.training[i]["input_ids"], other.training[i]["input_ids"])
        assert torch.equal(one.training[i]["labels"], other.training[i]["labels"])


def test_markdown_folder_has_one_document_per_file(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.md").write_text(f"# Größe {i}\n\nПривет, 日本語 {i}\n", encoding="utf-8")
    messages: list[str] = []

    def say(words: str, done: int = 0, total: int = 0) -> None:
        messages.append(words)
        assert 0 <= done <= 6

    prepared = set_up_training(TrainConfig(data=str(tmp_path), validation_fraction=0), progress=say)
    assert learned(prepared) == {f"# Größe {i}\n\nПривет, 日本語 {i}\n" for i in range(6)}
    assert prepared.notes[0] == f"6 text files from {tmp_path}"
    assert prepared.notes[1].startswith("training data: 6 documents with ")
    assert list(dict.fromkeys(messages)) == [
        f"reading {tmp_path}",
        "training a tokenizer",
        f"tokenizing {tmp_path}",
        "testing attention, layout and compilation",
    ]


def test_validation_split_is_reported(tmp_path: Path, model: str) -> None:
    data = str(write_jsonl(tmp_path / "a.jsonl", records(1)))
    prepared = set_up_training(TrainConfig(data=data, model=model))
    assert prepared.validation is None
    assert "no validation set: the data is too small to split" in prepared.notes
    assert not any("held out" in note for note in set_up_training(TrainConfig(data=data, validation_fraction=0)).notes)


def test_length_above_model_positions_is_rejected(tmp_path: Path, model: str) -> None:
    data = str(write_jsonl(tmp_path / "a.jsonl", records(3)))
    with pytest.raises(InputError, match=r"--max-length 65 is more than the 64 positions of .*: pass --max-length 64 "):
        set_up_training(TrainConfig(data=data, model=model, max_length=65))


def test_sample_prompt_that_fills_model_is_rejected(tmp_path: Path, model: str) -> None:
    data = str(write_jsonl(tmp_path / "a.jsonl", records(3)))
    with pytest.raises(InputError, match=r"^--sample-prompt has \d+ tokens and the model supports 64 positions: "):
        set_up_training(TrainConfig(data=data, model=model, sample_prompt="☃" * 30))


def test_tokenizer_larger_than_model_is_rejected(tmp_path: Path, model: str) -> None:
    from bigbatch.lm.data.tokenizer import train_tokenizer

    folder = save_model_folder(tmp_path / "m")
    train_tokenizer([f"token{i} " * 5 for i in range(300)], vocabulary_size=400).save_pretrained(folder)
    data = str(write_jsonl(tmp_path / "a.jsonl", records(3)))
    with pytest.raises(InputError, match=r"its tokenizer has 400 tokens and the model has 308\. Use the tokenizer"):
        set_up_training(TrainConfig(data=data, model=str(folder)))
