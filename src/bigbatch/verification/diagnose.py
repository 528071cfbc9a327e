"""Why a cut does not give the full-batch gradient: hypotheses, each tried on the user's own model.

Every cause that is found is taken out of the way (dropout off, batch norm on its running statistics), so that the next
one can be seen behind it.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.verification.cut_gradients import CutGradients, relative_difference

NUM_NAMED = 3  # modules that a sentence lists before it says "and N more"


def find_causes(trial: CutGradients, reference: int, cut: int, tolerance: float) -> tuple[str, ...]:
    """Say in sentences why micro-batches of ``cut`` samples differ from those of ``reference`` samples.

    Leaves modules in other modes than it found them in: call it inside `preserve.preserved`.
    """
    if not math.isfinite(relative_difference(trial.gradient(reference), trial.gradient(reference))):
        return ("the gradient of the full batch is not finite: look at the loss and the data before any cut.",)
    causes: list[str] = []
    for hypothesis in (_randomness, _batch_norm, _losses_not_sums, _coupling):
        found = list(hypothesis(trial, reference, cut, tolerance))
        causes += found
        if found and hypothesis is _losses_not_sums:  # cannot be taken out of the way, and hides what is behind it
            break
        if relative_difference(trial.gradient(cut), trial.gradient(reference)) <= tolerance:
            break
    return tuple(causes) or (
        "unknown: losses and items add up, and no module mixes samples. If the error is small, the tolerance may be "
        "too tight for this network's depth: look at the same in float64.",
    )


def _randomness(trial: CutGradients, reference: int, _cut: int, tolerance: float) -> Iterator[str]:
    """Yield a sentence if the gradient depends on the seed, and turn dropout off."""
    if not _depends_on_seed(trial, reference, tolerance):
        return
    dropouts = {
        name: module
        for name, module in trial.model.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0
    }
    for dropout in dropouts.values():
        dropout.eval()
    if dropouts:
        yield (
            f"dropout ({_listed(dropouts)}): its random numbers come from the global generator, so another cut draws "
            "other masks. Each cut is a valid sample of the same gradient; the numbers differ."
        )
    if _depends_on_seed(trial, reference, tolerance):
        for module in trial.model.modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False
        yield (
            "random numbers in the forward or in the loss: the gradient of one and the same batch changes with the "
            "seed, so another cut draws others."
        )


def _depends_on_seed(trial: CutGradients, reference: int, tolerance: float) -> bool:
    # Not `>`: a NaN from one of the seeds is a difference too.
    return not relative_difference(trial.gradient(reference, seed=1), trial.gradient(reference, seed=0)) <= tolerance


def _batch_norm(trial: CutGradients, _reference: int, _cut: int, _tolerance: float) -> Iterator[str]:
    """Yield a sentence if batch norms normalise by the micro-batch, and let them use their running statistics."""
    norms = {
        name: module
        for name, module in trial.model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
    }
    for norm in norms.values():
        norm.eval()
    if norms:
        yield (
            f"BatchNorm in training mode ({_listed(norms)}): it normalises by the mean and variance of the "
            "micro-batch, so samples influence one another. Put it in eval mode, or use GroupNorm or LayerNorm."
        )


def _losses_not_sums(trial: CutGradients, reference: int, cut: int, tolerance: float) -> Iterator[str]:
    """Yield a sentence for each term whose items or sums over the cut are not those of the reference."""
    whole, parts = _by_term(trial.terms(reference)), _by_term(trial.terms(cut))
    for name, values in whole.items():
        total, total_items = (math.fsum(column) for column in zip(*values, strict=True))
        sums, counts = zip(*parts.get(name, [(0.0, 0.0)]), strict=True)
        if math.fsum(counts) != total_items:
            yield (
                f"the items of the term {name!r} do not add up: {total_items:g} in the full batch, and "
                f"{math.fsum(counts):g} over its micro-batches of {cut}. Count what the loss sums over, and that alone."
            )
        elif len(values) == 1 < len(sums) and min(sums) <= total <= max(sums) and total:
            yield (
                f"the loss of the term {name!r} is not a sum: {total:.6g} for the full batch lies between those of its "
                f"{len(sums)} micro-batches ({min(sums):.6g} to {max(sums):.6g}), as a mean does. "
                "Return reduction='sum' and the count."
            )


def _by_term(microbatches: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, list[tuple[float, float]]]:
    by_term = defaultdict(list)
    for terms in microbatches:
        for name, pair in terms.items():
            by_term[name].append(pair)
    return dict(by_term)


def _coupling(trial: CutGradients, reference: int, cut: int, tolerance: float) -> Iterator[str]:
    """Yield a sentence that names what lets samples influence one another: a module, the model's own loss, the loss."""
    whole, parts = _ActivationRecorder(trial, reference), _ActivationRecorder(trial, cut)
    mixing = next((name for name in whole.order if _differs(whole.outputs, parts.outputs, name, tolerance)), None)
    if mixing is not None:
        if _differs(whole.inputs, parts.inputs, mixing, tolerance) and mixing:
            mixing = mixing.rpartition(".")[0]
        kind = type(trial.model.get_submodule(mixing)).__name__
        yield (
            f"{f'the module {mixing!r}' if mixing else 'the model'} ({kind}) mixes samples: for the same samples it "
            "gives other outputs when the batch is cut."
        )
    elif auxiliary := _auxiliary_losses(trial.model, whole.root_output):
        yield (
            f"an auxiliary loss inside the model ({', '.join(auxiliary)}): it is computed over each micro-batch, and "
            "the sum of those is not the one of the full batch. Leave it out of loss_fn, or accept it per micro-batch."
        )
    elif not _additive(trial, reference, cut, tolerance):
        yield (
            "the loss couples samples: the micro-batches' sums do not add up to the full batch's, though the model "
            "treats each sample alike. Contrastive, ranking and batch-statistics losses do this."
        )


