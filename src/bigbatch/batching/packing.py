"""Algorithms that partition sequences into groups: cut, pack and distribute. Integers only, no torch.

    longest first → cut (padded rows) or pack (packed rows) → distribute over ranks

Every function expects the samples longest first and refers to a sample by its position in that order, so that groups
depend on the lengths only, not on the order of the input. A group lists its positions in ascending order: its first
sample is its longest.
"""

from bisect import bisect_left
from collections.abc import Sequence
from heapq import heapreplace
from typing import TypeAlias

Group: TypeAlias = Sequence[int]


def cut_full(max_rows: Sequence[int]) -> list[Group]:
    """Cut greedily: give every group as many rows as its longest sample allows. No cut has fewer groups.

    Args:
        max_rows: For each position, the largest number of rows of a group that starts there; at least 1,
            non-decreasing.
    """
    groups: list[Group] = []
    start = 0
    while start < len(max_rows):
        stop = min(start + max_rows[start], len(max_rows))
        groups.append(range(start, stop))
        start = stop
    return groups


def cut_cheapest(row_costs: Sequence[int], max_rows: Sequence[int], *, per_group: int) -> list[Group]:
    """Minimize Σ over groups of ``per_group + rows · row_costs[first]``; among equal costs, the number of groups.

    With f(j) the cost of the first j samples, g the row costs and every group within its rows,

        f(j) = min over i of  f(i) + per_group + (j − i) · g(i)

    A later i has a lower g(i) and a later last j, so once it is cheaper than an earlier one it stays cheaper (the costs
    are Monge, infinities included). The current candidates are in a queue, each with the first j for which it is the
    best, and the whole takes O(n): Galil and Park, "Dynamic programming with convexity, concavity and sparsity", 1992,
    section 3, with a closed form instead of the binary search.

    No other partition is cheaper, contiguous or not. Proof: order the groups of any partition by their longest sample
    and reassign the samples in sorted order to groups of the same numbers of rows. All samples longer than a group's
    longest were in earlier groups and still are, so no group's longest sample becomes longer: the numbers of rows are
    the same, no row costs more, and no limit is exceeded.

    Args:
        row_costs: For each position, the cost of a row in a group that starts there; at least 1, non-increasing.
        max_rows: As in `cut_full`.
        per_group: Cost of a group in addition to its rows, at least 0.
    """
    num_samples = len(row_costs)
    scale = num_samples + 1  # the number of groups is counted in the digits below the cost, to break ties only
    slopes = [cost * scale for cost in row_costs]
    bases: list[int] = []  # f(i) − i · g(i): with a group from i to j the cost is bases[i] + j · slopes[i]
    queue: list[int] = []
    wins_from: list[int] = []
    starts = [0]
    head = total = 0
    for i in range(num_samples):
        base, slope = total + per_group * scale + 1 - i * slopes[i], slopes[i]
        bases.append(base)
        wins = i + 1
        while len(queue) > head:
            last = queue[-1]
            wins = last + max_rows[last] + 1  # where the limit ends the group of `last`, unless i is cheaper before
            if slopes[last] > slope:
                wins = min(wins, -((bases[last] - base) // (slopes[last] - slope)))
            elif base <= bases[last]:
                wins = i + 1
            if wins > wins_from[-1]:
                break
            queue.pop()
            wins_from.pop()
        queue.append(i)
        wins_from.append(wins)
        while head + 1 < len(queue) and wins_from[head + 1] <= i + 1:
            head += 1
        starts.append(queue[head])
        total = bases[queue[head]] + (i + 1) * slopes[queue[head]]
    return _groups_backwards(starts)


def _groups_backwards(starts: list[int]) -> list[Group]:
    """Return the groups, given the start of the best last group for every end."""
    groups: list[Group] = []
    stop = len(starts) - 1
    while stop:
        groups.append(range(starts[stop], stop))
        stop = starts[stop]
    return groups[::-1]


def cut_evenly(row_costs: Sequence[int], max_rows: Sequence[int], *, at_most: int) -> list[Group] | None:
    """Cut into at most ``at_most`` groups, minimizing the cost of the most expensive; None if the limits need more.

    Greedy cutting up to a cost yields the fewest groups within that cost, so the minimal cost is found by bisection.

    Args:
        row_costs: As in `cut_cheapest`.
        max_rows: As in `cut_full`.
        at_most: The largest number of groups.
    """
    full = cut_full(max_rows)
    if len(full) > at_most:
        return None
    low, high = row_costs[0], max(len(group) * row_costs[group[0]] for group in full)
    if len(_cut_up_to(low, row_costs, max_rows)) <= at_most:
        high = low
    while low < high:
        middle = (low + high) // 2
        if len(_cut_up_to(middle, row_costs, max_rows)) <= at_most:
            high = middle
        else:
            low = middle + 1
    return _cut_up_to(low, row_costs, max_rows)


def _cut_up_to(cost: int, row_costs: Sequence[int], max_rows: Sequence[int]) -> list[Group]:
    groups: list[Group] = []
    start = 0
    while start < len(row_costs):
        stop = min(start + min(max_rows[start], cost // row_costs[start]), len(row_costs))
        groups.append(range(start, stop))
        start = stop
    return groups


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[Group]:
    """Pack best-fit-decreasing: add each sample to the open group with the least remaining capacity, or open one.

    No packing has fewer than ⌈Σ lengths / capacity⌉ groups. Short samples fill the gaps of the long ones, so mixed
    lengths come within a fraction of a percent of that bound; if no two lengths fit together, each needs its own group.

    Args:
        lengths: Tokens of each sample, non-increasing, none above ``capacity``.
        capacity: Largest number of tokens of a group.
    """
    groups: list[list[int]] = []
    capacities_left: list[int] = []  # distinct remaining capacities of the open groups, ascending
    groups_by_capacity: dict[int, list[int]] = {}  # remaining capacity → numbers of the groups that have it
    shortest = lengths[-1] if lengths else 0
    for position, length in enumerate(lengths):
        place = bisect_left(capacities_left, length)
        if place == len(capacities_left):
            number, left = len(groups), capacity
            groups.append([])
        else:
            left = capacities_left[place]
            number = groups_by_capacity[left].pop()
            if not groups_by_capacity[left]:
                del capacities_left[place]
        groups[number].append(position)
        left -= length
        if left >= shortest:
            numbers = groups_by_capacity.setdefault(left, [])
            if not numbers:
                capacities_left.insert(bisect_left(capacities_left, left), left)
            numbers.append(number)
    return list(groups)


def pack_evenly(lengths: Sequence[int], capacity: int, *, num_groups: int) -> list[Group] | None:
    """Pack into ``num_groups`` groups, each sample into the shortest so far; None if one exceeds ``capacity``.

    Longest processing time first: Graham, "Bounds on multiprocessing timing anomalies", 1969, section 4.

    Args:
        lengths: As in `pack_best_fit`.
        capacity: As in `pack_best_fit`.
        num_groups: Number of groups; fewer if there are fewer samples.
    """
    num_groups = min(num_groups, len(lengths))
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    loads = [(0, number) for number in range(num_groups)]
    for position, length in enumerate(lengths):
        load, number = loads[0]
        if load + length > capacity:
            return None
        groups[number].append(position)
        heapreplace(loads, (load + length, number))
    return list(groups)


def distribute(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Assign items to ranks, ``num_ranks`` at a time (a layer), the most expensive of a layer to the cheapest rank.

    Ranks get equally many items, or one fewer where the last layer is incomplete, each in the order of ``costs``. The
    totals of two ranks differ by at most the widest cost difference within one layer: if totals differ by at most D and
    the items of a layer by at most d, this pairing leaves a difference of at most max(D, d).

    Args:
        costs: Cost of each item.
        num_ranks: Ranks, at least 1.

    Returns:
        For each rank, the indices of its items.
    """
    items_by_rank: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for start in range(0, len(costs), num_ranks):
        layer = sorted(range(start, min(start + num_ranks, len(costs))), key=costs.__getitem__, reverse=True)
        cheapest_first = sorted(range(num_ranks), key=totals.__getitem__)
        for item, rank in zip(layer, cheapest_first, strict=False):
            items_by_rank[rank].append(item)
            totals[rank] += costs[item]
    return items_by_rank
