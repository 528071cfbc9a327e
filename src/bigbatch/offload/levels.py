"""Levels of offload: what lives in host memory between updates."""

from typing import Literal, TypeAlias, get_args

from bigbatch.errors import InputError

Offload: TypeAlias = Literal["none", "optimizer"]
"""``"none"``; ``"optimizer"``: the state of the optimizers."""

LEVELS: tuple[str, ...] = get_args(Offload)


def check_level(level: object) -> Offload:
    """Return a level if it is one.

    Raises:
        InputError: It is not.
    """
    if level not in LEVELS:
        raise InputError(f"offload is {level!r}: it must be one of {', '.join(map(repr, LEVELS))}.")
    return level  # type: ignore[return-value]
