"""samples.jsonl: one text for each update, also after updates were repeated."""

from pathlib import Path

import pytest

from bigbatch.errors import BigbatchError
from bigbatch.lm.runs.samples import Sample, keep_samples, read_samples, write_sample

SAMPLES = [Sample(step, "def ", f"def f{step}():\n    \u00e9") for step in (5, 10, 15)]


def test_written_texts_are_read(tmp_path: Path) -> None:
    assert read_samples(tmp_path) == []
    for sample in SAMPLES:
        write_sample(tmp_path, sample)
    assert read_samples(tmp_path) == SAMPLES
    write_sample(tmp_path, Sample(5, "x", "the same update again"))
    assert read_samples(tmp_path) == [Sample(5, "x", "the same update again"), *SAMPLES[1:]]


def test_texts_after_checkpoint_are_removed(tmp_path: Path) -> None:
    keep_samples(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []
    for sample in SAMPLES:
        write_sample(tmp_path, sample)
    keep_samples(tmp_path, 10)
    assert read_samples(tmp_path) == SAMPLES[:2]
    assert len((tmp_path / "samples.jsonl").read_bytes().splitlines()) == 2


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    write_sample(tmp_path, SAMPLES[0])
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write(b'[]\n{"step": "1"}\n{"step": 7, "prompt": 1, "text": ""}\n\xff\n{"step": 8, "pro')
    assert read_samples(tmp_path) == SAMPLES[:1]


def test_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").mkdir()
    with pytest.raises(BigbatchError, match=r"samples\.jsonl cannot be written: .+\.$"):
        write_sample(tmp_path, SAMPLES[0])
