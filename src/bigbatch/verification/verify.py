"""Verify on a user's model, loss and batch that every cut of the batch yields the full-batch gradient.

reference = Σ_i ∇s_i / Σ_i n_i  with the whole batch as one micro-batch (or the fewest that fit)
for each cut:  ‖Σ_i ∇s_i / Σ_i n_i − reference‖ / ‖reference‖  ≤  tolerance of the dtype
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from bigbatch.batch_norm.checks import check_batch_norm, check_modules
from bigbatch.batching.checks import check_count
from bigbatch.batching.split import split
from bigbatch.memory.usage import is_out_of_memory
from bigbatch.preserve import preserved
from bigbatch.trials.loss_modules import modules_used_by
from bigbatch.types import Collate
from bigbatch.verification.causes.case import Case
from bigbatch.verification.causes.modules import dropout_notes
from bigbatch.verification.cut_gradients import (
    CUT_ERRORS,
    CutGradients,
    Gradients,
    largest_that_fits,
    narrowest_dtype,
    parameter_differences,
    relative_difference,
)
from bigbatch.verification.diagnose import find_causes
from bigbatch.verification.module_state import ModuleState
from bigbatch.verification.order import OrderError, order_error
from bigbatch.verification.outside_parameters import modules_by_name, preserved_tensors, survey_losses
from bigbatch.verification.tolerances import TOLERANCES, coarser_dtype

if TYPE_CHECKING:
    from bigbatch.types import CountItems, LossFunction

NUM_WORST = 5
DEFAULT_CUTS = (16, 5, 2)  # micro-batches; with 5 the last one is shorter for most batch sizes


@dataclass(frozen=True)
class Cut:
    """One cut of the batch into micro-batches, compared with the reference.

    Attributes:
        microbatch: Samples per micro-batch.
        num_microbatches: Number of micro-batches.
        relative_error: ‖gradient − reference‖ / ‖reference‖ (2-norms) over all parameters; NaN if the cut cannot run.
        mean_of_means_error: The same for the gradient of the mean of the micro-batches' mean losses, as loops that
            divide by the number of micro-batches compute it; NaN if a micro-batch has no items (0/0).
    """

    microbatch: int
    num_microbatches: int
    relative_error: float
    mean_of_means_error: float


@dataclass(frozen=True)
class ParameterError:
    """Error of the gradient of one parameter in the worst cut.

    Attributes:
        name: Name of the parameter in ``model.named_parameters()``; for one outside of the model, the name by which
            ``loss_fn`` refers to it, such as ``"criterion.weight"``.
        relative_error: ‖gradient − reference‖ / ‖reference‖ of this parameter.
    """

    name: str
    relative_error: float


@dataclass(frozen=True)
class Verification:
    """Result of `verify`; ``print`` formats it as a table.

    Attributes:
        exact: Whether the relative error of every cut is at most ``tolerance``.
        relative_error: Relative error of the worst cut.
        tolerance: Largest relative error that counts as rounding.
        dtype: The narrowest floating dtype of parameters, module outputs and losses.
        num_samples: Samples of the batch.
        reference_microbatch: Samples per micro-batch of the reference: all samples, or the largest number that fits.
        cuts: Result of each cut, ascending by micro-batch size by default.
        worst: Up to 5 parameters with the largest error in the worst cut, largest first; empty if ``exact``.
        causes: Why the gradients differ, in sentences; empty if ``exact``.
        order: Dependence on the order and the cut of the micro-batches; None if it was not measured: by default, or if
            the cuts are not exact, whose differences are not those of an order.
        notes: What would not be exact elsewhere, in sentences: dropout whose masks were the same in every cut.
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
    order: OrderError | None = None
    notes: tuple[str, ...] = ()

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
        lines += [f"  largest error: {parameter.name}, {parameter.relative_error:.1e}" for parameter in self.worst]
        lines += [f"  cause: {cause}" for cause in self.causes]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [] if self.order is None else [self.order.explain(self.tolerance)]
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
    batch_dim: int | None = None,
    count_items: "CountItems | None" = None,
    batch_norm: Literal["exact"] | None = None,
    tolerance: float | None = None,
    orders: int = 0,
) -> Verification:
    """Verify that every cut of a batch yields the full-batch gradient, and diagnose why if not.

    Compares Σ_i ∇s_i / Σ_i n_i over the micro-batches of each cut with the gradient of the whole batch of this process,
    from the same random seed and the same buffers and attributes of the model. Parameters that the loss reaches outside
    of the model, such as the weights of a criterion, are compared as well. Restores parameters, gradients, buffers,
    training modes, random states, and whatever else hangs on the model and on the modules that ``loss_fn`` uses; inside
    ``loss_fn``, `is_trial` returns True. Needs memory for the largest micro-batch, three gradients, and a copy of
    parameters and buffers on the host.

    Args:
        model: In training mode, or the mode to verify, on its device.
        loss_fn: ``loss_fn(model, microbatch) → (loss_sum, items)``, or ``{term: (loss_sum, items)}``.
        batch: As for `bigbatch.Engine.step`: tensors ``[samples, ...]``, or with ``collate`` a list of samples. Samples
            with different numbers of items are the strongest test.
        microbatch: Samples per micro-batch, of one cut or several; by default about 16, 5 and 2 micro-batches.
        collate: Builds a micro-batch from a list of samples.
        batch_dim: The dimension of tensors that is the sample, by default 0: 1 for batches ``[time, batch, ...]``.
        count_items: ``count_items(batch) → {term: items}``; required for a loss of several terms.
        batch_norm: As for `bigbatch.Engine`: ``"exact"`` verifies batch norm over the whole batch.
        tolerance: Largest relative error that counts as rounding; by default that of the narrowest dtype in use:
            1e-12 (float64), 2e-5 (float32), 5e-3 (float16), 3e-2 (bfloat16).
        orders: Random orders of the samples in which the gradient is computed twice more, for ``order`` of the result:
            as the full batch, and with a random cut. By default none.

    Raises:
        ValueError: The batch has fewer than 2 samples or no items, no parameter requires a gradient, ``microbatch`` is
            empty or below 1, or ``batch_norm`` is not supported here.
        TypeError: ``model`` is no module, the batch cannot be split, or ``loss_fn`` returns something other than sums
            and items.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass verify(model, loss_fn, batch), in this order.")
    if type(orders) is not int or orders < 0:
        raise ValueError(f"orders is {orders!r}: pass the number of random orders, 0 or more.")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter of the model requires a gradient: there is nothing to verify.")
    if batch_norm is not None:
        check_batch_norm(batch_norm, loss_fn)
        check_modules([model, *modules_used_by(loss_fn)], loss_fn)
    device = next(model.parameters()).device
    samples = split(batch, 1, device=device, collate=collate, batch_dim=batch_dim)
    if samples.num_samples < 2:
        raise ValueError(f"the batch has {samples.num_samples} sample(s): pass at least 2, so that it can be split.")
    totals = None if count_items is None else count_items(batch)
    with preserved(model, *modules_used_by(loss_fn)) as state, ExitStack() as stack:
        cut_gradients = CutGradients(model, loss_fn, samples, totals, restore=state.restore, batch_norm=batch_norm)
        outside, loss_dtype = survey_losses(cut_gradients)
        cut_gradients = replace(cut_gradients, outside=outside)
        stack.enter_context(preserved_tensors(outside))
        largest, reference, dtype = _reference_gradient(cut_gradients)
        dtype = coarser_dtype(dtype, loss_dtype)
        tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
        sizes = _sizes(microbatch, samples.num_samples, largest=largest)
        results = [_verify_cut(cut_gradients, size, reference) for size in sizes]
        worst = max(results, key=lambda result: _nan_as_infinity(result.cut.relative_error))
        exact = worst.cut.relative_error <= tolerance
        return Verification(
            exact=exact,
            relative_error=worst.cut.relative_error,
            tolerance=tolerance,
            dtype=dtype,
            num_samples=samples.num_samples,
            reference_microbatch=largest,
            cuts=tuple(result.cut for result in results),
            worst=() if exact else worst.parameters,
            causes=() if exact else _causes(cut_gradients, largest, results, tolerance),
            order=order_error(cut_gradients, reference, num_orders=orders, largest=largest)
            if exact and orders
            else None,
            notes=dropout_notes(model) if exact else (),
        )


@dataclass(frozen=True)
class _CutResult:
    cut: Cut
    parameters: tuple[ParameterError, ...] = ()
    failure: str | None = None


def _verify_cut(cut_gradients: CutGradients, size: int, reference: Gradients) -> _CutResult:
    """Compare the gradient of one cut with the reference; the error is NaN if the cut cannot run."""
    num_microbatches = len(cut_gradients.split(size))
    try:
        gradient = cut_gradients.gradient(size)
    except CUT_ERRORS as error:
        why = "do not fit in memory" if is_out_of_memory(error) else "cannot run, although larger ones can"
        failure = f"micro-batches of {size} {why}: {type(error).__name__}: {error}"
        return _CutResult(Cut(size, num_microbatches, math.nan, math.nan), failure=failure)
    try:
        mean_of_means_error = relative_difference(cut_gradients.mean_of_means(size), reference)
    except CUT_ERRORS:  # the mean over a micro-batch without items is undefined
        mean_of_means_error = math.nan
    cut = Cut(size, num_microbatches, relative_difference(gradient, reference), mean_of_means_error)
    errors = sorted(parameter_differences(gradient, reference).items(), key=lambda pair: -_nan_as_infinity(pair[1]))
    return _CutResult(cut, tuple(ParameterError(name, error) for name, error in errors[:NUM_WORST]))


def _causes(
    cut_gradients: CutGradients, largest: int, results: Sequence[_CutResult], tolerance: float
) -> tuple[str, ...]:
    failures = tuple(result.failure for result in results if result.failure is not None)
    ran = [result.cut for result in results if result.failure is None]
    if not ran:
        return failures
    worst = max(ran, key=lambda cut: _nan_as_infinity(cut.relative_error))
    if worst.relative_error <= tolerance:
        return failures
    cut_gradients.restore()
    state = ModuleState(modules_by_name(cut_gradients.loss_fn, cut_gradients.model))
    found = find_causes(Case(cut_gradients, largest, worst.microbatch, tolerance, state))
    return failures + tuple(cause.sentence for cause in found)


def _reference_gradient(cut_gradients: CutGradients) -> tuple[int, Gradients, torch.dtype]:
    """Compute the gradient of the whole batch as one micro-batch, or as the largest that fit."""

    def gradient(size: int) -> tuple[Gradients, torch.dtype]:
        with narrowest_dtype(cut_gradients.model, cut_gradients.outside) as dtypes:
            return cut_gradients.gradient(size), dtypes[-1]

    size, (reference, dtype) = largest_that_fits(cut_gradients, gradient)
    return size, reference, dtype


def _sizes(microbatch: int | Sequence[int] | None, num_samples: int, *, largest: int) -> list[int]:
    if microbatch is None:
        smallest = 2 if num_samples >= 4 else 1  # some layers do not support a single sample
        return sorted({min(max(-(-num_samples // parts), smallest), largest) for parts in DEFAULT_CUTS})
    sizes = list(microbatch) if isinstance(microbatch, Sequence) else [microbatch]
    if not sizes:
        raise ValueError("microbatch is an empty list: pass at least one number of samples.")
    for size in sizes:
        check_count("microbatch", size, "the samples of one micro-batch")
    return sizes


def _nan_as_infinity(error: float) -> float:
    return math.inf if math.isnan(error) else error
