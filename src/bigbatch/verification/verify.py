"""Proof on a model, a loss and a batch of the user's own: every cut of the batch gives the full-batch gradient.

reference = ∇ of the whole batch in one micro-batch (or in the fewest that fit)
for each cut:  ‖Σ_i ∇s_i / Σ_i n_i − reference‖ / ‖reference‖  ≤  tolerance of the dtype
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bigbatch.batching.checks import check_count
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory
from bigbatch.preserve import preserved
from bigbatch.types import Collate
from bigbatch.verification.cut_gradients import (
    CutGradients,
    Gradients,
    narrowest_dtype,
    parameter_differences,
    relative_difference,
)
from bigbatch.verification.diagnose import find_causes
from bigbatch.verification.tolerances import TOLERANCES

if TYPE_CHECKING:
    from bigbatch.types import CountItems, LossFunction

NUM_WORST = 5
CUT_ERRORS = (ArithmeticError, IndexError, RuntimeError, ValueError)  # what a model may say to a shape it cannot take
DEFAULT_CUTS = (16, 5, 2)  # micro-batches; 5 leaves a short last one for most sizes


@dataclass(frozen=True)
class Cut:
    """One way of cutting the batch, against the reference.

    Attributes:
        microbatch: Samples of a micro-batch.
        num_microbatches: How many the batch makes.
        relative_error: ‖gradient − reference‖ / ‖reference‖ over all parameters.
        mean_of_means_error: The same for the mean of the micro-batches' mean losses, as textbook loops compute it;
            NaN where the mean over a micro-batch without items is 0/0.
    """

    microbatch: int
    num_microbatches: int
    relative_error: float
    mean_of_means_error: float


@dataclass(frozen=True)
class ParameterError:
    """How far one parameter's gradient is off in the worst cut.

    Attributes:
        name: The parameter, as ``model.named_parameters()`` names it.
        relative_error: ‖gradient − reference‖ / ‖reference‖ of this parameter.
    """

    name: str
    relative_error: float


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify`; prints as a table.

    Attributes:
        exact: Whether every cut is within the tolerance.
        relative_error: That of the worst cut.
        tolerance: Largest relative error that counts as rounding in ``dtype``.
        dtype: The narrowest dtype that the loss was computed in.
        num_samples: Samples of the batch.
        reference_microbatch: Samples of a micro-batch of the reference: all, unless memory allowed fewer.
        cuts: Each cut's figures.
        worst: The parameters that differ most, worst first; empty if ``exact``.
        causes: Why it is not exact, in sentences, most likely first; empty if ``exact``.
    """

    exact: bool
    relative_error: float
    tolerance: float
    dtype: torch.dtype
    num_samples: int
    reference_microbatch: int
    cuts: tuple[Cut, ...]
    worst: tuple[ParameterError, ...] = ()
    causes: tuple[str, ...] = ()

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [
            f"gradient of {self.num_samples} samples, relative error against {self._reference()} ({dtype}, "
            f"tolerance {self.tolerance:.0e})",
            f"{'micro-batch':>12}{'micro-batches':>15}{'bigbatch':>12}{'mean of means':>16}",
        ]
        for cut in self.cuts:
            mark = "" if cut.relative_error <= self.tolerance else "  not exact"
            lines.append(
                f"{cut.microbatch:>12}{cut.num_microbatches:>15}{cut.relative_error:>12.1e}"
                f"{cut.mean_of_means_error:>16.1e}{mark}"
            )
        lines.append("exact: every cut gives the full-batch gradient" if self.exact else "NOT exact")
        lines += [f"  differs most: {parameter.name}, {parameter.relative_error:.1e}" for parameter in self.worst]
        lines += [f"  cause: {cause}" for cause in self.causes]
        return "\n".join(lines)

    def _reference(self) -> str:
        if self.reference_microbatch >= self.num_samples:
            return "the full batch"
        return f"micro-batches of {self.reference_microbatch}, the largest that fit"


