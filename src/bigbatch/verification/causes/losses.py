"""Causes in the values of the loss: means, counts that do not add up, pairs that a cut separates, penalties.

All of them compare sums and items of parts of the samples, without gradients; pairs are confirmed by the gradient.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bigbatch.verification.causes.case import ITEMS_ROUNDING, Case, Cause, Kind, by_term, is_additive, totals
from bigbatch.verification.causes.counts import Count, candidate_counts
from bigbatch.verification.causes.coupling import mixing_modules
from bigbatch.verification.cut_gradients import CUT_ERRORS, relative_difference

PARTS_OF_PAIRS = (2, 3, 4)  # chosen and rejected; anchor, positive and negative; ...
NUM_CHUNKS = 4
MAX_DEALT = 32  # samples that are looked at one by one, if the loss of a chunk is not finite
CLEAR = 50  # a difference is significant above this multiple of the tolerance
SPREAD = 10  # means that differ by less than this multiple of the rounding say nothing of their weights
SAME_RATIO = 0.02  # two ratios of counts are the same below this difference


def losses_not_sums(case: Case) -> Iterator[Cause]:
    """Yield a cause for each term whose items do not add up, or whose loss is a mean instead of a sum."""
    whole, parts = by_term(case.terms(case.reference)), by_term(case.terms(case.cut))
    for name, values in whole.items():
        total, total_items = (math.fsum(column) for column in zip(*values, strict=True))
        sums, counts = zip(*parts.get(name, [(0.0, 0.0)]), strict=True)
        if not math.isclose(math.fsum(counts), total_items, rel_tol=ITEMS_ROUNDING):
            yield Cause(
                Kind.ITEMS,
                f"the items of the term {name!r} do not add up: {total_items:g} in {case.whole}, but "
                f"{math.fsum(counts):g} over its micro-batches of {case.cut}. Count exactly the items that the loss "
                "sums.",
            )
        elif math.isclose(math.fsum(sums), total, rel_tol=case.tolerance, abs_tol=case.tolerance * max(map(abs, sums))):
            continue
        elif len(values) == 1 < len(sums) and min(sums) <= total <= max(sums):
            yield Cause(
                Kind.MEAN,
                f"the loss of the term {name!r} is not a sum: {total:.6g} for {case.whole} lies between those of its "
                f"{len(sums)} micro-batches ({min(sums):.6g} to {max(sums):.6g}), like a mean. "
                "Use reduction='sum' and return the number of items.",
            )


def pairs(case: Case) -> Iterator[Cause]:
    """Yield a cause if the gradient is exact when samples stay together that are half a micro-batch apart.

    The loss must also depend on the order of the samples: means and contrastive losses do not, and may be exact in one
    grouping by chance.
    """
    num_samples = case.cut_gradients.samples.num_samples
    whole = case.terms(num_samples) if case.reference >= num_samples else []
    if not whole or is_additive(whole, case.terms(case.cut), case.tolerance):
        return
    gradient = case.gradient(num_samples)
    for parts in PARTS_OF_PAIRS:
        distance, rest = divmod(num_samples, parts)
        if rest or distance < 2:
            continue
        for step in (distance, 1):
            groups, mixed = _groups(num_samples, parts, step=step), _regrouped(num_samples, parts, step=step)
            try:
                together = is_additive(whole, case.terms(groups), case.tolerance)
                if not together or is_additive(whole, case.terms([mixed]), CLEAR * case.tolerance):
                    continue
                if relative_difference(case.gradient(groups), gradient) > case.tolerance:
                    continue
            except CUT_ERRORS:  # not a group that the loss supports
                continue
            if next(mixing_modules(case), None) is None:  # else a module combines them
                yield Cause(Kind.PAIRS, _apart(parts) if step > 1 else _adjacent(parts))
            return


def _groups(num_samples: int, parts: int, *, step: int) -> list[list[int]]:
    """Return up to four groups of samples that keep tuples of ``parts`` samples together, ``step`` apart."""
    num_tuples = num_samples // parts
    tuples = [
        [index + step * part for part in range(parts)] if step > 1 else list(range(index * parts, (index + 1) * parts))
        for index in range(num_tuples)
    ]
    num_groups = min(num_tuples, NUM_CHUNKS)
    bounds = [num_tuples * index // num_groups for index in range(num_groups + 1)]
    return [
        [chosen[part] for part in range(parts) for chosen in tuples[start:end]]
        if step > 1
        else [row for chosen in tuples[start:end] for row in chosen]
        for start, end in pairwise(bounds)
    ]


def _regrouped(num_samples: int, parts: int, *, step: int) -> list[int]:
    """Return all samples in an order in which tuples of ``parts`` samples are others."""
    rows = list(range(num_samples))
    if step > 1:
        return [*rows[1:step], 0, *rows[step:]]
    rows[parts - 1], rows[parts] = parts, parts - 1
    return rows


def _apart(parts: int) -> str:
    fraction, fractions, tuples = {2: ("half", "halves", "pair"), 3: ("third", "thirds", "triple")}.get(
        parts, ("quarter", "quarters", "tuple")
    )
    return (
        f"the loss combines samples of different {fractions} of a micro-batch, i and i + n / {parts} of n samples, and "
        f"a cut separates them. Pass each {fraction} as a tensor of its own, such as "
        f"{{'chosen': ..., 'rejected': ...}}, so that one sample is one {tuples}."
    )


def _adjacent(parts: int) -> str:
    return (
        f"the loss combines {parts} neighbouring samples, and this cut separates some of them. Use a micro-batch that "
        f"is a multiple of {parts}, or pass tensors [samples / {parts}, {parts}, ...]."
    )


@dataclass(frozen=True)
class _Chunks:
    """Values of one term on four chunks of the samples, on pairs of them, and on all."""

    single: list[tuple[float, float]]
    pair: dict[tuple[int, int], tuple[float, float]]
    whole: tuple[float, float]
    rows: Sequence[Sequence[int]]

    def values(self) -> list[float]:
        return [loss for loss, _ in [*self.single, *self.pair.values(), self.whole]]


def _chunks(case: Case) -> dict[str, _Chunks]:
    """Evaluate chunks of the samples; empty if there are too few samples, or a chunk cannot run."""
    num_samples = min(case.reference, case.cut_gradients.samples.num_samples)
    if num_samples < NUM_CHUNKS:
        return {}
    bounds = [num_samples * index // NUM_CHUNKS for index in range(NUM_CHUNKS + 1)]
    try:
        found = _evaluated(case, [range(start, end) for start, end in pairwise(bounds)])
        if found or num_samples > MAX_DEALT:
            return found
        return _evaluated(case, _dealt(case, num_samples))
    except CUT_ERRORS:
        return {}


def _evaluated(case: Case, rows: Sequence[Sequence[int]]) -> dict[str, _Chunks]:
    """Evaluate chunks; terms with a value that is not finite, such as a mean over nothing, are left out."""
    links = [(0, 1), (0, 2), (0, 3), (2, 3)]
    groups = [*rows, *([*rows[a], *rows[b]] for a, b in links), sorted(row for chunk in rows for row in chunk)]
    values = [totals([terms]) for terms in case.terms(groups)]
    found = {}
    for name in values[-1]:
        column = [terms.get(name, (0.0, 0.0)) for terms in values]
        pair = dict(zip(links, column[NUM_CHUNKS:-1], strict=True))
        found[name] = _Chunks(column[:NUM_CHUNKS], pair, column[-1], rows)
    return {name: chunks for name, chunks in found.items() if all(map(math.isfinite, chunks.values()))}


def _dealt(case: Case, num_samples: int) -> list[list[int]]:
    """Return chunks of which each has samples with a finite loss, as far as there are enough."""
    single = [totals([terms]).values() for terms in case.terms([[row] for row in range(num_samples)])]
    is_finite = [all(math.isfinite(loss) for loss, _ in values) for values in single]
    order = sorted(range(num_samples), key=lambda row: not is_finite[row])
    return [sorted(order[index::NUM_CHUNKS]) for index in range(NUM_CHUNKS)]


def penalty(case: Case) -> Iterator[Cause]:
    """Yield a cause if every micro-batch adds the same amount, whatever its samples are."""
    for name, chunks in _chunks(case).items():
        loss = [value for value, _ in chunks.single]
        pair, whole = {link: value for link, (value, _) in chunks.pair.items()}, chunks.whole[0]
        # With s(A) = Σ item losses of A + b, each of these is b.
        amounts = [loss[a] + loss[b] - pair[a, b] for a, b in pair] + [pair[0, 1] + pair[2, 3] - whole]
        rounding = case.tolerance * max(map(abs, chunks.values()))
        if min(map(abs, amounts)) <= 10 * rounding or max(amounts) - min(amounts) > rounding:
            continue
        changed = _parameters_that_differ(case)
        yield Cause(
            Kind.PENALTY,
            f"a penalty that does not depend on the batch is added to the sum of the term {name!r}: {amounts[-1]:.6g} "
            f"in every micro-batch{changed}, so its weight grows with their number. Multiply it by the items, or "
            "return it as its own term.",
        )


def _parameters_that_differ(case: Case) -> str:
    reference, gradient = case.gradient(case.reference), case.gradient(case.cut)
    differing = [
        name for name in reference if relative_difference({name: gradient[name]}, {name: reference[name]}) > 1e-3
    ]
    return f" (it reaches {', '.join(differing[:3])})" if differing and len(differing) < len(reference) else ""


def other_count(case: Case) -> Iterator[Cause]:
    """Yield a cause if the loss is a mean times its items, but the mean runs over other items.

    With s_i = n_i · mean_i, the means of two chunks and of both together say how much each weighs in the mean; these
    weights must then predict the means of other pairs, and of all samples.
    """
    for name, chunks in _chunks(case).items():
        weights = _weights_in_mean(chunks, case.tolerance)
        if weights is None:
            continue
        count = _matching(weights, candidate_counts(case.cut_gradients, chunks.rows))
        items = chunks.whole[1]
        if count is None:
            yield Cause(
                Kind.OTHER_COUNT,
                f"the loss of the term {name!r} is a mean times its {items:g} items, but the mean runs over something "
                "else. Return the sum itself (reduction='sum'), or count what the mean divides by.",
            )
        else:
            yield Cause(
                Kind.OTHER_COUNT,
                f"the loss of the term {name!r} is a mean times its {items:g} items, but the mean runs over "
                f"{math.fsum(count.values):g}: {count.expression}. Count these instead.",
            )


def _weights_in_mean(chunks: _Chunks, tolerance: float) -> list[float] | None:
    """Return the weight of each chunk in the mean, relative to the first; None if the loss is no such mean."""
    if any(not items for _, items in [*chunks.single, *chunks.pair.values(), chunks.whole]):
        return None
    mean = [loss / items for loss, items in chunks.single]
    joint = {link: loss / items for link, (loss, items) in chunks.pair.items()}
    rounding = tolerance * max(map(abs, [*mean, *joint.values()]))
    items = [count for _, count in chunks.single]
    adds_up = all(
        abs(math.fsum(items[i] * mean[i] for i in link) / math.fsum(items[i] for i in link) - value) <= rounding
        for link, value in joint.items()
    )
    if adds_up:
        return None
    weights = [1.0]
    for index in range(1, NUM_CHUNKS):
        towards_first, towards_other = mean[0] - joint[0, index], joint[0, index] - mean[index]
        if abs(mean[0] - mean[index]) <= SPREAD * rounding or not towards_other or towards_first / towards_other <= 0:
            return None
        weights.append(towards_first / towards_other)
    for chunk_indices, found in (((2, 3), joint[2, 3]), (range(NUM_CHUNKS), chunks.whole[0] / chunks.whole[1])):
        total = math.fsum(weights[i] for i in chunk_indices)
        predicted = math.fsum(weights[i] * mean[i] for i in chunk_indices) / total
        if abs(predicted - found) > rounding:
            return None
    return weights


def _matching(weights: Sequence[float], counts: Sequence[Count]) -> Count | None:
    """Return the count whose ratios between chunks are nearest to the weights, if they are the same."""

    def distance(count: Count) -> float:
        return max(
            abs(value / count.values[0] / weight - 1) for value, weight in zip(count.values, weights, strict=True)
        )

    usable = [count for count in counts if all(count.values)]
    nearest = min(usable, key=distance, default=None)
    return nearest if nearest is not None and distance(nearest) <= SAME_RATIO else None
