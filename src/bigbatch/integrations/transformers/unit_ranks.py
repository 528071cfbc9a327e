"""Call a function on every rank, and raise on all if it raises on one."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from bigbatch.errors import InputError, RankFailedError
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory

T = TypeVar("T")


class OutOfMemory(Exception):  # noqa: N818 - handled by a smaller probe
    """Memory ran out on a rank."""


def rank_and_size() -> tuple[int, int]:
    """Return the rank of this process and the number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def on_all_ranks(function: Callable[[], T]) -> list[T]:
    """Call a function on every rank and return the results of all; if one fails, all raise. Collective."""
    return call_on_all_ranks(function, lambda value: value)[1]


def call_on_all_ranks(function: Callable[[], T], message: Callable[[T], Any]) -> tuple[T | None, list[Any]]:
    """Call a function on every rank and return its result, and a message of every rank's. Collective.

    Raises:
        OutOfMemory: Memory ran out on a rank, and no rank had another error.
        InputError: A rank raised it.
        RankFailedError: Another rank raised another error.
    """
    _, size = rank_and_size()
    error: Exception | None = None
    failure: tuple[str, str] | None = None
    own: T | None = None
    sent: Any = None
    try:
        own = function()
        sent = message(own)
    except Exception as raised:  # noqa: BLE001 - the other ranks wait; raised below
        error = raised
        failure = _kind(raised), f"{type(raised).__name__}: {raised}"
    outcomes: list[Any] = [(sent, failure)]
    if size > 1:
        outcomes = [(None, None)] * size
        dist.all_gather_object(outcomes, (sent, failure))
    failures = [each for _, each in outcomes if each is not None]
    if failures and all(kind == "memory" for kind, _ in failures):
        error = None  # its traceback references tensors
        free_cached_memory()
        raise OutOfMemory
    if error is not None:
        raise error
    for other, (_, each) in enumerate(outcomes):
        if each is not None:
            kind, text = each
            if kind == "input":
                raise InputError(text.partition(": ")[2])
            raise RankFailedError(f"rank {other} failed while the unit of the loss was determined: {text}")
    return own, [value for value, _ in outcomes]


def _kind(error: Exception) -> str:
    if is_out_of_memory(error):
        return "memory"
    return "input" if isinstance(error, InputError) else ""
