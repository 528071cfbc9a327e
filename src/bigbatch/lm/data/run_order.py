"""The order of a run's samples over all epochs: of one data set, or of several sources mixed by weight.

lengths, seed → RunOrder → the order of any epoch; samples done → epoch and position
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bigbatch.lm.data.sampling_order import ORDER_VERSION, EpochOrder, Indices, Order, PassOrder
from bigbatch.lm.text import plural

Lengths: TypeAlias = NDArray[np.integer[Any]]


class RunOrder(Protocol):
    """The samples of a run, epoch by epoch."""

    def epoch(self, epoch: int) -> Order:
        """Return the order of an epoch, from 0."""

    def locate(self, cursor: int) -> tuple[int, int]:
        """Return the epoch of the sample after ``cursor`` samples, and its position there."""

    def samples_before(self, epoch: int) -> int:
        """Return the samples of the epochs before one."""

    def tokens_before(self, epoch: int) -> int:
        """Return the tokens of the epochs before one."""


@dataclass
class UniformOrder:
    """Every sample once in each epoch.

    Args:
        lengths: Tokens of each sample.
        seed: Of the run.
        version: Of the sampling order.
    """

    lengths: Lengths
    seed: int
    version: int = ORDER_VERSION
    _latest: tuple[int, Order] | None = field(default=None, init=False, repr=False)

    def epoch(self, epoch: int) -> Order:
        """Return the order of an epoch, from 0; the latest one is kept."""
        if self._latest is None or self._latest[0] != epoch:
            self._latest = epoch, EpochOrder(len(self.lengths), seed=self.seed, epoch=epoch, version=self.version)
        return self._latest[1]

    def locate(self, cursor: int) -> tuple[int, int]:
        """Return the epoch of the sample after ``cursor`` samples, and its position there."""
        return divmod(cursor, len(self.lengths))

    def samples_before(self, epoch: int) -> int:
        """Return the samples of the epochs before one."""
        return epoch * len(self.lengths)

    def tokens_before(self, epoch: int) -> int:
        """Return the tokens of the epochs before one."""
        return epoch * int(self.lengths.sum(dtype=np.int64))


@dataclass(frozen=True)
class _Part:
    """An order in memory."""

    samples: Indices

    def __len__(self) -> int:
        return len(self.samples)

    def part(self, start: int, stop: int) -> Indices:
        return self.samples[start:stop]


class _Source:
    """Samples ``first … first + len(lengths) − 1`` of the data set, repeated pass by pass in orders of their own."""

    def __init__(self, first: int, lengths: Lengths, weight: float, name: str) -> None:
        self.weight = weight
        self.tokens = int(lengths.sum(dtype=np.int64))
        self._first = first
        self._lengths = lengths
        self._order = PassOrder(len(lengths), name) if len(lengths) else None

    def until(self, time: float) -> tuple[int, int]:
        """Return the number of samples that start before a time, in all passes, and their tokens."""
        # Every pass before this one starts before the time; float division may be off by one pass.
        last = max(0, int(time * self.weight / self.tokens) - 1)
        while (last + 1) * self.tokens / self.weight < time:
            last += 1
        first = last * len(self._lengths)
        _, times, tokens = self.part(first, first + len(self._lengths), last * self.tokens)
        inside = int(np.searchsorted(times, time, side="left"))
        return first + inside, last * self.tokens + int(tokens[:inside].sum())

    def part(self, start: int, stop: int, tokens_before: int) -> tuple[Indices, NDArray[np.float64], NDArray[np.int64]]:
        """Return the samples at positions of all passes in a row, the time at which each starts, and its tokens."""
        assert self._order is not None, "a source has samples"
        samples = self._order.part(start, stop)
        tokens = self._lengths[samples].astype(np.int64)
        before = tokens_before + np.cumsum(tokens) - tokens
        return samples + self._first, before / self.weight, tokens


class MixedOrder:
    """Sources mixed by weight, counted in tokens; a source that runs out begins its next pass.

    The next sample is one of the source with the fewest tokens so far relative to its weight:

        time of a sample = tokens of its source before it / weight        the samples of a run, sorted by time

    so that at every point each source is within one sample of its share. An epoch is one pass over the source that
    needs the longest, max tokens / weight: every sample of every source has then been seen. Each epoch is computed
    from the arguments only, in time and memory proportional to its samples.

    Args:
        lengths: Tokens of each sample, one array for each source; the samples of the data set are their concatenation.
        weights: Of each source, above 0.
        seed: Of the run.
    """

    def __init__(self, lengths: Sequence[Lengths], weights: Sequence[float], *, seed: int) -> None:
        assert len(lengths) == len(weights), "one weight for each source"
        first, self.sources = 0, list[_Source]()
        for place, (part, weight) in enumerate(zip(lengths, weights, strict=True)):
            self.sources.append(_Source(first, part, weight, f"seed {seed} source {place}"))
            first += len(part)
        self.longest = max(range(len(weights)), key=lambda i: self.sources[i].tokens / weights[i])
        self._latest: tuple[int, Order] | None = None
        self._before: dict[int, tuple[int, int]] = {0: (0, 0)}

    def passes(self) -> list[float]:
        """Return the passes over each source in one epoch; 1 for the longest."""
        end = self._end(0)
        return [end * source.weight / source.tokens for source in self.sources]

    def describe(self, names: Sequence[str]) -> str:
        """Return the shares of the sources and the length of an epoch as one line for the user."""
        total = sum(source.weight for source in self.sources)
        parts = [
            f"{source.weight / total:.1%} of the tokens from {name}, {passes:.3g} {'pass' if passes == 1 else 'passes'}"
            for name, source, passes in zip(names, self.sources, self.passes(), strict=True)
        ]
        epoch = plural(self.samples_before(1), "sequence")
        return f"mixture: {'; '.join(parts)}; an epoch is one pass over {names[self.longest]}, {epoch}"

    def epoch(self, epoch: int) -> Order:
        """Return the order of an epoch, from 0, as indices of the data set; the latest one is kept."""
        if self._latest is None or self._latest[0] != epoch:
            self._latest = epoch, _Part(self._merged(self._end(epoch - 1), self._end(epoch)))
        return self._latest[1]

    def locate(self, cursor: int) -> tuple[int, int]:
        """Return the epoch of the sample after ``cursor`` samples, and its position there."""
        epoch = cursor // max(1, self.samples_before(1))
        while epoch and self.samples_before(epoch) > cursor:
            epoch -= 1
        while self.samples_before(epoch + 1) <= cursor:
            epoch += 1
        return epoch, cursor - self.samples_before(epoch)

    def samples_before(self, epoch: int) -> int:
        """Return the samples of the epochs before one."""
        return self._totals(epoch)[0]

    def tokens_before(self, epoch: int) -> int:
        """Return the tokens of the epochs before one."""
        return self._totals(epoch)[1]

    def _totals(self, epoch: int) -> tuple[int, int]:
        if epoch not in self._before:
            found = [source.until(self._end(epoch - 1)) for source in self.sources]
            self._before[epoch] = sum(samples for samples, _ in found), sum(tokens for _, tokens in found)
        return self._before[epoch]

    def _end(self, epoch: int) -> float:
        """Return the time at which an epoch ends."""
        longest = self.sources[self.longest]
        return (epoch + 1) * longest.tokens / longest.weight

    def _merged(self, start: float, stop: float) -> Indices:
        """Return the samples that start from ``start`` to before ``stop``; at the same time, in source order."""
        samples: list[Indices] = []
        times: list[NDArray[np.float64]] = []
        for source in self.sources:
            first, tokens = source.until(start)
            found, at, _ = source.part(first, source.until(stop)[0], tokens)
            samples.append(found)
            times.append(at)
        merged = np.argsort(np.concatenate(times), kind="stable")
        ordered: Indices = np.concatenate(samples)[merged]
        return ordered
