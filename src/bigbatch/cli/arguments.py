"""From the words of a command line to validated models, or to one sentence about what is wrong with them.

    words → argparse: text by field → over the values of the TOML file → pydantic → frozen models

Flags, defaults and help come from the models' fields; flags and TOML share one validation and one way to complain.
Nothing here writes, or loads more than pydantic.
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from bigbatch.cli.error_messages import hint, nearest, sentence, short
from bigbatch.cli.options import COMMANDS, SourceOptions, flag_key
from bigbatch.errors import InputError
from bigbatch.lm.config.field_groups import EXCLUSIVE
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.files import os_reason

Model = TypeVar("Model", bound=BaseModel)

FILES = ("config", "save")
"""Fields that name a file."""


def parse(command: str, words: Sequence[str]) -> tuple[BaseModel, ...]:
    """Return what the command's ``run`` takes: its models, validated, in order.

    train: ``(TrainConfig,)``; plan: ``(TrainConfig, PlanOptions)``; verify: ``(TrainConfig, VerifyOptions)``;
    generate: ``(GenerateOptions,)``; checkpoints: ``(CheckpointsOptions,)``; report: ``(ReportOptions,)``;
    bench: ``(BenchOptions,)``.

    Raises:
        InputError: anything wrong in the words or in the TOML file that they name; one sentence.

    """
    given = _read_words(command, words)
    models = COMMANDS[command].models()
    config = (train_config(command, given),) if TrainConfig in models else ()
    return (*config, *(_validate(model, given) for model in models if model not in (TrainConfig, SourceOptions)))


def train_config(command: str, given: Mapping[str, object]) -> TrainConfig:
    """Return the configuration that the flags ``given`` and the TOML file that they may name ask for; flags win.

    A flag also replaces the file's other name for the same quantity: ``--epochs`` a ``steps`` of the file.
    """
    source = _validate(SourceOptions, given)
    flags = {key: value for key, value in given.items() if key in TrainConfig.model_fields}
    table = {} if source.config is None else _read_toml(command, source.config)
    for names in EXCLUSIVE:
        if any(name in flags for name in names):
            table = {key: value for key, value in table.items() if key not in names}
    spelled = {key: f"{key} in {source.config}" for key in table if key not in flags}
    config = _validate(TrainConfig, table | flags, spelled)
    if source.gradient_accumulation_steps is None:
        return config
    for name in ("microbatch", "token_budget"):
        if name in flags:
            raise InputError(f"--gradient-accumulation-steps and {_flag(name)} exclude each other: give one of them.")
    global_batch = config.resolved().global_batch
    if global_batch is None:
        raise InputError(
            "--gradient-accumulation-steps needs a batch in sequences: give --global-batch, "
            "or --microbatch beside the batch in tokens."
        )
    microbatch = -(-global_batch // source.gradient_accumulation_steps)
    return config.model_copy(update={"microbatch": microbatch, "token_budget": None})


def help_text(command: str) -> str:
    """Return what ``bigbatch COMMAND --help`` prints, for the width of this terminal."""
    spec = COMMANDS[command]
    parser = _parser(command)
    for key in spec.positionals:
        info = spec.fields()[key]
        parser.add_argument(key, metavar=key.upper(), nargs="?", help=_help(info))
    return parser.format_help()


# words -----------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An argparse that complains by an :class:`InputError` instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}.")


class _Formatter(argparse.HelpFormatter):
    """Wraps each paragraph to the terminal by itself, and leaves indented ones (the examples) alone."""

    def __init__(self, prog: str, **options: Any) -> None:
        width = min(100, shutil.get_terminal_size().columns - 2)
        super().__init__(prog, max_help_position=28, **{**options, "width": width})

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            line
            if line.startswith(" ")
            else textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent)
            for line in text.splitlines()
        )

    def _split_lines(self, text: str, width: int) -> list[str]:
        # Flag names are not broken at their hyphens.
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def _parser(command: str) -> _Parser:
    spec = COMMANDS[command]
    usage = " ".join([f"bigbatch {command}", *(f"[{key.upper()}]" for key in spec.positionals), "[--flag value ...]"])
    parser = _Parser(
        usage=usage.replace("[RUN]", "RUN").replace("[RUNS]", "RUN ..."),
        description=spec.about,
        epilog="\n".join(["examples:", *(f"  {example}" for example in spec.examples)]),
        formatter_class=_Formatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
        add_help=False,
    )
    for model, group in spec.sections:
        section = parser.add_argument_group(group.title, group.about)
        for name in group.fields:
            info = model.model_fields[name]
            key = flag_key(name, info)
            if key in spec.positionals:
                continue
            if info.annotation is bool:
                section.add_argument(_flag(key), dest=key, action="store_true", help=_help(info))
            else:
                section.add_argument(_flag(key), dest=key, metavar=_metavar(key, info), help=_help(info))
    return parser


def _read_words(command: str, words: Sequence[str]) -> dict[str, object]:
    """Return the text of each flag and positional by field; a flag given twice counts as its last."""
    spec = COMMANDS[command]
    tokens, after_dashes = _bind_values(command, words)
    try:
        namespace, extras = _parser(command).parse_known_args(tokens)
    except argparse.ArgumentError as error:  # the values are bound, so only a switch with one remains
        raise InputError(f"{error.argument_name} is a switch: it takes no value.") from None
    for word in extras:
        if word.startswith("-") and word != "-":
            flag = word.partition("=")[0]
            near = nearest(flag, [*(key for key in spec.fields() if key not in spec.positionals), "help"])
            raise InputError(f"unknown flag {short(flag)}: {hint(command, near and _flag(near))}")
    positionals = [*extras, *after_dashes]
    if spec.collects_all and positionals:
        return vars(namespace) | {spec.positionals[0]: positionals}
    if len(positionals) > len(spec.positionals):
        stray = short(repr(positionals[len(spec.positionals)]))
        raise InputError(f"{stray} is not expected: {command} takes {spec.usage_words}.")
    if spec.positionals and not positionals:
        raise InputError("RUN is missing: name the folder of a trained run, such as runs/tiny-python-stdlib.")
    return vars(namespace) | dict(zip(spec.positionals, positionals, strict=False))


def _bind_values(command: str, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Write ``--flag value`` as ``--flag=value`` and split at ``--``.

    argparse would take the value in ``--lr -1e-3`` or ``--sample-prompt -x`` for a flag.
    """
    spec = COMMANDS[command]
    valued = {_flag(key): key for key, info in spec.fields().items() if info.annotation is not bool}
    tokens: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return tokens, rest
        if word not in valued or valued[word] in spec.positionals:
            tokens.append(word)
        elif not rest or rest[0].startswith("--"):
            key = valued[word]
            if (alone := _alone(spec.fields()[key])) is not None:
                tokens.append(f"{word}={alone}")
                continue
            raise InputError(f"{word} needs a value: {word} {_metavar(key, spec.fields()[key])}.")
        else:
            tokens.append(f"{word}={rest.pop(0)}")
    return tokens, []


