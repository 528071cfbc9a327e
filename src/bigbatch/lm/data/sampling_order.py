"""Order of the samples within an epoch and their division into updates, as integers.

seed, epoch → EpochOrder → window_bounds → the samples of each update

Nothing here is as long as the data: any part of an epoch's order is computed on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import shake_256
from pathlib import Path
from random import Random
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bigbatch import __version__
from bigbatch.errors import InputError

ORDER_VERSION = 2
"""Of new runs; stored in the facts of a run."""
LEGACY_ORDER = 1
"""Of runs whose facts name none: a sort by random numbers of Python."""

Indices: TypeAlias = NDArray[np.int64]

_ROUNDS = 12  # with 8, orders of five or six samples are measurably uneven
_CHUNK = 1 << 16  # samples at a time


class Order(Protocol):
    """The order of one epoch."""

    def __len__(self) -> int:
        """Return the number of samples of the epoch."""

    def part(self, start: int, stop: int) -> Indices:
        """Return the samples at the positions from ``start`` to ``stop``, exclusive."""


class EpochOrder:
    """A permutation of ``range(num_samples)`` that depends on the arguments only; any part of it in O(part).

    Version 2 is a Feistel network (Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom
    functions", 1988) over the smallest power of two, whose results beyond ``num_samples`` are permuted again until
    they are below (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, section 3). Its
    round function is the finalizer of MurmurHash3 (Appleby, public domain) with keys from SHAKE-256.

    Version 1, of earlier runs, holds the whole order in memory.

    Args:
        num_samples: At least 0.
        seed: Seed of the run.
        epoch: From 0; every epoch has its own order.
        version: 1 or 2.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, num_samples: int, *, seed: int, epoch: int, version: int = ORDER_VERSION) -> None:
        if num_samples < 0:
            raise ValueError(f"num_samples={num_samples} is negative. Pass the number of samples, 0 or more.")
        if epoch < 0:
            raise ValueError(f"epoch={epoch} is negative. Epochs count from 0.")
        if version not in (LEGACY_ORDER, ORDER_VERSION):
            raise ValueError(f"version={version} is not a known sampling order. Use 1 or {ORDER_VERSION}.")
        self._num_samples = num_samples
        self._version = version
        # A string is hashed as a whole, so neighbouring seeds and epochs are unrelated.
        self._name = f"seed {seed} epoch {epoch}"
        self._keys = _keys_of(self._name)

    def __len__(self) -> int:
        return self._num_samples

    def part(self, start: int, stop: int) -> Indices:
        """Return the samples at the positions from ``start`` to ``stop``, exclusive; int64."""
        if self._version == LEGACY_ORDER:
            return self._sorted[start:stop]
        places = np.arange(start, max(start, min(stop, self._num_samples)), dtype=np.uint64)
        return _permuted(places, list(self._keys), self._num_samples)

    @cached_property
    def _sorted(self) -> Indices:
        # Sort by random() instead of shuffle(): Python guarantees the same numbers in every version only for that.
        random = Random(self._name)
        positions = np.fromiter((random.random() for _ in range(self._num_samples)), np.float64, self._num_samples)
        return np.argsort(positions, kind="stable").astype(np.int64)


class PassOrder:
    """Endless passes over ``range(num_samples)``, each in an order of its own, as one sequence; any part in O(part).

    As version 2 of `EpochOrder`, with keys that are mixed with the number of the pass, so that many short passes are
    computed at once.

    Args:
        num_samples: At least 1.
        name: Text that the order depends on.
    """

    def __init__(self, num_samples: int, name: str) -> None:
        self._num_samples = num_samples
        self._keys = _keys_of(name)

    def part(self, start: int, stop: int) -> Indices:
        """Return the samples at the positions from ``start`` to ``stop``, exclusive; int64."""
        passes, places = np.divmod(np.arange(start, max(start, stop), dtype=np.uint64), np.uint64(self._num_samples))
        keys = [_mixed(key + passes * np.uint64(0x9E3779B97F4A7C15)) for key in self._keys]
        return _permuted(places, keys, self._num_samples)


def _keys_of(name: str) -> NDArray[np.uint64]:
    return np.frombuffer(shake_256(name.encode()).digest(8 * _ROUNDS), dtype="<u8").astype(np.uint64)


def _permuted(places: NDArray[np.uint64], keys: Sequence[Any], size: int) -> Indices:
    """Permute places below ``size``; each round has one key, or one for each place."""
    found = _network(places, keys, size)
    while (beyond := np.flatnonzero(found >= size)).size:
        found[beyond] = _network(found[beyond], [key if key.ndim == 0 else key[beyond] for key in keys], size)
    return found.astype(np.int64)


def _network(values: NDArray[np.uint64], keys: Sequence[Any], size: int) -> NDArray[np.uint64]:
    """Permute values below the next power of two: (left, right) → (right, left ⊕ F(right)), in rounds."""
    bits = max(2, (size - 1).bit_length())
    wide, narrow = np.uint64(bits - bits // 2), np.uint64(bits // 2)
    left, right = values >> narrow, values & _mask(narrow)
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & _mask(wide))
        wide, narrow = narrow, wide
    return (left << narrow) | right


def _mask(bits: np.uint64) -> np.uint64:
    return (np.uint64(1) << bits) - np.uint64(1)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the 64-bit finalizer of MurmurHash3, modulo 2^64."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def epoch_order(num_samples: int, *, seed: int, epoch: int, version: int = ORDER_VERSION) -> list[int]:
    """Return a whole `EpochOrder` as a list, for few samples."""
    order: list[int] = EpochOrder(num_samples, seed=seed, epoch=epoch, version=version).part(0, num_samples).tolist()
    return order


