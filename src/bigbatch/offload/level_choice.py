"""The choice of ``Engine(offload="auto")`` among the levels of offload that a model and its optimizer support.

    cases of each rank → of all ranks → those that fit → the lowest level within 2 % of the fastest

No torch, and no device is queried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from bigbatch.errors import MemoryLimitError
from bigbatch.memory.limit import describe_bytes
from bigbatch.offload.levels import LEVELS, Offload

SPEED_TOLERANCE = 1.02  # largest time of the chosen level relative to the fastest, as for micro-batches


@dataclass(frozen=True)
class LevelCase:
    """What one level needs.

    Attributes:
        level: Of offload.
        least_bytes: Peak on the card with the smallest micro-batch that is possible.
        card_bytes: Peak on the card with the micro-batch that is used: the largest that fits, or the requested one.
        host_bytes: Pinned in host memory.
        window_s: Predicted seconds of one window and its update; None if levels are not compared by time.
    """

    level: Offload
    least_bytes: int
    card_bytes: int
    host_bytes: int
    window_s: float | None = None


@dataclass(frozen=True)
class LevelLimits:
    """Memory that one process may use.

    Attributes:
        card_bytes: For tensors on the card.
        host_bytes: For training state in host memory.
    """

    card_bytes: int
    host_bytes: int

    def fits(self, case: LevelCase) -> bool:
        """Return whether a level fits on the card and on the host."""
        return case.card_bytes <= self.card_bytes and case.host_bytes <= self.host_bytes


@dataclass(frozen=True)
class OffloadChoice:
    """The level that ``offload="auto"`` chose, with the reasons; ``str(choice)`` is one line.

    Attributes:
        level: Of offload.
        reason: Why levels were not compared, in a few words; None if they were.
        cases: The levels that were compared, lower ones first.
        limits: Memory of one process; None if levels were not compared.
        unsupported: The levels that were left out, and why, in a sentence each.
    """

    level: Offload
    reason: str | None = None
    cases: tuple[LevelCase, ...] = ()
    limits: LevelLimits | None = None
    unsupported: Mapping[Offload, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        chosen = next((case for case in self.cases if case.level == self.level), None)
        if chosen is None or self.limits is None:
            return f"offload {self.level}: {self.reason}"
        usable = describe_bytes(self.limits.card_bytes)
        parts = [f"{describe_bytes(chosen.card_bytes)} of {usable} on the card"]
        if chosen.host_bytes:
            parts.append(f"{describe_bytes(chosen.host_bytes)} on the host")
        if chosen.window_s is not None:
            parts.append(f"about {chosen.window_s:.3g} s an update")
        others = [self._describe_other(case, self.limits) for case in self.cases if case is not chosen]
        if self.unsupported:
            others.append(f"not supported: {', '.join(self.unsupported)}")
        return "; ".join([f"offload {self.level}: {', '.join(parts)}", *others])

    def _describe_other(self, case: LevelCase, limits: LevelLimits) -> str:
        if case.card_bytes > limits.card_bytes:
            return f"{case.level} needs {describe_bytes(case.least_bytes)}"
        if case.host_bytes > limits.host_bytes:
            return f"{case.level} needs {describe_bytes(case.host_bytes)} on the host"
        return f"{case.level} fits" + ("" if case.window_s is None else f", about {case.window_s:.3g} s")


def choose_level(
    cases: Sequence[LevelCase], limits: LevelLimits, *, unsupported: Mapping[Offload, str] | None = None
) -> OffloadChoice:
    """Return the lowest level that fits and needs at most 2 % more time than the fastest.

    Args:
        cases: At least one; lower levels first. If their time is not known, the lowest level that fits is chosen.
        limits: Memory of one process.
        unsupported: The levels that were left out, and why.

    Raises:
        MemoryLimitError: None fits. The message has the least memory that each level needs.
    """
    fitting = [case for case in cases if limits.fits(case)]
    if not fitting:
        raise MemoryLimitError(_refusal(cases, limits, unsupported or {}))
    fastest_s = min((case.window_s for case in fitting if case.window_s is not None), default=None)
    chosen = next(case for case in fitting if fastest_s is None or _is_fast(case, fastest_s))
    return OffloadChoice(chosen.level, None, tuple(cases), limits, unsupported or {})


def _is_fast(case: LevelCase, fastest_s: float) -> bool:
    return case.window_s is not None and case.window_s <= SPEED_TOLERANCE * fastest_s


def _refusal(cases: Sequence[LevelCase], limits: LevelLimits, unsupported: Mapping[Offload, str]) -> str:
    needs = []
    for case in cases:
        on_host = f" and {describe_bytes(case.host_bytes)} on the host" if case.host_bytes else ""
        needs.append(f"{case.level} needs {describe_bytes(case.least_bytes)} on the card{on_host}")
    left_out = f" (not supported: {', '.join(unsupported)})" if unsupported else ""
    return (
        f'offload="auto": no level fits{left_out}: {"; ".join(needs)}, and {describe_bytes(limits.card_bytes)} on the '
        f"card and {describe_bytes(limits.host_bytes)} on the host are usable. Shorten the samples, use activation "
        "checkpointing or fewer trained parameters, or raise the memory limit."
    )


def over_ranks(cases_of_ranks: Sequence[Sequence[LevelCase]]) -> list[LevelCase]:
    """Return the levels that all ranks support, with the most that any rank needs.

    Args:
        cases_of_ranks: Of each rank with samples, at least one; only some may have measured times.
    """
    by_level: list[Mapping[Offload, LevelCase]] = [{case.level: case for case in cases} for cases in cases_of_ranks]
    found = []
    for level in LEVELS:
        own = [cases[level] for cases in by_level if level in cases]
        if len(own) < len(by_level):
            continue
        seconds = [case.window_s for case in own if case.window_s is not None]
        found.append(
            replace(
                own[0],
                least_bytes=max(case.least_bytes for case in own),
                card_bytes=max(case.card_bytes for case in own),
                host_bytes=max(case.host_bytes for case in own),
                window_s=max(seconds, default=None),
            )
        )
    return found


def least_limits(limits_of_ranks: Sequence[LevelLimits]) -> LevelLimits:
    """Return the memory that every rank may use."""
    return LevelLimits(
        card_bytes=min(each.card_bytes for each in limits_of_ranks),
        host_bytes=min(each.host_bytes for each in limits_of_ranks),
    )
