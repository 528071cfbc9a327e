"""What a loss function may return, what it may not, and the messages about it."""

import math

import pytest
import torch

import bigbatch
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


def test_pair_is_recorded_like_its_term():
    quick, general = LossTotals(), LossTotals()
    for items in (3, 5):
        assert quick.record_pair((LOSS, items)) is LOSS
        assert general.record(as_terms((LOSS, items))) is LOSS
    assert (quick.divisor(), quick.terms(), quick.num_recorded) == (8, general.terms(), 2)
    quick.rollback(1)
    assert quick.items() == 3


@pytest.mark.parametrize("result", [(LOSS, 0), (LOSS, 3.0), (LOSS, True), (LOSS, -1), (LOSS,), [LOSS, 3], (3.0, 3)])
def test_other_results_are_not_recorded_as_pair(result):
    totals = LossTotals()
    assert totals.record_pair(result) is None
    assert totals.num_recorded == 0


def test_pair_after_another_term_is_left_to_record():
    totals = LossTotals()
    totals.record(as_terms({"a": (LOSS, 3)}))
    assert totals.record_pair((LOSS, 3)) is None
    with pytest.raises(ValueError, match="several terms need their totals"):
        totals.record(as_terms((LOSS, 3)))


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


@pytest.mark.parametrize(
    ("dtype", "count"),
    [("int8", 100), ("uint8", 255), ("int16", 32_000), ("uint16", 65_000), ("uint32", 4_000_000_000), ("float32", 0.3)],
)
def test_numpy_counts_of_any_width_add_up(dtype, count):
    numpy = pytest.importorskip("numpy")
    narrow = numpy.dtype(dtype).type(count)
    totals = LossTotals()
    for _ in range(300):
        totals.record(as_terms((LOSS, narrow)))
    assert totals.divisor() == pytest.approx(300 * float(narrow), rel=1e-12)
    assert sum(float(count) ** 2 for count in totals.microbatch_items()) == pytest.approx(
        300 * float(narrow) ** 2, rel=1e-12
    )
    assert totals.local_totals()["loss"][0] == pytest.approx(300 * float(narrow), rel=1e-12)
    assert type(totals.items()) is (float if dtype == "float32" else int)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_narrow_tensor_counts_add_up(dtype):
    totals = LossTotals({"a": torch.tensor(9_000)})
    for _ in range(90):
        totals.record(as_terms({"a": (LOSS, torch.tensor(100, dtype=dtype))}))
    assert totals.divisor() == 1.0
    assert sum(map(float, totals.microbatch_items())) == 90 * 100.0


def test_narrow_totals_are_converted():
    numpy = pytest.importorskip("numpy")
    totals = LossTotals({"a": numpy.uint8(200), "b": torch.tensor(3, dtype=torch.uint8)})
    assert totals.totals == {"a": 200, "b": 3}
    assert [type(count) for count in totals.totals.values()] == [int, int]


@pytest.mark.parametrize("count", ["nan", "inf", "-1"])
def test_invalid_numpy_counts_are_rejected(count):
    numpy = pytest.importorskip("numpy")
    for dtype in (numpy.float16, numpy.float64):
        with pytest.raises(ValueError, match="they must be a finite count, 0 or more"):
            as_terms((LOSS, dtype(count)))
        with pytest.raises(ValueError, match="they must be a finite count, 0 or more"):
            LossTotals({"a": dtype(count)})


@pytest.mark.parametrize("make", ["bool_(True)", "array([True, False])", "complex64(3)", "array([1, 2])"])
def test_numpy_values_that_count_nothing_are_rejected(make):
    numpy = pytest.importorskip("numpy")
    with pytest.raises(TypeError, match="they must be a number or a 0-d tensor"):
        as_terms((LOSS, eval(f"numpy.{make}", {"numpy": numpy})))


@pytest.mark.parametrize("make", [lambda w: w.sum(), lambda w: (w * 2).sum().reshape(1)])
def test_count_with_gradient_is_rejected(make):
    """A learned weight: as a constant, the gradient of the quotient would lack a part."""
    items = make(torch.ones(3, requires_grad=True))
    with pytest.raises(
        ValueError, match=r"^the items of the term 'loss' require a gradient, and a divisor is a constant"
    ):
        as_terms((torch.tensor(1.0), items))
    assert as_terms((torch.tensor(1.0), items.detach()))


def test_complex_count_is_rejected():
    with pytest.raises(TypeError, match="the items of the term 'loss' are a complex"):
        as_terms((LOSS, torch.tensor(3 + 0j)))


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
    assert ledger.terms()["loss"].loss == pytest.approx(18 / 7)  # the one without an item has a loss


def test_mean_over_nothing_has_no_gradient():
    totals = LossTotals()
    assert totals.record({"loss": (LOSS * math.nan, 0)}) is None
    assert totals.divisor() == 0
    report = totals.terms()["loss"]
    assert report.items == 0
    assert math.isnan(report.loss)
    totals.record({"loss": (LOSS, 3)})
    assert totals.terms()["loss"].loss == 2


@pytest.mark.parametrize("items", [0, 0.0, torch.tensor(0), torch.tensor(0, dtype=torch.uint8)])
@pytest.mark.parametrize("prescale", [False, True])
def test_loss_without_items_counts(items, prescale):
    totals = LossTotals(prescale=prescale)
    loss = totals.record(as_terms((LOSS, items)))
    assert loss is not None
    assert loss.item() == 6
    assert totals.divisor() == 0
    totals.record(as_terms((LOSS, 4)))
    assert totals.divisor() == 4
    assert totals.terms()["loss"].loss == 3


def test_empty_sum_without_graph_has_no_gradient():
    totals = LossTotals()
    assert totals.record({"loss": (torch.zeros(0).sum(), 0)}) is None
    assert totals.is_finite()


def test_term_with_total_zero_is_left_out():
    totals = LossTotals({"a": 0, "b": 2})
    loss = totals.record({"a": (LOSS * math.inf, 0), "b": (LOSS, 2)})
    assert loss.item() == 3
    assert totals.record({"a": (LOSS, 0)}) is None
    assert totals.divisor() == 1.0
    assert totals.is_finite()
    assert totals.terms()["a"].items == 0
    assert math.isnan(totals.terms()["a"].loss)
    assert totals.terms()["b"].loss == 3


def test_rollback_removes_microbatch_without_items():
    totals = LossTotals()
    totals.record({"loss": (LOSS, 2)})
    totals.record({"loss": (LOSS, 0)})
    totals.rollback(1)
    totals.record({"loss": (LOSS, 1)})
    assert totals.terms()["loss"].loss == 4


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


@pytest.mark.parametrize("use", ["engine", "window", "windows"])
def test_items_of_terms_are_a_dictionary(use):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator, rows = bigbatch.Accumulator(model, optimizer), torch.ones(3, 2)
    engine = bigbatch.Engine(model, optimizer, lambda m, x: (m(x).sum(), len(x)), microbatch=2, count_items=len)
    calls = {
        "engine": lambda: engine.step(rows),
        "window": lambda: accumulator.window(totals=3),
        "windows": lambda: next(accumulator.windows([rows], num_microbatches=1, count_items=len)),
    }
    with pytest.raises(TypeError) as refused:
        calls[use]()
    assert str(refused.value) == (
        "the items of the terms are a int: count_items= and totals= need a dictionary {term: items}, such as "
        "{'class': 128, 'box': 64}. A loss of one term needs neither."
    )


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
