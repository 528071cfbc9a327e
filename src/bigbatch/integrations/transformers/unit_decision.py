"""Decide in which units a loss adds up, from its gradients for samples together and in two parts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from bigbatch.errors import InputError
from bigbatch.integrations.transformers.traceless import attribute
from bigbatch.integrations.transformers.unit_counts import Candidate
from bigbatch.integrations.transformers.unit_probe import Evaluation, LossProbe, relative_residual, weights_of
from bigbatch.integrations.transformers.unit_refusals import (
    ADVICE,
    changing_divisor,
    coupled_sum,
    divided_by_steps,
    no_unit,
    no_unit_for_all,
    random_loss,
    subject_of,
    wrong_count,
)

# Powers of two, so that halving is exact; large, so that a term that is not divided stands out.
NUM_ITEMS = 4096
MUCH_SMALLER = 3  # errors of two units that both are within the tolerance


class Inconclusive(Exception):  # noqa: N818 - not an error: other samples may show it
    """The samples do not show the unit.

    Attributes:
        is_finite: Whether losses and gradients are finite, but the gradient is 0.
    """

    def __init__(self, *, is_finite: bool) -> None:
        super().__init__()
        self.is_finite = is_finite


@dataclass(frozen=True)
class Decision:
    """The units that fit.

    Attributes:
        takes_num_items: Whether the loss is a sum divided by ``num_items_in_batch``.
        fitting: The units, the most usual one first; their counts of the samples so far agree.
        factor: What the loss is multiplied by if ``num_items_in_batch`` is passed: the number of ranks, or 1.
        tolerance: Relative difference of counts that the gradients cannot show.
        is_final: Whether the decision holds for other windows too: not if it was made from a single sample.
        errors: Relative error of the gradient by unit, the largest of all samples that were tried.
    """

    takes_num_items: bool
    fitting: tuple[Candidate, ...]
    factor: int = 1
    tolerance: float = 0.0
    is_final: bool = True
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the units."""
        return [candidate.name for candidate in self.fitting]

    def describe(self) -> str:
        """Return the decision as a part of a sentence."""
        kind = "a sum that is divided by num_items_in_batch" if self.takes_num_items else "a mean"
        return f"{kind} over {' or '.join(self.names)}"

    def restrict(self, names: Sequence[str], trainer: Any) -> "Decision":
        """Return the decision for the units that are named.

        Raises:
            InputError: None is.
        """
        fitting = tuple(candidate for candidate in self.fitting if candidate.name in names)
        if not fitting:
            raise no_unit_for_all(trainer, self.names, names)
        return replace(self, fitting=fitting)

    def intersect(self, other: "Decision", trainer: Any) -> "Decision":
        """Return the decision for the units of both."""
        errors = {name: max(error, other.errors.get(name, 0.0)) for name, error in self.errors.items()}
        return replace(self, errors=errors).restrict(other.names, trainer)

    def best(self) -> "Decision | None":
        """Return the decision for the unit whose error is much the smallest, in half precision; None if none is."""
        ranked = sorted(self.fitting, key=lambda candidate: self.errors.get(candidate.name, 0.0))
        smallest, next_one = (self.errors.get(candidate.name, 0.0) for candidate in ranked[:2])
        return replace(self, fitting=(ranked[0],)) if smallest * MUCH_SMALLER < next_one else None


def decide(
    trainer: Any, probe: LossProbe, whole: Any, parts: Sequence[Any], candidates: Sequence[Candidate]
) -> Decision:
    """Return the units in which the loss adds up over the parts.

    Args:
        trainer: Named in errors.
        probe: Of its loss.
        whole: All samples, collated.
        parts: Its parts: the first is one sample; or only the whole, of one sample.
        candidates: The units to test.

    Raises:
        Inconclusive: The loss or gradient of these samples is not finite, or 0.
        InputError: No unit fits.
    """
    probe.choose_mode(parts[0])
    if _depends_on_steps(trainer, probe, parts[0]):
        raise divided_by_steps(trainer)
    if _is_divided(trainer, probe, whole):
        return _of_sum(trainer, probe, whole, parts, candidates)
    return _of_mean(trainer, probe, whole, parts, candidates)


def _depends_on_steps(trainer: Any, probe: LossProbe, inputs: Any) -> bool:
    args = trainer.args
    with attribute(args, "gradient_accumulation_steps", 2 * args.gradient_accumulation_steps):
        doubled = probe.value(inputs, 1)
    value = probe.value(inputs, 1)
    return math.isfinite(value) and not _equal_losses(probe, value, doubled)


def _is_divided(trainer: Any, probe: LossProbe, inputs: Any) -> bool:
    """Return whether the loss is divided by num_items_in_batch, rather than independent of it."""
    once, twice = probe.evaluate(inputs, NUM_ITEMS), probe.evaluate(inputs, 2 * NUM_ITEMS)
    products = _finite_products(probe, [once, twice])
    halves = _equal_losses(probe, once.loss, 2 * twice.loss) and probe.is_sum_of([once, twice], [1, -2], products)
    unchanged = _equal_losses(probe, once.loss, twice.loss) and probe.is_sum_of([once, twice], [1, -1], products)
    if halves == unchanged:
        raise changing_divisor(trainer, NUM_ITEMS, once.loss, twice.loss)
    if not probe.runs_as_in_training:
        in_training = [probe.loss_in_training(inputs, count) for count in (NUM_ITEMS, 2 * NUM_ITEMS)]
        if not _equal_losses(probe, in_training[0], (2 if halves else 1) * in_training[1]):
            raise changing_divisor(trainer, NUM_ITEMS, *in_training)
    return halves


