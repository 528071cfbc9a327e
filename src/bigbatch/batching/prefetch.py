"""Prefetching to a CUDA device: each micro-batch is copied while the previous one computes.

    take(i): stream waits for the copy of i → collate, pin and start copying micro-batch i + 1 → return i

Without looking ahead, micro-batch i itself is collated and copied then. On other devices, and if the batch is already
on the device, nothing is prefetched.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigbatch.batching.batch_types import Structure
from bigbatch.batching.split import Split


class _Fetched(NamedTuple):
    leaves: list[Any]
    structure: Structure
    copied: Collection[int]  # indices of the leaves copied from the host


class Prefetcher:
    """Source of the micro-batches of a split, in order, each copied without a wait of the host.

        with Prefetcher(parts) as prefetcher:
            for rows in parts.groups:
                loss_fn(model, prefetcher.take(rows))

    Copies are asynchronous, from pinned memory on a separate stream. Device memory is allocated on the stream that
    ``take`` is called on and freed like that of any tensor: the device holds the inputs of at most two micro-batches,
    no matter how far the host runs ahead. Outside the ``with`` block, ``take`` is that of the split.

    Args:
        parts: Its samples are collated once, in order, each micro-batch when the previous one is taken. An error while
            prefetching is discarded; that micro-batch is collated again when it is taken, and an error is raised then.
            A collate that draws random numbers draws new ones for samples that are retried.
        looks_ahead: Whether the next micro-batch is prefetched. If not, each one is collated and copied when it is
            taken; the host does not wait for the copy either.
    """

    def __init__(self, parts: Split, *, looks_ahead: bool = True) -> None:
        self._parts, self._looks_ahead = parts, looks_ahead
        self._pending_rows: Iterator[Sequence[int]] = iter(())
        self._next_rows: Sequence[int] | None = None
        self._fetched: _Fetched | None = None
        self._is_open = False  # on the CPU always

    def __enter__(self) -> "Prefetcher":
        if self._parts.device.type == "cuda":
            self._copying = torch.cuda.Stream(self._parts.device)  # type: ignore[no-untyped-call]
            self._is_open = True
            self._start()
        return self

    def _start(self) -> None:
        if self._is_open:
            self._pending_rows = iter(self._parts.groups)
            self._next_rows = next(self._pending_rows, None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_open, self._next_rows = False, None
        self._drop()

    def take(self, rows: Sequence[int]) -> Any:
        """Return the micro-batch of some samples, on the device.

        Args:
            rows: The next of ``parts.groups``. Other rows are a retry after an out-of-memory error: they are not
                prefetched, and the prefetched micro-batch is freed and fetched again when it is taken.
        """
        if self._next_rows is None and self._parts.groups and rows is self._parts.groups[0]:
            self._start()  # all micro-batches are run again
        if rows is not self._next_rows:  # always true on the CPU
            self._drop()
            return self._parts.take(rows)
        self._next_rows = next(self._pending_rows, None)
        fetched, self._fetched = self._fetched, None
        fetched = fetched or self._fetch(rows)
        if fetched.copied:
            self._wait_for_copies()
            if self._next_rows is not None and self._looks_ahead:
                self._fetch_ahead(self._next_rows)
        return self._parts.assemble(fetched.leaves, fetched.structure, copied=fetched.copied)

    def _fetch_ahead(self, rows: Sequence[int]) -> None:
        with suppress(Exception):  # raised when these rows are taken, and attributed to them
            self._fetched = self._fetch(rows)

    def _fetch(self, rows: Sequence[int]) -> _Fetched:
        """Gather a micro-batch and start copying its host tensors to the device."""
        leaves, structure = self._parts.gather(rows)
        pinned = {index: _pin(leaf) for index, leaf in enumerate(leaves) if _is_plain_host_tensor(leaf)}
        device = self._parts.device
        copies = {index: torch.empty_like(source, device=device) for index, source in pinned.items()}
        if copies:  # kernels queued so far may still use the memory that was allocated for the copies
            self._copying.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(self._copying):
                for index, source in pinned.items():
                    copies[index].copy_(source, non_blocking=True)
        except BaseException:
            self._wait_for_copies()
            raise
        return _Fetched([copies.get(index, leaf) for index, leaf in enumerate(leaves)], structure, copies.keys())

    def _drop(self) -> None:
        if self._fetched is not None:
            self._wait_for_copies()
            self._fetched = None

    def _wait_for_copies(self) -> None:
        """Order later work of the current stream after the copies: their readers, and reuse of their memory."""
        torch.cuda.current_stream(self._parts.device).wait_stream(self._copying)


def _is_plain_host_tensor(leaf: Any) -> bool:
    """Return whether a leaf is prefetched; not tensor subclasses, other layouts, or tensors that require grad."""
    return (
        type(leaf) is Tensor
        and leaf.device.type == "cpu"
        and leaf.layout is torch.strided
        and not leaf.is_nested
        and not leaf.requires_grad
    )


def _pin(leaf: Tensor) -> Tensor:
    """Return a contiguous copy in pinned memory; the tensor itself if pinning fails."""
    if leaf.is_pinned() and leaf.is_contiguous():
        return leaf
    try:
        return torch.empty_like(leaf, pin_memory=True).copy_(leaf)
    except RuntimeError:
        return leaf
