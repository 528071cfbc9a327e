"""The size of micro-batches: chosen, grouped by it, reduced after out-of-memory, and grown back."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from bigbatch.accumulation.value_checks import check_mapping, check_number, check_whole, damaged, describe
from bigbatch.autotune.choice import MicrobatchChoice
from bigbatch.batching.plan import Cost, TokenBudget, plan
from bigbatch.batching.token_groups import group_by_tokens, round_down_row, round_up_row
from bigbatch.errors import first_line
from bigbatch.types import Layout

SHRINK_FACTOR = 0.93  # of the size, after a window that ran out of memory
WINDOWS_BEFORE_GROWTH = 20  # without out-of-memory, before the size grows back by one step


class MicrobatchSize:
    """How many tokens or samples a micro-batch may hold at the moment.

    Args:
        requested: Samples, a `TokenBudget`, or ``"auto"`` to choose later.
        has_lengths: Whether the tokens of samples are known; ``"auto"`` then counts tokens, else samples.
        layout: ``"padded"`` or ``"packed"`` rows.

    Attributes:
        requested: As passed.
        choice: The choice that was set; None without one.
        limit: The largest size; 0 before a choice.
        current: The size in use, smaller than the limit after out-of-memory.
        windows_since_oom: Windows since then.
        counts_tokens: Whether sizes are in tokens.
        layout: As passed.
    """

    def __init__(self, requested: int | TokenBudget | Literal["auto"], *, has_lengths: bool, layout: Layout) -> None:
        self.requested = requested
        self.choice: MicrobatchChoice | None = None
        self.limit = self.current = _initial_size(requested)
        self.windows_since_oom = 0
        self._cost = Cost()
        self.counts_tokens = has_lengths and not isinstance(requested, int)
        self.layout = layout

    @property
    def is_chosen(self) -> bool:
        """Whether there is a size."""
        return self.current > 0

    @property
    def token_budget(self) -> int | None:
        """Tokens that no micro-batch exceeds at the moment; None if samples are the limit, or none is chosen yet."""
        return self.current or None if self.counts_tokens else None

    def set(self, choice: MicrobatchChoice) -> None:
        """Use a choice.

        Raises:
            ValueError: The size was not to be chosen, or the choice is in another unit.
        """
        if self.requested != "auto":
            raise ValueError(f'microbatch={self.requested!r} is fixed: pass microbatch="auto" to use a choice.')
        self._check_unit(choice)
        self.choice = choice
        self.limit = self.current = choice.size
        self.windows_since_oom = 0
        self._cost = choice.timing.cost(choice.size)

    def _check_unit(self, choice: MicrobatchChoice) -> None:
        unit = "tokens" if self.counts_tokens else "samples"
        if choice.unit != unit:
            change = "leave lengths= out" if self.counts_tokens else "pass lengths="
            raise ValueError(f"the choice is in {choice.unit}, and this engine counts {unit}: {change}, or tune again.")

    def groups(self, lengths: Sequence[int]) -> Sequence[Sequence[int]]:
        """Group samples into micro-batches of the current size.

        Args:
            lengths: Tokens of each sample.

        Returns:
            The indices of the samples of each micro-batch.

        Raises:
            RuntimeError: No size is chosen yet.
            ValueError: A length is above the token budget.
        """
        if not self.is_chosen:
            raise RuntimeError("no micro-batch is chosen yet: call tune(batch) first, or step(batch), which does it.")
        if not self.counts_tokens:
            size = self.current
            return [range(start, min(start + size, len(lengths))) for start in range(0, len(lengths), size)]
        if isinstance(self.requested, TokenBudget) and max(lengths, default=1) > self.requested.tokens:
            plan(lengths, token_budget=self.requested.tokens)  # raises, naming the sample: this budget was requested
        return group_by_tokens(lengths, self.current, cost=self._cost, layout=self.layout)

    def observe(self, retries: int) -> None:
        """Adapt the size after a window: smaller if memory ran out, larger again after many windows without."""
        self.windows_since_oom = 0 if retries else self.windows_since_oom + 1
        now = self.current
        if retries:
            smaller = max(1, min(now - 1, int(now * SHRINK_FACTOR)))
            self.current = smaller if self.layout == "padded" else round_down_row(smaller)
        elif self.windows_since_oom % WINDOWS_BEFORE_GROWTH == 0 and now < self.limit:
            larger = math.ceil(now / SHRINK_FACTOR) if self.layout == "padded" else round_up_row(now + 1)
            self.current = min(self.limit, larger)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values that the micro-batches of the next windows depend on."""
        return {
            "size": self.limit,
            "size_in_use": self.current,
            "good_windows": self.windows_since_oom,
            "choice": None if self.choice is None else asdict(self.choice),
        }

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that `load_state_dict` accepts a state.

        Args:
            state: Has the keys of `state_dict`; others are ignored.

        Raises:
            ValueError: A value cannot be one of a size, or the choice is in another unit.
        """
        size = check_whole("engine.size", state["size"])
        in_use = check_whole("engine.size_in_use", state["size_in_use"], at_least=min(1, size))
        check_whole("engine.good_windows", state["good_windows"])
        if in_use > size:
            raise damaged("engine.size_in_use", f"is {in_use}, above the engine.size of {size}")
        if state["choice"] is not None:
            choice = _checked_choice(state["choice"])
            if choice.size != size:
                raise damaged("engine.size", f"is {size}, and that of engine.choice is {choice.size}")
            if self.requested == "auto":
                self._check_unit(choice)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the sizes of `state_dict`; if another size was requested, keep that one.

        Raises:
            ValueError: As for `check_state_dict`; nothing is changed then.
        """
        self.check_state_dict(state)
        if self.requested == "auto" and state["choice"] is not None:
            self.set(MicrobatchChoice.from_dict(state["choice"]))
        if self.limit == state["size"]:
            self.current, self.windows_since_oom = state["size_in_use"], state["good_windows"]


