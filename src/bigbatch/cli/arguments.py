"""Parsing of command-line arguments into validated models, with one-sentence errors.

    argv → argparse: text by field → merged over the values of the file of settings → pydantic → frozen models

Flags, defaults and help come from the fields of the models. Flags and files share validation and error messages.
Nothing here writes a file or imports more than pydantic.
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from bigbatch.cli.command_specs import COMMAND_SPECS
from bigbatch.cli.options import SourceOptions, flag_key
from bigbatch.cli.unknown_flags import unknown_flag
from bigbatch.errors import InputError
from bigbatch.lm.config.error_messages import format_value, sentence, truncate
from bigbatch.lm.config.field_groups import EXCLUSIVE
from bigbatch.lm.config.field_types import join_texts
from bigbatch.lm.config.settings_file import read_settings, setting_names
from bigbatch.lm.config.train_config import TrainConfig

Model = TypeVar("Model", bound=BaseModel)

FILES = ("config", "save")
"""Fields whose value is the path of a file."""

POSITIONAL_NAMES = {"run": "RUN", "runs": "RUN", "prompt": "PROMPT", "data": "DATA"}
"""Names of the positional arguments in help and messages."""


def parse(command: str, argv: Sequence[str]) -> tuple[BaseModel, ...]:
    """Return the arguments of the command's ``run``: its validated models, in order.

    train: ``(TrainConfig,)``; plan: ``(TrainConfig, PlanOptions)``; generate: ``(GenerateOptions,)``, and so on.

    Raises:
        InputError: An argument, or the file named by ``--config``, is invalid; the message is one sentence.
    """
    values = _read_argv(command, argv)
    models = COMMAND_SPECS[command].models()
    config = (train_config(command, values),) if TrainConfig in models else ()
    return (*config, *(_validate(model, values) for model in models if model not in (TrainConfig, SourceOptions)))


def train_config(command: str, values: Mapping[str, object]) -> TrainConfig:
    """Return the configuration from the flags in ``values`` and the file named by ``--config``; flags win.

    A flag also replaces an exclusive setting of the file: ``--epochs`` replaces ``steps``.
    """
    source = _validate(SourceOptions, values)
    flags = {key: value for key, value in values.items() if key in setting_names()}
    table = {} if source.config is None else read_settings(command, source.config)
    for names in EXCLUSIVE:
        if any(name in flags for name in names):
            table = {key: value for key, value in table.items() if key not in names}
    if {"validation_data", "validation_fraction"} <= {*table, *flags}:
        raise InputError("--validation-data and --validation-fraction exclude each other: give one of them.")
    display_names = {key: f"{key} in {source.config}" for key in table if key not in flags}
    display_names |= {key: POSITIONAL_NAMES[key] for key in COMMAND_SPECS[command].positionals if key in flags}
    config = _validate(TrainConfig, table | flags, display_names)
    if source.gradient_accumulation_steps is None:
        return config
    for name in ("microbatch", "token_budget"):
        if name in flags:
            raise InputError(f"--gradient-accumulation-steps and {_flag(name)} exclude each other: give one of them.")
    global_batch = config.resolved().global_batch
    if global_batch is None:
        raise InputError(
            "--gradient-accumulation-steps needs a batch in sequences: pass --global-batch, "
            "or --microbatch with --global-batch-tokens."
        )
    microbatch = -(-global_batch // source.gradient_accumulation_steps)
    return config.model_copy(update={"microbatch": microbatch, "token_budget": None})


def help_text(command: str) -> str:
    """Return the text of ``bigbatch COMMAND --help``, wrapped to the width of this terminal."""
    spec = COMMAND_SPECS[command]
    parser = _parser(command)
    for key in spec.positionals:
        parser.add_argument(key, metavar=POSITIONAL_NAMES[key], nargs="?", help=_help(spec.fields()[key]))
    return parser.format_help()


# command line ----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Argument parser that raises :class:`InputError` instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}.")


class _Formatter(argparse.HelpFormatter):
    """Help formatter that wraps each paragraph separately, does not wrap indented lines (the examples), and does not
    break the names of flags at their hyphens.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        width = min(100, shutil.get_terminal_size().columns - 2)
        super().__init__(prog, max_help_position=28, **{**options, "width": width})

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            line
            if line.startswith(" ")
            else textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
            for line in text.splitlines()
        )

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def _parser(command: str) -> _Parser:
    spec = COMMAND_SPECS[command]
    usage = " ".join([f"bigbatch {command}", *(f"[{key.upper()}]" for key in spec.positionals), "[--flag value ...]"])
    parser = _Parser(
        usage=usage.replace("[RUN]", "RUN").replace("[DATA]", "DATA ...").replace("[RUNS]", "RUN ..."),
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
            elif accepts_several(info):
                words = f"{_metavar(key, info)} ..."
                section.add_argument(_flag(key), dest=key, action="append", metavar=words, help=_help(info))
            else:
                section.add_argument(_flag(key), dest=key, metavar=_metavar(key, info), help=_help(info))
    return parser


def _read_argv(command: str, argv: Sequence[str]) -> dict[str, object]:
    """Return the text of each flag and positional by field; raise `InputError` if one is unknown or missing."""
    spec = COMMAND_SPECS[command]
    tokens, after_dashes = _bind_values(command, argv)
    _refuse_repeated(command, tokens)
    try:
        namespace, extras = _parser(command).parse_known_args(tokens)
    except argparse.ArgumentError as error:  # values are bound already, so only a switch with a value remains
        raise InputError(f"{error.argument_name} is a switch and accepts no value.") from None
    for argument in extras:
        if argument.startswith("-") and argument != "-":
            raise unknown_flag(command, argument)
    positionals = [*extras, *after_dashes]
    if spec.collects_all and positionals:
        return vars(namespace) | {spec.positionals[0]: positionals}
    if len(positionals) > len(spec.positionals):
        unexpected = truncate(repr(positionals[len(spec.positionals)]))
        reads_data = command in ("train", "tokenize", "plan")
        hint = f" Pass data as --data {truncate(' '.join(positionals))}." if reads_data else ""
        raise InputError(f"unexpected argument {unexpected}: {command} accepts {spec.usage_words}.{hint}")
    if spec.positionals and not positionals:
        several = [key for key, value in vars(namespace).items() if isinstance(value, list)]
        order = f", before {_flag(several[-1])}, which accepts every value after it" if several else ""
        raise InputError(f"{spec.missing}{order}.")
    return vars(namespace) | dict(zip(spec.positionals, positionals, strict=False))


def _bind_values(command: str, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Rewrite ``--flag value`` as ``--flag=value``; return the arguments before and after ``--``.

    Otherwise argparse would parse the value in ``--lr -1e-3`` as a flag. A flag that accepts several values is
    repeated for each, up to the next word with a dash: ``--data a b`` becomes ``--data=a --data=b``.
    """
    spec = COMMAND_SPECS[command]
    keys_by_flag = {_flag(key): key for key, info in spec.fields().items() if info.annotation is not bool}
    tokens: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if token == "--":
            return tokens, rest
        if token not in keys_by_flag or keys_by_flag[token] in spec.positionals:
            tokens.append(token)
        elif not rest or rest[0].startswith("--"):
            key = keys_by_flag[token]
            if (implied := _implied_value(spec.fields()[key])) is not None:
                tokens.append(f"{token}={implied}")
                continue
            raise InputError(f"{token} needs a value: {token} {_metavar(key, spec.fields()[key])}.")
        else:
            tokens.append(f"{token}={rest.pop(0)}")
            while accepts_several(spec.fields()[keys_by_flag[token]]) and rest and not rest[0].startswith("-"):
                tokens.append(f"{token}={rest.pop(0)}")
    return tokens, []


def _refuse_repeated(command: str, tokens: Sequence[str]) -> None:
    """Raise if a flag is given twice: one of its values would be ignored."""
    fields = COMMAND_SPECS[command].fields()
    given: dict[str, str] = {}
    for token in tokens:
        flag, equals, value = token.partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or key not in fields or key in COMMAND_SPECS[command].positionals:
            continue
        if flag in given and not accepts_several(fields[key]):
            values = f", as {format_value(given[flag])} and {format_value(value)}" if equals else ""
            is_list = any(get_origin(kind) is tuple for kind in _base_types(fields[key].annotation))
            remedy = f"give one list, such as {flag} {given[flag]},{value}" if is_list else "give it once"
            raise InputError(f"{flag} is given twice{values}: {remedy}.")
        given[flag] = value


def accepts_several(info: FieldInfo) -> bool:
    """Return whether a flag may be repeated and may be followed by several values."""
    return isinstance(info.json_schema_extra, dict) and bool(info.json_schema_extra.get("several"))


def _implied_value(info: FieldInfo) -> object:
    """Return the value of a flag that is passed without one; None if it needs a value."""
    return info.json_schema_extra.get("alone") if isinstance(info.json_schema_extra, dict) else None


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _help(info: FieldInfo) -> str:
    """Return the description, with the default unless it states one itself; ``%`` is escaped for argparse."""
    text = info.description or ""
    if "(default" not in text and not info.is_required() and info.annotation is not bool:
        default = info.default
        shown = repr(default) if isinstance(default, str) and default != default.strip() else join_texts(default)
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
    """Return the types of an annotation without metadata and None: ``[int]`` for ``Annotated[int, ...] | None``."""
    if get_origin(annotation) is Annotated:
        return _base_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for side in get_args(annotation) if side is not type(None) for kind in _base_types(side)]
    return [annotation]


# validation ------------------------------------------------------------------------------------------------------


def _validate(
    model: type[Model], values: Mapping[str, object], display_names: Mapping[str, str] | None = None
) -> Model:
    """Build ``model`` from those ``values`` that are its fields; raise a one-sentence `InputError` if invalid.

    ``display_names`` are the names of fields in messages; by default the flag, or the metavar of a positional.
    """
    keys = {flag_key(name, info) for name, info in model.model_fields.items()}
    positionals = {key: name for key, name in POSITIONAL_NAMES.items() if key not in setting_names()}
    names = {key: _flag(key) for key in keys} | positionals | dict(display_names or {})
    try:
        return model.model_validate({key: value for key, value in values.items() if key in keys})
    except ValidationError as error:
        raise InputError(sentence(error, names)) from None
