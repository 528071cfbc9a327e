"""Check on all samples of a window that a loss adds up in the unit that was found on a few of them.

    n12 · loss12 = n1 · loss1 + n2 · loss2  for the halves of each micro-batch

The few samples may have equal class weights, no label that the loss leaves out, and no padding. Values of the loss do
not prove a unit, but disprove others; they need no gradient, so that a whole window can be run.
"""

import math
from collections.abc import Sequence
from typing import Any

from bigbatch.integrations.transformers.precision import run_precisely
from bigbatch.integrations.transformers.unit_counts import Candidate
from bigbatch.integrations.transformers.unit_decision import Decision
from bigbatch.integrations.transformers.unit_probe import ComputeLoss, LossProbe
from bigbatch.integrations.transformers.unit_samples import Collator, collate_parts
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory

FIRST_WINDOWS = 4


def is_audited(number: int) -> bool:
    """Return whether the window of a number, from 1, is audited: the first ones, and then at powers of two.

    A term of the loss may start later, and a rare class appear later.
    """
    return number <= FIRST_WINDOWS or not number & (number - 1)


def halves_of(samples: Sequence[Any], size: int, *, only_whole: bool) -> list[list[Sequence[Any]]]:
    """Return the samples of micro-batches of a size, at least 2, each in two halves.

    Args:
        samples: Of a window.
        size: Samples of one micro-batch.
        only_whole: Whether a last micro-batch that is smaller is left out, and not only one of a single sample.
    """
    size = max(2, size)
    chunks = [samples[start : start + size] for start in range(0, len(samples), size)]
    least = size if only_whole else 2
    return [[chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :]] for chunk in chunks if len(chunk) >= least]


def audit(
    trainer: Any,
    compute_loss: ComputeLoss,
    collator: Collator,
    halves: Sequence[Sequence[Sequence[Any]]],
    decision: Decision,
) -> dict[str, float]:
    """Return the largest relative error of the loss of each unit of a decision that does not fit all samples.

    Args:
        trainer: Nothing is changed on it.
        compute_loss: Its own.
        collator: Makes micro-batches.
        halves: The samples of this rank; of a sharded model, equally many on every rank.
        decision: Made on a few samples.
    """
    errors = dict.fromkeys(decision.names, 0.0)

    def run(probe: LossProbe) -> dict[str, float]:
        for number, parts in enumerate(halves):
            micro_batches = collate_parts(parts, collator)
            if not number:
                probe.choose_mode(micro_batches[1])
                if probe.is_random:
                    return {}
            values = [probe.value(each, 1 if decision.takes_num_items else None) for each in micro_batches]
            for candidate in decision.fitting:
                found = _error(candidate, decision, micro_batches, values)
                errors[candidate.name] = max(errors[candidate.name], found)
        return {name: error for name, error in errors.items() if error > probe.value_tolerance}

    try:
        return run_precisely(trainer, compute_loss, run) if halves else {}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    free_cached_memory()
    return {}  # two samples may be more than a micro-batch: the unit is that of the probe


def _error(candidate: Candidate, decision: Decision, micro_batches: Sequence[Any], values: Sequence[float]) -> float:
    counts = [1.0 if decision.takes_num_items else float(candidate.count(each)) for each in micro_batches]
    if candidate.depends_on_padding and not decision.takes_num_items and counts[0] != sum(counts[1:]):
        return math.inf  # the whole batch would be padded to another length, and have another mean
    terms = [count * value for count, value in zip(counts, values, strict=True) if count]
    if not all(map(math.isfinite, terms)):
        return 0.0  # such a window is reported when it runs
    scale = sum(map(abs, terms))
    return abs(terms[0] - sum(terms[1:])) / scale if len(terms) > 1 and counts[0] and scale else 0.0
