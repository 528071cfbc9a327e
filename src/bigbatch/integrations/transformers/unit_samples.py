"""The samples of a window over all ranks: their counts in each unit, and which of them show what a unit is."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from bigbatch.integrations.transformers.trainer_state import collator_state
from bigbatch.integrations.transformers.unit_counts import (
    Candidate,
    candidates_for,
    cut_rows,
    has_row_for_each_sample,
)
from bigbatch.rng import seed_everything

POOL = 16  # samples that the first choice is made from: the smallest of the window
SEPARATION = 1e-3  # of the weight of a part in two units


@dataclass(frozen=True)
class Collator:
    """The collator of a trainer.

    Attributes:
        collate: Makes a micro-batch of a list of samples.
        owners: Objects whose attributes it may write to, such as a random generator.
        label_names: Names of labels in its micro-batches.
    """

    collate: Callable[[Any], Any]
    owners: Sequence[Any] = ()
    label_names: Sequence[str] = ()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restore random states and the attributes of its owners on exit."""
        with ExitStack() as stack:
            for owner in (getattr(self.collate, "__self__", self.collate), *self.owners):
                stack.enter_context(collator_state(owner))
            yield


@dataclass(frozen=True)
class Entry:
    """A sample of a window.

    Attributes:
        rank: The rank that holds it.
        index: Its index there.
        size: Elements of its sequences, before it is collated.
        counts: Its items by the name of the unit.
    """

    rank: int
    index: int
    size: int
    counts: Mapping[str, float]


def count_samples(
    samples: Sequence[Any],
    collator: "Collator",
    rank: int,
    *,
    names: Sequence[str] | None = None,
) -> list[Entry]:
    """Return the counts of this rank's samples.

    Args:
        samples: Not collated.
        collator: Collates them once, or each, if its tensors do not have a row for each sample.
        rank: This one.
        names: The units to count; by default all.
    """
    if not samples:
        return []
    sizes = [size_of(sample) for sample in samples]
    with collator.restored():
        whole = collator.collate(list(samples))
        by_row = has_row_for_each_sample(whole, len(samples))
        batches = [whole] if by_row else [collator.collate([sample]) for sample in samples]
        candidates = candidates_for(
            batches[0], num_samples=len(samples) if by_row else 1, label_names=collator.label_names
        )
        counts: dict[str, list[float]] = {}
        for each in candidates:
            if names is not None and each.name not in names:
                continue
            if each.depends_on_padding:
                counts[each.name] = _padded_counts(each, samples, sizes, collator)
            elif by_row and each.count_rows is not None:
                counts[each.name] = [float(count) for count in each.count_rows(whole).tolist()]
            else:
                counts[each.name] = [float(each.count(batch)) for batch in batches]
    return [
        Entry(rank, index, size, {name: values[index] for name, values in counts.items()})
        for index, size in enumerate(sizes)
    ]


def count_microbatches(microbatches: Sequence[Any], candidates: Sequence[Candidate], rank: int) -> list[Entry]:
    """Return the counts of this rank's collated micro-batches, one entry for each."""
    return [
        Entry(rank, index, 0, {each.name: float(each.count(microbatch)) for each in candidates})
        for index, microbatch in enumerate(microbatches)
    ]


def _padded_counts(
    candidate: Candidate, samples: Sequence[Any], sizes: Sequence[int], collator: Collator
) -> list[float]:
    """Return the count of each sample on its own: exact if all are padded to one length, else by their sizes."""
    smallest, largest = (
        float(candidate.count(collator.collate([samples[sizes.index(size)]]))) for size in (min(sizes), max(sizes))
    )
    if smallest == largest:
        return [smallest] * len(samples)
    return [float(size) + smallest - min(sizes) for size in sizes]


def size_of(sample: Any) -> int:
    """Return the number of elements of the sequences and tensors of a sample that is not collated."""
    leaves = list(sample.values()) if isinstance(sample, Mapping) else tree_flatten(sample)[0]
    return sum(_elements(leaf) for leaf in leaves)


def _elements(leaf: Any) -> int:
    if isinstance(leaf, Tensor):
        return leaf.numel()
    if isinstance(size := getattr(leaf, "size", None), int):  # a NumPy array
        return size
    return len(leaf) if isinstance(leaf, list | tuple | str) else 1


def names_of(entries: Sequence[Entry]) -> list[str]:
    """Return the units in which every sample is counted."""
    if not entries:
        return []
    return [name for name in entries[0].counts if all(name in entry.counts for entry in entries)]


