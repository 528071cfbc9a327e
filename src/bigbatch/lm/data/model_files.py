"""Check the files of a model on this machine without loading a library: weights, configuration, tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from bigbatch.errors import InputError, os_reason
from bigbatch.lm.data.hub import close_matches, exists
from bigbatch.lm.files import file_kind

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf")
TOKENIZER_FILES = (
    "tokenizer*",
    "tekken.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "added_tokens.json",
    "special_tokens_map.json",
)


def has_weights(model: str) -> bool:
    """Return whether a folder contains files of weights."""
    return any(any(Path(model).glob(pattern)) for pattern in WEIGHT_FILES)


def check_has_weights(model: str) -> None:
    """Check that a model folder has weights; a name on the hub is not checked.

    Raises:
        InputError: It has a configuration and no weights.
    """
    if (Path(model) / CONFIG_FILE).is_file() and not has_weights(model):
        raise InputError(
            f"--model {model} has a configuration and no weights: pass --model-config {model} to pretrain a new model, "
            "or add its weights."
        )


def check_model_config(path: str, tokenizer: str | None) -> None:
    """Check that the configuration of a new model exists, and that its tokenizer is named or next to it.

    Args:
        path: Of ``--model-config``.
        tokenizer: Of ``--tokenizer``; None if it was not given.

    Raises:
        InputError: A file does not exist, or no tokenizer is named.
    """
    place = Path(path)
    if not exists(place):
        near = close_matches(path)
        remedy = f"Did you mean {' or '.join(near)}?" if near else "Pass a config.json, or a folder with one."
        raise InputError(f"there is no file or folder {path!r} for --model-config. {remedy}")
    if place.is_dir() and not (place / CONFIG_FILE).is_file():
        raise InputError(f"--model-config {path} is a folder without {CONFIG_FILE}: pass a folder with one.")
    if not place.is_dir() and not place.is_file():
        raise InputError(f"--model-config {path} is {file_kind(place)}: pass a {CONFIG_FILE}, or a folder with one.")
    if tokenizer is None and not (place.is_dir() and any(_tokenizer_files(place))):
        where = "is a file" if place.is_file() else "has no tokenizer"
        raise InputError(
            f"--model-config {path} {where}, so --tokenizer is needed: pass a tokenizer folder, a tokenizer.json, or "
            "train:N to train one of N tokens on the data."
        )


def tokenizer_digest(name: str) -> str | None:
    """Return a SHA-256, in hex, of the files of a tokenizer; None if it is no file or folder of this machine.

    Raises:
        InputError: A file cannot be read.
    """
    place = Path(name)
    files = [place] if place.is_file() else sorted(set(_tokenizer_files(place))) if place.is_dir() else []
    digest = sha256()
    try:
        for path in files:
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)} ".encode() + content)
    except OSError as error:
        raise InputError(f"the tokenizer {name} cannot be read: {os_reason(error)}.") from error
    return digest.hexdigest() if files else None


def _tokenizer_files(folder: Path) -> Iterator[Path]:
    return (path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file())
