"""Find the weights that a loss reads otherwise than in a linear layer, before the first window at level "master"."""

from functools import partial
from typing import Any

from torch import Tensor

from bigbatch.accumulation.accumulator import Accumulator
from bigbatch.accumulation.optimizer_state import init_optimizer_state
from bigbatch.batching.split import Split
from bigbatch.coupled.coupled import Coupled
from bigbatch.errors import InputError
from bigbatch.gradients.loss_totals import as_terms
from bigbatch.preserve import preserved
from bigbatch.trials.loss_modules import modules_used_by
from bigbatch.types import LossFunction


def probe_weights(accumulator: Accumulator, loss_fn: LossFunction, parts: Split) -> None:
    """Run the forward of one sample with the weights as they are on the device, and put back those that it rounds.

    Model and random states are as before. No-op without narrow weights, without a sample, and after the first time.

    Raises:
        InputError: The loss is a `Coupled`, or does not run with weights in bfloat16, at level ``"master"``.
    """
    offload = accumulator.update.offload
    if offload is None or not offload.wants_probe or not parts.groups:
        return
    if isinstance(loss_fn, Coupled):
        if offload.keep_all_wide():
            offload.prepare(init_optimizer_state)
            return
        raise InputError(
            'offload="master" looks at the graph of the loss, and that of a Coupled has two parts: pass '
            'offload="optimizer".'
        )
    with preserved(accumulator.sync.module, *modules_used_by(loss_fn), parameters=False):
        found = offload.probe(partial(_loss, accumulator.model, loss_fn, parts), accumulator.sync.module)
    if found is not None:
        offload.keep_wide(found)
        offload.prepare(init_optimizer_state)


def _loss(model: Any, loss_fn: LossFunction, parts: Split) -> Tensor:
    terms = as_terms(loss_fn(model, parts.copied().take(parts.groups[-1][:1])))
    loss: Tensor = sum(loss_sum for loss_sum, _ in terms.values())  # type: ignore[assignment]
    return loss
