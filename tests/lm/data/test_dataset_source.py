"""Datasets are loaded by subset and split; the loader of the hub is tried on a folder, which needs no network."""

from pathlib import Path

import pytest

from bigbatch.errors import InputError
from bigbatch.lm.data.dataset_source import load_hub
from bigbatch.lm.data.reading import ReadOptions

CARD = """\
---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train.jsonl
  - split: validation
    path: en/dev.jsonl
  - split: test
    path: en/test.jsonl
- config_name: fr
  data_files: fr/all.jsonl
---
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in ("en/train.jsonl", "en/dev.jsonl", "en/test.jsonl", "fr/all.jsonl"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_text(f'{{"text": "{name}", "id": null}}\n')
    (tmp_path / "set" / "README.md").write_text(CARD)
    return str(tmp_path / "set")


def test_subset_is_trained_and_validated_on(folder: str) -> None:
    source = load_hub(folder, ReadOptions(subset="en"))
    assert source.validation is not None
    assert [document.text for document in source.training] == ["en/train.jsonl"]
    assert [document.text for document in source.validation] == ["en/dev.jsonl"]
    about = f"the hub's dataset {folder}, subset en"
    assert source.training.notes == (
        f"1 record of {about}, split train",
        f"{about} has other splits, which are not used: test",
    )
    assert source.training.documents[0].source == f"{folder}:1"
    test = load_hub(folder, ReadOptions(subset="en", split="test")).training
    assert [document.text for document in test] == ["en/test.jsonl"]


def test_unnamed_subset_is_rejected(folder: str) -> None:
    with pytest.raises(InputError) as caught:
        load_hub(folder, ReadOptions())
    assert str(caught.value) == f"{folder} has the subsets en, fr: choose one with --subset, as --subset en."
    with pytest.raises(InputError) as caught:
        load_hub(folder, ReadOptions(subset="de"))
    assert str(caught.value) == f"{folder} has no subset 'de': it has en, fr."


def test_dataset_without_subsets_is_loaded(folder: str) -> None:
    (Path(folder) / "README.md").unlink()
    source = load_hub(f"{folder}/fr", ReadOptions())
    assert [document.text for document in source.training] == ["fr/all.jsonl"]
    assert source.validation is None
