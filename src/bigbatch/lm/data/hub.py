"""Check names of models and data: on this machine, without loading a library, then once on the Hugging Face Hub."""

import difflib
import os
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Literal

from bigbatch.errors import InputError
from bigbatch.lm.files import file_kind

TIMEOUT_S = 10.0
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
SUGGESTED = 3
ADAPTER_CONFIG = "adapter_config.json"  # in a folder of adapters, as peft saves them
MOST_ENTRIES = 10_000  # of a folder that are compared with a misspelled name


def exists(path: Path) -> bool:
    """Return whether a path exists; False also for one that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for the file system, or one with a NUL
        return False


def looks_local(name: str) -> bool:
    """Return whether a name can only be that of a path: no hub name, or in a folder that exists."""
    path = Path(name)
    return not HUB_NAME.fullmatch(name) or name.startswith(".") or (len(path.parts) > 1 and exists(path.parent))


def close_matches(name: str, known: Iterable[str] = ()) -> list[str]:
    """Return existing paths and known names with a spelling close to ``name``, the closest first."""
    path = Path(name)
    # If several folders of the path are missing, the first of them is the misspelled one.
    while path.name and not exists(path.parent):
        path = path.parent
    siblings = {entry.name: str(path.parent / entry.name) for entry in _entries(path.parent)}
    names = siblings if len(path.parts) > 1 else {**siblings, **{word: word for word in known}}
    return [names[near] for near in difflib.get_close_matches(path.name, names, n=SUGGESTED, cutoff=0.75)]


def check_model_path(model: str) -> None:
    """Check that a model is a folder of regular files, or can be a name on the hub. No request, no library is loaded.

    Raises:
        InputError: It is neither, or reading the folder would wait for a pipe.
    """
    path = Path(model)
    if not exists(path):
        if looks_local(model):
            near = close_matches(model)
            remedy = f"Did you mean {' or '.join(near)}?" if near else "Pass the folder of a model or its hub name."
            raise InputError(f"there is no model folder {model!r}. {remedy}")
    elif not path.is_dir():
        raise InputError(f"--model {model} is {file_kind(path)}. Pass the folder of the model.")
    elif exists(path / ADAPTER_CONFIG):
        raise InputError(
            f"--model {model} is a folder of adapters. Merge them into their model with bigbatch merge {model} --out "
            "DIR, and pass that."
        )
    else:
        for entry in _entries(path):
            if entry.exists() and not (entry.is_file() or entry.is_dir()):
                raise InputError(f"the model folder {model} contains {entry.name}, {file_kind(entry)}. Remove it.")


def _entries(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in islice(entries, MOST_ENTRIES)]
    except OSError:
        return []


def is_on_hub(name: str, kind: Literal["dataset", "model"]) -> bool:
    """Return whether the hub has ``name``; False also if it cannot be reached or offline mode is on. One request.

    The loaders of the libraries retry an unreachable hub, 23 s for datasets and 46 s for transformers (measured
    without a network), and print a line for each attempt.

    Raises:
        InputError: The hub has no such dataset or model, or the name is not a valid one.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    get_info = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
    try:
        get_info(name, timeout=TIMEOUT_S)
    except (HFValidationError, RepositoryNotFoundError):
        raise InputError(f"{name!r} is neither a path on this machine nor a {kind} on the hub.") from None
    except HfHubHTTPError:
        return True  # it is reachable; the loader reports the error in detail
    except Exception:  # noqa: BLE001  the network errors of the hub's client differ between versions
        return False
    return True


def is_local(model: str) -> bool:
    """Return whether a model must be loaded from this machine: it is a path, or the hub cannot be reached.

    Raises:
        InputError: As :func:`is_on_hub`.
    """
    return exists(Path(model)) or not is_on_hub(model, "model")
