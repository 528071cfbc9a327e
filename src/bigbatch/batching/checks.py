"""Validation of the arguments of `plan` and `split`. No torch."""

import difflib
import operator
from collections.abc import Sequence
from typing import Any

from bigbatch.batching.sorted_batch import Cost

LAYOUTS = ("padded", "packed")


def check_count(name: str, value: int, meaning: str) -> None:
    """Raise unless ``value`` is an int of at least 1.

    Args:
        name: The argument, as the message names it.
        value: Its value.
        meaning: What it counts, as the message explains it.

    Raises:
        TypeError: It is not an int.
        ValueError: It is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}: it must be an int, {meaning}.")
    if value < 1:
        raise ValueError(f"{name} is {value}: it must be at least 1, {meaning}.")


def check_plan_options(
    token_budget: int | None, microbatch_size: int | None, data_parallel_size: int, layout: str, cost: Cost
) -> None:
    """Raise unless exactly one limit is set and every option of `plan` is valid; errors are those of `plan`."""
    if token_budget is None and microbatch_size is None:
        raise ValueError("plan() has no limit: pass token_budget=, in tokens, or microbatch_size=, in samples.")
    if token_budget is not None and microbatch_size is not None:
        raise ValueError(
            f"plan() got both token_budget={token_budget!r} and microbatch_size={microbatch_size!r}: pass only one. A "
            "token budget bounds the memory of samples of any lengths."
        )
    if token_budget is not None:
        check_count("token_budget", token_budget, "the tokens, padding included, of one micro-batch")
    if microbatch_size is not None:
        check_count("microbatch_size", microbatch_size, "the samples of one micro-batch")
    check_count("data_parallel_size", data_parallel_size, "the ranks that hold different data")
    if layout not in LAYOUTS:
        near = difflib.get_close_matches(str(layout), LAYOUTS, n=1)
        hint = f'Did you mean "{near[0]}"?' if near else 'Pass "padded" (rows × longest) or "packed" (one row).'
        raise ValueError(f"layout is {layout!r}, which is not a layout. {hint}")
    if not isinstance(cost, Cost):
        raise TypeError(f"cost is {cost!r}: pass a Cost(per_microbatch=, per_token=, per_pair=).")


def read_lengths(lengths: Any) -> tuple[int, ...]:
    """Convert a sequence, 1-D array or tensor of integers to a tuple of ints. Waits for the device of a tensor.

    Raises:
        TypeError: It is not a sequence, or an element is not an int.
    """
    listed = lengths.tolist() if hasattr(lengths, "tolist") else lengths
    if isinstance(listed, str | bytes | bytearray) or not isinstance(listed, Sequence):
        raise TypeError(
            f"lengths is a {type(lengths).__name__}: it must be a sequence of ints, the tokens of each sample, such as "
            "[len(sample) for sample in samples]."
        )
    return tuple(
        length if type(length) is int else _as_int(index, length)  # no function call in the common case
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


def check_length_range(lengths: tuple[int, ...], token_budget: int | None) -> None:
    """Raise unless every length is at least 1 and within the budget.

    Raises:
        ValueError: The message names the first offending index and its length.
    """
    shortest, longest = min(lengths, default=1), max(lengths, default=1)
    if shortest < 1:
        index = next(index for index, length in enumerate(lengths) if length < 1)
        raise ValueError(
            f"lengths[{index}] is {lengths[index]}: a sample has at least 1 token. Remove samples without tokens."
        )
    if token_budget is not None and longest > token_budget:
        over = sum(length > token_budget for length in lengths)
        others = f", the longest of {over} that do not fit" if over > 1 else ""
        raise ValueError(
            f"lengths[{lengths.index(longest)}] is {longest}{others}: more tokens than token_budget={token_budget}, "
            f"and a sequence is never cut. Pass token_budget={longest} or more, or shorten the sequence."
        )


def check_functions(**functions: object) -> None:
    """Check that arguments that are functions can be called.

    Raises:
        TypeError: One cannot.
    """
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} is a {type(function).__name__}: pass a function.")
