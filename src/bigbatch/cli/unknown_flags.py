"""The error about a flag that a command does not have."""

from __future__ import annotations

from bigbatch.cli.command_specs import COMMAND_SPECS
from bigbatch.errors import InputError
from bigbatch.lm.config.error_messages import nearest, suggestion, truncate
from bigbatch.lm.config.settings_file import setting_names


def unknown_flag(command: str, argument: str) -> InputError:
    """Return the error about an argument that begins with a hyphen; it names what was probably meant."""
    spec = COMMAND_SPECS[command]
    flag = argument.partition("=")[0]
    if command == "resume" and flag.removeprefix("--").replace("-", "_") in setting_names():
        return InputError(f"{flag} cannot be changed, a resumed run keeps it: start a new run with bigbatch train.")
    if flag == "--data" and "data" in spec.positionals:
        return InputError(f"unknown flag --data: pass the data without it, as in bigbatch {command} FILE.")
    near = nearest(flag, [*(key for key in spec.fields() if key not in spec.positionals), "help"])
    return InputError(f"unknown flag {truncate(flag)}: {suggestion(command, near and '--' + near.replace('_', '-'))}")
