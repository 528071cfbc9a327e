"""Levels of offload: what lives in host memory between updates."""

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

from bigbatch.errors import InputError

Offload: TypeAlias = Literal["none", "optimizer", "master", "gradients"]
"""What lives in host memory, each including those before it: nothing; the state of the optimizers; the float32 values
of weights that are bfloat16 on the device; the gradient sums."""

LEVELS: tuple[Offload, ...] = get_args(Offload)

OffloadSetting: TypeAlias = Literal[Offload, "auto"]
"""A level, or ``"auto"`` for the fastest one that fits."""


def reaches(level: Offload, part: Offload) -> bool:
    """Return whether a level includes another one."""
    return LEVELS.index(level) >= LEVELS.index(part)


def check_level(level: object) -> Offload:
    """Return a level if it is one.

    Raises:
        InputError: It is not.
    """
    if level not in LEVELS:
        raise InputError(f"offload is {level!r}: it must be one of {', '.join(map(repr, LEVELS))}.")
    return level


def refuse_auto(level: object) -> None:
    """Refuse ``"auto"`` where no batch is known before the first backward.

    Raises:
        InputError: It is passed.
    """
    if level == "auto":
        raise InputError(
            'offload="auto" is chosen for a batch and its loss, and an Accumulator sees only losses that are already '
            "computed: use bigbatch.Engine, which chooses the level before its first window, or pass one of "
            f"{', '.join(map(repr, LEVELS))}."
        )


def check_master(level: Offload, used: Mapping[str, bool]) -> None:
    """Check that settings go together with float32 weights, and gradient sums, in host memory.

    Args:
        level: Of offload; no-op below ``"master"``.
        used: Whether other settings are used, by what to call them.

    Raises:
        InputError: They do not.
    """
    why = "weights are bfloat16 on the device, and their float32 gradients and values meet within the step only"
    if level == "gradients":
        why = "the gradient sums are in host memory, and reach the device part by part within the step only"
    for name, is_used in used.items():
        if is_used and reaches(check_level(level), "master"):
            raise InputError(
                f'offload="{level}" is not supported with {name}: {why}. Pass offload="optimizer", or remove the other.'
            )
