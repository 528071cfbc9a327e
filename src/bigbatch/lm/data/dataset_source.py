"""Datasets of the library ``datasets``: a folder saved with ``save_to_disk``, or a name on the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bigbatch.errors import InputError, first_line
from bigbatch.lm.data.arrow_files import BATCH_ROWS, rows_of
from bigbatch.lm.data.corpus import Corpus
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.file_source import Source
from bigbatch.lm.data.hub import is_on_hub
from bigbatch.lm.data.hub_folder import choose_name, choose_split
from bigbatch.lm.data.messages import NO_TOKEN
from bigbatch.lm.data.reading import Reading, ReadOptions
from bigbatch.lm.data.record_files import select_columns, to_documents
from bigbatch.lm.data.records import shape_notes
from bigbatch.lm.files import file_kind
from bigbatch.lm.text import plural


def is_saved_dataset(folder: Path) -> bool:
    """Return whether a folder was written by ``save_to_disk``."""
    has = {name: (folder / name).is_file() for name in ("state.json", "dataset_info.json", "dataset_dict.json")}
    return has["dataset_dict.json"] or (has["state.json"] and has["dataset_info.json"])


def open_saved(folder: Path, data: str, options: ReadOptions, *, wanted: str) -> Source:
    """Open a folder written by ``save_to_disk``.

    Raises:
        InputError: It cannot be read, or it is not clear which of its splits to read.
    """
    import datasets

    for path in folder.rglob("*"):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise InputError(f"the saved dataset {data} contains {path.name}, {file_kind(path)}. Remove it.")
    about = f"the saved dataset {data}"
    loaded = _attempt(lambda: datasets.load_from_disk(str(folder)), f"{about} cannot be read")
    if not isinstance(loaded, datasets.DatasetDict):
        return Source(_corpus(loaded, data, about, options))
    return _of_splits(loaded, data, about, options, wanted=wanted)


def open_hub(name: str, options: ReadOptions, *, wanted: str) -> Source:
    """Open a dataset of the hub; only the splits that are read are downloaded.

    Raises:
        InputError: It cannot be loaded, or it is not clear which of its subsets and splits to read.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE

    # In offline mode datasets reads its cache and fails at once; otherwise it would retry for half a minute.
    if not is_on_hub(name, "dataset") and not HF_HUB_OFFLINE:
        raise InputError(
            f"there is no file or folder {name!r}, and the hub cannot be reached to look for a dataset of that name. "
            "Check the path or the network; HF_HUB_OFFLINE=1 reads datasets that were downloaded before."
        )
    return load_hub(name, options, wanted=wanted)


def load_hub(name: str, options: ReadOptions, *, wanted: str = "train") -> Source:
    """Open a dataset that ``datasets.load_dataset`` finds by its name.

    Raises:
        InputError: As :func:`open_hub`.
    """
    import datasets

    failure = f"{name!r} is not a path on this machine and cannot be loaded from the hub"
    subsets = _attempt(lambda: datasets.get_dataset_config_names(name), failure)
    subset = choose_name([] if subsets == ["default"] else subsets, options.subset, kind="subset", data=name)
    splits = _attempt(lambda: datasets.get_dataset_split_names(name, subset), failure)
    load = {
        split: partial(_attempt, partial(datasets.load_dataset, name, subset, split=split), failure) for split in splits
    }
    about = f"the hub's dataset {name}" + (f", subset {subset}" if subset else "")
    return _of_splits(_Loaded(load), name, about, options, wanted=wanted, has_subsets=subset is not None)


class _Loaded(Mapping[str, Any]):
    """Splits that are loaded when they are looked up."""

    def __init__(self, load: Mapping[str, Callable[[], Any]]) -> None:
        self._load = load

    def __getitem__(self, split: str) -> Any:
        return self._load[split]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._load)

    def __len__(self) -> int:
        return len(self._load)


def _of_splits(
    splits: Mapping[str, Any], data: str, about: str, options: ReadOptions, *, wanted: str, has_subsets: bool = False
) -> Source:
    split = choose_split(list(splits), options.split, wanted, about)
    assert split is not None, "a dataset has splits"
    others = [other for other in splits if other not in (split, "validation")]
    notes = [f"{about} has other splits, which are not used: {', '.join(others)}"] if others else []
    training = _corpus(splits[split], data, f"{about}, split {split}", options, notes)
    validation = None
    if wanted == "train" and split != "validation" and "validation" in splits:
        name = f"the split validation of {data}"
        validation = _corpus(splits["validation"], name, f"{about}, split validation", options)
    return Source(training, validation, has_splits=True, has_subsets=has_subsets)


def _corpus(dataset: Any, data: str, about: str, options: ReadOptions, notes: list[str] | None = None) -> Corpus:
    names: list[str] = dataset.column_names
    chosen = select_columns(names, source=data, columns=options.columns)
    selected = dataset.select_columns(chosen).with_format("arrow")

    def read(reading: Reading) -> Iterator[Document]:
        shapes: dict[str, int] = {}
        rows = rows_of(selected.iter(batch_size=BATCH_ROWS), data, reading)
        for document in to_documents(rows, reading):
            shapes[document.shape] = shapes.get(document.shape, 0) + 1
            yield document
        if not shapes and not reading.num_broken:
            raise InputError(f"{about} is empty: it {NO_TOKEN}.")
        reading.about.append(f"{plural(sum(shapes.values()), 'record')} of {about}")
        reading.about.extend(shape_notes(name for name, number in shapes.items() for _ in range(number)))
        reading.left_out.extend(notes or ())

    files = [Path(entry["filename"]) for entry in dataset.cache_files]
    return Corpus(read, name=data, files=files, options=options)


def _attempt(load: Callable[[], Any], failure: str) -> Any:
    """Call a loader of datasets; raise what fails as one sentence."""
    import datasets
    import pyarrow as pa

    errors = (OSError, ValueError, RuntimeError, TypeError, KeyError)
    try:
        return load()
    except (*errors, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{failure}: {first_line(error)}.") from None