def _additive(trial: CutGradients, reference: int, cut: int, tolerance: float) -> bool:
    whole, parts = _by_term(trial.terms(reference)), _by_term(trial.terms(cut))
    return all(
        math.isclose(math.fsum(s for s, _ in values), math.fsum(s for s, _ in parts[name]), rel_tol=tolerance)
        for name, values in whole.items()
    )


class _ActivationRecorder:
    """First input and output tensor of every module that runs once per micro-batch, over all micro-batches."""

    def __init__(self, trial: CutGradients, microbatch: int) -> None:
        self.inputs: dict[str, list[Tensor]] = defaultdict(list)
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)
        self.order: list[str] = []  # of completion: what is inside a module comes before it
        self.root_output: Any = None
        handles = [m.register_forward_hook(self._hook(name)) for name, m in trial.model.named_modules()]
        try:
            num_microbatches = len(trial.terms(microbatch))
        finally:
            for handle in handles:
                handle.remove()
        self.order = [name for name in dict.fromkeys(self.order) if len(self.outputs[name]) == num_microbatches]

    def _hook(self, name: str) -> Any:
        def note(_module: nn.Module, inputs: Any, output: Any) -> None:
            self.order.append(name)
            self.inputs[name] += [tensor.clone() for tensor in _tensors(inputs)[:1]]
            self.outputs[name] += [tensor.clone() for tensor in _tensors(output)[:1]]
            if not name:
                self.root_output = output

        return note


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.ndim else []
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for part in value for tensor in _tensors(part)]


def _differs(whole: Mapping[str, list[Tensor]], parts: Mapping[str, list[Tensor]], name: str, tolerance: float) -> bool:
    """Tell whether the rows differ; rows of other widths (padded otherwise) cannot be compared, and do not."""
    pair = [tensors.get(name, []) for tensors in (whole, parts)]
    if not all(pair) or len({tensor.shape[1:] for tensors in pair for tensor in tensors}) > 1:
        return False
    one, other = (torch.cat(tensors) for tensors in pair)
    if one.shape != other.shape or not one.is_floating_point():
        return False
    scale = one.double().norm()
    return bool((one.double() - other.double()).norm() > tolerance * scale)


def _auxiliary_losses(model: nn.Module, output: Any) -> list[str]:
    """Name the 0-d floating outputs of the model other than its loss, and such attributes of its modules."""
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
