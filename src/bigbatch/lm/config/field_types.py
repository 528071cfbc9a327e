"""Types of the configuration fields: the values accepted from flags and TOML, and the messages for other values."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from bigbatch.lm.config.batch_schedule import read
from bigbatch.memory.limit import known_gpu, read_memory

LARGEST_COUNT = 2**31 - 1
LARGEST_SEED = 2**32 - 1
SMALLEST_TRAINED_VOCABULARY = 259  # 256 bytes and three special tokens
ALL_LINEAR = "all-linear"
"""The LoRA targets that mean every linear layer but the output layer; as in peft."""


def _refuse_bool(value: object) -> object:
    """Refuse TOML's ``true`` as a number; Python would convert it to 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("bool_for_number", "it must be a number")
    return value


def _usable_text(value: str) -> str:
    """Validate text as UTF-8 without NUL, which ``config.json`` and file names require."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("text_encoding", "it must be valid UTF-8 text") from None
    if "\0" in value:
        raise PydanticCustomError("nul_in_text", "it must not contain a NUL character")
    return value


def _folder_text(value: object) -> object:
    """Validate a folder in the same way, and as non-empty: ``Path("")`` would be the current one."""
    text = str(value) if isinstance(value, Path) else value
    if not isinstance(text, str):
        raise PydanticCustomError("folder_type", "it must be the name of a folder")
    if not text:
        raise PydanticCustomError("folder_empty", "it must not be empty")
    return _usable_text(text)


def _as_texts(value: object) -> object:
    """Convert one text to a tuple of one; refuse what is neither a text nor a list."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple):
        return value
    raise PydanticCustomError("texts", "it must be text or a list of texts")


def _as_numbers(value: object) -> object:
    """Convert one number to a tuple of one, and a list to a tuple."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _one_or_list(values: tuple[str, ...]) -> str | list[str]:
    """Write one text as itself, as versions did that accepted only one, and several as a list."""
    return values[0] if len(values) == 1 else list(values)


def _distinct_dashboards(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) < len(values):
        raise PydanticCustomError("dashboards", "name each dashboard once")
    if "none" in values and len(values) > 1:
        raise PydanticCustomError("dashboards", "none excludes the others")
    return values


def join_texts(values: object) -> str:
    """Return the value of a setting as words of a command line: texts of a list are separated by spaces."""
    if not isinstance(values, list | tuple):
        return str(values)
    return str(values[0]) if len(values) == 1 else shlex.join(map(str, values))


def _known_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", value):
        raise PydanticCustomError("device_name", "it must be auto, cpu, cuda, cuda:N or mps")
    return value


def _none_word(value: object) -> object:
    """Convert the word ``none`` to None, which TOML and flags lack."""
    return None if isinstance(value, str) and value.strip().lower() == "none" else value


def _zero_is_none(value: float | None) -> float | None:
    return value or None


def _auto_or_count(value: object) -> object:
    """Validate ``auto`` or a count; a union would report an error for each of its alternatives."""
    if isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    try:
        return _COUNT.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] in ("greater_than_equal", "less_than_equal", "int_parsing_size"):
            raise PydanticCustomError(first["type"], first["msg"], first.get("ctx")) from None
        raise PydanticCustomError("auto_or_count", "it must be auto or a whole number") from None


def _best_or_count(value: object) -> object:
    """Validate ``best`` or a count."""
    if isinstance(value, str) and value.strip().lower() == "best":
        return "best"
    try:
        return _auto_or_count(None if value == "auto" else value)
    except PydanticCustomError as error:
        if error.type != "auto_or_count":
            raise
        raise PydanticCustomError("best_or_count", "it must be best or a whole number") from None


def _tokenizer_text(value: str) -> str:
    """Refuse the vocabulary of a tokenizer to train that has no number."""
    if value.startswith("train:") and not (
        re.fullmatch(r"train:[0-9]{1,9}", value) and int(value[6:]) >= SMALLEST_TRAINED_VOCABULARY
    ):
        raise PydanticCustomError(
            "tokenizer",
            "train: needs the number of tokens, {least} or more, such as train:8192",
            {"least": SMALLEST_TRAINED_VOCABULARY},
        )
    return _usable_text(value)


def _switch(value: object) -> object:
    """Convert TOML's true and false to ``full`` and ``none``."""
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


def _memory_text(value: object) -> object:
    """Validate memory with :func:`bigbatch.memory.limit.read_memory`; TOML's numbers have no unit."""
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if isinstance(text, str):
        try:
            read_memory(text)
        except ValueError as error:
            raise PydanticCustomError("memory", "{demand}", {"demand": str(error)}) from None
    return text


