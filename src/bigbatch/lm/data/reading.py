"""State of one pass over a source: the options, the broken input that is skipped, and the notes for the user."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from bigbatch.errors import InputError
from bigbatch.lm.data.records import ANY_COLUMNS, RecordColumns
from bigbatch.lm.text import plural

SKIP_ADVICE = "Pass --skip-broken to leave out and count what is broken."
_KEPT = 3  # messages about broken input of one kind
_MOST_KINDS = 50  # the others are counted as one
# What differs between messages of one kind: places with their number, paths, quoted text, numbers.
_DETAILS = re.compile(r"\S+:\d+|\S*[/.]\w\S*|'[^']*'|\"[^\"]*\"|0x\w+|\d[\d,.]*")


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


@dataclass(frozen=True)
class Broken:
    """Broken input of one kind that was skipped.

    Attributes:
        noun: ``record`` or ``file``.
        number: How many.
        first: Messages about the first few of them.
    """

    noun: str
    number: int
    first: tuple[str, ...]

    def describe(self, consequence: str = "") -> str:
        """Return the number, followed by what happens to them, and the first ones, each on a line."""
        more = "".join(f"\n  {message}" for message in self.first[1:])
        rest = f"\n  and {self.number - len(self.first):,} more" if self.number > len(self.first) else ""
        number = plural(self.number, f"broken {self.noun}")
        return f"{number}{consequence}; the first: {self.first[0]}{more}{rest}"


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
    _broken: dict[tuple[str, str], Broken] = field(default_factory=dict)

    def skip_record(self, error: InputError) -> None:
        """Count a broken record.

        Raises:
            InputError: ``error``, unless broken input is skipped.
        """
        self._skip(error, advice=SKIP_ADVICE)
        self._records += 1
        self._count("record", str(error))

    def skip_file(self, error: InputError, *, is_only: bool = False) -> None:
        """Count a file that is broken as a whole, or from some place on.

        Args:
            error: What is wrong with it.
            is_only: Whether the source has no other file, so that skipping it would leave nothing.

        Raises:
            InputError: ``error``, unless broken input is skipped.
        """
        self._skip(error, advice="" if is_only else SKIP_ADVICE)
        self._files += 1
        self._count("file", str(error))

    @property
    def num_broken(self) -> int:
        """Broken records and files so far."""
        return self._records + self._files

    @property
    def first_broken(self) -> str | None:
        """The message of the first broken record or file; None if there is none."""
        return self._first or None

    @property
    def broken(self) -> tuple[Broken, ...]:
        """The broken records and files that were skipped, by what is wrong with them."""
        return tuple(self._broken.values())

    def note_broken(self) -> None:
        """Add the note about broken records and files, if any were skipped."""
        kinds = ((self._records, "broken record"), (self._files, "broken file"))
        found = [plural(number, noun) for number, noun in kinds if number]
        if found:
            self.left_out.append(f"{' and '.join(found)} left out; the first: {self._first}")

    def _skip(self, error: InputError, *, advice: str) -> None:
        if not self.options.skip_broken:
            raise advised(error, advice)
        self._first = self._first or str(error)

    def _count(self, noun: str, message: str) -> None:
        kind = (noun, _DETAILS.sub("", message))
        if kind not in self._broken and len(self._broken) >= _MOST_KINDS:
            kind = (noun, "")
        before = self._broken.get(kind, Broken(noun, 0, ()))
        self._broken[kind] = Broken(noun, before.number + 1, (*before.first, message)[:_KEPT])


def advised(error: InputError, advice: str = SKIP_ADVICE) -> InputError:
    """Return an error of the same class that also says how to leave out what is broken, unless it does already."""
    text = str(error)
    return error if not advice or text.endswith(SKIP_ADVICE) else type(error)(f"{text} {advice}")
