"""Set up a model for an objective that compares sequences: adapters, loss, metrics, and what is saved with the model.

model → no dropout (dpo, reward) → LoRA → activation checkpointing → loss → ModelSetup: padded rows, eager layers
"""

from functools import partial
from typing import Any

from bigbatch.coupled.coupled import Coupled
from bigbatch.coupled.stand_in import stand_in
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.pair_batches import collate_pairs
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.decoder_layers import offload_notes
from bigbatch.lm.model.expert_balance import use_float64_experts
from bigbatch.lm.model.loss_types import LanguageLoss
from bigbatch.lm.model.meta_setup import with_lora_on_meta
from bigbatch.lm.model.setup import ModelOutline, ModelSetup, layers_of, with_lora
from bigbatch.lm.model.weights import Weights
from bigbatch.lm.objectives.dpo import DPOLoss
from bigbatch.lm.objectives.dropout import OBJECTIVES, disable_dropout, write_dropout_rates
from bigbatch.lm.objectives.embedding import EmbeddingLoss, write_sentence_transformers_files
from bigbatch.lm.objectives.pair_metrics import PairMetrics
from bigbatch.lm.objectives.reward import RewardLoss


def set_up_objective(
    model: Any, config: TrainConfig, device_spec: DeviceSpec, weights: Weights | None, *, pad_id: int
) -> ModelSetup:
    """Do what `bigbatch.lm.model.setup.set_up_model` does, for another objective than sft.

    Args:
        model: As `bigbatch.lm.model.task_models.load_task_model` returns it, on its device, or on the meta device.
        config: A resolved config.
        device_spec: Device and precision.
        weights: Of a model on the meta device; None of another.
        pad_id: Token that pads rows.

    Raises:
        InputError: The model does not support a setting of the config.
    """
    notes: list[str] = []
    if device_spec.precision == "float64":
        use_float64_experts(model)
    write_files = None
    if config.objective in OBJECTIVES and (rates := disable_dropout(model)) is not None:
        notes.append(f"the dropout of the model is set to 0 for --objective {config.objective}")
        write_files = partial(write_dropout_rates, rates=rates)
    if config.lora_rank:
        model = with_lora(model, config) if weights is None else with_lora_on_meta(model, weights, config)
        if not config.saves_adapters:
            notes.append(
                "the adapters are saved within model/: no folder holds the weights of --model tiny without them"
            )
    model = (model.to(device_spec.device) if weights is None else model).train()
    loss_fn, metrics = make_loss(config, device_spec)
    notes += offload_notes(config.gradient_checkpointing, device_spec.device, captures=False)
    if config.objective == "embedding":
        assert config.max_length is not None, "set before the model is set up"
        write_files = partial(
            write_sentence_transformers_files,
            pooling=config.vector_pooling,
            max_length=config.max_length,
            width=model.config.get_text_config().hidden_size,
        )
    return ModelSetup(
        model,
        loss_fn,
        partial(collate_pairs, pad_id=pad_id),
        "padded",
        layers_of(model, config),
        uses_cuda_graphs=False,
        notes=tuple(notes),
        metrics=metrics,
        write_files=write_files,
    )


def outline_objective(model: Any, config: TrainConfig, device_spec: DeviceSpec, *, num_samples: int) -> ModelOutline:
    """Decide as `set_up_objective` does, for a model without weights.

    Args:
        model: On the device ``meta``. It is changed.
        config: With every default resolved.
        device_spec: Device and precision of the loss.
        num_samples: Of an update.

    Raises:
        InputError: The model does not support what the configuration asks for.
    """
    if config.objective in OBJECTIVES:
        disable_dropout(model)
    if config.lora_rank:
        model = with_lora(model, config)
    layers_of(model, config)
    loss_fn, _ = make_loss(config, device_spec)
    if isinstance(loss_fn, Coupled):
        loss_fn = stand_in(loss_fn, num_samples)
    return ModelOutline(model.train(), loss_fn, "padded")


def make_loss(config: TrainConfig, device_spec: DeviceSpec) -> tuple[LanguageLoss, PairMetrics]:
    """Create the loss of an objective, and the metrics that it records."""
    if config.objective == "dpo":
        metrics = PairMetrics(*DPOLoss.METRICS)
        kind, smoothing = config.dpo_loss or "sigmoid", config.dpo_label_smoothing or 0.0
        return DPOLoss(device_spec, metrics, beta=config.beta, kind=kind, label_smoothing=smoothing), metrics
    if config.objective == "embedding":
        metrics = PairMetrics(*EmbeddingLoss.METRICS)
        pooling, temperature = config.vector_pooling, config.similarity_temperature
        return EmbeddingLoss(device_spec, metrics, pooling=pooling, temperature=temperature), metrics
    metrics = PairMetrics(*RewardLoss.METRICS)
    return RewardLoss(device_spec, metrics, center=config.center_rewards_coefficient), metrics
