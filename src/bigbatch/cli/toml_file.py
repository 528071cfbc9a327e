"""Read the settings of a run from the TOML file of ``--config``.

file → UTF-8 → TOML → names checked → {field of TrainConfig: value}
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from bigbatch.cli.error_messages import nearest, suggestion, truncate
from bigbatch.errors import InputError, os_reason
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.files import file_kind


def read_toml(command: str, path: Path) -> dict[str, object]:
    """Return the settings of a TOML file. Names are checked, values are not.

    Args:
        command: The command, for messages.
        path: The file.

    Raises:
        InputError: The file cannot be read, is not TOML, or has a name that is not a field of :class:`TrainConfig`.
    """
    if not path.is_file() and path.exists() and not path.is_dir():  # reading a pipe may wait for ever
        raise InputError(f"{path} is {file_kind(path)}: --config needs a TOML file. Write the settings to a file.")
    try:
        table = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: --config needs a TOML file.") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: --config needs a TOML file.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {os_reason(error)}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: byte {error.start} cannot be read.") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply: settings are single values.") from None
    except ValueError as error:
        reason = str(error)
        raise InputError(f"{path} is not valid TOML: {reason[:1].lower()}{reason[1:]}.") from None
    for key, value in table.items():
        if key in TrainConfig.model_fields:
            continue
        if isinstance(value, dict):
            raise InputError(
                f"{path} has the table [{truncate(key)}]: write the settings at the top level, without tables."
            )
        near = nearest(key, TrainConfig.model_fields)
        raise InputError(
            f"{path} has the unknown key {truncate(repr(key))}: {suggestion(command, near and repr(near))}"
        )
    return table