def verify(
    model: nn.Module,
    loss_fn: "LossFunction",
    batch: Any,
    *,
    microbatch: int | Sequence[int] | None = None,
    collate: Collate | None = None,
    count_items: "CountItems | None" = None,
    tolerance: float | None = None,
) -> Verification:
    """Prove that every cut of a batch gives the gradient of the whole, or say why it does not.

    Everything is put back as it was: parameters, gradients, buffers, random states, training modes. Takes the memory
    of the largest micro-batch, three gradients and a copy of parameters and buffers on the host.

    Args:
        model: In the mode in which it trains, on its device.
        loss_fn: ``loss_fn(model, microbatch) → (loss_sum, items)``, or ``{term: (loss_sum, items)}``.
        batch: A pytree of tensors ``[samples, ...]``, or with ``collate`` a list of samples. Uneven ones prove most.
        microbatch: Samples of a micro-batch, one cut or several; by default about 16, 5 and 2 micro-batches.
        collate: Makes one micro-batch of a list of samples.
        count_items: ``count_items(batch) → {term: items}``, for a loss of several terms.
        tolerance: Relative error that counts as rounding; by default that of the narrowest dtype in use.

    Raises:
        ValueError: The batch has no sample or no item, no parameter requires a gradient, or a setting is out of range.
        TypeError: The batch cannot be cut.
    """
    trial = CutGradients(model, loss_fn, batch, collate=collate, count_items=count_items)
    if not trial.names():
        raise ValueError("no parameter of the model requires a gradient: there is nothing to verify.")
    num_samples = trial.split(1).num_samples
    if num_samples < 2:
        raise ValueError(f"the batch has {num_samples} sample(s): pass at least 2, or there is nothing to cut.")
    with preserved(model):
        largest, reference, dtype = _reference_gradient(trial, num_samples)
        tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
        outcomes = [_try_cut(trial, size, reference) for size in _sizes(microbatch, num_samples, largest=largest)]
        worst = max(outcomes, key=lambda outcome: _badness(outcome.cut.relative_error))
        exact = worst.cut.relative_error <= tolerance
        return Verification(
            exact=exact,
            relative_error=worst.cut.relative_error,
            tolerance=tolerance,
            dtype=dtype,
            num_samples=num_samples,
            reference_microbatch=largest,
            cuts=tuple(outcome.cut for outcome in outcomes),
            worst=() if exact else worst.parameters,
            causes=() if exact else _causes(trial, largest, outcomes, tolerance),
        )


@dataclass(frozen=True)
class _CutResult:
    cut: Cut
    parameters: tuple[ParameterError, ...] = ()
    failure: str | None = None


def _try_cut(trial: CutGradients, size: int, reference: Gradients) -> _CutResult:
    """Take one cut's gradients. A cut that cannot run, though the whole batch could, has an error of NaN."""
    num_microbatches = len(trial.split(size))
    try:
        gradient = trial.gradient(size)
    except CUT_ERRORS as error:
        why = "do not fit in memory" if is_out_of_memory(error) else "cannot run, though larger ones can"
        failure = f"micro-batches of {size} {why}: {type(error).__name__}: {error}"
        return _CutResult(Cut(size, num_microbatches, math.nan, math.nan), failure=failure)
    try:
        naive = relative_difference(trial.mean_of_means(size), reference)
    except CUT_ERRORS:  # a micro-batch without items may have no mean at all
        naive = math.nan
    cut = Cut(size, num_microbatches, relative_difference(gradient, reference), naive)
    errors = sorted(parameter_differences(gradient, reference).items(), key=lambda pair: -_badness(pair[1]))
    return _CutResult(cut, tuple(ParameterError(name, error) for name, error in errors[:NUM_WORST]))


def _causes(trial: CutGradients, largest: int, outcomes: Sequence[_CutResult], tolerance: float) -> tuple[str, ...]:
    failures = tuple(outcome.failure for outcome in outcomes if outcome.failure is not None)
    ran = [outcome.cut for outcome in outcomes if outcome.failure is None]
    if not ran:
        return failures
    worst = max(ran, key=lambda cut: _badness(cut.relative_error))
    if worst.relative_error <= tolerance:
        return failures
    return failures + find_causes(trial, largest, worst.microbatch, tolerance)


def _reference_gradient(trial: CutGradients, num_samples: int) -> tuple[int, Gradients, torch.dtype]:
    """Take the gradient of the whole batch in one micro-batch, or in halves of it until they fit."""
    size = num_samples
    while True:
        try:
            with narrowest_dtype(trial.model) as dtypes:
                return size, trial.gradient(size), dtypes[-1]
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # Outside the except block: there the traceback still holds the tensors that did not fit.
        size = -(-size // 2)
        free_cached_memory()


def _sizes(microbatch: int | Sequence[int] | None, num_samples: int, *, largest: int) -> list[int]:
    if microbatch is None:
        smallest = 2 if num_samples >= 4 else 1  # some layers cannot run on one sample, for reasons of their own
        return sorted({min(max(-(-num_samples // parts), smallest), largest) for parts in DEFAULT_CUTS})
    sizes = list(microbatch) if isinstance(microbatch, Sequence) else [microbatch]
    if not sizes:
        raise ValueError("microbatch is an empty list: give at least one number of samples.")
    for size in sizes:
        check_count("microbatch", size, "the samples of one micro-batch")
    return sizes


def _badness(error: float) -> float:
    return math.inf if math.isnan(error) else error
