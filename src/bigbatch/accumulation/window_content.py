"""The states of a window, and what it will run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from bigbatch.types import Items


class WindowState(Enum):
    """The state of a window."""

    EMPTY = "empty"
    ACCUMULATING = "accumulating"
    CLOSED = "closed"
    ABORTED = "aborted"
    TORN = "torn"


@dataclass(frozen=True)
class WindowContent:
    """What a window will run, as far as it is known when it opens.

    Attributes:
        microbatches: One entry for each micro-batch of this rank, in order.
        max_num_microbatches: The largest number of micro-batches on any rank.
        totals: Global items of each term, for a loss of several terms.
        tokens: Number of tokens on this rank, without padding; None if unknown.
        samples: Number of samples on this rank; None if unknown.
    """

    microbatches: Iterable[Any] = ()
    max_num_microbatches: int = 0
    totals: Mapping[str, Items] | None = None
    tokens: int | None = None
    samples: int | None = None
