"""Compile the decoder layers of a model, if that leaves its loss and gradient unchanged."""

from typing import Any

import torch
from torch import Tensor

from bigbatch.errors import InputError, first_line
from bigbatch.gradients.loss_totals import as_terms
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.decoder_layers import DecoderLayers
from bigbatch.lm.model.embedding_hook import embedded_tokens
from bigbatch.lm.model.fp8 import Fp8Layers
from bigbatch.preserve import preserved
from bigbatch.rng import seed_everything
from bigbatch.verification.tolerances import COMPILED_TOLERANCE, COMPILED_TOLERANCE_HALF


def compile_layers(
    model: Any,
    config: TrainConfig,
    layers: DecoderLayers | None,
    loss_fn: Any,
    collator: Any,
    device_spec: DeviceSpec,
    longest: int,
    notes: list[str],
    *,
    fp8: Fp8Layers | None = None,
) -> None:
    """Compile the layers, and check their loss and gradient against eager mode.

    With products in float8, a compiled layer may round a value to the next number of float8. They may differ by as much
    as products in float8 differ from those in bfloat16, which is measured.
    """
    why = "its layers are not those of transformers" if layers is None else None
    if layers is not None:
        microbatch = _trial(model, collator, device_spec, longest)
        mode = layers.mode
        layers.set_checkpointing("full")  # least memory, and it tests recomputation as well
        before = _loss_and_gradient(model, loss_fn, microbatch)
        tolerance = COMPILED_TOLERANCE_HALF if device_spec.is_half_precision else COMPILED_TOLERANCE
        if fp8 is not None:
            with fp8.disabled():
                wide = _loss_and_gradient(model, loss_fn, microbatch)
            tolerance = max(tolerance, _largest_difference(before, wide))
        layers.compile(deterministic=config.deterministic)
        try:
            after = _loss_and_gradient(model, loss_fn, microbatch)
        except Exception as error:  # noqa: BLE001 - on any compiler error, the model runs eagerly
            why = first_line(error)
        else:
            difference = _largest_difference(after, before)
            why = None if difference <= tolerance else f"its compiled results differ by {difference:.0e}"
        layers.set_checkpointing(mode)
        if why is not None:
            layers.decompile()
    if why is None:
        return
    if config.compile != "auto":
        raise InputError(
            f"--compile {config.compile} is not supported for {config.model}: {why}. Use --compile auto or none."
        )
    notes.append(f"layers are not compiled: {why}")


def _trial(model: Any, collator: Any, device_spec: DeviceSpec, longest: int) -> dict[str, Tensor]:
    """Create a micro-batch of three sequences, one of them of the largest length."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in (longest, max(1, longest // 2), max(1, longest // 3)):
        tokens = torch.randint(vocabulary, (length,), generator=generator)
        samples.append({"input_ids": tokens, "labels": tokens.roll(-1)})
    return {name: tensor.to(device_spec.device) for name, tensor in collator(samples).items()}


def _loss_and_gradient(model: Any, loss_fn: Any, microbatch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient by the embedded tokens; the state of the model is restored."""
    with preserved(model, parameters=False), embedded_tokens(model) as embedded:
        seed_everything(0)
        terms = as_terms(loss_fn(model, microbatch)).values()
        loss_sum = torch.stack([term_sum for term_sum, _ in terms]).sum()
        (gradient,) = torch.autograd.grad(loss_sum, embedded[0])
    return loss_sum.detach(), gradient


def _largest_difference(new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor]) -> float:
    return max(_difference(one, other) for one, other in zip(new, old, strict=True))


def _difference(new: Tensor, old: Tensor) -> float:
    size, difference = float(old.double().norm()), float((new.double() - old.double()).norm())
    return difference / size if size else difference
