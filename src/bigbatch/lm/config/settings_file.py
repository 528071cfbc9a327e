"""Read the settings of a run from a TOML or YAML file, such as that of ``--config``, or from a dict.

file → UTF-8 → TOML, or YAML for .yaml and .yml → names checked → {field of TrainConfig: value}
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError

from bigbatch.errors import InputError, first_line, os_reason
from bigbatch.lm.config.error_messages import nearest, sentence, suggestion, truncate
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.files import file_kind

YAML_SUFFIXES = (".yaml", ".yml")
_EXPECTED = "settings are read from a TOML or YAML file"


def to_config(settings: TrainConfig | Mapping[str, object] | str | Path | None) -> TrainConfig:
    """Return a configuration, or the one that a dict or the file at a path describes; None for the defaults.

    Raises:
        InputError: The file cannot be read, a name is unknown, or a value is invalid; the message is one sentence.
    """
    if isinstance(settings, TrainConfig):
        return settings
    display_names = {}
    if settings is None:
        table: dict[str, object] = {}
    elif isinstance(settings, Mapping):
        table = dict(settings)
        unknown = next((name for name in table if name not in setting_names()), None)
        if unknown is not None:
            near = nearest(str(unknown), setting_names())
            raise InputError(f"{truncate(repr(unknown))} is not a setting: {suggestion('train', near and repr(near))}")
    elif isinstance(settings, str | Path):
        table = read_settings("train", Path(settings))
        display_names = {name: f"{name} in {settings}" for name in table}
    else:
        raise InputError(
            f"the configuration is {type(settings).__name__}: pass a TrainConfig, a dict of settings, or the path of a "
            "TOML or YAML file."
        )
    try:
        return TrainConfig.model_validate(table)
    except ValidationError as error:
        raise InputError(sentence(error, display_names)) from None


def read_settings(command: str, path: Path) -> dict[str, object]:
    """Return the settings of a TOML or YAML file. Names are checked, values are not.

    Args:
        command: The command, for messages.
        path: The file.

    Raises:
        InputError: The file cannot be read, is not TOML or YAML, or has a name that is not a field of
            :class:`TrainConfig`.
    """
    if not path.is_file() and path.exists() and not path.is_dir():  # reading a pipe may wait for ever
        raise InputError(f"{path} is {file_kind(path)}: {_EXPECTED}. Write the settings to a file.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        table = _parse_yaml(path, text) if path.suffix.lower() in YAML_SUFFIXES else tomllib.loads(text)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: {_EXPECTED}.") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: {_EXPECTED}.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {os_reason(error)}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: byte {error.start} cannot be read.") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply: settings are single values.") from None
    except InputError:
        raise
    except ValueError as error:
        reason = str(error)
        raise InputError(f"{path} is not valid TOML: {reason[:1].lower()}{reason[1:]}.") from None
    _check_names(command, path, table)
    return table


def setting_names() -> set[str]:
    """Return the names of the settings of a run, as in flags and files."""
    return {info.alias or name for name, info in TrainConfig.model_fields.items()}


def _check_names(command: str, path: Path, table: dict[str, object]) -> None:
    for key, value in table.items():
        if key in setting_names():
            continue
        if isinstance(value, dict):
            shape = f"the table [{truncate(key)}]" if path.suffix.lower() not in YAML_SUFFIXES else f"settings in {key}"
            raise InputError(f"{path} has {shape}: write the settings at the top level, without tables.")
        near = nearest(key, setting_names())
        raise InputError(
            f"{path} has the unknown key {truncate(repr(key))}: {suggestion(command, near and repr(near))}"
        )


def _parse_yaml(path: Path, text: str) -> dict[str, object]:
    """Parse YAML; null, true and false have their meaning, and other plain words are text, as on the command line.

    The types of YAML 1.1 would read 012 as ten, 1:30 as ninety and 1e-3 as text.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # no types
        yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise InputError(f"{path} has the key {truncate(repr(twice))} twice: give it once.")
            found: dict[Any, Any] = super().construct_mapping(node, deep)
            return found

    Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(~|null|)$"), None)
    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|false)$"), None)
    try:
        table = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or first_line(error)
        raise InputError(f"{path} is not valid YAML: {reason}{place}.") from None
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise InputError(f"{path} has no settings: write each as name: value, on a line of its own.")
    return {str(key): value for key, value in table.items()}
