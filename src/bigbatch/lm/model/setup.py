"""Set up attention, loss, layout, compilation and CUDA graphs of a model, each tested on the model itself.

model → attention without a mask → chunked loss → packed rows → balance of experts → LoRA → products in float8 →
compiled layers → ModelSetup
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigbatch.errors import InputError, first_line
from bigbatch.lm.config.field_types import CheckpointingMode
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.dataset import collate
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.adapters import add_lora
from bigbatch.lm.model.attention_choice import choose_kernel
from bigbatch.lm.model.causal_attention import (
    drop_mask_if_causal,
    has_full_attention,
    looks_causal,
    use_causal_attention,
)
from bigbatch.lm.model.chunk_size import chunk_tokens_of
from bigbatch.lm.model.chunked_loss import chunked_loss_is_exact, find_lm_head, worth_chunking
from bigbatch.lm.model.compilation import compile_layers
from bigbatch.lm.model.decoder_layers import DecoderLayers, offload_notes, uses_randomness
from bigbatch.lm.model.expert_balance import balance_plan, run_router_hooks_eagerly, use_float64_experts
from bigbatch.lm.model.fp8 import Fp8Layers, use_fp8
from bigbatch.lm.model.load_balancing import LoadBalancedLoss
from bigbatch.lm.model.loss_choice import make_loss_fn
from bigbatch.lm.model.loss_types import LanguageLoss, LossMetrics
from bigbatch.lm.model.packed_rows import pack_row, packing_obstacle, static_packing_obstacle
from bigbatch.lm.model.task_models import PEFT_TASKS
from bigbatch.types import Layout


@dataclass(frozen=True)
class ModelSetup:
    """A model with its loss, layout and execution mode.

    Attributes:
        model: In training mode, with its adapters.
        loss_fn: The loss, as validation computes it: for sft the cross entropy.
        collate: Collates a list of samples to a micro-batch.
        layout: Layout of the micro-batches.
        layers: Layers that support activation checkpointing; None if the model has none.
        uses_cuda_graphs: Whether micro-batches are replayed as CUDA graphs.
        notes: Sentences about optimizations that are not used, and why.
        balanced: The cross entropy with the load-balancing loss of the experts; None if that is not trained.
        metrics: What the loss function records for metrics.jsonl; None for nothing.
        write_files: Writes more files into the folder of a saved model; None for none.
        fp8: The layers with products in float8; None without ``--precision fp8``.
    """

    model: Any
    loss_fn: LanguageLoss
    collate: Callable[[Sequence[dict[str, Tensor]]], dict[str, Tensor]]
    layout: Layout
    layers: DecoderLayers | None
    uses_cuda_graphs: bool
    notes: tuple[str, ...]
    balanced: LoadBalancedLoss | None = None
    metrics: LossMetrics | None = None
    write_files: Callable[[Path], None] | None = None
    fp8: Fp8Layers | None = None

    @property
    def training_loss(self) -> LanguageLoss | LoadBalancedLoss:
        """The loss function for `bigbatch.Engine`."""
        return self.loss_fn if self.balanced is None else self.balanced

    @property
    def has_compiled_layers(self) -> bool:
        """Whether the decoder layers are compiled."""
        return self.layers is not None and self.layers.is_compiled

    @property
    def checkpointing_mode(self) -> CheckpointingMode:
        """The current mode of activation checkpointing."""
        return "none" if self.layers is None else self.layers.mode


@dataclass(frozen=True)
class ModelOutline:
    """The part of a `ModelSetup` that follows from a model without weights.

    Attributes:
        model: In training mode, with its adapters, attention and activation checkpointing.
        loss_fn: As `bigbatch.Engine` accepts it.
        layout: Of the micro-batches.
    """

    model: Any
    loss_fn: LanguageLoss | LoadBalancedLoss
    layout: Layout


def set_up_model(model: Any, config: TrainConfig, device_spec: DeviceSpec, *, pad_id: int, longest: int) -> ModelSetup:
    """Resolve the ``auto`` settings of a config for a model, and apply them.

    Args:
        model: A transformers language model on its device, without adapters.
        config: A resolved config.
        device_spec: Device and precision.
        pad_id: Token that pads rows.
        longest: Tokens of the longest sequence of the run.

    Raises:
        InputError: The model does not support a setting of the config.
    """
    notes: list[str] = []
    on_cuda = device_spec.device.type == "cuda"
    if config.compile == "graphs" and not on_cuda:
        raise InputError(
            f"--compile graphs needs CUDA, but this run is on {device_spec.device}. Use --compile layers or none."
        )
    if device_spec.precision == "float64":
        use_float64_experts(model)
    needs_mask = not drop_mask_if_causal(model, device_spec, max_length=longest)
    chunks = worth_chunking(find_lm_head(model)) and chunked_loss_is_exact(model, device_spec)
    layout = _layout(model, config, device_spec, longest, needs_mask, notes)
    balance = balance_plan(model, config, device_spec)
    if config.lora_rank:
        model = with_lora(model, config)
        chunks = chunks and find_lm_head(model) is not None  # not if the head has an adapter
        if not config.saves_adapters:
            notes.append(
                "the adapters are saved within model/: no folder holds the weights of --model tiny without them"
            )
    model = model.to(device_spec.device).train()
    fp8 = use_fp8(model, config, device_spec)  # after the checks of attention, whose tolerances are those of bf16
    notes += [] if fp8 is None else [fp8.note]
    layers = layers_of(model, config)
    compiles = compiles_layers(config, device_spec.device)
    chunk_tokens = chunk_tokens_of(find_lm_head(model), config, device_spec.device) if chunks else None
    loss_fn = make_loss_fn(
        config, device_spec, chunk_tokens=chunk_tokens, needs_mask=needs_mask, longest=longest, fused=compiles
    )
    if layout == "packed":
        most = None if config.reproducible else config.token_budget  # a quantum has the same row for every budget
        collator: Any = partial(pack_row, pad_id=pad_id, longest=longest, most=most, marks_padding=balance is not None)
    else:
        collator = partial(collate, pad_id=pad_id)
    balanced = None if balance is None else balance.loss_fn(loss_fn)
    if compiles:
        if balanced is not None:
            run_router_hooks_eagerly(model)
        compile_layers(model, config, layers, balanced or loss_fn, collator, device_spec, longest, notes, fp8=fp8)
    uses_cuda_graphs = captures_cuda_graphs(config, device_spec.device)
    notes += offload_notes(config.gradient_checkpointing, device_spec.device, captures=config.compile == "auto")
    if uses_cuda_graphs and balanced is not None:
        uses_cuda_graphs = _without_cuda_graphs(config, notes)
    return ModelSetup(model, loss_fn, collator, layout, layers, uses_cuda_graphs, tuple(notes), balanced, fp8=fp8)


def outline_model(
    model: Any, config: TrainConfig, device_spec: DeviceSpec, *, target: torch.device, longest: int, max_length: int
) -> ModelOutline:
    """Decide as `set_up_model` does, for a model without weights: whatever it tries on the weights is assumed to work.

    Args:
        model: A transformers language model on the device ``meta``, without adapters. It is changed.
        config: With every default resolved.
        device_spec: Device and precision of the loss.
        target: Device of the run, which decides the layout.
        longest: Tokens of the longest sequence.
        max_length: Tokens to which sequences are cut.

    Raises:
        InputError: The model does not support what the configuration asks for.
    """
    is_causal = looks_causal(model)
    if is_causal and has_full_attention(model.config, max_length=max_length):
        use_causal_attention(model)
    layout: Layout = "padded"
    if config.layout == "packed" or (
        wants_packed_rows(config, target)
        and static_packing_obstacle(model, DeviceSpec(target, device_spec.precision)) is None
        and not uses_randomness(model)  # dropout in attention has no packed kernel
    ):
        layout = "packed"
    balance = balance_plan(model, config, device_spec)
    if config.lora_rank:
        model = with_lora(model, config)
    use_fp8(model, config, device_spec, target=target)
    layers_of(model, config)
    head = find_lm_head(model)
    chunk_tokens = chunk_tokens_of(head, config, target) if worth_chunking(head) else None
    loss_fn = make_loss_fn(config, device_spec, chunk_tokens=chunk_tokens, needs_mask=not is_causal, longest=longest)
    return ModelOutline(model.train(), loss_fn if balance is None else balance.loss_fn(loss_fn), layout)


def _without_cuda_graphs(config: TrainConfig, notes: list[str]) -> bool:
    """Return False, with a note: a captured micro-batch would replay the shares of experts of an earlier window."""
    if config.compile == "graphs":
        raise InputError(
            f"--compile graphs is not supported for {config.model} with the load-balancing loss of its experts, whose "
            "shares change with every update. Use --compile layers, or --router-aux-loss-coef 0."
        )
    notes.append("micro-batches are not captured as CUDA graphs: the load-balancing loss changes with every update")
    return False


def compiles_layers(config: TrainConfig, device: torch.device) -> bool:
    """Return whether the decoder layers are compiled on a device, if they can be."""
    return config.compile in ("layers", "graphs") or (config.compile == "auto" and device.type == "cuda")


def captures_cuda_graphs(config: TrainConfig, device: torch.device) -> bool:
    """Return whether micro-batches are captured as CUDA graphs on a device."""
    captures = config.compile in ("auto", "graphs") and config.gradient_checkpointing != "offload"
    return captures and device.type == "cuda" and not config.reproducible


def wants_packed_rows(config: TrainConfig, device: torch.device) -> bool:
    """Return whether rows are packed on a device, if the model supports it."""
    return config.layout == "packed" or (config.layout == "auto" and device.type == "cuda")


def _layout(
    model: Any, config: TrainConfig, device_spec: DeviceSpec, longest: int, needs_mask: bool, notes: list[str]
) -> Layout:
    """Choose packed or padded rows; for packed rows, switch the model to attention by offsets."""
    if not wants_packed_rows(config, device_spec.device):
        _refuse_kernel(config, "rows are padded")
        return "padded"
    before = getattr(model.config, "_attn_implementation", None)
    why = "it needs a mask for padding" if needs_mask else None
    if why is None:
        use_causal_attention(model)
        why = packing_obstacle(model, device_spec, longest=longest)
    if why is None:
        notes += choose_kernel(model, config, device_spec, longest=longest)
        return "packed"
    if before is not None and getattr(model.config, "_attn_implementation", None) != before:
        model.set_attn_implementation(before)
    if config.layout == "packed":
        raise InputError(f"--layout packed is not supported for {config.model}: {why}. Use --layout auto or padded.")
    _refuse_kernel(config, f"rows are padded, because {why}")
    notes.append(f"rows are padded and not packed: {why}")
    return "padded"


def _refuse_kernel(config: TrainConfig, why: str) -> None:
    if config.attention == "fa4":
        raise InputError(f"--attention fa4 is for packed rows, and {why}. Use --attention auto.")


def with_lora(model: Any, config: TrainConfig) -> Any:
    """Add the LoRA adapters of a config to a model.

    Raises:
        InputError: The model does not support them.
    """
    assert config.lora_alpha is not None, "resolved() sets it"
    try:
        return add_lora(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            seed=config.seed,
            targets=config.lora_targets,
            dropout=config.lora_dropout,
            rslora=config.rslora,
            dora=config.dora,
            task=PEFT_TASKS[config.objective],
        )
    except InputError:
        raise
    except ValueError as error:
        more = [flag for flag, given in (("--dora", config.dora), ("--lora-dropout", config.lora_dropout)) if given]
        flags = " with ".join(["--lora-rank", *([" and ".join(more)] if more else [])])
        remedy = f" Leave out {' and '.join(more)}, or name other --lora-targets." if more else ""
        raise InputError(f"{flags} is not supported for {config.model}: {first_line(error)}.{remedy}") from error


def layers_of(model: Any, config: TrainConfig) -> DecoderLayers | None:
    """Find the decoder layers of a model and set their activation checkpointing; None if the model has none.

    Raises:
        InputError: The config requires checkpointing, and the model has no such layers.
    """
    try:
        layers = DecoderLayers(model)
    except ValueError as error:
        if config.gradient_checkpointing in ("auto", "none"):
            return None
        raise InputError(
            f"--gradient-checkpointing is not supported for {config.model}: {first_line(error)}."
        ) from error
    if config.gradient_checkpointing != "auto":
        layers.set_checkpointing(config.gradient_checkpointing)
    return layers
