"""The documents of a source, read while they are iterated over, with notes for the user."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbatch.errors import InputError
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.reading import DEFAULT_OPTIONS, Broken, Reading, ReadOptions

if TYPE_CHECKING:
    from bigbatch.lm.data.token_shards.shards import TokenShards


class Corpus:
    """The documents of one source: read while they are iterated over, again each time, in the same order.

    Memory is bounded by the largest document or the largest part of a file that its format reads at once.

    Attributes:
        name: The source, as the user named it.
        files: The files that are read, if they are on this machine.
        shards: The shards of tokens that the documents are in, if they can be read where they are.
        state: Returns a JSON value that changes when the documents do; None to know them by their files.
    """

    def __init__(
        self,
        read: Callable[[Reading], Iterator[Document]],
        *,
        name: str = "",
        files: Sequence[Path] = (),
        options: ReadOptions = DEFAULT_OPTIONS,
        shards: TokenShards | None = None,
        state: Callable[[], Any] | None = None,
    ) -> None:
        """Store ``read``, which yields every document and adds notes to the pass that it receives."""
        self.name = name
        self.files = tuple(files)
        self.shards = shards
        self.state = state
        self._read = read
        self._options = options
        self._last: Reading | None = None

    def __iter__(self) -> Iterator[Document]:
        """Yield every document.

        Raises:
            InputError: A file or a record cannot be read and broken input is not skipped, or no document is left.
        """
        reading = Reading(self._options)
        is_empty = True
        for document in self._read(reading):
            is_empty = False
            yield document
        if is_empty:
            raise InputError(reading.first_broken or f"{self.name} has nothing to train on.")
        reading.note_broken()
        self._last = reading

    @property
    def documents(self) -> tuple[Document, ...]:
        """All documents in memory, at least one; for small sources."""
        return tuple(self)

    @property
    def notes(self) -> tuple[str, ...]:
        """One line for each count of documents read or left out by the last complete iteration."""
        return (*self._complete.about, *self._complete.left_out)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Those of the notes that say what was left out."""
        return tuple(self._complete.left_out)

    @property
    def broken(self) -> tuple[Broken, ...]:
        """The broken records and files that the last complete iteration left out."""
        return self._complete.broken

    @property
    def _complete(self) -> Reading:
        assert self._last is not None, "the notes are complete after an iteration over all documents"
        return self._last
