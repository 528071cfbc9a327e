"""Who runs which samples in which micro-batch: from lengths and limits to a frozen `Plan`. Integers only, no torch.

    lengths → longest first → groups within the limit → dealt to ranks, largest first

This file checks what comes in and draws what goes out; `packing` decides.
"""

import difflib
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from bigbatch.batching.packing import Cost as Cost
from bigbatch.batching.packing import SortedBatch, distribute

LAYOUTS = ("padded", "packed")
DEFAULT_COST = Cost()

DRAWN_FIRST, DRAWN_LAST = 12, 4  # micro-batches that a drawing shows before and after "… more"
BAR_CELLS = 30


@dataclass(frozen=True)
class TokenBudget:
    """The largest number of tokens, padding included, in one micro-batch: rows × longest.

    Attributes:
        tokens: At least 1, and at least the longest sample that will come.

    Raises:
        TypeError: It is no int.
        ValueError: It is below 1.
    """

    tokens: int

    def __post_init__(self) -> None:
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int):
            raise TypeError(f"the token budget is {self.tokens!r}: it must be an int, the tokens of one micro-batch.")
        if self.tokens < 1:
            raise ValueError(f"the token budget is {self.tokens}: it must be at least 1 token.")


@dataclass(frozen=True)
class Plan:
    """Who runs which samples in which micro-batch; ``print(plan)`` draws it, ``==`` compares it.

        for indices in plan.microbatches[dp_rank]:
            run([samples[i] for i in indices])        # nothing to run, zero items, where indices is ()

    Every sample is in one micro-batch. All ranks have equally many, the largest first and the smallest last, so that
    memory runs out at once or not at all; empty ones, at the end, fill up a rank that has fewer.

    Attributes:
        microbatches: ``microbatches[dp_rank][i]`` holds the indices of the samples of that rank's i-th micro-batch, the
            longest first.
        lengths: Tokens of each sample of the global batch.
        layout: ``"padded"`` (rows × longest) or ``"packed"`` (one row).
        token_budget: Tokens, padding included, that no micro-batch exceeds; None where samples were the limit.
        microbatch_size: Samples that no micro-batch exceeds; None where tokens were the limit.
        data_parallel_size: Ranks that share the global batch.
    """

    microbatches: tuple[tuple[tuple[int, ...], ...], ...] = field(repr=False)
    lengths: tuple[int, ...] = field(repr=False)
    layout: str
    token_budget: int | None
    microbatch_size: int | None
    data_parallel_size: int

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of one rank, the same for all, empty ones included."""
        return len(self.microbatches[0])

    @property
    def tokens(self) -> int:
        """Tokens of the global batch without padding, over all ranks."""
        return sum(self.lengths)

    @property
    def padded_tokens(self) -> int:
        """Tokens as laid out, padding included, over all ranks."""
        return sum(map(self._laid_out, chain.from_iterable(self.microbatches)))

    @property
    def fill(self) -> float:
        """``tokens / padded_tokens``; 1.0 for packed rows and for an empty batch."""
        return self.tokens / self.padded_tokens if self.lengths else 1.0

    @property
    def waste(self) -> float:
        """Share of the tokens as laid out that is padding: ``1 − fill``."""
        return 1.0 - self.fill

    @property
    def largest_tokens(self) -> int:
        """Tokens of the largest micro-batch of any rank as laid out, padding included; 0 for an empty batch."""
        return max(map(self._laid_out, chain.from_iterable(self.microbatches)), default=0)

    def __str__(self) -> str:
        return "\n".join(_draw(self))

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
    """Decide which samples form which micro-batch on which rank.

        padded, token_budget       the cheapest cut of the samples sorted by length (`packing.cut_cheapest`)
        padded, microbatch_size    sorted by length, that many at a time
        packed, token_budget       best-fit-decreasing, at least ⌈Σ lengths / token_budget⌉ micro-batches
        packed, microbatch_size    at most that many sequences a row, dealt so that rows hold about as many tokens

    On one rank the cheapest cut is cheaper than or as cheap as any other grouping, contiguous or not. On several the
    i-th micro-batches of all ranks wait for one another, so the least Σ_i max over ranks of the cost decides between
    the above and a more even grouping into a multiple of the ranks. Where the last round has too few micro-batches for
    the ranks, its dearest are halved, and empty ones are added only for want of samples or of gain.

    The same lengths give the same plan under any Python; in another order they give the same plan under other indices,
    among equal lengths the lower index first. Time is O(n log n): 0.1 s for 100,000 lengths on one rank and 0.2 s on
    eight, on one x86-64 core (benchmarks/planning.py).

    Args:
        lengths: Tokens of each sample, at least 1: a sequence of ints, or a 1-D array or tensor of them.
        token_budget: Tokens, padding included, that no micro-batch may exceed.
        microbatch_size: Samples that no micro-batch may exceed. Pass this or ``token_budget``.
        data_parallel_size: Ranks that share the batch.
        layout: ``"padded"``: rows × longest. ``"packed"``: one row, sequences told apart by their offsets.
        cost: What cuts are weighed by, and ranks balanced by.

    Raises:
        TypeError: Something is no int, or lengths are no sequence.
        ValueError: Both limits or none; a length above the budget or below 1; a limit or the ranks below 1; an
            unknown layout.
    """
    _check_options(token_budget, microbatch_size, data_parallel_size, layout, cost)
    tokens = _read_lengths(lengths)
    _check_lengths(tokens, token_budget)
    order = sorted(range(len(tokens)), key=tokens.__getitem__, reverse=True)  # stable: among equals the lower index
    batch = SortedBatch([tokens[i] for i in order], token_budget, microbatch_size, layout == "packed", cost)
    groups = batch.group(data_parallel_size) if tokens else []
    hands = distribute([batch.cost_of(group) for group in groups], data_parallel_size)
    num_microbatches = -(-len(groups) // data_parallel_size)
    microbatches = tuple(
        tuple(tuple(order[position] for position in groups[number]) for number in hand)
        + ((),) * (num_microbatches - len(hand))
        for hand in hands
    )
    return Plan(microbatches, tokens, layout, token_budget, microbatch_size, data_parallel_size)


def _check_options(
    token_budget: int | None, microbatch_size: int | None, data_parallel_size: int, layout: str, cost: Cost
) -> None:
    if token_budget is None and microbatch_size is None:
        raise ValueError("plan() has no limit: pass token_budget=, in tokens, or microbatch_size=, in samples.")
    if token_budget is not None and microbatch_size is not None:
        raise ValueError(
            f"plan() was given token_budget={token_budget!r} and microbatch_size={microbatch_size!r}: pass only one. A "
            "token budget bounds the memory of samples of any lengths."
        )
    if token_budget is not None:
        _check_count("token_budget", token_budget, "the tokens, padding included, of one micro-batch")
    if microbatch_size is not None:
        _check_count("microbatch_size", microbatch_size, "the samples of one micro-batch")
    _check_count("data_parallel_size", data_parallel_size, "the ranks that hold different data")
    if layout not in LAYOUTS:
        near = difflib.get_close_matches(str(layout), LAYOUTS, n=1)
        told = f'Did you mean "{near[0]}"?' if near else 'Pass "padded" (rows × longest) or "packed" (one row).'
        raise ValueError(f"layout is {layout!r}, which is none. {told}")
    if not isinstance(cost, Cost):
        raise TypeError(f"cost is {cost!r}: pass a Cost(per_microbatch=, per_token=, per_pair=).")


def _check_count(name: str, value: int, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}: it must be an int, {what}.")
    if value < 1:
        raise ValueError(f"{name} is {value}: it must be at least 1, {what}.")


def _read_lengths(lengths: Any) -> tuple[int, ...]:
    listed = lengths.tolist() if hasattr(lengths, "tolist") else lengths  # waits for the device of a tensor
    if isinstance(listed, str | bytes | bytearray) or not isinstance(listed, Sequence):
        raise TypeError(
            f"lengths is a {type(lengths).__name__}: it must be a sequence of ints, the tokens of each sample, such as "
            "[len(sample) for sample in samples]."
        )
    return tuple(
        length if type(length) is int else _as_int(index, length)  # the common case without a call
        for index, length in enumerate(listed)
    )


def _as_int(index: int, length: Any) -> int:
    try:
        if isinstance(length, bool):
            raise TypeError
        return operator.index(length)
    except TypeError:
        raise TypeError(
            f"lengths[{index}] is {length!r}, a {type(length).__name__}: it must be an int, the tokens of that sample."
        ) from None


def _check_lengths(lengths: tuple[int, ...], token_budget: int | None) -> None:
    shortest, longest = min(lengths, default=1), max(lengths, default=1)
    if shortest < 1:
        index = next(index for index, length in enumerate(lengths) if length < 1)
        raise ValueError(
            f"lengths[{index}] is {lengths[index]}: a sample has at least 1 token. Leave out samples that have none."
        )
    if token_budget is not None and longest > token_budget:
        over = sum(length > token_budget for length in lengths)
        others = f", the longest of {over} that do not fit" if over > 1 else ""
        raise ValueError(
            f"lengths[{lengths.index(longest)}] is {longest}{others}: more tokens than token_budget={token_budget}, "
            f"and a sequence is never cut. Pass token_budget={longest} or more, or shorten the sequence."
        )


def _draw(plan: Plan) -> Iterator[str]:
    """Yield the lines of a drawing, of at most 80 columns for batches below a billion tokens."""
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
    num_hidden = max(0, len(rows) - DRAWN_FIRST - DRAWN_LAST)
    for rank, i in rows[:DRAWN_FIRST] if num_hidden else rows:
        yield _draw_row(plan, rank, i, scale)
    if num_hidden:
        yield _columns("…", f"{num_hidden:,} more")
        yield from (_draw_row(plan, rank, i, scale) for rank, i in rows[-DRAWN_LAST:])
    yield ""
    yield from _summarise(plan)


def _draw_row(plan: Plan, rank: int, i: int, scale: int) -> str:
    """Draw one micro-batch: █ for tokens, ░ for padding, as long as its share of ``scale`` tokens."""
    microbatch = plan.microbatches[rank][i]
    lengths = [plan.lengths[index] for index in microbatch]
    tokens, laid_out = sum(lengths), plan._laid_out(microbatch)
    end, full = (-(-BAR_CELLS * count // scale) for count in (laid_out, tokens))  # any token is seen: rounded up
    share = tokens / (laid_out if plan.layout == "padded" else scale) if tokens else 0.0
    return _columns(
        f"{rank}:{i}" if plan.data_parallel_size > 1 else f"{i}",
        "█" * full + "░" * (end - full) if lengths else "(empty)",
        f"{len(lengths):,}",
        f"{max(lengths):,}" if lengths else "–",
        f"{tokens:,}",
        f"{share:.1%}" if lengths else "–",
    )


def _summarise(plan: Plan) -> Iterator[str]:
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
