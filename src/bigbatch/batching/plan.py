"""Assignment of samples to micro-batches and ranks: lengths and limits → frozen `Plan`. Integers only, no torch.

    lengths → longest first → groups within the limit → distributed over ranks, largest first

`checks` validates the arguments, `sorted_batch` chooses the groups, and this file formats the plan as text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from bigbatch.batching.checks import check_length_range, check_plan_options, read_lengths
from bigbatch.batching.packing import distribute
from bigbatch.batching.sorted_batch import Cost as Cost
from bigbatch.batching.sorted_batch import SortedBatch

DEFAULT_COST = Cost()

NUM_FIRST_ROWS, NUM_LAST_ROWS = 12, 4  # micro-batches that the text shows before and after "… more"
BAR_CELLS = 30


@dataclass(frozen=True)
class TokenBudget:
    """The largest number of tokens in one micro-batch, padding included: rows × longest, or the sum if packed.

    Attributes:
        tokens: At least 1, and at least the tokens of the longest sample of any batch.

    Raises:
        TypeError: ``tokens`` is not an int.
        ValueError: ``tokens`` is below 1.
    """

    tokens: int

    def __post_init__(self) -> None:
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int):
            raise TypeError(f"the token budget is {self.tokens!r}: it must be an int, the tokens of one micro-batch.")
        if self.tokens < 1:
            raise ValueError(f"the token budget is {self.tokens}: it must be at least 1 token.")


@dataclass(frozen=True)
class Plan:
    """Assignment of the samples of a global batch to ranks and micro-batches. Printable, comparable with ``==``.

        for indices in plan.microbatches[dp_rank]:
            run([samples[i] for i in indices])        # indices may be (): nothing to run, zero items

    Every sample is in exactly one micro-batch. All ranks have the same number of micro-batches, the largest first and
    the smallest last, so that out-of-memory errors occur at the first micro-batch or not at all. A rank with fewer is
    filled up with empty ones at the end.

    Attributes:
        microbatches: ``microbatches[dp_rank][i]`` holds the sample indices of that rank's i-th micro-batch, the
            longest sample first.
        lengths: Tokens of each sample of the global batch.
        layout: ``"padded"`` (rows × longest) or ``"packed"`` (one row).
        token_budget: Largest number of tokens of a micro-batch, padding included; None if limited in samples.
        microbatch_size: Largest number of samples of a micro-batch; None if limited in tokens.
        data_parallel_size: Number of ranks that share the global batch.
    """

    microbatches: tuple[tuple[tuple[int, ...], ...], ...] = field(repr=False)
    lengths: tuple[int, ...] = field(repr=False)
    layout: str
    token_budget: int | None
    microbatch_size: int | None
    data_parallel_size: int

    @property
    def num_microbatches(self) -> int:
        """Micro-batches per rank, the same on all ranks, empty ones included."""
        return len(self.microbatches[0])

    @property
    def tokens(self) -> int:
        """Tokens of the global batch (over all ranks) without padding."""
        return sum(self.lengths)

    @property
    def padded_tokens(self) -> int:
        """Tokens of the global batch (over all ranks) as laid out, padding included."""
        return sum(map(self._laid_out, chain.from_iterable(self.microbatches)))

    @property
    def fill(self) -> float:
        """``tokens / padded_tokens``, between 0 and 1; 1.0 for packed rows and for an empty batch."""
        return self.tokens / self.padded_tokens if self.lengths else 1.0

    @property
    def waste(self) -> float:
        """Padding as a fraction of ``padded_tokens``: ``1 − fill``."""
        return 1.0 - self.fill

    @property
    def largest_tokens(self) -> int:
        """Tokens of the largest micro-batch on any rank, padding included; 0 for an empty batch."""
        return max(map(self._laid_out, chain.from_iterable(self.microbatches)), default=0)

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def _laid_out(self, microbatch: tuple[int, ...]) -> int:
        lengths = [self.lengths[index] for index in microbatch]
        return sum(lengths) if self.layout == "packed" else len(lengths) * max(lengths, default=0)


def plan(
    lengths: Sequence[int],
    *,
    token_budget: int | None = None,
    microbatch_size: int | None = None,
    data_parallel_size: int = 1,
    layout: str = "padded",
    cost: Cost = DEFAULT_COST,
) -> Plan:
    """Assign the samples of a global batch to micro-batches and ranks.

        padded, token_budget       the cheapest cut of the samples sorted by length (`packing.cut_cheapest`)
        padded, microbatch_size    sorted by length, ``microbatch_size`` at a time
        packed, token_budget       best-fit-decreasing, at least ⌈Σ lengths / token_budget⌉ micro-batches
        packed, microbatch_size    at most that many sequences per row, distributed so that rows have similar tokens

    On one rank no grouping, contiguous or not, is cheaper than the cheapest cut. On several ranks the i-th
    micro-batches run at the same time, so the lowest Σ_i max over ranks of the cost selects between the above and a
    more even grouping into a multiple of the ranks. If the last round has fewer micro-batches than ranks, its most
    expensive ones are halved; empty ones are added only if there are too few samples or halving does not pay.

    The plan is deterministic: it depends on the lengths and options only, and of equal lengths the lower index comes
    first. Permuted lengths yield the same plan with other indices. Time is O(n log n): 0.1 s for 100,000 lengths on
    one rank and 0.2 s on eight, on one x86-64 core (benchmarks/planning.py).

    Args:
        lengths: Tokens of each sample of the global batch, at least 1: a sequence of ints, or a 1-D integer array or
            tensor ``[samples]``.
        token_budget: Largest number of tokens of a micro-batch, padding included.
        microbatch_size: Largest number of samples of a micro-batch. Pass either this or ``token_budget``.
        data_parallel_size: Number of ranks that share the global batch.
        layout: ``"padded"``: rows × longest. ``"packed"``: one row, sequences separated by offsets.
        cost: Cost model that cuts minimize and ranks are balanced by.

    Returns:
        The plan for all ranks, identical on every rank that passes the same arguments. No communication.

    Raises:
        TypeError: ``lengths`` is not a sequence of ints, a limit or ``data_parallel_size`` is not an int, or ``cost``
            is not a `Cost`.
        ValueError: Both limits or neither; a length above the budget or below 1; a limit or ``data_parallel_size``
            below 1; an unknown layout.
    """
    check_plan_options(token_budget, microbatch_size, data_parallel_size, layout, cost)
    tokens = read_lengths(lengths)
    check_length_range(tokens, token_budget)
    order = sorted(range(len(tokens)), key=tokens.__getitem__, reverse=True)  # stable: among equals the lower index
    batch = SortedBatch([tokens[i] for i in order], token_budget, microbatch_size, layout == "packed", cost)
    groups = batch.group(data_parallel_size) if tokens else []
    groups_by_rank = distribute([batch.cost_of(group) for group in groups], data_parallel_size)
    num_microbatches = -(-len(groups) // data_parallel_size)
    microbatches = tuple(
        tuple(tuple(order[position] for position in groups[number]) for number in numbers)
        + ((),) * (num_microbatches - len(numbers))
        for numbers in groups_by_rank
    )
    return Plan(microbatches, tokens, layout, token_budget, microbatch_size, data_parallel_size)


def _lines(plan: Plan) -> Iterator[str]:
    """Yield the lines of ``str(plan)``, of at most 80 columns for batches below a billion tokens."""
    ranks = f" on each of {plan.data_parallel_size:,} ranks" if plan.data_parallel_size > 1 else ""
    limit = _count(plan.token_budget, "token") if plan.token_budget else _count(plan.microbatch_size or 0, "sequence")
    yield f"{_count(len(plan.lengths), 'sequence')}, {_count(plan.tokens, 'token')}, {plan.layout}"
    yield f"{_count(plan.num_microbatches, 'micro-batch')}{ranks}, at most {limit} each"
    if not plan.lengths:
        return
    yield ""
    scale = plan.token_budget or plan.largest_tokens
    share = "fill" if plan.layout == "padded" else "of budget" if plan.token_budget else "of largest"
    yield _columns(
        "rank:#" if ranks else "#", f"0 {f' {scale:,}':─>{BAR_CELLS - 2}}", "seqs", "longest", "tokens", share
    )
    rows = [(rank, i) for rank in range(plan.data_parallel_size) for i in range(plan.num_microbatches)]
    num_hidden = max(0, len(rows) - NUM_FIRST_ROWS - NUM_LAST_ROWS)
    for rank, i in rows[:NUM_FIRST_ROWS] if num_hidden else rows:
        yield _row(plan, rank, i, scale)
    if num_hidden:
        yield _columns("…", f"{num_hidden:,} more")
        yield from (_row(plan, rank, i, scale) for rank, i in rows[-NUM_LAST_ROWS:])
    yield ""
    yield from _summary(plan)


def _row(plan: Plan, rank: int, i: int, scale: int) -> str:
    """Format one micro-batch: █ for tokens, ░ for padding, a full bar for ``scale`` tokens."""
    microbatch = plan.microbatches[rank][i]
    lengths = [plan.lengths[index] for index in microbatch]
    tokens, laid_out = sum(lengths), plan._laid_out(microbatch)
    end, full = (-(-BAR_CELLS * count // scale) for count in (laid_out, tokens))  # rounded up: every token is visible
    share = tokens / (laid_out if plan.layout == "padded" else scale) if tokens else 0.0
    return _columns(
        f"{rank}:{i}" if plan.data_parallel_size > 1 else f"{i}",
        "█" * full + "░" * (end - full) if lengths else "(empty)",
        f"{len(lengths):,}",
        f"{max(lengths):,}" if lengths else "–",
        f"{tokens:,}",
        f"{share:.1%}" if lengths else "–",
    )


def _summary(plan: Plan) -> Iterator[str]:
    if plan.layout == "padded":
        laid_out = _count(plan.padded_tokens, "token")
        yield f"fill {plan.fill:.1%}, waste {plan.waste:.1%}: {laid_out} with padding (█ tokens, ░ padding)"
    elif plan.token_budget:
        bound = -(-plan.tokens // plan.token_budget)
        count = sum(map(bool, chain.from_iterable(plan.microbatches)))
        yield f"{_count(count, 'micro-batch')} with samples; ⌈tokens / budget⌉ is {bound:,}"
    yield f"the largest micro-batch has {_count(plan.largest_tokens, 'token')}"
    if plan.data_parallel_size > 1:
        loads = [sum(map(plan._laid_out, rank)) for rank in plan.microbatches]
        yield f"ranks run {min(loads):,} to {_count(max(loads), 'token')}"


def _columns(label: str, bar: str, *figures: str) -> str:
    widths = (6, 9, 11, 12)
    return (
        f"{label:>8}  {bar:<{BAR_CELLS}}".rstrip()
        if not figures
        else f"{label:>8}  {bar:<{BAR_CELLS}}"
        + "".join(f"{figure:>{width}}" for figure, width in zip(figures, widths, strict=True))
    )


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{number:,} {noun if number == 1 else plural}"
