"""Inspected data has the counts of the data that a run trains on: the tokenizer is trained on the same texts."""

import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.planning.inspection import inspect_data
from bigbatch.lm.training.data import DataLoader
from bigbatch.lm.training.run_tokenizer import train_run_tokenizer
from support.language_models import write_jsonl

COUNT = re.compile(r"([\d,]+) tokens, ([\d,]+) of them")


def quiet(activity: str, done: int = 0, total: int = 0) -> None:
    """Ignore the progress."""


def texts(words: str, number: int) -> list[dict[str, Any]]:
    """Return records of text in which neighbouring words recur, so that a tokenizer joins their letters."""
    found = words.split()
    rows = (" ".join(found[(i * j + j) % len(found)] for j in range(5 + i % 9)) for i in range(number))
    return [{"text": f"{i}: {row}"} for i, row in enumerate(rows)]


def counts(notes: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return all tokens and those trained on of every note that counts them."""
    return [match.groups() for note in notes if (match := COUNT.search(note))]  # type: ignore[misc]


def inspected_and_loaded(data: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the counts of `inspect_data` and of a run."""
    config = TrainConfig(data=(str(data),), no_cache=True).resolved()
    with DataLoader(config, quiet) as loader:
        loaded = loader.load(train_run_tokenizer(config, loader), 16).notes
    return counts(inspect_data(config, num_samples=0, progress=quiet).notes), counts(loaded)


def test_validation_split_is_counted_apart(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", texts("alpha beta gamma delta epsilon", 120))
    write_jsonl(tmp_path / "validation.jsonl", texts("einundzwanzig zweiunddreissig dreiundvierzig", 90))
    inspected, loaded = inspected_and_loaded(tmp_path)
    assert len(loaded) == 2
    assert inspected == loaded


def test_tokenizer_is_trained_without_held_out_documents(tmp_path: Path) -> None:
    words = (sha256(bytes([i])).hexdigest()[:9] for i in range(30))  # those held out are in no other document
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": f"{word} " * 9} for word in words])
    inspected, loaded = inspected_and_loaded(path)
    sums = [sum(int(pair[i].replace(",", "")) for pair in loaded) for i in (0, 1)]
    assert len(loaded) == 2
    assert [[int(number.replace(",", "")) for number in pair] for pair in inspected] == [sums]


def test_lines_name_their_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "one"}, {"text": "two"}])
    write_jsonl(tmp_path / "validation.jsonl", [{"text": "three"}])
    config = TrainConfig(data=(str(tmp_path),)).resolved()
    inspection = inspect_data(config, num_samples=9, progress=quiet)
    assert inspection.notes[-4:] == (
        "training data: 2 documents: 2 text",
        "training data: 2 sequences with 10 tokens, 8 of them (80 %) trained on",
        "validation data: 1 document: 1 text",
        "validation data: 1 sequence with 7 tokens, 6 of them (86 %) trained on",
    )
    assert sum(inspection.lengths.values()) == 2
    assert [sample.source for sample in inspection.samples] == [f"{tmp_path}/train.jsonl:{n}" for n in (1, 2)]
