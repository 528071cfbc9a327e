"""Check an engine's loss and model in its first window, once, for what makes an update depend on the micro-batch.

    modules, the graph of the first loss → any sign? → do losses and items of a few samples add up? → if not: diagnose
    as `verify` does → warn

Costs nothing but a look at the graph unless that has a sign, such as a mean; then some forwards of at most eight
samples of each of three micro-batches, without gradients, before the update. Changes no state. A window of one
micro-batch is not cut: only the scale of its loss is checked, and the rest in the first window that has several.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bigbatch.batching.split import Split
from bigbatch.compiled_modules import has_compiled
from bigbatch.coupled.coupled import Coupled
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory
from bigbatch.preserve import preserved
from bigbatch.rng import random_states
from bigbatch.trials.loss_modules import modules_used_by
from bigbatch.types import LossFunction, LossResult
from bigbatch.verification.activation_hooks import ActivationHooks
from bigbatch.verification.causes.case import Case, Cause, Kind, is_additive, totals
from bigbatch.verification.causes.losses import losses_not_sums
from bigbatch.verification.causes.modules import (
    RANDOM_NUMBERS,
    active_dropouts,
    batch_norm_cause,
    dropout_cause,
    training_batch_norms,
)
from bigbatch.verification.cut_gradients import CutGradients, TermValues, narrowest_dtype
from bigbatch.verification.diagnose import find_causes
from bigbatch.verification.loss_graph import may_depend_on_cut
from bigbatch.verification.module_state import ModuleState
from bigbatch.verification.outside_parameters import modules_by_name, preserved_tensors, survey_losses
from bigbatch.verification.tolerances import coarser_dtype, tolerance_for

MIN_SAMPLES = 4  # of one micro-batch, else two of them
MAX_SAMPLES = 8
MAX_BLOCKS = 3  # groups of at most so many samples: those of one may have equally many items
MAX_JOINED = 4  # micro-batches that are compared with their neighbours
MAX_POSTPONED = 3  # windows that show nothing, such as those whose samples have no items, or no finite loss
ROOM = 5  # gradients may differ by more than in `verify`, which was asked for
NO_SUM = Cause(
    Kind.UNKNOWN,
    "the losses of parts of a micro-batch do not add up to its loss, and some samples by themselves have none: it may "
    "be a mean over fewer items than it is multiplied by. Return the sum and the items that it runs over.",
)
NOT_REPORTED = (Kind.NOT_FINITE, Kind.UNKNOWN)


class FirstWindowCheck:
    """Warns once if a window's update depends on how its batch is cut.

    Args:
        model: As for `bigbatch.Engine`.
        enabled: Whether to check at all.
        evaluates: Whether the loss may be evaluated on its own: not over several ranks, whose forwards may be
            collective. Modules are looked at in any case.
        names_norms: Whether batch norms normalize micro-batches by themselves.
        names_dropout: Whether other cuts draw other random numbers.

    Attributes:
        is_done: Whether nothing is left to check.
    """

    def __init__(
        self, model: nn.Module, *, enabled: bool, evaluates: bool, names_norms: bool = True, names_dropout: bool = True
    ) -> None:
        self.is_done = not enabled
        self._model = model
        # A compiled model would be compiled again for these samples.
        self._evaluates = evaluates and not has_compiled(model)
        self._scale_is_checked = not self._evaluates
        self._num_postponed, self._names_dropout = 0, names_dropout
        self._norms: set[nn.Module] | None = None if names_norms else set()  # that micro-batches run; None for all
        self._has_sign: bool | None = None  # None until a loss was seen
        self._devices = list({p.device for p in model.parameters() if p.is_cuda})

    def watch(self, loss_fn: LossFunction, parts: Split) -> LossFunction:
        """Return a loss function for one window; the first result of all shows whether `run` evaluates the loss.

        Args:
            loss_fn: As for `bigbatch.Engine`.
            parts: The batch, split into the micro-batches of the window.
        """
        if isinstance(loss_fn, Coupled):
            return self._watch_coupled(loss_fn)
        if self._has_sign is not None or not self._evaluates:
            return loss_fn
        first = len(parts.groups[0]) if len(parts) else 0

        def watched(model: Any, microbatch: Any) -> LossResult:
            if self._has_sign is not None:
                return loss_fn(model, microbatch)
            is_named = not self._names_dropout or active_dropouts(self._model)
            before = None if is_named else random_states(self._devices)
            result = loss_fn(model, microbatch)
            draws = before is not None and not _same_states(before, random_states(self._devices))
            self._has_sign = draws or may_depend_on_cut(result, first)
            return result

        return watched

    def _watch_coupled(self, coupled: Coupled) -> Coupled:
        """Note the batch norms that run on micro-batches: those in the loss receive the whole batch."""
        seen: set[nn.Module] = set()
        self._norms = seen

        def encode(model: Any, microbatch: Any) -> Any:
            norms = training_batch_norms(self._model).values()
            handles = [norm.register_forward_hook(lambda norm, *_: seen.add(norm)) for norm in norms]
            try:
                return coupled.encode(model, microbatch)
            finally:
                for handle in handles:
                    handle.remove()

        return Coupled(encode, coupled.loss, gather=coupled.gather)

    def run(self, loss_fn: LossFunction, parts: Split, *, may_join: bool) -> None:
        """Check one window before its update; no-op if it has no sample.

        Args:
            loss_fn: As for `bigbatch.Engine`.
            parts: The batch, split into the micro-batches of the window.
            may_join: Whether two micro-batches of fewer than four samples may run as one, without gradients: not if
                the tokens of a micro-batch are limited.

        Raises:
            ValueError: The loss combines samples that this window cuts apart, and another form of the batch is right.
        """
        groups = [list(group) for group in parts.groups if len(group)]
        is_cut = len(groups) > 1
        if not groups or (not is_cut and self._scale_is_checked) or any(map(is_lazy, self._model.parameters())):
            return
        causes = self._of_modules() if is_cut else []
        if self._evaluates and self._has_sign:
            found = self._of_loss(loss_fn, parts, groups, may_join=may_join)
            if found is None and self._num_postponed < MAX_POSTPONED:
                self._num_postponed += 1
                return
            known = {cause.kind for cause in causes}
            causes += [cause for cause in found or () if cause.kind not in known]
        for cause in causes:
            if cause.kind is Kind.PAIRS:  # every cut is wrong, and another form of the batch is right
                raise ValueError(f"{cause.sentence} To run this batch as it is, pass check=False.")
        self._scale_is_checked = True
        self.is_done = is_cut or bool(causes)
        if causes:
            listed = "\n".join(f"- {cause.sentence}" for cause in causes)
            warnings.warn(
                f"the updates of this engine are not exactly those of the full batch:\n{listed}\n"
                "bigbatch.verify shows how much they differ. Engine(check=False) turns this check off.",
                stacklevel=5,  # the call of Engine.step
            )

    def _of_modules(self) -> list[Cause]:
        dropouts, norms = active_dropouts(self._model), training_batch_norms(self._model)
        dropouts = dropouts if self._names_dropout else {}
        if self._norms is not None:
            norms = {name: norm for name, norm in norms.items() if norm in self._norms}
        return [dropout_cause(dropouts)] * bool(dropouts) + [batch_norm_cause(norms)] * bool(norms)

    def _of_loss(
        self, loss_fn: LossFunction, parts: Split, groups: Sequence[list[int]], *, may_join: bool
    ) -> list[Cause] | None:
        """Return the causes that a few samples show; None if other windows may show more."""
        try:
            with (
                warnings.catch_warnings(action="ignore"),  # of torch, about fewer samples than the user passed
                preserved(self._model, *modules_used_by(loss_fn), parameters=False) as state,
            ):
                for module in [*active_dropouts(self._model).values(), *training_batch_norms(self._model).values()]:
                    module.eval()
                cut_gradients = CutGradients(self._model, loss_fn, parts, restore=state.restore)
                modules = ModuleState(modules_by_name(loss_fn, self._model))
                return _causes(cut_gradients, groups, modules, may_join=may_join)
        except Exception as error:  # noqa: BLE001 - a loss that cannot run on fewer samples is not checked
            out_of_memory = is_out_of_memory(error)
        if out_of_memory:  # outside the except block, whose traceback references tensors
            free_cached_memory()
        return []


def _causes(
    cut_gradients: CutGradients, groups: Sequence[list[int]], state: ModuleState, *, may_join: bool
) -> list[Cause] | None:
    is_cut, first = len(groups) > 1, len(groups[0])
    as_in_window = first < MIN_SAMPLES and may_join and is_cut
    blocks = [group[:MAX_SAMPLES] for group in groups[:MAX_BLOCKS]]
    if as_in_window:
        blocks = [[*one, *other] for one, other in zip(groups[::2], groups[1::2], strict=False)][:MAX_BLOCKS]
    found: list[Cause] | None = []
    for rows in blocks:
        if len(rows) < 2:
            continue
        case = _case(cut_gradients, rows, first if as_in_window else (len(rows) + 1) // 2, state)
        whole = case.terms(len(rows))
        values = totals(whole).values()
        if not all(math.isfinite(loss) for loss, _ in values) or not any(items for _, items in values):
            found = found or None
            continue
        if is_additive(whole, case.terms(case.cut), case.tolerance):
            continue
        if not _are_equal(whole, case.terms(len(rows), seed=1), case.tolerance):
            return [RANDOM_NUMBERS] if is_cut else []
        if not is_cut:
            return [cause for cause in losses_not_sums(case) if cause.kind is Kind.MEAN]
        if may_join and not as_in_window and _joins_add_up(cut_gradients, groups[:MAX_JOINED], state):
            return None  # the window cuts where the loss allows it, between pairs for example; or their items are equal
        found = _diagnosed(case)
        if {cause.kind for cause in found} != {Kind.COUPLING} or not _has_empty_samples(case):
            break
        found = [NO_SUM]  # a mean over few items may look like coupling
    return found


def _has_empty_samples(case: Case) -> bool:
    """Return whether some samples by themselves have no loss: not finite, or 0, as a mean over nothing; not all."""
    alone = case.terms([[row] for row in range(case.reference)])
    return len({math.isfinite(loss) and loss != 0 for terms in alone for loss, _ in terms.values()}) > 1


def _joins_add_up(cut_gradients: CutGradients, groups: Sequence[list[int]], state: ModuleState) -> bool:
    """Return whether the loss of neighbouring micro-batches together is the sum of theirs."""
    return all(
        _adds_up(_case(cut_gradients, [*first, *second], len(first), state)) for first, second in pairwise(groups)
    )


def _case(cut_gradients: CutGradients, rows: Sequence[int], cut: int, state: ModuleState) -> Case:
    """Return the case of some samples of the window, with the tolerance of the dtypes that it runs in."""
    state.restore()
    gather = cut_gradients.samples.gather
    samples = replace(
        cut_gradients.samples, num_samples=len(rows), gather=lambda chosen: gather([rows[i] for i in chosen])
    )
    cut_gradients = replace(cut_gradients, samples=samples)
    with narrowest_dtype(cut_gradients.model) as dtypes, torch.no_grad(), ActivationHooks():
        _, loss_dtype = survey_losses(cut_gradients)
    tolerance = tolerance_for(coarser_dtype(dtypes[-1], loss_dtype))
    return Case(cut_gradients, len(rows), cut, tolerance, state, whole=f"{len(rows)} samples")


def _same_states(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    return (
        torch.equal(before["cpu"], after["cpu"])
        and all(map(torch.equal, before["devices"], after["devices"]))
        and before["python"] == after["python"]
        and before["numpy"] == after["numpy"]
    )


def _adds_up(case: Case) -> bool:
    try:
        return is_additive(case.terms(case.reference), case.terms(case.cut), case.tolerance)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False


def _diagnosed(case: Case) -> list[Cause]:
    """Diagnose by gradients as `verify` does, if the gradients differ as well."""
    whole = case.terms(case.reference)
    case.state.restore()
    outside, _ = survey_losses(case.cut_gradients)
    items = {name: count for name, (_, count) in totals(whole).items()}
    with preserved(case.model), preserved_tensors(outside):
        case.cut_gradients = replace(case.cut_gradients, outside=outside, totals=items if len(items) > 1 else None)
        not_additive = list(losses_not_sums(case))
        if not not_additive and case.error() <= ROOM * case.tolerance:
            return []
        return [cause for cause in find_causes(case) if cause.kind not in NOT_REPORTED]


def _are_equal(first: Sequence[TermValues], second: Sequence[TermValues], tolerance: float) -> bool:
    return all(
        math.isclose(loss, second[index][name][0], rel_tol=tolerance, abs_tol=tolerance)
        for index, terms in enumerate(first)
        for name, (loss, _) in terms.items()
    )