def sampling_order_of(folder: Path | None, facts: Mapping[str, Any] | None, *, has_checkpoint: bool) -> int:
    """Return the version of the sampling order of a run.

    Args:
        folder: Of the run, for messages.
        facts: In its newest checkpoint, or without one, in run-manifest.json.
        has_checkpoint: Whether it has one: a run without checkpoint and facts starts from the beginning.

    Raises:
        InputError: This version of bigbatch does not know the order.
    """
    if facts is None and not has_checkpoint:
        return ORDER_VERSION
    version = (facts or {}).get("sampling_order", LEGACY_ORDER)
    if version not in (LEGACY_ORDER, ORDER_VERSION):
        raise InputError(
            f"{folder} has sampling order {version!r}, and bigbatch {__version__} knows orders up to {ORDER_VERSION}. "
            "Upgrade bigbatch; nothing was changed."
        )
    return int(version)


def window_bounds(
    order: Order,
    lengths: NDArray[np.integer[Any]],
    *,
    global_batch: int | None,
    global_batch_tokens: int | None,
    position: int = 0,
) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each update in the order of an epoch; every sample is in exactly one.

    In sequences, a window has ``global_batch`` samples. In tokens, it has whole samples with a total as close to
    ``global_batch_tokens`` as possible: it ends before the first sample that would not bring the total closer. The
    last window has the remaining samples.

    Args:
        order: Of the epoch.
        lengths: Tokens of each sample, without padding, each at least 1.
        global_batch: Samples behind one update, at least 1, or None.
        global_batch_tokens: Tokens behind one update, at least 1, or None. Exactly one of the two is set.
        position: Samples to skip at the start of the epoch; at the end of a window, the windows after it are the
            same as without skipping.

    Raises:
        ValueError: Both sizes are set, or neither, or a number is out of range.
    """
    if (global_batch is None) == (global_batch_tokens is None):
        raise ValueError(
            f"global_batch={global_batch} and global_batch_tokens={global_batch_tokens}: the batch is counted in "
            "sequences or in tokens. Set exactly one of them."
        )
    if global_batch is not None:
        _check_positive("global_batch", global_batch)
        starts = range(position, len(order), global_batch)
        return ((start, min(start + global_batch, len(order))) for start in starts)
    assert global_batch_tokens is not None
    _check_positive("global_batch_tokens", global_batch_tokens)
    return _token_bounds(order, lengths, global_batch_tokens, position)


def epoch_windows(
    lengths: Sequence[int] | NDArray[np.integer[Any]],
    *,
    global_batch: int | None,
    global_batch_tokens: int | None,
    seed: int,
    epoch: int,
    position: int = 0,
) -> list[list[int]]:
    """Return the samples of each update of an epoch, of few samples. As `window_bounds`, which has no lists."""
    order = EpochOrder(len(lengths), seed=seed, epoch=epoch)
    bounds = window_bounds(
        order,
        np.asarray(lengths, dtype=np.int64),
        global_batch=global_batch,
        global_batch_tokens=global_batch_tokens,
        position=position,
    )
    return [order.part(start, stop).tolist() for start, stop in bounds]


def _token_bounds(
    order: Order, lengths: NDArray[np.integer[Any]], target: int, position: int
) -> Iterator[tuple[int, int]]:
    """Yield the windows of ``target`` tokens.

    With S(i) the tokens of the first i samples, a window from sample i also has sample j > i if that brings its total
    closer to the target: S(j) + S(j+1) − 2·S(i) < 2·target. The left side grows with j, so the end is found by
    bisection. ``sums`` are S of the samples from ``base`` on, as far as they have been read.
    """
    base, sums = position, np.zeros(1, dtype=np.int64)
    start = position
    while start < len(order):
        before = int(sums[start - base])
        while True:
            known = base + len(sums) - 1  # S is known up to here
            middles = sums[:-1] + sums[1:]
            stop = base + int(np.searchsorted(middles[start + 1 - base :], 2 * (target + before))) + start + 1 - base
            if stop < known or known == len(order):
                break
            base, sums = start, sums[start - base :]
            more = tokens_of(order, lengths, known, min(len(order), known + max(_CHUNK, len(sums))))
            sums = np.concatenate([sums, sums[-1] + np.cumsum(more)])
        stop = min(max(stop, start + 1), len(order))
        yield start, stop
        start = stop


def tokens_of(order: Order, lengths: NDArray[np.integer[Any]], start: int, stop: int) -> NDArray[np.int64]:
    """Return the lengths of the samples at the positions from ``start`` to ``stop`` of an order; int64.

    Raises:
        ValueError: A length is below 1.
    """
    samples = order.part(start, stop)
    found = lengths[samples].astype(np.int64)
    if found.size and found.min() < 1:
        _check_positive(f"the length of sample {samples[found.argmin()]}", int(found.min()))
    return found


def num_tokens_of(order: Order, lengths: NDArray[np.integer[Any]], start: int, stop: int) -> int:
    """Return the tokens of the samples at the positions from ``start`` to ``stop`` of an order."""
    return sum(
        int(tokens_of(order, lengths, first, min(first + _CHUNK, stop)).sum()) for first in range(start, stop, _CHUNK)
    )


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value} and must be at least 1.")
