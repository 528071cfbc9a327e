"""Causes that couple samples: a module that mixes them, time as dimension 0, an auxiliary loss, the loss itself."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.verification.causes.case import Case, Cause, Kind, totals


def mixing_modules(case: Case) -> Iterator[Cause]:
    """Yield a cause that names the module whose outputs change when the batch is split."""
    whole, parts = _ActivationRecorder(case, case.reference), _ActivationRecorder(case, case.cut)
    mixing = next((name for name in whole.order if _differs(whole.outputs, parts.outputs, name, case.tolerance)), None)
    if mixing is None:
        return
    if _differs(whole.inputs, parts.inputs, mixing, case.tolerance) and mixing:
        mixing = mixing.rpartition(".")[0]
    module = case.model.get_submodule(mixing)
    kind = type(module).__name__
    named = f"the module {mixing!r} ({kind})" if mixing else f"the model ({kind})"
    layer, is_unbatched = _sequence_layer(module), any(t.ndim == 2 for t in whole.inputs.get(mixing, []))
    if layer is not None and (is_unbatched or not layer.batch_first):
        why = "receives inputs without a batch dimension" if is_unbatched else "has batch_first=False"
        yield Cause(
            Kind.TIME_FIRST,
            f"{named} {why}: it reads dimension 0, along which the batch is cut, as time. Pass batch_dim=1 if the "
            "batch is [time, samples, ...], or inputs [samples, time, ...] with batch_first=True.",
        )
    else:
        yield Cause(
            Kind.MIXING_MODULE,
            f"{named} mixes samples: its outputs for the same samples change when the batch is split.",
        )


def _sequence_layer(module: nn.Module) -> nn.RNNBase | nn.MultiheadAttention | None:
    """Return a recurrent or attention layer, or the attention of a transformer layer."""
    layer = module if isinstance(module, nn.RNNBase) else getattr(module, "self_attn", module)
    return layer if isinstance(layer, nn.RNNBase | nn.MultiheadAttention) else None


def auxiliary_losses(case: Case) -> Iterator[Cause]:
    """Yield a cause if the model returns or keeps an auxiliary loss."""
    whole = _ActivationRecorder(case, case.reference)
    if auxiliary := _auxiliary_losses(case.model, whole.root_output):
        yield Cause(
            Kind.AUXILIARY_LOSS,
            f"an auxiliary loss inside the model ({', '.join(auxiliary)}): it is computed per micro-batch, and the "
            "sum over micro-batches is not that of the full batch. Remove it from loss_fn, or accept the difference.",
        )


def coupling_loss(case: Case) -> Iterator[Cause]:
    """Yield a cause if the sums of the micro-batches do not add up."""
    whole, parts = totals(case.terms(case.reference)), totals(case.terms(case.cut))
    if all(math.isclose(value, parts[name][0], rel_tol=case.tolerance) for name, (value, _) in whole.items()):
        return
    yield Cause(
        Kind.COUPLING,
        "the loss couples samples: the sums of the micro-batches do not add up to that of the full batch, although "
        "the model computes each sample independently. Contrastive, ranking and batch-statistics losses do this. Pass "
        "bigbatch.Coupled(encode, loss) as loss_fn: encode returns the features of a micro-batch, and loss is computed "
        "on those of the whole batch.",
    )


class _ActivationRecorder:
    """Records the first input and output tensor of every module that runs once per micro-batch."""

    def __init__(self, case: Case, microbatch: int) -> None:
        self.inputs: dict[str, list[Tensor]] = defaultdict(list)
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)
        self.order: list[str] = []  # of completion: submodules before their parent
        self.root_output: Any = None
        handles = [m.register_forward_hook(self._hook(name)) for name, m in case.model.named_modules()]
        try:
            num_microbatches = len(case.terms(microbatch))
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
