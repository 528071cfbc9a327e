"""The identity of a run, run-manifest.json: the layout of its directory, its random id, and what it was started with.

    config, facts → new_identity → run-manifest.json, written once → read_identity → compared with the checkpoints

Directories of earlier versions (layout 1) have no such file: their id is a hash of config.json.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bigbatch import __version__
from bigbatch.errors import InputError, os_reason
from bigbatch.lm.files import read_json, read_regular
from bigbatch.lm.runs.file_names import CONFIG, IDENTITY
from bigbatch.lm.text import describe_invalid

LAYOUT = 2  # of a run directory: raised when an earlier version could misread or damage it
LEGACY_LAYOUT = 1  # without run-manifest.json


class _IdentityFile(BaseModel):
    """The content of run-manifest.json, without its digest."""

    model_config = ConfigDict(strict=True, extra="forbid")

    layout: Annotated[int, Field(ge=LAYOUT, le=LAYOUT)]
    run_id: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    bigbatch: str
    settings: dict[str, Any]
    facts: dict[str, Any] | None


class NewerLayoutError(InputError):
    """A run directory that a newer bigbatch wrote."""


@dataclass(frozen=True)
class RunIdentity:
    """The identity of a run.

    Attributes:
        layout: Of the run directory.
        run_id: Made at random when the run directory was created; checkpoints hold it too.
        settings: config.json at that time; None in layout 1.
        facts: The model and data that the run was started with; None in layout 1, or if it was created without them.
    """

    layout: int
    run_id: str
    settings: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] | None = None


def new_identity(settings: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> bytes:
    """Return the content of run-manifest.json for a new run."""
    return _to_bytes(token_hex(16), settings, facts)


def with_facts(identity: RunIdentity, facts: Mapping[str, Any]) -> bytes:
    """Return the content of run-manifest.json for a run whose model and data are known."""
    return _to_bytes(identity.run_id, identity.settings or {}, facts)


def _to_bytes(run_id: str, settings: Mapping[str, Any], facts: Mapping[str, Any] | None) -> bytes:
    content = {
        "layout": LAYOUT,
        "run_id": run_id,
        "bigbatch": __version__,
        "settings": dict(settings),
        "facts": None if facts is None else dict(facts),
    }
    return json.dumps({**content, "digest": digest_of(content)}, indent=2).encode() + b"\n"


def digest_of(content: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hex, of JSON values, independent of the order of keys."""
    return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_identity(folder: Path) -> RunIdentity:
    """Read the identity of a run.

    Raises:
        NewerLayoutError: Its layout is newer.
        InputError: run-manifest.json (in layout 1: config.json) cannot be read or was changed.
    """
    path = folder / IDENTITY
    try:
        content = read_json(path)
    except FileNotFoundError:
        return _legacy_identity(folder)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {os_reason(error)}. Restore the file.") from error
    except ValueError as error:
        raise _damaged(path, f"it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _damaged(path, "it is not an object")
    digest = content.pop("digest", None)
    if digest != digest_of(content):
        raise _damaged(path, "it differs from what was written (SHA-256)")
    layout = content.get("layout")
    if type(layout) is int and layout > LAYOUT:
        raise NewerLayoutError(
            f"{folder} has layout {layout}, written by bigbatch {content.get('bigbatch')}, and bigbatch {__version__} "
            f"supports layouts up to {LAYOUT}. Upgrade bigbatch; nothing was changed."
        )
    try:
        found = _IdentityFile.model_validate(content)
    except ValidationError as error:
        raise _damaged(path, describe_invalid(error.errors(include_url=False)[0])) from error
    return RunIdentity(found.layout, found.run_id, found.settings, found.facts)


def check_layout(folder: Path) -> None:
    """Check that a run directory has no newer layout, for readers that accept incomplete and damaged ones.

    Raises:
        NewerLayoutError: It has.
    """
    try:
        read_identity(folder)
    except NewerLayoutError:
        raise
    except InputError:
        return


def _legacy_identity(folder: Path) -> RunIdentity:
    try:
        return RunIdentity(LEGACY_LAYOUT, sha256(read_regular(folder / CONFIG)).hexdigest()[:16])
    except OSError as error:
        raise InputError(f"{folder} is no run: {folder / CONFIG} cannot be read ({os_reason(error)}).") from error


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is not what bigbatch wrote: {why}. Restore the file.")
