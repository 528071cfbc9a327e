"""The file samples.jsonl of a run: texts that the model generated, each with its update.

``{"step": 150, "prompt": "def ", "text": "def f(x): return x"}`` on each line
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bigbatch.errors import BigbatchError, os_reason
from bigbatch.lm.files import open_regular, parse_json, read_regular, write_atomically
from bigbatch.lm.runs.file_names import SAMPLES

LARGEST_SAMPLES = 2**24  # bytes of the file that are read


@dataclass(frozen=True)
class Sample:
    """A generated text.

    Attributes:
        step: Updates done before.
        prompt: Its start.
        text: The whole text, prompt included.
    """

    step: int
    prompt: str
    text: str


def write_sample(folder: Path, sample: Sample) -> None:
    """Append a text to samples.jsonl of a run directory.

    Raises:
        BigbatchError: The file cannot be written.
    """
    line = json.dumps({"step": sample.step, "prompt": sample.prompt, "text": sample.text})
    try:
        with open_regular(folder / SAMPLES, "ab") as file:
            file.write(line.encode() + b"\n")
    except OSError as error:
        raise BigbatchError(f"{folder / SAMPLES} cannot be written: {os_reason(error)}.") from error


def keep_samples(folder: Path, step: int) -> None:
    """Remove the texts after an update from samples.jsonl, because the updates after it are repeated.

    Raises:
        BigbatchError: The file cannot be written.
    """
    found = read_samples(folder)
    kept = [sample for sample in found if sample.step <= step]
    if len(kept) == len(found):
        return
    try:
        write_atomically(folder / SAMPLES, b"")
    except OSError as error:
        raise BigbatchError(f"{folder / SAMPLES} cannot be written: {os_reason(error)}.") from error
    for sample in kept:
        write_sample(folder, sample)


def read_samples(folder: Path) -> list[Sample]:
    """Return the texts of samples.jsonl, by update; lines that are none are left out, and a missing file has none."""
    try:
        lines = read_regular(folder / SAMPLES, limit=LARGEST_SAMPLES).splitlines()
    except OSError:
        return []
    found = {}
    for line in lines:
        with suppress(ValueError, RecursionError):
            if (sample := _sample(parse_json(line))) is not None:
                found[sample.step] = sample
    return [found[step] for step in sorted(found)]


def _sample(row: object) -> Sample | None:
    if not isinstance(row, Mapping):
        return None
    step, prompt, text = row.get("step"), row.get("prompt"), row.get("text")
    if type(step) is not int or not isinstance(prompt, str) or not isinstance(text, str):
        return None
    return Sample(step, prompt, text)