def _alone(info: FieldInfo) -> object:
    """What a flag means without a value; None where it needs one."""
    return info.json_schema_extra.get("alone") if isinstance(info.json_schema_extra, dict) else None


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _help(info: FieldInfo) -> str:
    """The description, and the default unless it says that itself; argparse reads ``%`` as a format."""
    text = info.description or ""
    if "(default" not in text and not info.is_required() and info.annotation is not bool:
        default = info.default
        shown = repr(default) if isinstance(default, str) and default != default.strip() else default
        text = f"{text} (default: {shown})"
    return text.replace("%", "%%")


def _metavar(key: str, info: FieldInfo) -> str:
    if isinstance(info.json_schema_extra, dict) and "placeholder" in info.json_schema_extra:
        return str(info.json_schema_extra["placeholder"])
    return "|".join(_placeholder(key, kind) for kind in _base_types(info.annotation))


def _placeholder(key: str, kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if key in FILES:
        return "FILE"
    if kind is Path:
        return "FOLDER"
    if get_origin(kind) is tuple:
        return "N,N,..." if _base_types(get_args(kind)[0]) == [int] else "NAME,NAME,..."
    return {int: "N", float: "X"}.get(kind, key.split("_")[-1].upper())


def _base_types(annotation: Any) -> list[Any]:
    """``[int]`` behind ``Annotated[int, ...] | None``."""
    if get_origin(annotation) is Annotated:
        return _base_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for side in get_args(annotation) if side is not type(None) for kind in _base_types(side)]
    return [annotation]


# file ------------------------------------------------------------------------------------------------------------


def _read_toml(command: str, path: Path) -> dict[str, object]:
    """Return the file's settings, whose names are those of :class:`TrainConfig`; their values are not looked at."""
    try:
        table = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: --config takes a TOML file.") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: --config takes a TOML file.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {os_reason(error)}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: byte {error.start} cannot be read.") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply for settings, which are single values.") from None
    except ValueError as error:
        reason = str(error)
        raise InputError(f"{path} is not valid TOML: {reason[:1].lower()}{reason[1:]}.") from None
    for key, value in table.items():
        if key in TrainConfig.model_fields:
            continue
        if isinstance(value, dict):
            raise InputError(f"{path} has the table [{short(key)}]: write the settings at its top, without tables.")
        near = nearest(key, TrainConfig.model_fields)
        raise InputError(f"{path} has the unknown key {short(repr(key))}: {hint(command, near and repr(near))}")
    return table


def _validate(model: type[Model], given: Mapping[str, object], spelled: Mapping[str, str] | None = None) -> Model:
    """Build ``model`` from those values in ``given`` that are its own, or say in one sentence why it cannot be.

    ``spelled`` is what the user called a field; a flag or, for what argparse had no flag for, a word in capitals.
    """
    keys = {flag_key(name, info) for name, info in model.model_fields.items()}
    names = {key: _flag(key) for key in keys} | {"run": "RUN", "runs": "RUN", "prompt": "PROMPT"} | dict(spelled or {})
    try:
        return model.model_validate({key: value for key, value in given.items() if key in keys})
    except ValidationError as error:
        raise InputError(sentence(error, names)) from None
