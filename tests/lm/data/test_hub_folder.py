"""Of a folder laid out like a dataset of the hub only the training files are read, and the others are named."""

from pathlib import Path

import pytest

from bigbatch.errors import InputError
from bigbatch.lm.data.hub_folder import split_of
from bigbatch.lm.data.sources import read_corpus

RECORD = '{"text": "a record"}\n'
CARD = "---\nlicense: mit\npretty_name: Small\n---\n# A dataset\n"


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return folder


def sources(folder: Path) -> list[str]:
    """Return the files that are trained on, as paths in the folder."""
    documents = read_corpus(str(folder)).documents
    return sorted({Path(document.source.partition(":")[0]).relative_to(folder).as_posix() for document in documents})


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_corpus(str(folder))
    return str(caught.value)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("README.md", "data/train-0-of-1.jsonl", "data/test-0-of-1.jsonl"), ["data/train-0-of-1.jsonl"]),
        (("train.csv", "test.csv"), ["train.csv"]),
        (("wiki_train.jsonl", "wiki_valid.jsonl", "LICENSE"), ["wiki_train.jsonl"]),
        (("train/a.txt", "train/b.txt", "test/a.txt", "notes.txt"), ["train/a.txt", "train/b.txt"]),
        (("train.txt", "dev.txt"), ["train.txt"]),
        (("en/Train-1.ndjson", "en/Train-2.ndjson", "en/eval.ndjson"), ["en/Train-1.ndjson", "en/Train-2.ndjson"]),
        (("all.jsonl", "README.md", "LICENSE.txt", "dataset_infos.json"), ["all.jsonl"]),
        (("train.jsonl", "README.md"), ["train.jsonl"]),
    ],
)  # fmt: skip
def test_only_training_split_is_read(tmp_path: Path, files: tuple[str, ...], expected: list[str]) -> None:
    contents = dict.fromkeys(files, RECORD)
    assert sources(write(tmp_path, contents)) == expected


@pytest.mark.parametrize(
    "files",
    [
        ("a.txt", "README.md", "LICENSE"),
        ("train-journey.txt", "test-of-time.txt", "holiday.md"),
        ("src/train.py", "tests/test_train.py", "README.md"),
        ("contest.jsonl", "trainer.jsonl", "latest.jsonl"),
        ("a.txt", "test.txt"),
        ("package.json", "index.js", "test/data.json", "LICENSE", "README.md"),
        ("train.json", "test.json", "model.py"),
    ],
)
def test_other_folders_are_read_whole(tmp_path: Path, files: tuple[str, ...]) -> None:
    assert sources(write(tmp_path, dict.fromkeys(files, RECORD))) == sorted(files)


def test_files_left_out_are_named(tmp_path: Path) -> None:
    names = ("data/train-0.jsonl", "data/train-1.jsonl", "data/validation-0.jsonl", "LICENSE")
    folder = write(tmp_path, dict.fromkeys(names, RECORD) | {"README.md": CARD})
    assert read_corpus(str(folder)).notes == (
        f"2 records in 2 files from {folder}",
        f"{folder} is laid out like a dataset of the hub: only 2 files of the split train are used, not LICENSE, "
        "README.md, data/validation-0.jsonl",
        f"the split validation of {folder} is not used: validation data is held out of the training data "
        "(--validation-fraction)",
    )


def test_note_names_first_files_of_many(tmp_path: Path) -> None:
    folder = write(tmp_path, {f"{name}.jsonl": RECORD for name in ("train", *(f"test-{i}" for i in range(9)))})
    assert read_corpus(str(folder)).notes[1] == (
        f"{folder} is laid out like a dataset of the hub: only 1 file of the split train is used, not "
        "test-0.jsonl, test-1.jsonl, test-2.jsonl, test-3.jsonl, test-4.jsonl and 4 more"
    )


def test_card_of_text_files_is_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path, {"README.md": CARD, "b.txt": "text", "c/d.txt": "text"})
    assert sources(folder) == ["b.txt", "c/d.txt"]
    write(tmp_path, {"README.md": "---\ntitle: My notes\n---\ntext"})  # front matter of a web page
    assert sources(folder) == ["README.md", "b.txt", "c/d.txt"]


