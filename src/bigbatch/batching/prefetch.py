"""Micro-batches on their way to a CUDA device: one is copied while the one before it computes.

take micro-batch i: wait, on the device, for its copy → collate, pin and begin to copy micro-batch i + 1 → give i

Elsewhere, and where the batch is on the device already, nothing is done ahead: a micro-batch comes when it is taken.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bigbatch.batching.split import Split


class _Fetched(NamedTuple):
    leaves: list[Any]
    structure: pytree.TreeSpec
    num_copied: int  # leaves that were on the host


class Prefetcher:
    """Take the micro-batches of a split in their order, each fetched while the one before it computes.

        with Feed(parts) as feed:
            for rows in parts.groups:
                loss_fn(model, feed.take(rows))

    Copies go from pinned memory over a stream of their own. Their memory is allocated on the stream that ``take`` is
    called on and freed like any tensor's: the device holds the inputs of two micro-batches, however far the host is
    ahead. Outside the ``with`` block, ``take`` is that of the split.

    Args:
        parts: Its samples are collated once, in order, each micro-batch when the one before it is taken. What fails
            then is tried again in its turn, and raised then. A collate that draws random numbers draws others for
            samples that run again.
    """

    def __init__(self, parts: Split) -> None:
        self._parts = parts
        self._pending_rows: Iterator[Sequence[int]] = iter(())
        self._next_rows: Sequence[int] | None = None
        self._fetched: _Fetched | None = None

    def __enter__(self) -> "Prefetcher":
        if self._parts.device.type == "cuda":
            self._copying = torch.cuda.Stream(self._parts.device)  # type: ignore[no-untyped-call]
            self._pending_rows = iter(self._parts.groups)
            self._next_rows = next(self._pending_rows, None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._next_rows = None
        self._drop()

    def take(self, rows: Sequence[int]) -> Any:
        """Give the micro-batch of some samples, on the device.

        Args:
            rows: The next of ``parts.groups``. Any others are samples that are run again for want of memory: they are
                taken by themselves, and what was fetched ahead is given back, to be fetched anew in its turn.
        """
        if rows is not self._next_rows:  # always so on the CPU
            self._drop()
            return self._parts.take(rows)
        self._next_rows = next(self._pending_rows, None)
        fetched, self._fetched = self._fetched, None
        fetched = fetched or self._fetch(rows)
        if fetched.num_copied:
            self._wait_for_copies()
            if self._next_rows is not None:
                self._fetch_ahead(self._next_rows)
        return self._parts.assemble(fetched.leaves, fetched.structure)

    def _fetch_ahead(self, rows: Sequence[int]) -> None:
        with suppress(Exception):  # it will be raised in the turn of these rows, and put down to them
            self._fetched = self._fetch(rows)

    def _fetch(self, rows: Sequence[int]) -> _Fetched:
        """Gather a micro-batch and begin to copy to the device what of it is on the host."""
        leaves, structure = self._parts.gather(rows)
        pinned = {index: _pin(leaf) for index, leaf in enumerate(leaves) if _is_plain_host_tensor(leaf)}
        device = self._parts.device
        copies = {index: torch.empty_like(source, device=device) for index, source in pinned.items()}
        if copies:  # whoever had their memory before may use it up to here
            self._copying.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(self._copying):
                for index, source in pinned.items():
                    copies[index].copy_(source, non_blocking=True)
        except BaseException:
            self._wait_for_copies()
            raise
        return _Fetched([copies.get(index, leaf) for index, leaf in enumerate(leaves)], structure, len(copies))

    def _drop(self) -> None:
        if self._fetched is not None:
            self._wait_for_copies()
            self._fetched = None

    def _wait_for_copies(self) -> None:
        """Let what is queued from now on come after the copies: their readers, and whoever gets their memory next."""
        torch.cuda.current_stream(self._parts.device).wait_stream(self._copying)


def _is_plain_host_tensor(leaf: Any) -> bool:
    """Tell what is copied ahead; the rest is left to the split: other layouts and classes, and what has a graph."""
    return (
        type(leaf) is Tensor
        and leaf.device.type == "cpu"
        and leaf.layout is torch.strided
        and not leaf.is_nested
        and not leaf.requires_grad
    )


def _pin(leaf: Tensor) -> Tensor:
    """Give the tensor in pinned memory, without gaps; as it is where there is no more of such memory."""
    if leaf.is_pinned() and leaf.is_contiguous():
        return leaf
    try:
        return torch.empty_like(leaf, pin_memory=True).copy_(leaf)
    except RuntimeError:
        return leaf
