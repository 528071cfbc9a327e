"""The file fingerprints.jsonl of a run, and where two of them first differ.

    {"parameters": [name, ...], "quantum": 2, "num_threads": 1, "torch": "2.11.0"}
    {"step": 1, "gradients": "0a1b2c3d...", "parameters": "4e5f6071..."}       eight hex digits for each parameter

No torch here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigbatch.errors import InputError, os_reason
from bigbatch.lm.files import open_regular, write_atomically
from bigbatch.lm.runs.file_names import FINGERPRINTS

DIGITS = 8


@dataclass(frozen=True)
class Fingerprints:
    """The content of a file.

    Attributes:
        names: Of the trained parameters.
        setting: Other values of the first line.
        gradients: By update, one fingerprint for each parameter; None for a skipped update.
        parameters: By update, one fingerprint for each parameter after it.
    """

    names: tuple[str, ...]
    setting: Mapping[str, Any]
    gradients: Mapping[int, str | None]
    parameters: Mapping[int, str]


@dataclass(frozen=True)
class Difference:
    """The first difference of two runs.

    Attributes:
        step: The update.
        is_gradient: Whether gradients differ, before the parameters do.
        names: The parameters that differ, in the order of the model.
    """

    step: int
    is_gradient: bool
    names: tuple[str, ...]


def read_fingerprints(run: Path) -> Fingerprints:
    """Read the fingerprints of a run; an incomplete last line, of a run in progress, is ignored.

    Raises:
        InputError: The run has none, or the file is damaged.
    """
    path = run / FINGERPRINTS
    try:
        with open_regular(path) as file:
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        raise InputError(f"{run} has no {FINGERPRINTS}: start it with bigbatch train --reproducible.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {os_reason(error)}.") from error
    try:
        header, *rows = map(json.loads, lines[:-1])
        names = tuple(header.pop("parameters"))
        found = {int(row["step"]): (row["gradients"], row["parameters"]) for row in rows}
        for gradients, parameters in found.values():
            if len(parameters) != DIGITS * len(names) or len(gradients or parameters) != len(parameters):
                raise ValueError("a line has another number of parameters than the first one")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged ({error}): restore it, or resume the run from a checkpoint, which writes the lines "
            "after it again."
        ) from error
    gradients_by_step = {step: gradients for step, (gradients, _) in found.items()}
    return Fingerprints(names, header, gradients_by_step, {step: parameters for step, (_, parameters) in found.items()})


def begin_fingerprints(run: Path, names: Sequence[str], setting: Mapping[str, Any], *, done: int) -> None:
    """Write the first line of a new run; of a resumed one, remove the lines after its checkpoint.

    Args:
        run: Its directory.
        names: Of the trained parameters.
        setting: What the bits depend on, for `bigbatch diff`.
        done: Updates at the checkpoint; 0 for a new run.
    """
    lines = [json.dumps({"parameters": list(names), **setting})]
    if done and (run / FINGERPRINTS).exists():
        found = read_fingerprints(run)
        for step, parameters in found.parameters.items():
            if step <= done:
                lines.append(json.dumps({"step": step, "gradients": found.gradients[step], "parameters": parameters}))
    write_atomically(run / FINGERPRINTS, "".join(line + "\n" for line in lines).encode())


def first_difference(one: Fingerprints, other: Fingerprints) -> Difference | None:
    """Return the first difference in the updates that both have; None if all are equal.

    Raises:
        InputError: The runs train other parameters, or have no update in common.
    """
    if one.names != other.names:
        missing = sorted(set(one.names) ^ set(other.names))
        raise InputError(
            f"the runs train different parameters, of which {missing[0] if missing else one.names[0]} is the first: "
            "compare runs of one model."
        )
    steps = sorted(one.parameters.keys() & other.parameters.keys())
    if not steps:
        raise InputError("the runs have no update in common: compare them after at least one update of each.")
    for step in steps:
        for is_gradient, a, b in (
            (True, one.gradients[step], other.gradients[step]),
            (False, one.parameters[step], other.parameters[step]),
        ):
            if a != b:
                return Difference(step, is_gradient, _differing(one.names, a, b))
    return None


def _differing(names: Sequence[str], one: str | None, other: str | None) -> tuple[str, ...]:
    if one is None or other is None:  # only one of the runs skipped the update
        return tuple(names)
    places = ((index * DIGITS, (index + 1) * DIGITS) for index in range(len(names)))
    return tuple(name for name, (a, b) in zip(names, places, strict=True) if one[a:b] != other[a:b])