def _no_adascale(value: object) -> object:
    """Refuse the one rule that the command cannot apply, and name the call that can."""
    if isinstance(value, str) and value.strip() == "adascale":
        raise PydanticCustomError(
            "adascale",
            "it is derived for SGD and needs a measured noise scale, which bigbatch train does not pass to it: in your "
            'own loop, call bigbatch.rescale(optimizer, factor, rule="adascale", noise_scale=N, batch=B)',
        )
    return value


def _batch_schedule(value: str) -> str:
    try:
        read(value)
    except ValueError as error:
        raise PydanticCustomError("batch_schedule", "{demand}", {"demand": str(error)}) from None
    return value


def _gpu_name(value: str) -> str:
    try:
        return known_gpu(value)
    except ValueError as error:
        raise PydanticCustomError("gpu", "{demand}", {"demand": str(error)}) from None


def _lora_targets(value: object) -> object:
    """Validate names separated by commas, or a list of them; return them separated by commas alone."""
    if not isinstance(value, str | list | tuple):
        raise PydanticCustomError("lora_targets", "it must be names separated by commas")
    names = [_usable_text(str(name)).strip() for name in (value.split(",") if isinstance(value, str) else value)]
    if not all(names):
        raise PydanticCustomError("lora_targets", "each name in it must not be empty")
    if len(set(names)) < len(names):
        raise PydanticCustomError("lora_targets", "it must name each layer once")
    if ALL_LINEAR in names and len(names) > 1:
        raise PydanticCustomError("lora_targets", "all-linear includes every other name: give one or the other")
    return ",".join(names)


Whole = Annotated[int, BeforeValidator(_refuse_bool)]
"""An integer, also as text such as "64"; 2.5 and true are refused."""
Count = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=1, le=LARGEST_COUNT)]
Seed = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=0, le=LARGEST_SEED)]
Number = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False)]
Text = Annotated[str, AfterValidator(_usable_text)]
Texts = Annotated[
    tuple[Annotated[str, Field(min_length=1), AfterValidator(_usable_text)], ...],
    BeforeValidator(_as_texts),
    PlainSerializer(_one_or_list),
    Field(min_length=1),
]
"""One text or several: a flag followed by several values, or repeated; a text or a list in a file of settings."""
Dashboards = Annotated[
    tuple[Literal["none", "tensorboard", "wandb", "mlflow", "trackio"], ...],
    BeforeValidator(_as_texts),
    AfterValidator(_distinct_dashboards),
    PlainSerializer(_one_or_list),
    Field(min_length=1),
]
"""One dashboard or several, each once; ``none`` alone."""
Weights = Annotated[
    tuple[Annotated[float, BeforeValidator(_refuse_bool), Field(gt=0, allow_inf_nan=False)], ...],
    BeforeValidator(_as_numbers),
    Field(min_length=1),
]
"""One number or several, each above 0: a flag followed by several values, or repeated; a list in a file of settings."""
Folder = Annotated[Path, BeforeValidator(_folder_text)]
Device = Annotated[str, AfterValidator(_known_device)]
Microbatch = Annotated[Literal["auto"] | Count, BeforeValidator(_auto_or_count)]
Keep = Annotated[Literal["best"] | Count, BeforeValidator(_best_or_count)]
Patience = Annotated[Count | None, BeforeValidator(_none_word)]
TokenizerText = Annotated[str, AfterValidator(_tokenizer_text)]
BatchScheduleText = Annotated[str, AfterValidator(_batch_schedule)]
MemoryText = Annotated[str, BeforeValidator(_memory_text)]
Checkpointing = Annotated[Literal["auto", "none", "selective", "full", "offload"], BeforeValidator(_switch)]
LrRule = Annotated[
    Literal["none", "linear", "sqrt", "sde", "half-life", "sqrt+half-life"], BeforeValidator(_no_adascale)
]
LoraTargets = Annotated[str, BeforeValidator(_lora_targets)]
Gpu = Annotated[str, AfterValidator(_gpu_name)]
NormLimit = Annotated[Annotated[Number, Field(ge=0)] | None, BeforeValidator(_none_word), AfterValidator(_zero_is_none)]

_COUNT: TypeAdapter[int] = TypeAdapter(Count)


CheckpointingMode: TypeAlias = Literal["none", "selective", "full", "offload"]


CHECKPOINTING_MODES: tuple[CheckpointingMode, ...] = ("none", "selective", "full", "offload")

AUTO_MODES: tuple[CheckpointingMode, ...] = ("none", "selective", "full")

RECOMPUTED_LAYERS: Mapping[CheckpointingMode, float] = MappingProxyType(
    {"none": 0.0, "selective": 0.5, "full": 1.0, "offload": 1.0}
)
"""Share of the layers whose forward runs again in backward."""
"""Modes that ``auto`` chooses among: ``"offload"`` has not been measured on a card, and is for those who ask for it."""
