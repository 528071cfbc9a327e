"""Folders of tokens that ``bigbatch tokenize`` made ahead, by one process or in parts by several.

FOLDER/manifest.json, tokens-…, documents-…, tokenizer/      made by one process
FOLDER/part-00003-of-00008/…                                 the same files, made by process 3 of 8
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from bigbatch.errors import InputError
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.token_store.build import Store
from bigbatch.lm.data.token_store.manifest import FORMAT, MANIFEST, read_manifest
from bigbatch.lm.data.tokenizer import AnyTokenizer, load_tokenizer, read_trained
from bigbatch.lm.files import read_json

TOKENIZER = "tokenizer"
TRAINED = "trained.json"  # of --model tiny, in that folder
BLOCK_DOCUMENTS = 1_000  # consecutive documents of one part
_PART = re.compile(r"part-(\d{5})-of-(\d{5})")


def part_name(number: int, of: int) -> str:
    """Return the name of the folder of one part, from 0."""
    return f"part-{number:05d}-of-{of:05d}"


def part_of(documents: Iterable[Document], number: int, of: int) -> Iterable[Document]:
    """Yield the documents of one part: blocks of consecutive documents, in turn."""
    return (document for i, document in enumerate(documents) if i // BLOCK_DOCUMENTS % of == number)


def find_stores(folder: Path) -> list[Store] | None:
    """Return the stores of a folder of tokens; None if it is no such folder.

    Raises:
        InputError: Parts are missing or differ, or a store is damaged.
    """
    with suppress(OSError):
        if _is_store(folder):
            return [(folder, read_manifest(folder))]
        names = sorted(path.name for path in folder.iterdir() if _PART.fullmatch(path.name) and path.is_dir())
        if names and all(_is_store(folder / name) for name in names):
            return _parts(folder, names)
    return None


def stored_tokenizer(store: Store) -> AnyTokenizer:
    """Return the tokenizer with which a folder was tokenized.

    Raises:
        InputError: It cannot be read.
    """
    folder = store[0] / TOKENIZER
    return read_trained(folder / TRAINED) if (folder / TRAINED).is_file() else load_tokenizer(str(folder))


def _parts(folder: Path, names: list[str]) -> list[Store]:
    of = {name.rpartition("-")[2] for name in names}
    if len(of) > 1:
        raise InputError(
            f"{folder} has parts of different numbers of processes: {names[0]} and {names[-1]}. Remove those that do "
            "not belong together."
        )
    number = int(of.pop())
    missing = [part_name(i, number) for i in range(number) if part_name(i, number) not in names]
    if missing:
        raise InputError(
            f"{folder} has {len(names):,} of {number:,} parts; {missing[0]} is missing. Run bigbatch tokenize with "
            f"--shard {int(missing[0][5:10])}/{number} to make it."
        )
    stores = [(folder / name, read_manifest(folder / name)) for name in names]
    first = stores[0][1]
    for path, manifest in stores:
        same = (manifest.tokenizer, manifest.description.get("state"), manifest.description.get("settings"))
        if same != (first.tokenizer, first.description.get("state"), first.description.get("settings")):
            raise InputError(
                f"{path} was made from other data, settings or another tokenizer than {stores[0][0]}. Make all parts "
                "from the same data with the same flags."
            )
    return stores


def _is_store(folder: Path) -> bool:
    path = folder / MANIFEST
    if not path.is_file():
        return False
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT
