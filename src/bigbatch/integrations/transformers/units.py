"""Find out what the loss of a Trainer is averaged over, by its gradients on the samples of a window.

samples → counts in every unit → a few samples, together and in parts → the unit in which their gradients add up
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from bigbatch.errors import InputError
from bigbatch.integrations.transformers.precision import run_precisely
from bigbatch.integrations.transformers.unit_audit import audit, halves_of, is_audited
from bigbatch.integrations.transformers.unit_counts import Candidate, candidates_for
from bigbatch.integrations.transformers.unit_decision import Decision, Inconclusive, decide
from bigbatch.integrations.transformers.unit_probe import ComputeLoss
from bigbatch.integrations.transformers.unit_ranks import OutOfMemory, call_on_all_ranks, on_all_ranks, rank_and_size
from bigbatch.integrations.transformers.unit_refusals import (
    ambiguous,
    no_gradient,
    not_all_samples,
    out_of_memory,
    refuse_coupled_losses,
    subject_of,
    wrong_items,
)
from bigbatch.integrations.transformers.unit_samples import (
    Collator,
    Entry,
    agree,
    choose_parts,
    collate_parts,
    count_microbatches,
    count_samples,
    most_different,
    names_of,
)

MAX_PROBES = 5  # of one window
FIRST_WINDOWS = 3  # in which a loss with a reference model is probed: it starts from it, where terms may vanish
SUM = "sum / num_items"


@dataclass(frozen=True)
class Unit:
    """What the loss of a micro-batch is averaged over.

    Attributes:
        name: ``"sum / num_items"``, ``"shifted labels"``, ``"labels"``, ``"completion tokens"``, ``"samples"``,
            ``"attention tokens"``, ``"positions"``...; ``"undetermined"`` for a window whose gradient does not depend
            on the unit: it has one sample, or is not finite.
        count: Items of one collated micro-batch: an int, or a 0-d tensor on its device, which is not waited for.
        takes_num_items: Whether the loss is a sum divided by ``num_items_in_batch``: with 1 it is the sum.
    """

    name: str
    count: Callable[[Any], int | Tensor]
    takes_num_items: bool


class UnitFinder:
    """Finds the unit of one trainer's loss. Collective over the ranks; every rank calls it in every window.

    Args:
        trainer: Only its state is used: model, arguments, accelerator. A trace of the probe is left on none of them.
        collate: Its data collator.
        compute_loss: ``compute_loss(model, inputs, num_items_in_batch) → 0-d loss``: the trainer's own.
        given: A unit that the user passed; it is only audited.
    """

    def __init__(
        self,
        trainer: Any,
        collate: Callable[[Any], Any],
        compute_loss: ComputeLoss,
        given: Candidate | None = None,
    ) -> None:
        self._trainer, self._compute_loss = trainer, compute_loss
        self._is_given = given is not None
        owners = [getattr(trainer, "data_collator", None)]
        self._collator = Collator(collate, owners, tuple(getattr(trainer, "label_names", None) or ()))
        self._decision = None if given is None else Decision(takes_num_items=False, fitting=(given,))
        self._num_windows = 0

    @property
    def needs_counts(self) -> bool:
        """Whether the next window is counted in several units, which fitted so far."""
        return self._decision is not None and len(self._decision.fitting) > 1

    def unit(self, samples: Sequence[Any], microbatches: Sequence[Any] | None = None) -> Unit:
        """Return the unit for a window.

        The first call runs the model on a few samples of the window, as do later calls while the windows before were
        of one sample or not finite, or if this window separates units whose counts agreed in all others. Windows
        1, 2, 3, 4, 8, 16... are run once more without gradients, to check the unit on all samples.

        Args:
            samples: Of this rank, not collated; may be empty.
            microbatches: The micro-batches that will be run of them, if they are collated already: samples are then not
                collated again to see whether the units that fitted so far count this window equally.

        Raises:
            InputError: No unit fits, or several that count this window differently; on all ranks.
            RankFailedError: Another rank failed.
        """
        if not self._is_given:
            refuse_coupled_losses(self._trainer)
        self._num_windows += 1
        known = self._decision
        if (
            known is not None
            and known.is_final
            and not self._may_have_changed()
            and self._holds(known, samples, microbatches)
        ):
            return self._as_unit(self._audited(known, samples))
        entries = self._entries(samples)
        found = self._probe(samples, entries)
        if found is not None and known is not None:
            self._check_unchanged(found, known)
        self._decision = found or known
        if found is None:
            return self._undetermined(samples)
        return self._as_unit(self._audited(found, samples))

    def _audited(self, decision: Decision, samples: Sequence[Any]) -> Decision:
        """Return a decision whose units fit all samples. Collective while windows are audited."""
        if not (decision.is_final and is_audited(self._num_windows)):
            return decision
        _, num_ranks = rank_and_size()
        halves = halves_of(samples, self._batch_size(), only_whole=num_ranks > 1)
        if num_ranks > 1:  # sharded models, and losses that call collectives, run equally often
            halves = halves[: min(on_all_ranks(lambda: len(halves)))]
        try:
            each = on_all_ranks(lambda: self._audit(halves, decision))
        except OutOfMemory:  # in the copies of parameters
            return decision
        errors = {name: max(found.get(name, 0.0) for found in each) for found in each for name in found}
        fitting = [name for name in decision.names if name not in errors]
        if not fitting and self._is_given:
            raise wrong_items(self._trainer, max(errors.values()))
        if not fitting:
            raise not_all_samples(self._trainer, errors)
        self._decision = decision.restrict(fitting, self._trainer)
        return self._decision

    def _audit(self, halves: Sequence[Sequence[Sequence[Any]]], decision: Decision) -> dict[str, float]:
        try:
            return audit(self._trainer, self._compute_loss, self._collator, halves, decision)
        except TypeError:  # a loss that requires num_items_in_batch is divided by what is passed
            if not self._is_given:
                raise
            return {}

    def _batch_size(self) -> int:
        return max(2, int(getattr(self._trainer.args, "per_device_train_batch_size", 2)))

    def _holds(self, known: Decision, samples: Sequence[Any], microbatches: Sequence[Any] | None) -> bool:
        """Return whether the counts of all units of a decision agree in a window. Collective if they are several."""
        if len(known.fitting) == 1:
            return True
        rank, _ = rank_and_size()
        each = on_all_ranks(
            lambda: None if microbatches is None else count_microbatches(microbatches, known.fitting, rank)
        )
        if all(entries is not None for entries in each):
            return self._agree([entry for entries in each for entry in entries or ()], known)
        return self._agree(self._entries(samples, known.names), known)

    def _may_have_changed(self) -> bool:
        return not self._is_given and self._num_windows <= FIRST_WINDOWS and hasattr(self._trainer, "ref_model")

    def _check_unchanged(self, found: Decision, known: Decision) -> None:
        if known.is_final and found.takes_num_items != known.takes_num_items:
            raise InputError(
                f"{subject_of(self._trainer)} was {known.describe()} in the first window and is {found.describe()} "
                "now: pass items=callable(inputs) -> number to exact()."
            )

    def _as_unit(self, decision: Decision) -> Unit:
        first, factor = decision.fitting[0], decision.factor
        name = SUM if decision.takes_num_items else first.name
        if factor == 1:
            return Unit(name, first.count, decision.takes_num_items)
        return Unit(name, lambda inputs: first.count(inputs) * factor, decision.takes_num_items)

    def _undetermined(self, samples: Sequence[Any]) -> Unit:
        """Return any unit: the gradient of one sample is the same in all, and NaN stays NaN."""
        return Unit("undetermined", lambda inputs: 1, takes_num_items=False)

    def _agree(self, entries: Sequence[Entry], decision: Decision) -> bool:
        names = [candidate.name for candidate in decision.fitting]
        if not entries or len(names) == 1:
            return True
        counted = set(names_of(entries))
        return counted.issuperset(names) and agree(
            entries, names, tolerance=decision.tolerance, absolute=decision.takes_num_items
        )

    def _entries(self, samples: Sequence[Any], names: Sequence[str] | None = None) -> list[Entry]:
        rank, _ = rank_and_size()
        each = on_all_ranks(lambda: count_samples(samples, self._collator, rank, names=names))
        return [entry for entries in each for entry in entries]

    def _probe(self, samples: Sequence[Any], entries: Sequence[Entry]) -> Decision | None:
        """Return the decision of this window; None if it has no sample, or one, or is not finite."""
        names = names_of(entries)
        max_samples = self._batch_size()
        decision: Decision | None = None
        has_gradient = True
        tried: list[Entry] = []
        for _ in range(MAX_PROBES if entries else 0):
            if decision is None:
                parts = choose_parts(entries, names, tried, max_samples)
            else:
                parts = most_different(entries, [candidate.name for candidate in decision.fitting])
            try:
                found = self._run(self._exchange(parts, samples))
            except Inconclusive as reason:
                has_gradient = reason.is_finite
                if len(parts) == 1:
                    return decision
                tried += [entry for part in parts for entry in part]
                continue
            except OutOfMemory:
                if max_samples == 2:
                    raise out_of_memory(self._trainer, parts) from None
                max_samples = 2
                continue
            decision = found if decision is None else decision.intersect(found, self._trainer)
            if self._agree(entries, decision):
                return decision
        if decision is not None and (best := decision.best()) is not None:
            return best
        if decision is not None:
            raise ambiguous(self._trainer, [each.name for each in decision.fitting])
        if entries and has_gradient and len(entries) > 1:
            raise no_gradient(self._trainer, len(entries))
        return None

    def _exchange(self, parts: Sequence[Sequence[Entry]], samples: Sequence[Any]) -> tuple[list[int], list[Any]]:
        """Return the number of samples, and the collated samples, of all parts together and of each. Collective."""
        rank, _ = rank_and_size()
        own = {entry.index: samples[entry.index] for part in parts for entry in part if entry.rank == rank}
        held = on_all_ranks(lambda: own)
        chosen = [[held[entry.rank][entry.index] for entry in part] for part in parts]
        # The first rank collates for all: a random collator draws other numbers on each.
        collated = on_all_ranks(lambda: collate_parts(chosen, self._collator) if rank == 0 else [])[0]
        sizes = [len(part) for part in chosen]
        return [sum(sizes), *sizes], collated

    def _run(self, probed: tuple[list[int], list[Any]]) -> Decision:
        """Return the decision for collated samples: the same on all ranks."""
        sizes, (whole, *parts) = probed
        if len(sizes) == 2:
            parts = parts[:1]
        candidates = candidates_for(parts[0], num_samples=sizes[1], label_names=self._collator.label_names)

        trainer = self._trainer

        def evaluate() -> Decision | Inconclusive:
            try:
                return run_precisely(
                    trainer, self._compute_loss, lambda probe: decide(trainer, probe, whole, parts, candidates)
                )
            except Inconclusive as reason:
                return reason

        def message(result: Decision | Inconclusive | None) -> Any:
            if isinstance(result, Decision):
                return result.names, result.tolerance, dict(result.errors)
            return isinstance(result, Inconclusive) and result.is_finite

        own, results = call_on_all_ranks(evaluate, message)
        if any(isinstance(each, bool) for each in results):
            raise Inconclusive(is_finite=all(each is not False for each in results))
        assert isinstance(own, Decision)
        tolerance = max(tolerance for _, tolerance, _ in results)  # ranks whose memory is short run in half precision
        errors = {name: max(errors[name] for *_, errors in results) for name in own.errors}
        names = [name for name in own.names if all(name in names for names, *_ in results)]
        return replace(own, tolerance=tolerance, errors=errors).restrict(names, self._trainer)
