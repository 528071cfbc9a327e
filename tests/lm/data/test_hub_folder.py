"""Of a folder laid out like a dataset of the hub only the training files are read, and the others are named."""

import gzip
from pathlib import Path

import pytest

from bigbatch.errors import InputError
from bigbatch.lm.data.corpus import Corpus
from bigbatch.lm.data.sources import ReadOptions, open_sources, read_corpus
from bigbatch.lm.data.split_names import split_of

RECORD = '{"text": "a record"}\n'
CONTENTS = {".jsonl": RECORD, ".ndjson": RECORD, ".json": RECORD, ".csv": "text\na record\n"}
CARD = "---\nlicense: mit\npretty_name: Small\n---\n# A dataset\n"


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return folder


def small(*names: str) -> dict[str, str]:
    """Return a content for each file that fits its suffix."""
    return {name: CONTENTS.get(Path(name).suffix, "a text\n") for name in names}


def read(folder: Path | str, split: str | None = None, subset: str | None = None) -> Corpus:
    """Return the training data of a folder after one pass over it."""
    (corpus,) = open_sources([str(folder)], options=ReadOptions(split=split, subset=subset)).training
    assert corpus.documents
    return corpus


def sources(folder: Path) -> list[str]:
    """Return the files that are trained on, as paths in the folder."""
    documents = read_corpus(str(folder))
    return sorted({Path(document.source.partition(":")[0]).relative_to(folder).as_posix() for document in documents})


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        read(folder)
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
        (("train.json", "test.json", "model.py", "Makefile"), ["train.json"]),
        (("train/a.txt", "train/b.md", "test/d.txt", "README.md"), ["train/a.txt", "train/b.md"]),
        (("train/a.jsonl", "train/convert.py", "val/a.jsonl"), ["train/a.jsonl"]),
        (("corpus.train.txt", "corpus.valid.txt", "corpus.test.txt"), ["corpus.train.txt"]),
    ],
)  # fmt: skip
def test_only_training_split_is_read(tmp_path: Path, files: tuple[str, ...], expected: list[str]) -> None:
    assert sources(write(tmp_path, small(*files))) == expected


@pytest.mark.parametrize(
    "files",
    [
        ("a.txt", "README.md", "LICENSE"),
        ("train-journey.txt", "test-of-time.txt", "holiday.md"),
        ("src/train.py", "tests/test_train.py", "README.md"),
        ("contest.jsonl", "trainer.jsonl", "latest.jsonl"),
        ("a.txt", "test.txt"),
        ("package.json", "index.js", "test/data.json", "LICENSE", "README.md"),
        ("train.py", "test.py", "eval.md"),
        ("train.json", "test.json", "settings.json", "model.py"),
    ],
)
def test_other_folders_are_read_whole(tmp_path: Path, files: tuple[str, ...]) -> None:
    assert sources(write(tmp_path, small(*files))) == sorted(files)


def test_files_left_out_are_named(tmp_path: Path) -> None:
    names = ("data/train-0.jsonl", "data/train-1.jsonl", "data/validation-0.jsonl", "LICENSE")
    folder = write(tmp_path, dict.fromkeys(names, RECORD) | {"README.md": CARD})
    assert read(folder).notes == (
        f"2 records in 2 files from {folder}",
        f"{folder} is laid out like a dataset of the hub: only 2 files of the split train are used, not LICENSE, "
        "README.md",
    )


