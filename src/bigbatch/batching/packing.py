"""How sequences become groups: cut, pack and deal. Integers only, no torch.

    longest first → cut (padded rows) or pack (packed rows) → deal to ranks

Every function takes the samples longest first and names a sample by its position in that order, so that groups depend
on the lengths alone and never on how the samples were numbered. A group lists its positions in ascending order: its
first sample is its longest.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from heapq import heapify, heappop, heappush, heapreplace
from typing import TypeAlias

Group: TypeAlias = Sequence[int]


@dataclass(frozen=True)
class Cost:
    """What a micro-batch costs, in any unit: only the ratios count.

        padded: per_microbatch + per_token · rows · longest + per_pair · rows · longest²
        packed: per_microbatch + per_token · Σ length       + per_pair · Σ length²

    The defaults make a token cost as much as 8,192 pairs and a micro-batch as much as 1,024 tokens. A transformer layer
    of width d does 72·d² operations for a token and 12·d for a pair of query and key, 6·d where masked pairs are
    skipped: a token costs 6·d to 12·d pairs, here for d around 1,024 (fitted on two CPU cores, no pair skipped: 1,400
    at width 256 and 2,000 at 384). Starting a micro-batch cost 30 to 70 tokens in that fit. On a GPU it costs more,
    since launching kernels bounds small micro-batches: the default stands between, and is no measurement. Too high a
    figure costs a little padding, too low a one costs micro-batches.

    Attributes:
        per_microbatch: For each micro-batch, whatever its size; at least 0.
        per_token: For each token, padding included; at least 1.
        per_pair: For each pair of tokens of one row; at least 0.

    Raises:
        TypeError: One of them is no int.
        ValueError: One of them is too low.
    """

    per_microbatch: int = 1_024 * 8_192
    per_token: int = 8_192
    per_pair: int = 1

    def __post_init__(self) -> None:
        for part in fields(self):
            value, least = getattr(self, part.name), 1 if part.name == "per_token" else 0
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(
                    f"Cost.{part.name} is {value!r}: it must be an int. Only the ratios count, so multiply all three "
                    "until they are whole."
                )
            if value < least:
                raise ValueError(f"Cost.{part.name} is {value}: it must be at least {least}.")

    def of_row(self, length: int) -> int:
        """Cost of one row of ``length`` tokens, without that of its micro-batch."""
        return (self.per_token + self.per_pair * length) * length


@dataclass(frozen=True)
class SortedBatch:
    """The lengths of a batch, longest first, and how they may be grouped.

    Attributes:
        lengths: Tokens of each sample, falling, none above the budget.
        token_budget: Tokens, padding included, that no group exceeds; or None.
        microbatch_size: Samples that no group exceeds; or None. One of the two is given.
        packed: Whether samples are packed into one row instead of padded to the longest.
        cost: What groups are weighed by.
    """

    lengths: Sequence[int]
    token_budget: int | None
    microbatch_size: int | None
    packed: bool
    cost: Cost

    def group(self, num_ranks: int) -> list[Group]:
        """Choose the groups for so many ranks, the largest first.

        The i-th groups of all ranks run at the same time and wait for the dearest of them, so the choice is the least
        Σ_i max over ranks of the cost: of the groups that are best for one rank, and of more even ones whose number is
        a multiple of the ranks. Where a last round has fewer groups than ranks, its dearest are halved.
        """
        candidates = (self._complete_last_round(groups, num_ranks) for groups in self._candidates(num_ranks))
        return min(candidates, key=lambda groups: self._lockstep(groups, num_ranks))

    def tokens_of(self, group: Group) -> int:
        """Tokens of a group as laid out, padding included."""
        return sum(map(self.lengths.__getitem__, group)) if self.packed else len(group) * self.lengths[group[0]]

    def cost_of(self, group: Group) -> int:
        """Cost of a group as laid out."""
        if self.packed:
            return self.cost.per_microbatch + sum(self.cost.of_row(self.lengths[position]) for position in group)
        return self.cost.per_microbatch + len(group) * self.cost.of_row(self.lengths[group[0]])

    def _candidates(self, num_ranks: int) -> Iterator[list[Group]]:
        best = self._best_groups()
        yield best
        full_rounds, left = divmod(len(best), num_ranks)
        if num_ranks == 1 or (self.microbatch_size and not left):  # a size asked for is kept where it fits the ranks
            return
        for rounds in {max(full_rounds, 1): None, full_rounds + bool(left): None}:
            even = self._even_groups(rounds * num_ranks)
            if even is not None:
                yield even

    def _best_groups(self) -> list[Group]:
        """The groups that cost least in all; for one rank there are no better ones."""
        if self.packed:
            if self.token_budget:
                return pack_best_fit(self.lengths, self.token_budget)
            return list(distribute(self.lengths, -(-len(self.lengths) // self._max_rows(1))))
        max_rows = [self._max_rows(length) for length in self.lengths]
        if self.token_budget is None:
            return cut_full(max_rows)
        row_costs = [self.cost.of_row(length) for length in self.lengths]
        return cut_cheapest(row_costs, max_rows, per_group=self.cost.per_microbatch)

    def _even_groups(self, num_groups: int) -> list[Group] | None:
        """At most so many groups, as alike as the limit lets them be; None where it needs more groups."""
        num_groups = min(num_groups, len(self.lengths))
        if not self.packed:
            max_rows = [self._max_rows(length) for length in self.lengths]
            row_costs = [self.cost.of_row(length) for length in self.lengths]
            return cut_evenly(row_costs, max_rows, at_most=num_groups)
        if self.token_budget:
            return pack_evenly(self.lengths, self.token_budget, num_groups=num_groups)
        return (
            list(distribute(self.lengths, num_groups)) if num_groups * self._max_rows(1) >= len(self.lengths) else None
        )

    def _max_rows(self, longest: int) -> int:
        return self.microbatch_size or (self.token_budget or 0) // longest

    def _complete_last_round(self, groups: list[Group], num_ranks: int) -> list[Group]:
        """Sort largest first; in the last round halve the dearest group while a rank has none."""
        groups = self._largest_first(groups)
        whole_rounds = (len(groups) - 1) // num_ranks * num_ranks
        dearest_first = [(-self.cost_of(group), group[0], group) for group in groups[whole_rounds:]]
        heapify(dearest_first)
        while len(dearest_first) < num_ranks and len(dearest_first[0][-1]) > 1:
            group = heappop(dearest_first)[-1]
            middle = (len(group) + 1) // 2
            halves = (group[::2], group[1::2]) if self.packed else (group[:middle], group[middle:])
            for half in halves:
                heappush(dearest_first, (-self.cost_of(half), half[0], half))
        return groups[:whole_rounds] + self._largest_first([group for _, _, group in dearest_first])

    def _largest_first(self, groups: list[Group]) -> list[Group]:
        return sorted(groups, key=lambda group: (self.tokens_of(group), self.cost_of(group)), reverse=True)

    def _lockstep(self, groups: list[Group], num_ranks: int) -> int:
        costs = list(map(self.cost_of, groups))
        return sum(max(costs[start : start + num_ranks]) for start in range(0, len(costs), num_ranks))


def cut_full(max_rows: Sequence[int]) -> list[Group]:
    """Cut greedily: every group takes as many rows as its longest sample allows. No cut has fewer groups.

    Args:
        max_rows: For each position, how many rows a group may have that begins there, at least 1 and never falling.
    """
    groups: list[Group] = []
    start = 0
    while start < len(max_rows):
        stop = min(start + max_rows[start], len(max_rows))
        groups.append(range(start, stop))
        start = stop
    return groups


def cut_cheapest(row_costs: Sequence[int], max_rows: Sequence[int], *, per_group: int) -> list[Group]:
    """Cut where Σ over groups of ``per_group + rows · row_costs[first]`` is least; among equals, into the fewest.

    With f(j) the cost of the first j samples, g the row costs and every group within its rows,

        f(j) = min over i of  f(i) + per_group + (j − i) · g(i)

    A later i has a lower g(i) and a later last j, so once it beats an earlier one it does so for ever (the costs are
    Monge, infinities included). The candidates of the moment stand in a queue, each with the first j that it wins, and
    the whole takes O(n): Galil and Park, "Dynamic programming with convexity, concavity and sparsity", 1992, section 3,
    with a closed form in place of the binary search.

    No other partition is cheaper, contiguous or not. Order the groups of any partition by their longest sample and
    hand out the same numbers of rows again in sorted order: the samples longer than a group's longest all sat in
    groups before it, so they still go there, and no group's longest sample is longer than it was. Same rows, none
    dearer, no limit passed.

    Args:
        row_costs: For each position, what a row costs in a group that begins there; at least 1 and never rising.
        max_rows: As in `cut_full`.
        per_group: Cost of a group beside its rows, at least 0.
    """
    num_samples = len(row_costs)
    scale = num_samples + 1  # makes room for a count of the groups below the cost: it breaks ties, and nothing else
    slopes = [cost * scale for cost in row_costs]
    bases: list[int] = []  # f(i) − i · g(i): a group from i to j brings the cost to bases[i] + j · slopes[i]
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
            wins = last + max_rows[last] + 1  # there the limit ends the group, if this i is not cheaper before
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
    """Follow, from the last sample, where the group that ends there starts."""
    groups: list[Group] = []
    stop = len(starts) - 1
    while stop:
        groups.append(range(starts[stop], stop))
        stop = starts[stop]
    return groups[::-1]


def cut_evenly(row_costs: Sequence[int], max_rows: Sequence[int], *, at_most: int) -> list[Group] | None:
    """Cut into at most so many groups that the dearest costs least; None where the limits need more groups.

    Filling up to a cost gives the fewest groups under that cost, so the least such cost is found by bisection.
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
    """Pack best-fit-decreasing: each sample joins the fullest group that still has room, or opens one.

    No packing has fewer than ⌈Σ lengths / capacity⌉ groups. Many short samples fill the gaps of the long ones, so
    mixed lengths come within a fraction of a percent of it; lengths of which two never fit need one group each.

    Args:
        lengths: Tokens of each sample, falling, none above ``capacity``.
        capacity: Tokens that a group never exceeds.
    """
    groups: list[list[int]] = []
    rooms: list[int] = []  # the different rooms that are left in open groups, rising
    with_room: dict[int, list[int]] = {}  # room → groups that have just this much left
    shortest = lengths[-1] if lengths else 0
    for position, length in enumerate(lengths):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            number, room = len(groups), capacity
            groups.append([])
        else:
            room = rooms[place]
            number = with_room[room].pop()
            if not with_room[room]:
                del rooms[place]
        groups[number].append(position)
        room -= length
        if room >= shortest:
            holders = with_room.setdefault(room, [])
            if not holders:
                rooms.insert(bisect_left(rooms, room), room)
            holders.append(number)
    return list(groups)


def pack_evenly(lengths: Sequence[int], capacity: int, *, num_groups: int) -> list[Group] | None:
    """Pack into just so many groups, each sample into the emptiest; None where one would exceed ``capacity``.

    Longest processing time first: Graham, "Bounds on multiprocessing timing anomalies", 1969, section 4.
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
    """Deal items to hands, a layer of ``num_ranks`` at a time, the dearest of a layer to the cheapest hand.

    Hands hold equally many items, or one fewer where the last layer runs out, each in the order of ``costs``. No hand
    is dearer than another by more than the widest difference within one layer: where hands differ by at most D and
    the items of a layer by at most d, pairing them crosswise leaves at most max(D, d).
    """
    hands: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for start in range(0, len(costs), num_ranks):
        layer = sorted(range(start, min(start + num_ranks, len(costs))), key=costs.__getitem__, reverse=True)
        cheapest_first = sorted(range(num_ranks), key=totals.__getitem__)
        for item, hand in zip(layer, cheapest_first, strict=False):
            hands[hand].append(item)
            totals[hand] += costs[item]
    return hands