def _equal_losses(probe: LossProbe, first: float, second: float) -> bool:
    """Return whether two losses of the same inputs are equal; a term of a thousandth makes them differ."""
    return abs(first - second) <= probe.loss_tolerance * max(abs(first), abs(second))


def _of_sum(
    trainer: Any, probe: LossProbe, whole: Any, parts: Sequence[Any], candidates: Sequence[Candidate]
) -> Decision:
    total = probe.evaluate(parts[0], 1)
    labels = [candidate for candidate in candidates if candidate.counts_labels or "completion" in candidate.name]
    try:
        mean = probe.evaluate(parts[0], None)
    except (AttributeError, TypeError):  # the loss requires num_items_in_batch: the Trainer's count is its definition
        fitting, factor = _counted_by_trainer(trainer, labels), 1
    else:
        products = _finite_products(probe, [total, mean])
        fitting, factor = [], 1
        for factor in dict.fromkeys((1, trainer.accelerator.num_processes)):
            fitting = [each for each in labels if _is_count(probe, each, factor, parts[0], [total, mean], products)]
            if fitting:
                break
        if not fitting:
            raise wrong_count(trainer, total.loss / mean.loss, {c.name: float(c.count(parts[0])) for c in labels})
    if len(parts) > 1 and not probe.is_random:
        sums = [probe.evaluate(whole, 1), total, probe.evaluate(parts[1], 1)]
        products = _finite_products(probe, sums)
        if not probe.is_sum_of(sums, [1, -1, -1], products):
            raise coupled_sum(trainer)
    return Decision(True, tuple(fitting), factor, probe.loss_tolerance, is_final=len(parts) > 1)


def _is_count(
    probe: LossProbe,
    candidate: Candidate,
    factor: int,
    inputs: Any,
    sum_and_mean: Sequence[Evaluation],
    products: Tensor,
) -> bool:
    """Return whether the sum is the mean times a count."""
    count = factor * float(candidate.count(inputs))
    total, mean = sum_and_mean
    return _equal_losses(probe, total.loss, count * mean.loss) and probe.is_sum_of(sum_and_mean, [1, -count], products)


def _counted_by_trainer(trainer: Any, labels: Sequence[Candidate]) -> list[Candidate]:
    names = ["shifted labels"] if getattr(trainer, "_loss_shifts_labels", False) else ["labels"]
    chosen = [candidate for candidate in labels if candidate.name in names] or list(labels[:1])
    if not chosen:
        raise InputError(f"{subject_of(trainer)} needs num_items_in_batch, and its inputs have no labels. {ADVICE}")
    return chosen


def _of_mean(
    trainer: Any, probe: LossProbe, whole: Any, parts: Sequence[Any], candidates: Sequence[Candidate]
) -> Decision:
    if probe.is_random:
        raise random_loss(trainer)
    mean, given = probe.evaluate(whole), probe.evaluate(whole, NUM_ITEMS)
    products = _finite_products(probe, [given, mean])
    factors = dict.fromkeys((1, trainer.accelerator.num_processes))
    if not any(probe.is_sum_of([given, mean], [1, -factor], products) for factor in factors):
        raise changing_divisor(trainer, NUM_ITEMS, given.loss, mean.loss)
    del given
    if len(parts) == 1:
        raise Inconclusive(is_finite=True)
    evaluations = [mean, *(probe.evaluate(part) for part in parts)]
    products = probe.products(evaluations)
    finite = [e.is_finite and bool(products[i, i].isfinite()) for i, e in enumerate(evaluations)]
    if not (finite[0] and finite[1]):
        raise Inconclusive(is_finite=False)
    errors: dict[str, float] = {}
    fitting = []
    for candidate in candidates:
        weights = weights_of(candidate, whole, parts)
        if weights is not None and probe.is_sum_of(evaluations, weights, products):
            fitting.append(candidate)
        errors[candidate.name] = _error(weights, products, finite)
    if not fitting:
        raise no_unit(trainer, errors)
    return Decision(False, tuple(fitting), tolerance=probe.span_tolerance, errors=errors)


def _error(weights: Sequence[float] | None, products: Tensor, finite: Sequence[bool]) -> float:
    if weights is None or not all(ok or not weight for weight, ok in zip(weights, finite, strict=True)):
        return math.inf
    used = [index for index, weight in enumerate(weights) if weight]
    return math.hypot(*relative_residual([weights[index] for index in used], products[used][:, used]))


def _finite_products(probe: LossProbe, evaluations: Sequence[Evaluation]) -> Tensor:
    """Return dot products of gradients that are finite and not 0."""
    products = probe.products(evaluations)
    is_finite = all(each.is_finite for each in evaluations) and bool(products.isfinite().all())
    if not is_finite or not products[0, 0]:
        raise Inconclusive(is_finite=is_finite)
    return products