def test_script_next_to_card_is_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path, {"README.md": CARD, "small.py": "import datasets", "a.jsonl": RECORD})
    assert sources(folder) == ["a.jsonl"]
    write(tmp_path, {"README.md": "---\ntags: [code]\n---\n"})  # no card
    assert sources(folder) == ["README.md", "a.jsonl", "small.py"]


def test_card_declares_files_of_splits(tmp_path: Path) -> None:
    card = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/tr-*\n"
        "  - split: test\n    path: [data/te-*]\n---\n"
    )
    names = ("data/tr-0.jsonl", "data/te-0.jsonl", "data/other.jsonl")
    folder = write(tmp_path, dict.fromkeys(names, RECORD) | {"README.md": card})
    assert sources(folder) == ["data/tr-0.jsonl"]


def test_several_configurations_are_rejected(tmp_path: Path) -> None:
    card = "---\nconfigs:\n- config_name: en\n- config_name: fr\n---\n"
    folder = write(tmp_path, {"README.md": card, "en/train.jsonl": RECORD, "fr/train.jsonl": RECORD})
    assert refusal(folder) == (
        f"the folder {folder} has 2 configurations (en, fr), and a run trains on one of them. Pass the folder or a "
        "file of one with --data."
    )
    assert sources(folder / "en") == ["train.jsonl"]


@pytest.mark.parametrize("name", ["test.jsonl", "dev/a.parquet.jsonl", "eval.json"])
def test_folder_without_training_split_is_rejected(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, {name: RECORD})
    split = {"t": "test", "d": "validation", "e": "test"}[name[0]]
    assert refusal(folder) == (
        f"the folder {folder} has files of the split {split} and none of the split train. Pass the files to train on, "
        f"such as --data {folder / name}."
    )


def test_folder_of_descriptions_only_is_rejected(tmp_path: Path) -> None:
    folder = write(tmp_path, {"README.md": CARD, "LICENSE": "text"})
    assert refusal(folder) == f"the folder {folder} contains no file to train on, only its description."


def test_invalid_card_is_rejected(tmp_path: Path) -> None:
    folder = write(tmp_path, {"README.md": "---\nlicense: [mit\n---\n", "a.jsonl": RECORD})
    assert refusal(folder).startswith(f"the metadata of {folder}/README.md is not valid YAML: ")


@pytest.mark.parametrize(
    ("training", "validation"),
    [("train.jsonl", "validation.jsonl"), ("my-train-v1.jsonl", "my-dev-v1.jsonl"), ("train/a.txt", "val/a.txt")],
)
def test_unused_validation_split_is_reported(tmp_path: Path, training: str, validation: str) -> None:
    write(tmp_path, {training: RECORD, validation: RECORD, "test.jsonl": RECORD})
    data = str(tmp_path / training.partition("/")[0])
    sibling = validation.partition("/")[0]
    assert read_corpus(data).notes[-1] == (
        f"{sibling} next to {data} is not used: validation data is held out of the training data "
        "(--validation-fraction)"
    )


def test_lone_training_file_has_no_note(tmp_path: Path) -> None:
    write(tmp_path, {"train.jsonl": RECORD, "test.jsonl": RECORD, "validation.txt": "text", "b.jsonl": RECORD})
    for name in ("train.jsonl", "b.jsonl"):
        assert len(read_corpus(str(tmp_path / name)).notes) == 1


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("data/squad-TRAIN-v1.1.json", "train"),
        ("train.jsonl.gz", "train"),
        ("validation/part0.parquet", "validation"),
        ("test-00000-of-00002.parquet", "test"),
        ("dev.tsv", "validation"),
        ("evaluation.csv", "test"),
        ("test_3.txt", "test"),
        ("attest.csv", None),
        ("pretrain.jsonl", None),
        ("my_test.txt", None),
        ("test.py", None),
        ("README.md", None),
    ],
)
def test_split_follows_from_name(name: str, split: str | None) -> None:
    assert split_of(name) == split
