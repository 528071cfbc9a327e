"""The schema of state.json: what a run's state must look like before any of it is used.

values → seal (with the SHA-256 of the tensor files) → state.json → check_seal → tensors joined → validate → SavedState

The seal detects an edited state.json or a replaced tensor file even if the manifest was made to match. It is no
signature: a program that recomputes it too is not noticed.
"""

import math
import random
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from bigbatch.autotune.microbatch_choice import MicrobatchChoice
from bigbatch.lm.checkpoint.integrity import IntegrityError
from bigbatch.lm.checkpoint.manifest import Stamp
from bigbatch.lm.config.field_types import CheckpointingMode
from bigbatch.lm.runs.identity import digest_of
from bigbatch.lm.text import describe_invalid

STATE = "state.json"
SEAL = "seal"

Count = Annotated[int, Field(ge=0, le=2**62)]
PositiveCount = Annotated[int, Field(ge=1, le=2**62)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Point = Annotated[list[NotNegative] | tuple[NotNegative, ...], Field(min_length=2, max_length=2)]
Scalar = bool | int | float | str | None


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, arbitrary_types_allowed=True)


class SavedProgress(_Strict):
    """The fields of `bigbatch.lm.checkpoint.run_checkpoint.Progress`; those without a default were always saved."""

    step: Count
    cursor: Count
    skipped: Count
    skipped_in_a_row: Count
    validation_loss: float | None
    metrics_bytes: Count
    quarantine_bytes: Count
    batch: Count = 0
    pending_metrics_row: dict[str, Scalar] | None = None
    best_loss: float | None = None
    best_step: Count = 0
    improved_loss: float | None = None
    validations_without_improvement: Count = 0


class SavedFacts(_Strict):
    """What `bigbatch.lm.training.resume.run_facts` returns; earlier versions have fewer."""

    settings: dict[str, Scalar | list[Scalar]]
    data_sha256: str
    num_samples: PositiveCount
    vocabulary_sha256: str
    weights_dtype: str
    frozen_sha256: str | None
    fingerprint: str | None = None
    sampling_order: PositiveCount = 1
    learning: dict[str, Scalar | list[Scalar]] | None = None
    model: dict[str, Any] | None = None
    chat_template_sha256: str | None = None
    tokenizer_sha256: str | None = None
    validation_sha256: str | None = None
    passed: dict[str, bool | str] | None = None
    compiled_layers: bool = False


class SavedOptimizer(_Strict):
    """``Optimizer.state_dict()`` of AdamW."""

    state: dict[Count, dict[str, Tensor]]
    param_groups: Annotated[list[dict[str, Any]], Field(min_length=1)]


class SavedEngineProgress(_Strict):
    """Plain values of the engine."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    num_steps: Count
    size: Count
    size_in_use: Count
    good_windows: Count
    choice: dict[str, Any] | None
    noise: dict[str, float] | None = None


class SavedRandom(_Strict):
    """States of the random generators, as `bigbatch.rng.random_states` returns them."""

    cpu: Tensor
    devices: list[Tensor]
    python: tuple[Literal[3], tuple[Count, ...] | list[Count], float | None]
    numpy: dict[str, Any] | None


class SavedRank(_Strict):
    """The parts of the engine's state that differ by rank."""

    random: SavedRandom
    engine: SavedEngineProgress