def _checked_choice(state: Any) -> MicrobatchChoice:
    """Build a choice from plain values after checking their kinds."""
    place = "engine.choice"
    values = check_mapping(place, state)
    try:
        points = list(values["timing"]["points"])
        sizes = [check_whole(f"{place}.timing", size, at_least=1) for size, _ in points]
        is_ascending = bool(sizes) and sizes == sorted(set(sizes))
        if not is_ascending or not all(check_number(f"{place}.timing", seconds) > 0 for _, seconds in points):
            raise damaged(f"{place}.timing", "is not of ascending sizes and their seconds")
        choice = MicrobatchChoice.from_dict(values)
        for trial in choice.trials:
            check_whole(f"{place}.trials", trial.size, at_least=1)
            check_number(f"{place}.trials", trial.per_s)
    except (TypeError, LookupError, AttributeError, OverflowError) as error:
        raise damaged(place, f"is not a choice of auto-tuning ({type(error).__name__}: {first_line(error)})") from error
    for name, least in (("size", 1), ("longest", 1), ("largest", 1), ("peak_bytes", 0), ("limit_bytes", 0)):
        check_whole(f"{place}.{name}", getattr(choice, name), at_least=least)
    check_number(f"{place}.per_s", choice.per_s)
    if not isinstance(choice.unit, str) or not isinstance(choice.limited, bool):
        raise damaged(place, "has a unit that is not text, or a limited that is not a bool")
    if not (choice.prediction_failure is None or isinstance(choice.prediction_failure, str)):
        raise damaged(f"{place}.prediction_failure", f"is {describe(choice.prediction_failure)}, not text")
    return choice


def _initial_size(requested: int | TokenBudget | str) -> int:
    if isinstance(requested, TokenBudget):
        return requested.tokens
    return 0 if isinstance(requested, str) else requested
