"""Branches are compared sequence by sequence, and a difference within its spread is no result."""

import math
from typing import Any

import pytest

from bigbatch.lm.advice.branch_experiment import BranchResult, compare, conclusion

ITEMS = (4, 6, 5, 5)
BASE = [(2.0 * items, items) for items in ITEMS]


def branch(*changes: float, multiple: int = 2) -> BranchResult:
    """Return a branch whose sequences have other losses per label, by ``changes``."""
    losses = [(loss + change * items, items) for (loss, items), change in zip(BASE, changes, strict=True)]
    return compare(losses, BASE, multiple=multiple, batch=8 * multiple, updates=16 // multiple)


def results(*verdicts: str) -> list[BranchResult]:
    made = [BranchResult(1, 8, 16, 2.0, 0.0, 0.0, "baseline")]
    usual: dict[str, Any] = {"no penalty": (0.001, 0.002), "penalty": (0.3, 0.01), "inconclusive": (0.0123, 0.0456)}
    for power, verdict in enumerate(verdicts, start=1):
        penalty, spread = usual[verdict]
        made.append(BranchResult(2**power, 8 * 2**power, 16, 2.0 + penalty, penalty, spread, verdict))  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ((0.0, 0.0, 0.0, 0.0), "no penalty"),
        ((-0.5, -0.4, -0.6, -0.5), "no penalty"),
        ((0.5, 0.4, 0.6, 0.5), "penalty"),
        ((0.02, 0.02, 0.02, 0.02), "penalty"),
        ((0.5, -0.5, 0.4, -0.4), "inconclusive"),
        ((0.0, 0.0, 0.0, 0.1), "inconclusive"),
        ((-1.0, 0.2, 0.2, 0.2), "inconclusive"),
        ((math.nan, 0.0, 0.0, 0.0), "penalty"),
    ],
)
def test_difference_is_judged_by_its_spread(changes: tuple[float, ...], verdict: str) -> None:
    assert branch(*changes).verdict == verdict


def test_spread_is_that_of_ratio() -> None:
    found = branch(0.1, 0.3, 0.0, 0.0)
    penalty = (0.4 + 1.8) / 20
    residuals = [0.4 - 4 * penalty, 1.8 - 6 * penalty, -5 * penalty, -5 * penalty]
    assert found.penalty == pytest.approx(penalty)
    assert found.loss == pytest.approx(2 + penalty)
    assert found.spread == pytest.approx(1.96 * math.sqrt(4 / 3 * sum(r * r for r in residuals)) / 20)
    assert branch(0.25, 0.25, 0.25, 0.25).spread == pytest.approx(0.0, abs=1e-12)


def test_single_sequence_decides_nothing() -> None:
    found = compare([(10.0, 5)], [(9.0, 5)], multiple=4, batch=32, updates=1)
    assert (found.verdict, found.spread) == ("inconclusive", math.inf)
    assert conclusion([BranchResult(1, 8, 4, 1.8, 0.0, 0.0, "baseline"), found]).startswith(
        "inconclusive at 32: the difference +0.2000 from the batch of 8 is within the spread of one sequence, so it"
    )


def test_inconclusive_branch_is_no_result() -> None:
    rest = (
        "inconclusive at {}: the difference +0.0123 from the batch of 8 is within the spread ±0.0456 over the held-out "
        "sequences, so it may be above or below 0.01 nats per token. Train with a larger --validation-fraction, or "
        "pass more --branch-updates."
    )
    assert conclusion(results("inconclusive", "penalty")) == rest.format(16)
    assert conclusion(results("no penalty", "inconclusive", "no penalty")) == (
        "no loss penalty up to 16 sequences; " + rest.format(32)
    )


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (("no penalty", "no penalty", "no penalty"), "64 sequences or more"),
        (("no penalty", "penalty", "inconclusive"), "16 sequences"),
        (("penalty", "no penalty", "no penalty"), "8 sequences"),
    ],
)
def test_largest_batch_before_penalty_is_result(verdicts: tuple[str, ...], expected: str) -> None:
    assert conclusion(results(*verdicts)) == f"largest batch without loss penalty: {expected}"


def test_conclusion_names_unit_of_objective() -> None:
    text = conclusion(results("no penalty", "inconclusive"), noun="pair", unit="nats per pair")
    assert text.startswith("no loss penalty up to 16 pairs; inconclusive at 32: ")
    assert "±0.0456 over the held-out pairs, so it may be above or below 0.01 nats per pair. Train" in text
    assert conclusion(results("no penalty"), noun="pair").endswith("16 pairs or more")
