"""Axes, linear or logarithmic, with few round ticks; and formatted numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Kind = Literal["plain", "bytes", "share", "count"]

LOG_RATIO = 30.0  # of maximum to minimum; above it, a linear axis would flatten most of a line
BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Scale:
    """An axis.

    Attributes:
        low: Value at its start.
        high: Value at its end, above ``low``.
        is_log: Whether it is logarithmic; ``low`` is positive then.
        ticks: Labelled values between ``low`` and ``high``.
        kind: Unit of the values.
    """

    low: float
    high: float
    is_log: bool
    ticks: tuple[float, ...]
    kind: Kind = "plain"

    def at(self, value: float) -> float:
        """Return the position of a value as a fraction of the axis, clamped to 0 and 1."""
        if self.is_log:
            share = (math.log(max(value, self.low)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))

    def label(self, tick: float) -> str:
        """Format a tick in the unit of the axis, with the digits that make the ticks distinct."""
        return tick_label(tick, self.ticks, self.kind, is_log=self.is_log)


def wants_log(values: Sequence[float]) -> bool:
    """Return whether all values are positive and their range needs a logarithmic axis."""
    return bool(values) and min(values) > 0 and max(values) / min(values) >= LOG_RATIO


TINY = 1e-300  # steps between smaller values would underflow


def value_scale(values: Sequence[float], *, is_log: bool, from_zero: bool, kind: Kind, most_ticks: int) -> Scale:
    """Return an axis that contains all values, which are finite and at least one."""
    low, high = min(values), max(values)
    if is_log:
        low, high = low / 1.15, high * 1.15
        return Scale(low, high, True, _log_ticks(low, high, most_ticks), kind)
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), TINY):  # a flat line has room on both sides, or above zero
        room = abs(high) * 0.1 if abs(high) > TINY else 1.0
        low, high = (low if from_zero and low == 0 else low - room), high + room
    unit = byte_unit(high)[0] if kind == "bytes" else 1.0
    step = _step((high - low) / unit, most_ticks, whole=kind == "count" and high - low >= 2) * unit
    room = 0.05 * (high - low)
    low = low if low == 0 and from_zero else low - room
    high += room
    return Scale(low, high, False, _multiples(step, low, high), kind)


def step_scale(first: float, last: float, *, most_ticks: int) -> Scale:
    """Return an axis of integers from the first to the last."""
    if last <= first:
        first, last = first - 0.5, last + 0.5
    step = _step(last - first, most_ticks, whole=True)
    return Scale(first, last, False, _multiples(step, first, last), "count")


def _step(span: float, most_ticks: int, *, whole: bool) -> float:
    rough = span / most_ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= rough * 0.999), 10 * power)
    return max(1.0, math.ceil(step - 1e-9)) if whole else step


def _multiples(step: float, low: float, high: float) -> tuple[float, ...]:
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return tuple(number * step for number in range(first, last + 1))


def _log_ticks(low: float, high: float, most_ticks: int) -> tuple[float, ...]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**power for power in range(first, last + 1) for f in factors if low <= f * 10.0**power <= high]
        if len(ticks) <= most_ticks:
            break
    every = -(-len(ticks) // most_ticks)
    return tuple(ticks[::every]) or (low, high)


def byte_unit(num_bytes: float) -> tuple[float, str]:
    """Return the unit in which a number of bytes is written, and its name."""
    power = 0
    while power < len(BYTE_UNITS) - 1 and abs(num_bytes) >= 1024.0 ** (power + 1):
        power += 1
    return 1024.0**power, BYTE_UNITS[power]


def tick_label(tick: float, ticks: Sequence[float], kind: Kind, *, is_log: bool = False) -> str:
    """Format a tick in the unit of its axis; on a logarithmic axis every tick has its own unit."""
    if tick == 0:
        return "0"
    largest = abs(tick) if is_log else max(map(abs, ticks))
    gap = abs(tick) if is_log else _smallest_gap(ticks)
    if kind == "share":
        return f"{_digits(tick * 100, gap * 100)} %"
    if kind == "bytes":
        unit, name = byte_unit(largest)
        return f"{_digits(tick / unit, gap / unit)} {name}"
    if largest < 1e-3 or largest >= 1e15:
        return _scientific(tick)
    unit, suffix = next(((unit, name) for unit, name in SUFFIXES if largest >= max(unit, 1e4)), (1.0, ""))
    return _digits(tick / unit, gap / unit) + suffix


def _scientific(value: float) -> str:
    """Format a number as 5×10⁻⁶."""
    digits, _, power = f"{value:.3e}".partition("e")
    digits = digits.rstrip("0").rstrip(".").replace("-", "−")
    raised = str(int(power)).translate(RAISED)
    return f"10{raised}" if digits == "1" else f"{digits}×10{raised}"


def _smallest_gap(ticks: Sequence[float]) -> float:
    return min((abs(b - a) for a, b in pairwise(ticks)), default=abs(ticks[0]) or 1.0)


def _digits(value: float, gap: float) -> str:
    """Format a number with the fewest decimals that resolve a gap."""
    for decimals in range(9):
        if abs(round(gap, decimals) - gap) <= 1e-6 * gap:
            break
    return f"{value:,.{decimals}f}".replace("-", "−")


def number(value: float | None, kind: Kind = "plain") -> str:
    """Format a number with four significant digits and its unit; a dash for None and non-finite values."""
    if value is None or not math.isfinite(value):
        return "–"
    if kind == "bytes":
        unit, name = byte_unit(value)
        return f"{value / unit:,.{0 if unit == 1 else 2}f} {name}"
    if kind == "share":
        return f"{value:.1%}".replace("%", " %")
    if kind == "count" or (value == int(value) and abs(value) < 1e15):
        return f"{value:,.0f}".replace("-", "−")
    if 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}".replace("-", "−")
    return _scientific(value) if abs(value) < 1e-3 or abs(value) >= 1e15 else f"{value:.4g}".replace("-", "−")


def format_setting(value: object) -> str:
    """Format a setting as in TOML, strings without quotes where possible; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value if value == value.strip() and value else repr(value)
    if isinstance(value, list):
        return ", ".join(map(format_setting, value))
    return number(value) if type(value) is float else str(value)
