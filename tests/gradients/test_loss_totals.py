"""What a loss function may return, what it may not, and the messages about it."""

import math

import pytest
import torch

from bigbatch.gradients.loss_totals import LossTotals, as_terms

LOSS = torch.tensor(6.0, requires_grad=True)


@pytest.mark.parametrize("result", [(LOSS, 3), [LOSS, 3.0], (LOSS, torch.tensor(3)), (LOSS, torch.tensor([3]))])
def test_pair_is_one_term(result):
    terms = as_terms(result)
    assert list(terms) == ["loss"]
    ledger = LossTotals()
    assert ledger.record(terms) is LOSS
    assert ledger.divisor() == 3
    assert ledger.terms()["loss"].loss == 2


def test_mapping_is_its_terms():
    terms = {"a": (LOSS, 3), "b": (LOSS, 0)}
    assert as_terms(terms) is terms


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (LOSS, r"the term 'loss' of the loss is a tensor of shape \(\): return the pair \(loss_sum, items\)"),
        ((LOSS,), "the term 'loss' of the loss is a tuple: return the pair"),
        ((LOSS, 1, 2), "is a tuple: return the pair"),
        (None, "is a NoneType: return the pair"),
        (1.5, "is a float: return the pair"),
        ({"kl": LOSS}, "the term 'kl' of the loss is a tensor"),
        ((1.5, 3), "the loss of the term 'loss' is a float: it must be a 0-d tensor"),
        ((LOSS, None), "the items of the term 'loss' are a NoneType"),
        ((LOSS, "3"), "the items of the term 'loss' are a str: they must be a number"),
        (({"a": (LOSS, 1)}, 3), "the loss of the term 'loss' is a dict"),
    ],
)
def test_invalid_term_raises_type_error_naming_it(result, message):
    with pytest.raises(TypeError, match=message):
        as_terms(result)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ((torch.ones(3), 3), r"the loss of the term 'loss' has shape \(3,\): it must be the 0-d sum.*reduction='sum'"),
        ((torch.ones(1), 3), r"has shape \(1,\)"),
        ((LOSS, -1), "the items of the term 'loss' are -1: they must be a finite count, 0 or more"),
        ((LOSS, math.nan), "are nan: they must be a finite count"),
        ((LOSS, math.inf), "are inf: they must be a finite count"),
        ((LOSS, torch.tensor(-2)), "are -2: they must be a finite count"),
        ((LOSS, torch.tensor(math.nan)), "are nan: they must be a finite count"),
        ((LOSS, torch.ones(4)), r"the items of the term 'loss' have shape \(4,\).*Call .sum\(\) on the mask"),
    ],
)
def test_invalid_sum_or_count_raises_naming_it(result, message):
    with pytest.raises(ValueError, match=message):
        as_terms(result)


def test_numpy_integers_are_valid_counts():
    numpy = pytest.importorskip("numpy")
    ledger = LossTotals()
    ledger.record(as_terms((LOSS, numpy.int64(3))))
    assert ledger.divisor() == 3


def test_counts_in_too_narrow_dtype_are_rejected():
    """A mask in bfloat16 sums 299 ones to 300."""
    mask = torch.ones(299, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16"):
        as_terms((LOSS, mask.sum()))


def test_microbatch_without_term_needs_totals():
    assert LossTotals({"a": 3}).record(as_terms({})) is None
    with pytest.raises(ValueError, match="the loss has no term"):
        LossTotals().record(as_terms({}))


def test_counts_are_compared_exactly():
    """A window of a million tokens whose count is one off was counted by another rule."""
    ledger = LossTotals({"a": 1_000_001})
    ledger.record({"a": (LOSS, 1_000_000)})
    with pytest.raises(ValueError, match="returned 1000001 items for the term 'a', and the micro-batches had 1000000"):
        ledger.divisor()


def test_divisor_is_item_sum_not_microbatch_count():
    ledger = LossTotals()
    for items in (5, 0, 2):
        ledger.record({"loss": (LOSS, items)})
    assert ledger.divisor() == ledger.items() == 7
    assert ledger.terms()["loss"].loss == pytest.approx(12 / 7)  # the one without an item is left out


def test_microbatch_without_items_has_no_gradient():
    ledger = LossTotals()
    assert ledger.record({"loss": (torch.tensor(math.nan), 0)}) is None
    assert ledger.divisor() == 0
    report = ledger.terms()["loss"]
    assert report.items == 0
    assert math.isnan(report.loss)


def test_term_names_are_fixed_without_totals():
    ledger = LossTotals()
    ledger.record({"a": (LOSS, 1)})
    with pytest.raises(ValueError, match="the loss has the terms 'a', 'b': several terms need their totals"):
        ledger.record({"b": (LOSS, 1)})


def test_counted_but_missing_term_is_found():
    ledger = LossTotals({"a": 2, "b": 1})
    ledger.record({"a": (LOSS, 2)})
    with pytest.raises(ValueError, match="count_items returned 1 items for the term 'b', and the micro-batches had 0"):
        ledger.divisor()


def test_items_of_term_with_zero_total_are_found():
    ledger = LossTotals({"a": 0})
    ledger.record({"a": (LOSS, 2)})
    with pytest.raises(ValueError, match="returned 0 items for the term 'a', and the micro-batches had 2"):
        ledger.divisor()


@pytest.mark.parametrize("items", [[1, 8], [8, 1], [1, 1, 1], [0.25, 5.0], [3], [1000, 1]])
def test_prescaling_uses_one_power_of_two(items):
    ledger = LossTotals(prescale=True)
    loss = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    factors = [ledger.record({"loss": (loss, count)}).item() for count in items]
    assert len(set(factors)) == 1
    assert math.log2(factors[0]).is_integer()
    assert ledger.divisor() == pytest.approx(sum(items) * factors[0], rel=1e-15)


def test_inplace_loss_change_does_not_affect_report():
    ledger = LossTotals()
    loss = torch.tensor(6.0)
    ledger.record({"loss": (loss, 3)})
    loss /= 100
    assert ledger.terms()["loss"].loss == 2


def test_mixed_dtype_loss_sums_use_float64():
    ledger = LossTotals()
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        ledger.record({"loss": (torch.tensor(256.0, dtype=dtype), 1)})
    ledger.record({"loss": (torch.tensor(1.0, dtype=torch.bfloat16), 1)})
    assert ledger.terms()["loss"].loss == 769 / 4