def test_note_names_first_files_of_many(tmp_path: Path) -> None:
    folder = write(tmp_path, {f"{name}.jsonl": RECORD for name in ("train", *(f"test-{i}" for i in range(9)))})
    assert read(folder).notes[1] == (
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
    assert refusal(folder) == (f"{folder} has the subsets en, fr: choose one with --subset, as --subset en.")
    assert sources(folder / "en") == ["train.jsonl"]


@pytest.mark.parametrize("name", ["test.jsonl", "dev/a.parquet.jsonl", "eval.json"])
def test_folder_without_training_split_is_rejected(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, {name: RECORD})
    split = {"t": "test", "d": "validation", "e": "test"}[name[0]]
    assert refusal(folder) == (
        f"{folder} has the split {split} and none of the name train: choose one with --split, as --split {split}."
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
    write(tmp_path, small(training, validation, "test.jsonl"))
    data = str(tmp_path / training.partition("/")[0])
    sibling = validation.partition("/")[0]
    assert read(data).notes[-1] == (
        f"{sibling} next to {data} is not used: pass --validation-data {tmp_path / sibling} to validate on it"
    )


def test_lone_training_file_has_no_note(tmp_path: Path) -> None:
    write(tmp_path, {"train.jsonl": RECORD, "test.jsonl": RECORD, "validation.txt": "text", "b.jsonl": RECORD})
    for name in ("train.jsonl", "b.jsonl"):
        assert len(read(tmp_path / name).notes) == 1


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
        ("a.test.txt", "test"),
        ("attest.txt", None),
        ("test.py", None),
        ("README.md", None),
    ],
)
def test_split_follows_from_name(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_splits_of_folder_train_and_validate(tmp_path: Path) -> None:
    names = ("data/train-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl", "data/test-0.jsonl")
    folder = write(tmp_path, {name: f'{{"text": "{name}"}}\n' for name in names} | {"README.md": CARD})
    opened = open_sources([str(folder)])
    assert [[d.text for d in corpus] for corpus in (*opened.training, *opened.validation)] == [[names[0]], [names[1]]]
    assert opened.notes == (f"validation: the split validation of {folder}; nothing is held out of the data",)
    assert open_sources([str(folder)], with_validation=False).notes == (
        f"the split validation of {folder} is not used",
    )
    other = write(tmp_path / "other", {"a.jsonl": RECORD})
    replaced = open_sources([str(folder)], validation_data=[str(other)])
    assert [d.text for corpus in replaced.validation for d in corpus] == ["a record"]
    assert replaced.notes == (f"the split validation of {folder} is not used",)


def test_validation_folder_is_read_from_its_split(tmp_path: Path) -> None:
    write(tmp_path / "t", small("a.jsonl"))
    names = ("train.jsonl", "dev.jsonl", "test.jsonl")
    folder = write(tmp_path / "v", {name: f'{{"text": "{name}"}}\n' for name in names})
    (validation,) = open_sources([str(tmp_path / "t")], validation_data=[str(folder)]).validation
    assert [document.text for document in validation] == ["dev.jsonl"]
    (folder / "dev.jsonl").unlink()
    with pytest.raises(InputError) as caught:
        open_sources([str(tmp_path / "t")], validation_data=[str(folder)])
    assert str(caught.value) == (
        f"{folder} has the splits test, train and none of the name validation: pass the files of one."
    )


def test_split_is_chosen_by_name(tmp_path: Path) -> None:
    names = ("train_sft", "train_gen", "test_sft")
    folder = write(tmp_path, {f"data/{name}-00000-of-00002.jsonl": RECORD for name in names})
    listed = "test_sft, train_gen, train_sft"
    assert refusal(folder) == (
        f"{folder} has the splits {listed} and none of the name train: choose one with --split, as --split train_gen."
    )
    assert read(folder, split="train_gen").documents[0].source.startswith(f"{folder}/data/train_gen-")
    with pytest.raises(InputError) as caught:
        read(folder, split="sft")
    assert str(caught.value) == f"{folder} has no split 'sft': it has {listed}."


def test_only_split_of_another_name_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path, {"data/german-00000-of-00001.jsonl": RECORD, "README.md": CARD})
    assert sources(folder) == ["data/german-00000-of-00001.jsonl"]


