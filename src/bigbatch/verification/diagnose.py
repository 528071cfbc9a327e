"""Diagnose why a cut does not yield the full-batch gradient, by testing hypotheses on the user's model.

Each cause that is found is eliminated (dropout off, batch norm on its running statistics) before the next is tested.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.verification.cut_gradients import CutGradients, relative_difference

NUM_NAMED = 3  # modules that a sentence lists before "and N more"


def find_causes(cut_gradients: CutGradients, reference: int, cut: int, tolerance: float) -> tuple[str, ...]:
    """Return, in sentences, why the gradient of micro-batches of ``cut`` samples differs from the reference.

    Changes the modes of modules: call it inside `preserve.preserved`.

    Args:
        cut_gradients: The model, loss and batch.
        reference: Samples per micro-batch of the reference.
        cut: Samples per micro-batch of the cut.
        tolerance: Largest relative error that counts as rounding.
    """
    if not math.isfinite(relative_difference(cut_gradients.gradient(reference), cut_gradients.gradient(reference))):
        return ("the gradient of the full batch is not finite: check the loss and the data first.",)
    causes: list[str] = []
    for hypothesis in (_randomness, _batch_norm, _losses_not_sums, _coupling):
        sentences = list(hypothesis(cut_gradients, reference, cut, tolerance))
        causes += sentences
        if sentences and hypothesis is _losses_not_sums:  # cannot be eliminated, and hides further causes
            break
        if relative_difference(cut_gradients.gradient(cut), cut_gradients.gradient(reference)) <= tolerance:
            break
    return tuple(causes) or (
        "unknown: losses and items add up, and no module mixes samples. If the error is small, the tolerance may be "
        "too tight for the depth of this network: verify in float64.",
    )


def _randomness(cut_gradients: CutGradients, reference: int, _cut: int, tolerance: float) -> Iterator[str]:
    """Yield a sentence if the gradient depends on the seed, and turn dropout off."""
    if not _depends_on_seed(cut_gradients, reference, tolerance):
        return
    dropouts = {
        name: module
        for name, module in cut_gradients.model.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0
    }
    for dropout in dropouts.values():
        dropout.eval()
    if dropouts:
        yield (
            f"dropout ({_listed(dropouts)}): it draws from the global random generator, so each cut has other masks. "
            "Every cut is a valid sample of the same gradient, but the numbers differ."
        )
    if _depends_on_seed(cut_gradients, reference, tolerance):
        for module in cut_gradients.model.modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False
        yield (
            "random numbers in the forward or in the loss: the gradient of the same batch changes with the seed, so "
            "each cut draws other numbers."
        )


def _depends_on_seed(cut_gradients: CutGradients, reference: int, tolerance: float) -> bool:
    # Not `>`: NaN from one of the seeds counts as a difference.
    return (
        not relative_difference(cut_gradients.gradient(reference, seed=1), cut_gradients.gradient(reference, seed=0))
        <= tolerance
    )


def _batch_norm(cut_gradients: CutGradients, _reference: int, _cut: int, _tolerance: float) -> Iterator[str]:
    """Yield a sentence if batch norms use statistics of the micro-batch, and switch them to running statistics."""
    norms = {
        name: module
        for name, module in cut_gradients.model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
    }
    for norm in norms.values():
        norm.eval()
    if norms:
        yield (
            f"BatchNorm in training mode ({_listed(norms)}): it normalizes by the mean and variance of the "
            "micro-batch, so samples influence each other. Set it to eval mode, or use GroupNorm or LayerNorm."
        )


def _losses_not_sums(cut_gradients: CutGradients, reference: int, cut: int, tolerance: float) -> Iterator[str]:
    """Yield a sentence for each term whose items do not add up, or whose loss is a mean instead of a sum."""
    whole, parts = _by_term(cut_gradients.terms(reference)), _by_term(cut_gradients.terms(cut))
    for name, values in whole.items():
        total, total_items = (math.fsum(column) for column in zip(*values, strict=True))
        sums, counts = zip(*parts.get(name, [(0.0, 0.0)]), strict=True)
        if math.fsum(counts) != total_items:
            yield (
                f"the items of the term {name!r} do not add up: {total_items:g} in the full batch, but "
                f"{math.fsum(counts):g} over its micro-batches of {cut}. Count exactly the items that the loss sums."
            )
        elif len(values) == 1 < len(sums) and min(sums) <= total <= max(sums) and total:
            yield (
                f"the loss of the term {name!r} is not a sum: {total:.6g} for the full batch lies between those of its "
                f"{len(sums)} micro-batches ({min(sums):.6g} to {max(sums):.6g}), like a mean. "
                "Use reduction='sum' and return the number of items."
            )


def _by_term(microbatches: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, list[tuple[float, float]]]:
    by_term = defaultdict(list)
    for terms in microbatches:
        for name, pair in terms.items():
            by_term[name].append(pair)
    return dict(by_term)


def _coupling(cut_gradients: CutGradients, reference: int, cut: int, tolerance: float) -> Iterator[str]:
    """Yield a sentence that names the source of coupling between samples: a module, an auxiliary loss, or the loss."""
    whole, parts = _ActivationRecorder(cut_gradients, reference), _ActivationRecorder(cut_gradients, cut)
    mixing = next((name for name in whole.order if _differs(whole.outputs, parts.outputs, name, tolerance)), None)
    if mixing is not None:
        if _differs(whole.inputs, parts.inputs, mixing, tolerance) and mixing:
            mixing = mixing.rpartition(".")[0]
        kind = type(cut_gradients.model.get_submodule(mixing)).__name__
        yield (
            f"{f'the module {mixing!r}' if mixing else 'the model'} ({kind}) mixes samples: its outputs for the same "
            "samples change when the batch is split."
        )
    elif auxiliary := _auxiliary_losses(cut_gradients.model, whole.root_output):
        yield (
            f"an auxiliary loss inside the model ({', '.join(auxiliary)}): it is computed per micro-batch, and the "
            "sum over micro-batches is not that of the full batch. Remove it from loss_fn, or accept the difference."
        )
    elif not _additive(cut_gradients, reference, cut, tolerance):
        yield (
            "the loss couples samples: the sums of the micro-batches do not add up to that of the full batch, although "
            "the model computes each sample independently. Contrastive, ranking and batch-statistics losses do this."
        )


def _additive(cut_gradients: CutGradients, reference: int, cut: int, tolerance: float) -> bool:
    whole, parts = _by_term(cut_gradients.terms(reference)), _by_term(cut_gradients.terms(cut))
    return all(
        math.isclose(math.fsum(s for s, _ in values), math.fsum(s for s, _ in parts[name]), rel_tol=tolerance)
        for name, values in whole.items()
    )


class _ActivationRecorder:
    """Records the first input and output tensor of every module that runs once per micro-batch."""

    def __init__(self, cut_gradients: CutGradients, microbatch: int) -> None:
        self.inputs: dict[str, list[Tensor]] = defaultdict(list)
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)
        self.order: list[str] = []  # of completion: submodules before their parent
        self.root_output: Any = None
        handles = [m.register_forward_hook(self._hook(name)) for name, m in cut_gradients.model.named_modules()]
        try:
            num_microbatches = len(cut_gradients.terms(microbatch))
        finally:
            for handle in handles:
                handle.remove()
        self.order = [name for name in dict.fromkeys(self.order) if len(self.outputs[name]) == num_microbatches]

    def _hook(self, name: str) -> Any:
        def record(_module: nn.Module, inputs: Any, output: Any) -> None:
            self.order.append(name)
            self.inputs[name] += [tensor.clone() for tensor in _tensors(inputs)[:1]]
            self.outputs[name] += [tensor.clone() for tensor in _tensors(output)[:1]]
            if not name:
                self.root_output = output

        return record


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.ndim else []
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for part in value for tensor in _tensors(part)]


def _differs(whole: Mapping[str, list[Tensor]], parts: Mapping[str, list[Tensor]], name: str, tolerance: float) -> bool:
    """Return whether the rows differ; rows of different widths (other padding) are not compared and count as equal."""
    pair = [tensors.get(name, []) for tensors in (whole, parts)]
    if not all(pair) or len({tensor.shape[1:] for tensors in pair for tensor in tensors}) > 1:
        return False
    expected, actual = (torch.cat(tensors) for tensors in pair)
    if expected.shape != actual.shape or not expected.is_floating_point():
        return False
    scale = expected.double().norm()
    return bool((expected.double() - actual.double()).norm() > tolerance * scale)


def _auxiliary_losses(model: nn.Module, output: Any) -> list[str]:
    """Return the names of 0-d floating outputs other than the loss, and of 0-d ``*loss*`` or ``*aux*`` attributes."""
    found = []
    if isinstance(output, Mapping):
        found += [f"output {name!r}" for name, value in output.items() if name != "loss" and _is_scalar(value)]
    elif isinstance(output, tuple):
        found += [f"output {index}" for index, value in enumerate(output) if _is_scalar(value)]
    for name, module in model.named_modules():
        found += [
            f"{name}.{attribute}".lstrip(".")
            for attribute, value in vars(module).items()
            if "loss" in attribute.lower() or "aux" in attribute.lower()
            if _is_scalar(value)
        ]
    return found


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.ndim and value.is_floating_point()


def _listed(modules: Mapping[str, nn.Module]) -> str:
    named = [f"{name or 'the model'}: {type(module).__name__}" for name, module in modules.items()]
    more = f" and {len(named) - NUM_NAMED} more" if len(named) > NUM_NAMED else ""
    return ", ".join(named[:NUM_NAMED]) + more
