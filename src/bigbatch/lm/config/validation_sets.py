"""Validation sets by name: ``--validation-data web=web.jsonl code=src/`` → the sources of each set.

No torch here: the command line validates with this module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bigbatch.errors import InputError

NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)=(.+)", re.DOTALL)
UNNAMED = ""
"""The name of the only set, where sources are given without names."""


def read_sets(sources: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the sources of each set, in the order in which the sets are first named.

    A source is named by letters, digits, ``_``, ``.`` or ``-`` and ``=`` in front of it, so ``./year=2024`` has no
    name. Sources with one name are one set, and so are all those without a name.

    Raises:
        ValueError: Some are named and others are not; the message continues a sentence that begins with the flag.
    """
    sets: dict[str, list[str]] = {}
    for source in sources:
        match = NAMED.fullmatch(source)
        name, source = (UNNAMED, source) if match is None else match.groups()
        sets.setdefault(name, []).append(source)
    if UNNAMED in sets and len(sets) > 1:
        unnamed, named = sets[UNNAMED][0], next(name for name in sets if name != UNNAMED)
        raise ValueError(f"names the set {named}, but not that of {unnamed}: write NAME={unnamed}")
    return {name: tuple(found) for name, found in sets.items()}


def sources_of(sources: Sequence[str]) -> tuple[str, ...]:
    """Return the sources of all sets, without names, in the order of the sets."""
    return tuple(source for found in read_sets(sources).values() for source in found)


def check_named_paths(sources: Sequence[str]) -> None:
    """Refuse a named source that could also be the path of a file, such as ``year=2024`` where that exists.

    Raises:
        InputError: There is one.
    """
    for source in sources:
        if NAMED.fullmatch(source) and Path(source).exists():
            name, _, rest = source.partition("=")
            raise InputError(
                f"--validation-data {source} is a file or folder of that name, and could be {rest} as the set {name}: "
                f"write ./{source} for the file or folder, or rename it."
            )


def primary_set(names: Mapping[str, object], best_metric: str | None) -> str:
    """Return the name of the set whose loss is ``validation_loss``: that of ``--best-metric``, else the first.

    Raises:
        InputError: No set has that name.
    """
    if best_metric is None:
        return next(iter(names))
    if best_metric not in names:
        known = " or ".join(name for name in names if name != UNNAMED)
        remedy = f"pass {known}" if known else "name the sets, as in --validation-data web=web.jsonl"
        raise InputError(f"--best-metric {best_metric} is not the name of a validation set: {remedy}.")
    return best_metric
