"""Compile the decoder layers of a model, if that leaves its loss and gradient unchanged."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bigbatch.compiled_modules import FixedCode
from bigbatch.deterministic import deterministic_kernels
from bigbatch.errors import InputError, first_line
from bigbatch.gradients.loss_totals import as_terms
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.chunked_loss import ChunkedCausalLMLoss
from bigbatch.lm.model.decoder_layers import DecoderLayers
from bigbatch.lm.model.embedding_hook import embedded_tokens
from bigbatch.lm.model.fp8 import Fp8Layers
from bigbatch.preserve import preserved
from bigbatch.rng import seed_everything
from bigbatch.verification.tolerances import COMPILED_TOLERANCE, COMPILED_TOLERANCE_HALF

TRIAL_TOKENS = 16_384  # at most, unless two sequences have more: kernels for more tokens are hardly chosen otherwise


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

    Under ``--reproducible``, nothing is compiled after it. Its micro-batch, for which kernels are chosen, depends on
    the quantum and on ``longest`` alone, so it is the same on every rank, for every memory limit and on resume.

    Args:
        model: In training mode, with its weights.
        config: Of the run.
        layers: Of the model; None if it has none that can be compiled.
        loss_fn: Returns sums and counts of a micro-batch.
        collator: Collates samples to a micro-batch.
        device_spec: Device and precision.
        longest: Tokens of the longest sequence of the run.
        notes: Receives why layers are not compiled.
        fp8: The layers with products in float8.

    Raises:
        InputError: The config requires compilation, and it fails or changes results.
    """
    why = "its layers are not those of transformers" if layers is None else None
    if layers is not None:
        mode = layers.mode
        layers.set_checkpointing("full")  # least memory, and it tests recomputation as well
        with deterministic_kernels() if config.reproducible else nullcontext():  # as in training
            why = _compile(model, config, layers, loss_fn, collator, device_spec, longest, fp8)
        layers.set_checkpointing(mode)
        if why is not None:
            layers.decompile()
            if (loss_code := _code_of(loss_fn)) is not None:
                loss_code.decompile()
    if why is None:
        return
    if config.compile != "auto":
        raise InputError(
            f"--compile {config.compile} is not supported for {config.model}: {why}. Use --compile auto or none."
        )
    notes.append(f"layers are not compiled: {why}")


def _compile(
    model: Any,
    config: TrainConfig,
    layers: DecoderLayers,
    loss_fn: Any,
    collator: Any,
    device_spec: DeviceSpec,
    longest: int,
    fp8: Fp8Layers | None,
) -> str | None:
    """Compile; return why it failed."""
    quantum = config.quantum_in_use
    samples = _samples(model, trial_lengths(longest, quantum))
    microbatch = {name: tensor.to(device_spec.device) for name, tensor in collator(samples).items()}
    of_run = partial(_loss_and_gradient, model, loss_fn, microbatch, None if quantum is None else layers)
    before = of_run()
    tolerance = COMPILED_TOLERANCE_HALF if device_spec.is_half_precision else COMPILED_TOLERANCE
    if fp8 is not None:
        with fp8.disabled():
            wide = of_run()
        tolerance = max(tolerance, _largest_difference(before, wide))
    loss_code = _code_of(loss_fn)
    try:
        layers.compile(kernels="fixed" if config.reproducible else "untimed" if config.deterministic else "timed")
        if loss_code is not None:
            loss_code.compile()
        after = of_run()
    except Exception as error:  # noqa: BLE001 - on any compiler error, the model runs eagerly
        return first_line(error)
    difference = _largest_difference(after, before)
    if difference > tolerance:
        return f"its compiled results differ by {difference:.0e}"
    if config.reproducible:
        layers.fix()
    if loss_code is not None:
        loss_code.fix()
    return None


def eager_note(layers: DecoderLayers | None, all_gather: Callable[[Any], list[Any]]) -> str | None:
    """Return a sentence about calls of layers that ran eagerly under ``--reproducible``; None if none did. Collective.

    Args:
        layers: Of the model.
        all_gather: Returns a value of every rank.
    """
    if layers is None or layers.eager_calls is None:
        return None
    eager, total = (sum(counts) for counts in zip(*all_gather(list(layers.eager_calls)), strict=True))
    if not eager:
        return None
    return (
        f"{eager:,} of {total:,} calls of compiled layers ran eagerly: nothing was compiled for such inputs before the "
        "first update"
    )


def _code_of(loss_fn: Any) -> FixedCode | None:
    """Return the code of a loss under ``--reproducible`` that is compiled together with the layers."""
    return loss_fn.fused_code if isinstance(loss_fn, ChunkedCausalLMLoss) else None


def trial_lengths(longest: int, quantum: int | None) -> list[int]:
    """Return the tokens of each sequence of the micro-batch for which layers are compiled.

    Args:
        longest: Of all sequences.
        quantum: Sequences that are computed together under ``--reproducible``; None without it.
    """
    num_sequences = 3 if quantum is None else min(quantum, max(2, TRIAL_TOKENS // longest))
    return [max(1, longest // (1 + index % 3)) for index in range(num_sequences)]


def _samples(model: Any, lengths: Sequence[int]) -> list[dict[str, Tensor]]:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocabulary, (length,), generator=generator) for length in lengths]
    return [{"input_ids": tokens, "labels": tokens.roll(-1)} for tokens in rows]


def _loss_and_gradient(
    model: Any, loss_fn: Any, microbatch: dict[str, Tensor], trained_layers: DecoderLayers | None
) -> tuple[Tensor, ...]:
    """Return the loss and a gradient; the state of the model is restored.

    The gradient is that of the embedded tokens, or with ``trained_layers``, of the trained parameters in the first
    layer that has some: forward and backward are then those of training, in which embedded tokens may need no gradient.
    """
    inputs: list[Tensor] | None = None if trained_layers is None else [*trained_layers.first_trained_parameters()]
    with preserved(model, parameters=False):
        seed_everything(0)
        if inputs is None:
            with embedded_tokens(model) as embedded:
                loss_sum = _loss_sum(loss_fn, model, microbatch)
            inputs = [embedded[0]]
        else:
            loss_sum = _loss_sum(loss_fn, model, microbatch)
        gradients = torch.autograd.grad(loss_sum, inputs) if inputs else ()
    return loss_sum.detach(), torch.cat([gradient.flatten() for gradient in gradients] or [loss_sum.detach()[None]])


def _loss_sum(loss_fn: Any, model: Any, microbatch: dict[str, Tensor]) -> Tensor:
    terms = as_terms(loss_fn(model, microbatch)).values()
    return torch.stack([term_sum for term_sum, _ in terms]).sum()


def _largest_difference(new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> float:
    return max(_difference(one, other) for one, other in zip(new, old, strict=True))


def _difference(new: Tensor, old: Tensor) -> float:
    size, difference = float(old.double().norm()), float((new.double() - old.double()).norm())
    return difference / size if size else difference
