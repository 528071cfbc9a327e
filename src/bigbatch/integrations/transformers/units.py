"""Find out what the loss of a Trainer is averaged over, by its gradients on the samples of a window.

samples → counts in every unit → a few samples, together and in parts → the unit in which their gradients add up
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from bigbatch.errors import InputError, RankFailedError
from bigbatch.integrations.transformers.precision import Precision, in_precision, precisions_for
from bigbatch.integrations.transformers.traceless import traceless
from bigbatch.integrations.transformers.unit_counts import Candidate, candidates_for
from bigbatch.integrations.transformers.unit_decision import Decision, Inconclusive, decide
from bigbatch.integrations.transformers.unit_probe import ComputeLoss, LossProbe
from bigbatch.integrations.transformers.unit_refusals import (
    ambiguous,
    no_gradient,
    out_of_memory,
    refuse_coupled_losses,
    subject_of,
)
from bigbatch.integrations.transformers.window_samples import (
    Collator,
    Entry,
    agree,
    choose_parts,
    collate_parts,
    count_samples,
    most_different,
    names_of,
)
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory

T = TypeVar("T")
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
    """

    def __init__(self, trainer: Any, collate: Callable[[Any], Any], compute_loss: ComputeLoss) -> None:
        self._trainer, self._compute_loss = trainer, compute_loss
        owners = [getattr(trainer, "data_collator", None)]
        self._collator = Collator(collate, owners, tuple(getattr(trainer, "label_names", None) or ()))
        self._decision: Decision | None = None
        self._num_windows = 0

    def unit(self, samples: Sequence[Any]) -> Unit:
        """Return the unit for a window.

        The first call runs the model on a few samples of the window, as do later calls while the windows before were
        of one sample or not finite, or if this window separates units whose counts agreed in all others.

        Args:
            samples: Of this rank, not collated; may be empty.

        Raises:
            InputError: No unit fits, or several that count this window differently; on all ranks.
            RankFailedError: Another rank failed.
        """
        refuse_coupled_losses(self._trainer)
        self._num_windows += 1
        known = self._decision
        if known is not None and known.is_final and not self._may_have_changed() and self._holds(known, samples):
            return self._as_unit(known)
        entries = self._entries(samples)
        found = self._probe(samples, entries)
        if found is not None and known is not None:
            self._check_unchanged(found, known)
        self._decision = found or known
        if found is None:
            return self._undetermined(samples)
        return self._as_unit(found)

    def _holds(self, known: Decision, samples: Sequence[Any]) -> bool:
        """Return whether the counts of all units of a decision agree in a window. Collective if they are several."""
        return len(known.fitting) == 1 or self._agree(self._entries(samples, known.names), known)

    def _may_have_changed(self) -> bool:
        return self._num_windows <= FIRST_WINDOWS and hasattr(self._trainer, "ref_model")

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
        rank, _ = _rank_and_size()
        each = self._on_all_ranks(lambda: count_samples(samples, self._collator, rank, names=names))
        return [entry for entries in each for entry in entries]

    def _probe(self, samples: Sequence[Any], entries: Sequence[Entry]) -> Decision | None:
        """Return the decision of this window; None if it has no sample, or one, or is not finite."""
        names = names_of(entries)
        max_samples = max(2, int(getattr(self._trainer.args, "per_device_train_batch_size", 2)))
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
            except _OutOfMemoryError:
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
        rank, _ = _rank_and_size()
        own = {entry.index: samples[entry.index] for part in parts for entry in part if entry.rank == rank}
        held = self._on_all_ranks(lambda: own)
        chosen = [[held[entry.rank][entry.index] for entry in part] for part in parts]
        # The first rank collates for all: a random collator draws other numbers on each.
        collated = self._on_all_ranks(lambda: collate_parts(chosen, self._collator) if rank == 0 else [])[0]
        sizes = [len(part) for part in chosen]
        return [sum(sizes), *sizes], collated

    def _run(self, probed: tuple[list[int], list[Any]]) -> Decision:
        """Return the decision for collated samples: the same on all ranks."""
        sizes, (whole, *parts) = probed
        if len(sizes) == 2:
            parts = parts[:1]
        candidates = candidates_for(parts[0], num_samples=sizes[1], label_names=self._collator.label_names)

        def evaluate() -> Decision | Inconclusive:
            try:
                return self._evaluate(whole, parts, candidates)
            except Inconclusive as reason:
                return reason

        def message(result: Decision | Inconclusive | None) -> Any:
            if isinstance(result, Decision):
                return result.names, result.tolerance, dict(result.errors)
            return isinstance(result, Inconclusive) and result.is_finite

        own, results = self._call_on_all_ranks(evaluate, message)
        if any(isinstance(each, bool) for each in results):
            raise Inconclusive(is_finite=all(each is not False for each in results))
        assert isinstance(own, Decision)
        tolerance = max(tolerance for _, tolerance, _ in results)  # ranks whose memory is short run in half precision
        errors = {name: max(errors[name] for *_, errors in results) for name in own.errors}
        names = [name for name in own.names if all(name in names for names, *_ in results)]
        return replace(own, tolerance=tolerance, errors=errors).restrict(names, self._trainer)

    def _evaluate(self, whole: Any, parts: Sequence[Any], candidates: Sequence[Candidate]) -> Decision:
        """Decide in the most precise arithmetic that the model runs in."""
        trainer = self._trainer
        precisions = precisions_for(trainer)
        for number, precision in enumerate(precisions, 1):
            try:
                with traceless(trainer, self._compute_loss) as model, in_precision(trainer, precision):
                    is_rounded = precision is Precision.AUTOCAST
                    probe = LossProbe(trainer, model, self._compute_loss, autocast=is_rounded)
                    return decide(trainer, probe, whole, parts, candidates)
            except (InputError, Inconclusive):
                raise
            except Exception as error:  # kernels such as flash attention need half precision
                is_last = number == len(precisions)
                if is_last or (is_out_of_memory(error) and precision is not Precision.FLOAT32):
                    raise
            free_cached_memory()
        raise AssertionError("the last precision returns or raises")

    def _on_all_ranks(self, function: Callable[[], T]) -> list[T]:
        """Call a function on every rank and return the results of all; if one fails, all raise. Collective."""
        return self._call_on_all_ranks(function, lambda value: value)[1]

    def _call_on_all_ranks(self, function: Callable[[], T], message: Callable[[T], Any]) -> tuple[T | None, list[Any]]:
        """Call a function on every rank and return its result, and a message of every rank's. Collective."""
        _, size = _rank_and_size()
        error: Exception | None = None
        failure: tuple[str, str] | None = None
        own: T | None = None
        sent: Any = None
        try:
            own = function()
            sent = message(own)
        except Exception as raised:  # noqa: BLE001 - the other ranks wait; raised below
            error = raised
            failure = _kind(raised), f"{type(raised).__name__}: {raised}"
        outcomes: list[Any] = [(sent, failure)]
        if size > 1:
            import torch.distributed as dist

            outcomes = [(None, None)] * size
            dist.all_gather_object(outcomes, (sent, failure))
        failures = [each for _, each in outcomes if each is not None]
        if failures and all(kind == "memory" for kind, _ in failures):
            error = None  # its traceback references tensors
            free_cached_memory()
            raise _OutOfMemoryError
        if error is not None:
            raise error
        for other, (_, each) in enumerate(outcomes):
            if each is not None:
                kind, text = each
                if kind == "input":
                    raise InputError(text.partition(": ")[2])
                raise RankFailedError(f"rank {other} failed while the unit of the loss was determined: {text}")
        return own, [value for value, _ in outcomes]


class _OutOfMemoryError(Exception):
    """The probe ran out of memory on a rank."""


def _kind(error: Exception) -> str:
    if is_out_of_memory(error):
        return "memory"
    return "input" if isinstance(error, InputError) else ""


def _rank_and_size() -> tuple[int, int]:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
