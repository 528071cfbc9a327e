"""Messages between ranks, and functions that all ranks finish or fail together.

Numbers are sent as tensors and values as JSON; nothing is pickled. An error is sent as its class name and its message.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bigbatch.errors import CheckpointError, InputError, MemoryLimitError, RankFailedError, os_reason

T = TypeVar("T")
R = TypeVar("R")
Failure: TypeAlias = tuple[str, str]
"""The class name of an error, empty if only its own rank can raise it, and its message."""

Number: TypeAlias = float | Tensor
"""A number, or a 0-d tensor on any device."""

ERRORS: tuple[type[Exception], ...] = (InputError, MemoryLimitError, CheckpointError, TypeError, ValueError)
"""Errors that every rank raises by their own class; subclasses first."""


class RankGroup:
    """A single rank: its messages reach itself. Base class of `DistributedRankGroup`.

    Attributes:
        size: Number of ranks.
        rank: Rank of this process.
    """

    size = 1
    rank = 0

    def all_gather_numbers(self, values: Sequence[Number]) -> list[list[float]]:
        """Return the values of every rank, equally many on each. Collective; waits for the device."""
        return [[float(value) for value in values]]

    def all_gather_text(self, text: str) -> list[str]:
        """Return the text of every rank. Collective; waits for the device."""
        return [text]

    def broadcast_text(self, text: str, *, source: int = 0) -> str:
        """Return the text of one rank. Collective; waits for the device."""
        return text

    def all_gather(self, value: Any) -> list[Any]:
        """Return the JSON value of every rank. Collective."""
        return [json.loads(text) for text in self.all_gather_text(json.dumps(value))]

    def broadcast(self, value: Any, *, source: int = 0) -> Any:
        """Return the JSON value of one rank. Collective."""
        return json.loads(self.broadcast_text(json.dumps(value if self.rank == source else None), source=source))


class DistributedRankGroup(RankGroup):
    """The ranks of a process group.

    Args:
        group: Contains this process; None for all ranks.
        device: Where the model is. Messages are on this device if the backend supports it, else on the host.

    Raises:
        ValueError: This process is not in the group.
    """

    def __init__(self, group: Any = None, device: torch.device | None = None) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        if self.rank < 0:
            raise ValueError("this rank is not in the group: only the ranks of a group can use it.")
        self.device = _message_device(group, device or torch.device("cpu"))

    def all_gather_numbers(self, values: Sequence[Number]) -> list[list[float]]:
        """Return the values of every rank, equally many on each. Collective; waits for the device."""
        own = as_tensor(values, self.device)
        gathered = own.new_empty(self.size, len(own))
        dist.all_gather(list(gathered.unbind()), own, group=self.group)
        rows: list[list[float]] = gathered.tolist()  # waits for the device
        return rows

    def all_gather_text(self, text: str) -> list[str]:
        """Return the text of every rank. Collective; waits for the device."""
        data = text.encode()
        sizes = [int(size) for (size,) in self.all_gather_numbers([float(len(data))])]
        own = torch.zeros(max(1, *sizes), dtype=torch.uint8, device=self.device)
        own[: len(data)] = _as_bytes(data).to(self.device)
        gathered = own.new_empty(self.size, len(own))
        dist.all_gather(list(gathered.unbind()), own, group=self.group)
        return [bytes(row[:size].tolist()).decode() for row, size in zip(gathered.cpu(), sizes, strict=True)]

    def broadcast_text(self, text: str, *, source: int = 0) -> str:
        """Return the text of one rank. Collective; waits for the device."""
        data = text.encode()
        size = torch.tensor([len(data)], device=self.device)
        dist.broadcast(size, group=self.group, group_src=source)
        received = torch.zeros(int(size.item()), dtype=torch.uint8, device=self.device)
        if self.rank == source:
            received.copy_(_as_bytes(data))
        dist.broadcast(received, group=self.group, group_src=source)
        return bytes(received.tolist()).decode()


def rank_group(group: Any = None, device: torch.device | None = None) -> RankGroup:
    """Return the ranks of a process group; a single rank if torch.distributed is not initialized."""
    if dist.is_available() and dist.is_initialized():
        return DistributedRankGroup(group, device)
    return RankGroup()


@contextmanager
def fail_together(announce: Callable[[], object]) -> Iterator[None]:
    """If the block raises, announce it to the ranks that would wait for this one, then raise.

    Args:
        announce: The collective that the other ranks are in, or on their way to; its own errors are ignored.
    """
    try:
        yield
    except BaseException:
        with suppress(Exception):  # the other ranks may have exited
            announce()
        raise


@contextmanager
def raise_together(ranks: RankGroup, error_class: type[Exception]) -> Iterator[None]:
    """Raise ``error_class`` on all ranks, with the first message, if the block does on any. Collective at its end."""
    error: Exception | None = None
    try:
        yield
    except error_class as raised:
        error = raised
    messages = ranks.all_gather(None if error is None else str(error))
    first = next((message for message in messages if message is not None), None)
    if first is not None:
        raise error_class(first) from error


def run_on_first_rank(ranks: RankGroup, function: Callable[[], T]) -> T:
    """Call a function on the first rank, and return its JSON value on every rank. Collective.

    Raises:
        InputError, MemoryLimitError, CheckpointError, TypeError, ValueError: The function raised it.
        RankFailedError: It raised anything else; the first rank raises the error itself.
    """
    result, failure, error = None, None, None
    if ranks.rank == 0:
        try:
            result = function()
        except BaseException as raised:  # noqa: BLE001, the other ranks wait for the result; raised below
            failure, error = describe(raised), raised
    result, failure = ranks.broadcast([result, failure])
    if error is not None:
        raise error
    if failure is not None:
        raise error_of(failure, otherwise=RankFailedError, prefix="rank 0 failed: ")
    value: T = result
    return value


def run_together(
    ranks: RankGroup,
    function: Callable[[], T],
    on_first_rank: Callable[[list[T]], Sequence[R]],
    error_message: Callable[[str], str],
    *,
    errors: tuple[type[Exception], ...] = ERRORS,
) -> R:
    """Call a function on every rank, combine the results on the first one, and return to each rank its part.

    No rank raises before every rank knows that one failed. Two messages for each rank. Collective.

    Args:
        ranks: All of them call this.
        function: Runs on every rank; returns a JSON value.
        on_first_rank: Receives the results of all ranks, and returns a JSON value for each of them.
        error_message: Makes the sentence that all ranks raise, from the reason why one of them failed.
        errors: Raised by every rank as they are.

    Raises:
        errors: A rank raised one; all ranks raise it with its sentence.
        CheckpointError: A rank raised anything else; all raise the sentence of ``error_message``, and the rank itself
            its own error unless that is an OSError.
        ConnectionError: Another rank has exited.
    """
    result, failure, error = _attempt(function, ranks, errors)
    with _lost_ranks():
        outcomes = ranks.all_gather([result, failure])
    parts: Any = None
    if ranks.rank == 0:
        failure = next((each for _, each in outcomes if each is not None), None)
        if failure is None:
            parts, failure, own = _attempt(lambda: on_first_rank([value for value, _ in outcomes]), ranks, errors)
            error = error or own
        if failure is not None and not failure[0]:
            failure = ("", error_message(failure[1]))
    with _lost_ranks():
        parts, failure = ranks.broadcast([parts, failure])
    if failure is None:
        part: R = parts[ranks.rank]
        return part
    if error is not None and not isinstance(error, (OSError, *errors)):
        raise error
    raise error_of(failure, otherwise=CheckpointError, errors=errors) from error


def describe(error: BaseException, errors: tuple[type[Exception], ...] = ERRORS) -> Failure:
    """Return the kind and the sentence of an error."""
    kind = next((each.__name__ for each in errors if isinstance(error, each)), "")
    return kind, str(error)


def error_of(
    failure: Failure,
    *,
    otherwise: type[Exception],
    prefix: str = "",
    errors: tuple[type[Exception], ...] = ERRORS,
) -> Exception:
    """Return the error that `describe` described; ``otherwise``, with a prefix, if it was of no listed kind."""
    kind, sentence = failure
    return next((each(sentence) for each in errors if each.__name__ == kind), otherwise(prefix + sentence))


def as_tensor(values: Sequence[Number], device: torch.device) -> Tensor:
    """Return numbers and 0-d tensors as one float64 tensor ``[values]``; does not wait for the device."""
    plain = torch.tensor([0.0 if isinstance(value, Tensor) else float(value) for value in values], dtype=torch.float64)
    numbers = plain.to(device)
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    if places:
        tensors = [value.detach().reshape(()) for value in values if isinstance(value, Tensor)]
        numbers[torch.tensor(places, device=device)] = torch.stack([t.to(device, torch.float64) for t in tensors])
    return numbers


def list_ranks(ranks: Sequence[int]) -> str:
    """Return ``rank 1`` or ``ranks 0, 2``."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _attempt(
    function: Callable[[], Any], ranks: RankGroup, errors: tuple[type[Exception], ...]
) -> tuple[Any, Failure | None, BaseException | None]:
    try:
        return function(), None, None
    except BaseException as error:  # noqa: BLE001, the other ranks wait for the result; raised by the caller
        kind, sentence = describe(error, errors)
        if not kind:
            reason = os_reason(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            sentence = reason if ranks.size == 1 else f"rank {ranks.rank}: {reason}"
        return None, (kind, sentence), error


@contextmanager
def _lost_ranks() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # each backend has its own error for a peer that has exited
        raise ConnectionError("another rank cannot be reached") from error


def _message_device(group: Any, device: torch.device) -> torch.device:
    backends = [entry.partition(":")[0] for entry in str(dist.get_backend_config(group)).split(",")]  # "cpu:gloo,…"
    return device if device.type in backends else torch.device(backends[0])


def _as_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
