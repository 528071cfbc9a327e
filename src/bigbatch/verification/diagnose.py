"""Diagnose why a cut does not yield the full-batch gradient, by testing hypotheses on the user's model.

Each cause that is found is eliminated (dropout off, batch norm on its running statistics, state reset, hooks removed)
before the next is tested. A cause in the loss itself ends the diagnosis: it cannot be eliminated, and hides others.
"""

import math
from collections.abc import Callable, Iterator

from bigbatch.coupled.coupled import Coupled
from bigbatch.verification.causes.case import Case, Cause, Kind
from bigbatch.verification.causes.coupling import auxiliary_losses, coupling_loss, mixing_modules
from bigbatch.verification.causes.hooks import custom_backward, gradient_hooks
from bigbatch.verification.causes.losses import losses_not_sums, other_count, pairs, penalty
from bigbatch.verification.causes.modules import batch_norm, changing_state, randomness
from bigbatch.verification.cut_gradients import relative_difference

NOT_FINITE = Cause(Kind.NOT_FINITE, "the gradient of the full batch is not finite: check the loss and the data first.")
UNKNOWN = Cause(
    Kind.UNKNOWN,
    "unknown: losses and items add up, and no module mixes samples. If the error is small, the tolerance may be too "
    "tight for the depth of this network: verify in float64.",
)

Hypothesis = Callable[[Case], Iterator[Cause]]
ELIMINATED: tuple[Hypothesis, ...] = (randomness, batch_norm, changing_state, gradient_hooks)
FINAL: tuple[Hypothesis, ...] = (
    pairs,
    losses_not_sums,
    mixing_modules,
    penalty,
    other_count,
    custom_backward,
    auxiliary_losses,
    coupling_loss,
)


def find_causes(case: Case) -> tuple[Cause, ...]:
    """Return why the gradient of a cut differs from that of the reference; never empty.

    Changes the modes of modules: call it inside `preserve.preserved`.

    Args:
        case: Two cuts whose gradients differ.
    """
    if not math.isfinite(relative_difference(case.gradient(case.reference), case.gradient(case.reference))):
        return (NOT_FINITE,)
    causes: list[Cause] = []
    with case.eliminated:
        for hypothesis in ELIMINATED:
            found = list(hypothesis(case))
            causes += found
            if found and case.is_explained():
                return tuple(causes)
        coupled = isinstance(case.cut_gradients.loss_fn, Coupled)  # its values are those of the whole batch
        for hypothesis in (mixing_modules,) if coupled else FINAL:
            if found := list(hypothesis(case)):
                return (*causes, *found)
    return tuple(causes) or (UNKNOWN,)
