"""Levels of offload: what lives in host memory between updates."""

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

from bigbatch.errors import InputError

Offload: TypeAlias = Literal["none", "optimizer", "master"]
"""Nothing; the state of the optimizers; also the float32 values of weights that are bfloat16 on the device."""

LEVELS: tuple[str, ...] = get_args(Offload)


def check_level(level: object) -> Offload:
    """Return a level if it is one.

    Raises:
        InputError: It is not.
    """
    if level not in LEVELS:
        raise InputError(f"offload is {level!r}: it must be one of {', '.join(map(repr, LEVELS))}.")
    return level  # type: ignore[return-value]


def check_master(level: str, used: Mapping[str, bool]) -> None:
    """Check that settings go together with float32 weights in host memory.

    Args:
        level: Of offload; no-op for others than ``"master"``.
        used: Whether other settings are used, by what to call them.

    Raises:
        InputError: They do not.
    """
    for name, is_used in used.items():
        if is_used and level == "master":
            raise InputError(
                f'offload="master" is not supported with {name}: weights are bfloat16 on the device, and their float32 '
                'gradients and values meet within the step only. Pass offload="optimizer", or remove the other.'
            )
