"""Errors for losses whose unit cannot be determined: what is wrong, then the call to make."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bigbatch.errors import InputError

ADVICE = (
    "Pass items=callable(inputs) -> number to exact() if you know what it is averaged over, or use "
    "weights(trainer, items=...) to weight micro-batches only."
)
_COUPLED_DPO_LOSSES = ("aot", "aot_unpaired")


def _advice(trainer: Any) -> str:
    """Return what to do about a loss that is a mean over nothing known."""
    if any(kind.__module__.startswith("sentence_transformers.") for kind in type(trainer).__mro__):
        return (
            "For losses with in-batch negatives, and all others that compare the samples of a batch, use exact() of "
            "bigbatch.integrations.sentence_transformers."
        )
    return ADVICE


def subject_of(trainer: Any) -> str:
    """Return the loss of a trainer as the subject of a sentence."""
    return f"the loss of {class_name(trainer)} ({type(getattr(trainer, 'model', None)).__name__})"


def class_name(trainer: Any) -> str:
    """Return the name of the class of a trainer, before `exact` or `weights` was called on it."""
    kinds = type(trainer).__mro__
    if len(kinds) == 1 or not kinds[1].__module__.startswith("bigbatch."):
        return kinds[0].__name__
    return next(kind for kind in kinds[1:] if not kind.__module__.startswith("bigbatch.")).__name__


def refuse_coupled_losses(trainer: Any) -> None:
    """Raise for losses of TRL in which samples influence one another, which the first window may hide.

    At the start the model equals its reference: the KL term of KTO is then 0, and all log-ratios are equal.

    Raises:
        InputError: The loss is one of them.
    """
    if getattr(trainer, "calculate_KL", False) or getattr(trainer, "calculate_kl", False):
        loss_type = getattr(trainer, "loss_type", None) or getattr(trainer.args, "loss_type", None)
        raise InputError(
            f"loss_type={loss_type!r} subtracts a KL estimate that is the mean over a micro-batch, so samples "
            "influence one another and micro-batches do not add up to the batch. Use loss_type='apo_zero_unpaired', "
            "which is exact, or weights(trainer, items=...) to weight micro-batches only."
        )
    loss_types = getattr(trainer.args, "loss_type", None)
    listed = [loss_types] if isinstance(loss_types, str) else list(loss_types or ())
    coupled = [each for each in listed if each in _COUPLED_DPO_LOSSES]
    if coupled:
        raise InputError(
            f"loss_type={coupled[0]!r} sorts the log-ratios of a micro-batch, so samples influence one another and "
            "micro-batches do not add up to the batch. Use another loss_type such as 'sigmoid', or "
            "weights(trainer, items=...) to weight micro-batches only."
        )


def changing_divisor(trainer: Any, num_items: int, once: float, twice: float) -> InputError:
    """Return the error for a loss that is neither divided by num_items_in_batch nor independent of it."""
    return InputError(
        f"{subject_of(trainer)} is neither divided by num_items_in_batch nor independent of it ({once:.6g} for "
        f"{num_items}, {twice:.6g} for {2 * num_items}): it has several terms, such as an auxiliary loss of a router. "
        f"Turn the auxiliary loss off (output_router_logits=False), or use weights(trainer, items=...)."
    )


def divided_by_steps(trainer: Any) -> InputError:
    """Return the error for a loss that divides by the number of accumulation steps."""
    return InputError(
        f"{subject_of(trainer)} depends on args.gradient_accumulation_steps, and exact() divides by the items of the "
        "whole window: return the mean of the micro-batch undivided."
    )


def wrong_count(trainer: Any, ratio: float, counts: Mapping[str, float]) -> InputError:
    """Return the error for a sum whose number of items is none of the counts."""
    listed = ", ".join(f"{count:g} {name}" for name, count in counts.items()) or "no labels"
    return InputError(
        f"{subject_of(trainer)} of one sample is {ratio:.6g} times as large with num_items_in_batch=1 as without it, "
        f"and the sample has {listed}: the number of items is unknown. {ADVICE}"
    )


def coupled_sum(trainer: Any) -> InputError:
    """Return the error for a sum over samples that influence one another."""
    return InputError(
        f"{subject_of(trainer)} does not add up over samples, although it is divided by num_items_in_batch: samples "
        "influence one another, as in batch norm or contrastive losses. Use weights(trainer, items=...) to weight "
        "micro-batches only."
    )


def random_loss(trainer: Any) -> InputError:
    """Return the error for a mean that draws random numbers in eval mode."""
    return InputError(
        f"{subject_of(trainer)} draws random numbers in eval mode too, so that its unit cannot be determined by "
        f"comparing gradients. {ADVICE}"
    )


def no_unit(trainer: Any, errors: Mapping[str, float]) -> InputError:
    """Return the error for a mean that fits no unit."""
    listed = ", ".join(f"{name} {error:.1e}" for name, error in errors.items()) or "no unit can be counted"
    return InputError(
        f"{subject_of(trainer)} is a mean over none of the known units (relative error of the gradient: {listed}): "
        "samples influence one another, the loss has several terms in different units or class weights (whose number "
        "of items is weight[labels].sum()), it is a sum instead of a mean, or it depends on padding. "
        f"{_advice(trainer)}"
    )


def not_all_samples(trainer: Any, errors: Mapping[str, float]) -> InputError:
    """Return the error for a mean whose unit fits a few samples, but not all of a window."""
    if all(math.isinf(error) for error in errors.values()):
        return InputError(
            f"{subject_of(trainer)} is a mean over {' or '.join(errors)}, padding included, so it depends on which "
            "samples are padded together: pad all samples to one length in the data collator, or average over labels."
        )
    listed = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return InputError(
        f"{subject_of(trainer)} is a mean over none of the known units for all samples of this window (relative error "
        f"of the loss: {listed}): it has class weights or several terms, leaves out labels, depends on padding, or "
        f"samples influence one another. {_advice(trainer)}"
    )


def wrong_items(trainer: Any, error: float) -> InputError:
    """Return the error for ``items=`` that do not count what the loss is averaged over."""
    return InputError(
        f"items= does not count what {subject_of(trainer)} is averaged over: with these counts the loss of a "
        f"micro-batch is not the mean of its two halves (relative error {error:.1e}). Return the number that the loss "
        "is divided by, for class weights weight[labels].sum(), and a mean from the loss. A loss with several terms, "
        "or in which samples influence one another, has no such number: use weights(trainer, items=...) to weight "
        "micro-batches only."
    )


def no_unit_for_all(trainer: Any, first: Sequence[str], second: Sequence[str]) -> InputError:
    """Return the error for different units on other samples or ranks."""
    return InputError(
        f"{subject_of(trainer)} is a mean over {' or '.join(first) or 'no unit'} for some samples and over "
        f"{' or '.join(second) or 'no unit'} for others, so no unit fits all. {ADVICE}"
    )


def ambiguous(trainer: Any, names: Sequence[str]) -> InputError:
    """Return the error for several units that fit but count the window differently."""
    return InputError(
        f"{subject_of(trainer)} may be averaged over {' or '.join(names)}: all fit the gradients of this window, but "
        f"they count its samples differently. {ADVICE}"
    )


def depends_on_ranks(trainer: Any) -> InputError:
    """Return the error for a loss that uses values of other ranks."""
    return InputError(
        f"{subject_of(trainer)} uses values of other ranks (torch.distributed, or gather or reduce of its "
        "accelerator), so micro-batches do not add up to the batch. Return the mean over the micro-batch of this rank, "
        "or use weights(trainer, items=...) to weight micro-batches only."
    )


def unequal_micro_batches(trainer: Any) -> InputError:
    """Return the error for micro-batches that differ by rank, for a loss that calls collectives."""
    return InputError(
        f"{subject_of(trainer)} calls torch.distributed, so all ranks must run micro-batches of as many samples, "
        'which a TokenBudget, microbatch="auto" and memory= do not give: pass microbatch= a number of samples, or '
        "communicate by trainer.accelerator, which returns the values of this rank inside a window."
    )


def no_gradient(trainer: Any, num_samples: int) -> InputError:
    """Return the error for a window whose probed samples have no gradient."""
    return InputError(
        f"{subject_of(trainer)} has a gradient of 0 for the samples of this window that were tried ({num_samples} in "
        f"all), so its unit cannot be determined. {ADVICE}"
    )


def out_of_memory(trainer: Any, parts: Sequence[Sequence[Any]]) -> InputError:
    """Return the error for a probe that does not fit in memory."""
    sizes = ", ".join(str(entry.size) for part in parts for entry in part)
    return InputError(
        f"memory is insufficient to determine the unit of {subject_of(trainer)} from two samples together (of {sizes} "
        "elements): pass items=callable(inputs) -> number to exact()."
    )