def test_subset_is_chosen_by_name(tmp_path: Path) -> None:
    card = (
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/*.jsonl\n"
        "- config_name: fr\n  data_dir: fr\n---\n"
    )
    folder = write(tmp_path, {"README.md": card, **small("en/a.jsonl", "fr/train.jsonl", "fr/test.jsonl")})
    assert read(folder, subset="en").documents[0].source == f"{folder}/en/a.jsonl:1"
    assert read(folder, subset="fr").documents[0].source == f"{folder}/fr/train.jsonl:1"
    assert len(read(folder, subset="fr").documents) == 1
    with pytest.raises(InputError) as caught:
        read(folder, subset="de")
    assert str(caught.value) == f"{folder} has no subset 'de': it has en, fr."


def test_folder_is_subset_without_card(tmp_path: Path) -> None:
    folder = write(tmp_path, small("en/train.jsonl", "fr/train.jsonl", "fr/test.jsonl"))
    assert read(folder, subset="fr").documents[0].source == f"{folder}/fr/train.jsonl:1"
    with pytest.raises(InputError) as caught:
        read(folder, subset="de")
    assert str(caught.value) == f"{folder} has no subset 'de': its dataset card names none, and its folders are en, fr."


def test_compressed_splits_are_recognized(tmp_path: Path) -> None:
    for name in ("train.jsonl.gz", "test.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(RECORD.encode()))
    assert read(tmp_path).documents[0].source == f"{tmp_path}/train.jsonl.gz:1"


def test_texts_about_folder_are_noted(tmp_path: Path) -> None:
    folder = write(tmp_path, small("a.txt", "README.md", "LICENSE"))
    assert read(folder).left_out == (f"{folder} is read as a folder of texts, LICENSE, README.md included",)


@pytest.mark.parametrize(
    ("files", "similar"),
    [
        (("train/a.py", "test/d.py"), "test/, train/ are"),
        (("x/Train/a.md", "x/dev/d.md", "x/dev/e.md"), "x/Train/, x/dev/ are"),
        (("wiki.train.tokens", "wiki.test.tokens"), "wiki.test.tokens, wiki.train.tokens are"),
        (("train/a.txt", "test/b.txt", "c.jsonl"), None),
        (("train/a.py", "tests/d.py"), None),
        (("train.py", "test.py", "eval.py"), None),
    ],
)
def test_names_like_splits_that_are_read_as_one_are_noted(
    tmp_path: Path, files: tuple[str, ...], similar: str | None
) -> None:
    corpus = read(write(tmp_path, small(*files)))
    notes = [note for note in corpus.left_out if "read as one set" in note]
    assert notes == (
        [] if similar is None else [f"{tmp_path} is read as one set, although {similar} named like splits"]
    )


def test_files_that_card_names_must_exist(tmp_path: Path) -> None:
    card = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: [data/training-*, more/*]\n"
        "  - split: validation\n    path: data/validation-*\n---\n"
    )
    folder = write(tmp_path, {"README.md": card, "data/train-0.jsonl": RECORD, "data/test-0.jsonl": RECORD})
    assert refusal(folder) == (
        f"the dataset card of {folder} names data/training-*, more/* for the split train, and no such file is there. "
        "Download the missing files, correct README.md, or pass the files to read."
    )
    write(tmp_path, {"data/training-0.jsonl": RECORD})
    assert refusal(folder).startswith(f"the dataset card of {folder} names more/* for the split train, and no such")
    write(tmp_path, {"more/a.jsonl": RECORD})
    note = f"{folder} has no file data/validation-*, which its dataset card names for the split validation"
    assert note in read(folder).left_out


def test_missing_files_of_a_series_are_noted(tmp_path: Path) -> None:
    folder = write(tmp_path, {f"data/train-0000{i}-of-00003.jsonl": RECORD for i in (0, 2)})
    note = f"{folder} has 2 of the 3 files data/train-*-of-00003.jsonl: the others are missing"
    assert note in read(folder).left_out
    write(tmp_path, {"data/train-00001-of-00003.jsonl": RECORD})
    assert not any("missing" in note for note in read(folder).left_out)


def test_training_split_is_proposed_before_others(tmp_path: Path) -> None:
    names = ("test_sft", "train_gen", "train_sft")
    folder = write(tmp_path, {f"data/{name}-00000-of-00001.jsonl": RECORD for name in names})
    assert refusal(folder).endswith(": choose one with --split, as --split train_gen.")


def test_files_without_split_are_proposed_by_path(tmp_path: Path) -> None:
    folder = write(tmp_path, small("a.jsonl", "b.jsonl", "test.jsonl"))
    assert refusal(folder) == (
        f"{folder} has the split test and none of the name train: pass the files to train on by their paths, as "
        f"{folder}/a.jsonl, or choose one with --split."
    )


def test_texts_beside_records_have_no_shape(tmp_path: Path) -> None:
    folder = write(tmp_path, small("a.txt", "b.py", "c.jsonl"))
    assert not any("several shapes" in note for note in read(folder).notes)
