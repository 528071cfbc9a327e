"""The samples of a global batch, longest first, and how they are grouped. Integers only, no torch.

SortedBatch.group(num_ranks): candidate groupings from `packing` → the one with the lowest cost
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from heapq import heapify, heappop, heappush

from bigbatch.batching.packing import (
    Group,
    cut_cheapest,
    cut_evenly,
    cut_full,
    distribute,
    pack_best_fit,
    pack_evenly,
)


@dataclass(frozen=True)
class Cost:
    """Cost model of a micro-batch, in arbitrary units: only the ratios matter.

        padded: per_microbatch + per_token · rows · longest + per_pair · rows · longest²
        packed: per_microbatch + per_token · Σ length       + per_pair · Σ length²

    By default a token costs as much as 8,192 pairs and a micro-batch as much as 1,024 tokens. A transformer layer of
    width d does 72·d² operations per token and 12·d per query-key pair, 6·d if masked pairs are skipped: a token costs
    6·d to 12·d pairs, here for d around 1,024 (fitted on two CPU cores, no pair skipped: 1,400 at width 256 and 2,000
    at 384). The overhead of a micro-batch was 30 to 70 tokens in that fit. It is larger on a GPU, where kernel launches
    bound small micro-batches: the default lies between the two and is not a measurement. Too high a value costs a
    little padding, too low a value costs extra micro-batches.

    Attributes:
        per_microbatch: Per micro-batch, independent of its size; at least 0.
        per_token: Per token, padding included; at least 1.
        per_pair: Per pair of tokens of one row; at least 0.

    Raises:
        TypeError: A value is not an int.
        ValueError: A value is below its minimum.
    """

    per_microbatch: int = 1_024 * 8_192
    per_token: int = 8_192
    per_pair: int = 1

    def __post_init__(self) -> None:
        for part in fields(self):
            value, minimum = getattr(self, part.name), 1 if part.name == "per_token" else 0
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(
                    f"Cost.{part.name} is {value!r}: it must be an int. Only the ratios matter, so multiply all three "
                    "by the same factor until they are integers."
                )
            if value < minimum:
                raise ValueError(f"Cost.{part.name} is {value}: it must be at least {minimum}.")

    def of_row(self, length: int) -> int:
        """Return the cost of one row of ``length`` tokens, without ``per_microbatch``."""
        return (self.per_token + self.per_pair * length) * length


@dataclass(frozen=True)
class SortedBatch:
    """The lengths of a batch, longest first, with the limit and the cost model for grouping them.

    Attributes:
        lengths: Tokens of each sample, non-increasing, none above the budget.
        token_budget: Largest number of tokens of a group, padding included; or None.
        microbatch_size: Largest number of samples of a group; or None. Exactly one of the two is set.
        packed: Whether samples are packed into one row instead of padded to the longest.
        cost: Cost model of a group.
    """

    lengths: Sequence[int]
    token_budget: int | None
    microbatch_size: int | None
    packed: bool
    cost: Cost

    def group(self, num_ranks: int) -> list[Group]:
        """Choose the groups for ``num_ranks`` ranks, the largest first.

        The i-th groups of all ranks run at the same time and wait for the most expensive of them, so the choice
        minimizes Σ_i max over ranks of the cost. Candidates are the groups that are optimal for one rank, and more even
        ones whose number is a multiple of ``num_ranks``. If the last round has fewer groups than ranks, its most
        expensive groups are halved.
        """
        candidates = (self._complete_last_round(groups, num_ranks) for groups in self._candidates(num_ranks))
        return min(candidates, key=lambda groups: self._synchronized_cost(groups, num_ranks))

    def tokens_of(self, group: Group) -> int:
        """Return the tokens of a group as laid out, padding included."""
        return sum(map(self.lengths.__getitem__, group)) if self.packed else len(group) * self.lengths[group[0]]

    def cost_of(self, group: Group) -> int:
        """Return the cost of a group as laid out."""
        if self.packed:
            return self.cost.per_microbatch + sum(self.cost.of_row(self.lengths[position]) for position in group)
        return self.cost.per_microbatch + len(group) * self.cost.of_row(self.lengths[group[0]])

    def _candidates(self, num_ranks: int) -> Iterator[list[Group]]:
        best = self._best_groups()
        yield best
        full_rounds, left = divmod(len(best), num_ranks)
        if num_ranks == 1 or (self.microbatch_size and not left):  # keep a requested size if the rounds are complete
            return
        for rounds in {max(full_rounds, 1): None, full_rounds + bool(left): None}:
            even = self._even_groups(rounds * num_ranks)
            if even is not None:
                yield even

    def _best_groups(self) -> list[Group]:
        """Return the groups with the lowest total cost, which is optimal for one rank."""
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
        """Return at most ``num_groups`` groups, as even as the limit allows; None if the limit needs more."""
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
        """Sort largest first; halve the most expensive group of the last round while a rank has none."""
        groups = self._largest_first(groups)
        whole_rounds = (len(groups) - 1) // num_ranks * num_ranks
        costliest_first = [(-self.cost_of(group), group[0], group) for group in groups[whole_rounds:]]
        heapify(costliest_first)
        while len(costliest_first) < num_ranks and len(costliest_first[0][-1]) > 1:
            group = heappop(costliest_first)[-1]
            middle = (len(group) + 1) // 2
            halves = (group[::2], group[1::2]) if self.packed else (group[:middle], group[middle:])
            for half in halves:
                heappush(costliest_first, (-self.cost_of(half), half[0], half))
        return groups[:whole_rounds] + self._largest_first([group for _, _, group in costliest_first])

    def _largest_first(self, groups: list[Group]) -> list[Group]:
        return sorted(groups, key=lambda group: (self.tokens_of(group), self.cost_of(group)), reverse=True)

    def _synchronized_cost(self, groups: list[Group], num_ranks: int) -> int:
        costs = list(map(self.cost_of, groups))
        return sum(max(costs[start : start + num_ranks]) for start in range(0, len(costs), num_ranks))
