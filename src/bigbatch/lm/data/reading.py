"""State of one pass over a source: the options, the broken input that is skipped, and the notes for the user."""

from __future__ import annotations

from dataclasses import dataclass, field

from bigbatch.errors import InputError
from bigbatch.lm.data.records import ANY_COLUMNS, RecordColumns
from bigbatch.lm.text import plural


class UnknownShapeError(InputError):
    """A file has data of a kind that is not known; the message lists what was found and what is known."""


@dataclass(frozen=True)
class ReadOptions:
    """How a source is read.

    Attributes:
        skip_broken: Whether to skip and count broken records and files instead of raising at the first.
        split: Split of a dataset to train on; None for ``train``.
        subset: Subset (configuration) of a dataset; None for datasets that have none.
        columns: Columns to read records from, if not those of a known shape.
    """

    skip_broken: bool = False
    split: str | None = None
    subset: str | None = None
    columns: RecordColumns = ANY_COLUMNS


DEFAULT_OPTIONS = ReadOptions()


@dataclass
class Reading:
    """One pass over a source.

    Attributes:
        options: How the source is read.
        about: Notes about what was read.
        left_out: Notes about what was left out.
    """

    options: ReadOptions = DEFAULT_OPTIONS
    about: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    _records: int = 0
    _files: int = 0
    _first: str = ""

    def skip_record(self, error: InputError) -> None:
        """Count a broken record.

        Raises:
            InputError: ``error``, unless broken input is skipped.
        """
        self._skip(error)
        self._records += 1

    def skip_file(self, error: InputError) -> None:
        """Count a file that is broken as a whole, or from some place on.

        Raises:
            InputError: ``error``, unless broken input is skipped.
        """
        self._skip(error)
        self._files += 1

    @property
    def num_broken(self) -> int:
        """Broken records and files so far."""
        return self._records + self._files

    @property
    def first_broken(self) -> str | None:
        """The message of the first broken record or file; None if there is none."""
        return self._first or None

    def note_broken(self) -> None:
        """Add the note about broken records and files, if any were skipped."""
        kinds = ((self._records, "broken record"), (self._files, "broken file"))
        found = [plural(number, noun) for number, noun in kinds if number]
        if found:
            self.left_out.append(f"{' and '.join(found)} left out; the first: {self._first}")

    def _skip(self, error: InputError) -> None:
        if not self.options.skip_broken:
            raise error
        self._first = self._first or str(error)