def agree(entries: Sequence[Entry], names: Sequence[str], *, tolerance: float, absolute: bool) -> bool:
    """Return whether the counts of some units agree: they are equal, or equal up to a constant factor."""
    first, *others = names
    for name in others:
        if any((not entry.counts[name]) != (not entry.counts[first]) for entry in entries):
            return False
        ratios = [entry.counts[name] / entry.counts[first] for entry in entries if entry.counts[first]]
        expected = [1.0, 1.0] if absolute else ratios
        if ratios and max(*ratios, *expected) > min(*ratios, *expected) * (1 + tolerance):
            return False
    return True


def choose_parts(
    entries: Sequence[Entry], names: Sequence[str], tried: Sequence[Entry], max_samples: int
) -> list[list[Entry]]:
    """Return two parts, one sample and one or two others, whose shares differ by unit; the smallest ones that do.

    Args:
        entries: All samples.
        names: Units whose shares should differ.
        tried: Samples that did not show anything: others are chosen, as long as there are two.
        max_samples: Of both parts together, at least 2.
    """
    untried = [entry for entry in entries if entry not in tried]
    untried = untried if len(untried) > 1 else list(entries)

    def rank_of(entry: Entry) -> tuple[bool, int, int, int]:
        return not _is_counted(entry, names), entry.size, entry.rank, entry.index

    by_size = sorted(untried, key=rank_of)
    usable = [entry for entry in by_size if _is_counted(entry, names)]
    pool = (usable if len(usable) > 1 else by_size)[:POOL]
    if len(pool) < 2:
        return [pool]
    pairs = itertools.combinations(pool, 2) if len(usable) != 1 else ((pool[0], other) for other in pool[1:])
    pair = max(pairs, key=lambda pair: _separation(pair, names))
    others = [entry for entry in pool if entry not in pair]
    return [[pair[0]], [pair[1], *others[: max(0, min(1, max_samples - 2))]]]


def _is_counted(entry: Entry, names: Sequence[str]) -> bool:
    return all(entry.counts[name] for name in names)


def most_different(entries: Sequence[Entry], names: Sequence[str]) -> list[list[Entry]]:
    """Return two samples whose shares in two of the units differ most; the first one has items in all units."""
    first, *others = names
    best: tuple[float, list[list[Entry]]] = (-1.0, [])
    for name in others:
        counted = [entry for entry in entries if entry.counts[name] + entry.counts[first]]
        if len(counted) < 2:
            continue
        low, *_, high = sorted(
            counted, key=lambda entry: entry.counts[name] / (entry.counts[name] + entry.counts[first])
        )
        pair = sorted((low, high), key=lambda entry: min(entry.counts[each] for each in names), reverse=True)
        best = max(best, (_separation((low, high), (first, name)), [[pair[0]], [pair[1]]]), key=lambda each: each[0])
    return best[1] or choose_parts(entries, names, (), 2)


def _separation(pair: tuple[Entry, Entry], names: Sequence[str]) -> float:
    """Return how many of the units have different shares, and by how much they differ."""
    shares = []
    for name in names:
        first, second = (entry.counts[name] for entry in pair)
        shares.append(first / (first + second) if first + second else 0.0)
    differences = [abs(a - b) for a, b in itertools.combinations(shares, 2)]
    return sum(each > SEPARATION for each in differences) + min(0.9, sum(differences))


def collate_parts(parts: Sequence[Sequence[Any]], collator: "Collator") -> list[Any]:
    """Return the collated samples of all parts together, and of each part; restores the random states.

    A collator that draws random numbers runs once, and its rows are cut.
    """
    together = [sample for part in parts for sample in part]
    with collator.restored():
        seed_everything(0)
        whole = collator.collate(list(together))
        if len(parts) == 1:
            return [whole, whole]
        seed_everything(1)
        if same_batches(whole, collator.collate(list(together))):
            return [whole, *(collator.collate(list(part)) for part in parts)]
    bounds = [0, *itertools.accumulate(map(len, parts))]
    return [whole, *(cut_rows(whole, range(start, stop)) for start, stop in itertools.pairwise(bounds))]


def same_batches(first: Any, second: Any) -> bool:
    """Return whether two collated micro-batches are equal."""
    leaves = [tree_flatten(dict(each) if isinstance(each, Mapping) else each)[0] for each in (first, second)]
    if len(leaves[0]) != len(leaves[1]):
        return False
    return all(_same_value(a, b) for a, b in zip(*leaves, strict=True))


def _same_value(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape != second.shape or first.dtype != second.dtype:
            return False
        if first.is_floating_point():  # a NaN may stand for a value that is missing
            return torch.allclose(first, second, rtol=0.0, atol=0.0, equal_nan=True)
        return torch.equal(first, second)
    return first is second or bool(first == second)