class SavedEngine(SavedRank):
    """``Engine.state_dict()``."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, arbitrary_types_allowed=True)

    model: dict[str, Tensor]
    optimizer: SavedOptimizer
    scheduler: dict[str, Any] | None
    scaler: dict[str, Any] | None


class SavedState(_Strict):
    """The whole of state.json, with its tensors."""

    engine: SavedEngine
    ranks: list[SavedRank] = []
    progress: SavedProgress
    level: CheckpointingMode
    total_steps: PositiveCount
    facts: SavedFacts


class SavedTrial(_Strict):
    """A timed size of a `SavedChoice`."""

    size: PositiveCount
    per_s: NotNegative


class SavedTiming(_Strict):
    """The points of the time model of a `SavedChoice`."""

    points: list[Point] | tuple[Point, ...]


class SavedChoice(_Strict):
    """The fields of `bigbatch.autotune.MicrobatchChoice`, with those names of bigbatch 0.1.0 that have changed."""

    size: PositiveCount
    longest: PositiveCount
    unit: Literal["tokens", "samples"]
    peak_bytes: Count
    limit_bytes: Count
    per_s: NotNegative
    largest: PositiveCount
    trials: list[SavedTrial] | tuple[SavedTrial, ...] | None = None
    tried: list[SavedTrial] | None = None
    timing: SavedTiming
    prediction_failure: str | None = None
    unpredicted: str | None = None
    limited: bool = False


def read_choice(values: Mapping[str, Any]) -> MicrobatchChoice:
    """Return the choice of a micro-batch from values that a file holds.

    Raises:
        ValueError: They are not one; the message is a clause that names the field.
    """
    try:
        SavedChoice.model_validate(values)
        return MicrobatchChoice.from_dict(values)
    except ValidationError as error:
        raise ValueError(describe_invalid(error.errors(include_url=False)[0])) from None
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"it is not the choice of a micro-batch ({error})") from None


def sealed(values: Mapping[str, Any], stamps: Mapping[str, Stamp]) -> dict[str, Any]:
    """Add the seal to the content of state.json, once the files of tensors are written."""
    files = {name: stamp.sha256 for name, stamp in sorted(stamps.items())}
    return {**values, SEAL: {"files": files, "sha256": _seal_of(values, files)}}


def _seal_of(values: Mapping[str, Any], files: object) -> str:
    """Return the SHA-256 of the content, without the size of metrics.jsonl, which depends on the times in it."""
    progress = values.get("progress")
    if isinstance(progress, dict):
        progress = {name: value for name, value in progress.items() if name != "metrics_bytes"}
    return digest_of({**values, "progress": progress, "files": files})


def check_seal(values: Any, stamps: Mapping[str, Stamp], *, required: bool) -> dict[str, Any]:
    """Return the content of state.json without its seal.

    Args:
        values: The content.
        stamps: The files of tensors, according to the manifest.
        required: Whether content without a seal is invalid; bigbatch 0.1 wrote none.

    Raises:
        IntegrityError: It is not an object, or not what was sealed.
    """
    if not isinstance(values, dict):
        raise IntegrityError(f"{STATE} is not an object")
    content = dict(values)
    seal = content.pop(SEAL, None)
    if seal is None and not required:
        return content
    files = {name: stamp.sha256 for name, stamp in sorted(stamps.items())}
    if not isinstance(seal, dict) or seal.get("sha256") != _seal_of(content, seal.get("files")):
        raise IntegrityError(f"{STATE} was changed after it was written")
    if seal["files"] != files:
        changed = next((name for name in files if files[name] != seal["files"].get(name)), "a file of tensors")
        raise IntegrityError(f"{changed} is not the one that {STATE} was written with")
    return content


def validate(state: Any) -> None:
    """Validate a state with its tensors joined, as `bigbatch.lm.checkpoint.run_checkpoint` uses it.

    Raises:
        IntegrityError: A field is missing, unknown, or of another type; the message names it.
    """
    try:
        found = SavedState.model_validate(state)
    except ValidationError as error:
        raise IntegrityError(f"{STATE}: {describe_invalid(error.errors(include_url=False)[0])}") from None
    progress = found.progress
    if not progress.skipped_in_a_row <= progress.skipped <= progress.step <= found.total_steps:
        raise IntegrityError(
            f"{STATE} is of update {progress.step:,} of {found.total_steps:,}, with {progress.skipped:,} skipped"
        )
    if progress.best_step > progress.step:
        raise IntegrityError(f"{STATE} is of update {progress.step:,}, and its best one is {progress.best_step:,}")
    if progress.cursor < progress.step:  # every update has at least one sample
        raise IntegrityError(f"{STATE}: progress.cursor is {progress.cursor:,} after {progress.step:,} updates")
    for part in (found.engine, *found.ranks):
        _check_random(part.random)
        if part.engine.choice is not None:
            try:
                read_choice(part.engine.choice)
            except ValueError as reason:
                raise IntegrityError(f"{STATE}: engine.engine.choice.{reason}") from None


def _check_random(found: SavedRandom) -> None:
    """Try the states on generators of our own."""
    try:
        torch.Generator().set_state(found.cpu)
        version, internal, gauss = found.python
        random.Random().setstate((version, tuple(internal), gauss))
        if found.numpy is not None:
            _check_numpy(found.numpy)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError) as error:
        raise IntegrityError(f"{STATE}: engine.random is not the state of generators ({error})") from None


def _check_numpy(found: Mapping[str, Any]) -> None:
    import numpy as np

    key = found["state"]["key"]
    if not (isinstance(key, list) and all(type(word) is int for word in key) and type(found["state"]["pos"]) is int):
        raise ValueError("numpy.state")
    state = {**found["state"], "key": np.array(key, dtype="uint32")}
    np.random.RandomState().set_state({**found, "state": state})


def check_types(place: str, own: Any, found: Any) -> None:
    """Check that plain values have the types of those of the engine that receives them; keys may be added or missing.

    Raises:
        ValueError: One has another type, or is not finite; the message names it.
    """
    if isinstance(own, Mapping) and isinstance(found, Mapping):
        for name in own.keys() & found.keys():
            check_types(f"{place}.{name}", own[name], found[name])
    elif isinstance(own, list | tuple) and isinstance(found, list | tuple):
        if place.endswith(".params"):  # `bigbatch.Engine.load_state_dict` compares the groups
            return
        if len(own) != len(found):
            raise ValueError(f"{place} has {len(found):,} entries in the state, not {len(own):,}.")
        for index, (one, other) in enumerate(zip(own, found, strict=True)):
            check_types(f"{place}[{index}]", one, other)
    elif own is not None and not isinstance(own, Tensor):
        is_number = isinstance(own, float) and type(found) in (int, float)
        if not (is_number or type(found) is type(own)):
            raise ValueError(f"{place} is a {type(found).__name__} in the state, not a {type(own).__name__}.")
        if is_number and not math.isfinite(found):
            raise ValueError(f"{place} is {found} in the state.")
