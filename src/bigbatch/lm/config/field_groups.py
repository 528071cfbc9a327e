"""How the fields of a training run belong together: in ``--help``, as alternatives, and in ``bigbatch resume``."""

from __future__ import annotations

from typing import NamedTuple

EXCLUSIVE = (
    ("global_batch", "global_batch_tokens"),
    ("global_batch_schedule", "global_batch_tokens"),
    ("microbatch", "token_budget"),
    ("steps", "epochs"),
    ("memory", "gpu"),
    ("text_column", "messages_column"),
)
"""Pairs of fields that set the same quantity; at most one of each pair may be set."""


NEEDS_PERMISSION = {
    "global_batch": "batch",
    "global_batch_tokens": "batch",
    "global_batch_schedule": "batch",
    "seed": "seed",
    "data": "data",
    "split": "data",
    "subset": "data",
    "validation_data": "data",
    "skip_broken": "data",
    "text_column": "data",
    "messages_column": "data",
    "data_weights": "data",
}
"""Settings that affect the result, each with the kind of ``--allow-KIND-change`` that ``bigbatch resume`` requires."""

CHANGEABLE = (
    "cache",
    "no_cache",
    "cache_by_content",
    "microbatch",
    "token_budget",
    "device",
    "precision",
    "logits",
    "memory",
    "gpu",
    "gradient_checkpointing",
    "offload",
    "layout",
    "attention",
    "compile",
    "sample_prompt",
    "log",
    "checkpoint_every",
    "keep",
    "early_stopping",
    "async_checkpoint",
    "max_skipped",
    "grace_s",
    "deterministic",
    "parallel",
    "timeout_s",
)
"""Settings that ``bigbatch resume`` may change freely: execution and output, not what is trained."""


_FLAGS = {"model_config_path": "--model-config"}


def flag_of(field: str) -> str:
    """Return the flag of a field."""
    return _FLAGS.get(field, f"--{field.replace('_', '-')}")


class FieldGroup(NamedTuple):
    """Fields that ``--help`` lists together, under a title and a one-line description."""

    title: str
    about: str
    fields: tuple[str, ...]


GROUPS = (
    FieldGroup(
        "objective",
        "What is learned from the data; the other settings are for the objective that their description names.",
        (
            "objective",
            "dpo_beta",
            "dpo_loss",
            "dpo_label_smoothing",
            "center_rewards_coefficient",
            "pooling",
            "temperature",
        ),
    ),
    FieldGroup(
        "data",
        "Training data and its validation split.",
        (
            "data",
            "data_weights",
            "split",
            "subset",
            "validation_data",
            "validation_fraction",
            "max_length",
            "skip_broken",
            "text_column",
            "messages_column",
        ),
    ),
    FieldGroup(
        "token cache",
        "Tokens of the data, written once and used by every later start and by bigbatch resume.",
        ("cache", "no_cache", "cache_by_content"),
    ),
    FieldGroup("conversations", "How conversations are trained on.", ("chat_template", "train_on")),
    FieldGroup(
        "model",
        "Model, LoRA adapters, and the load-balancing loss of a mixture of experts.",
        (
            "model",
            "model_config_path",
            "tokenizer",
            "lora_rank",
            "lora_alpha",
            "lora_targets",
            "lora_dropout",
            "rslora",
            "dora",
            "quantize",
            "router_aux_loss_coef",
            "router_aux_loss",
        ),
    ),
    FieldGroup(
        "batch",
        "Size of one update, and of what is in memory at a time. Only the global batch affects the result.",
        (
            "global_batch",
            "global_batch_tokens",
            "global_batch_schedule",
            "rebase_second_moment",
            "microbatch",
            "token_budget",
        ),
    ),
    FieldGroup("length", "Length of the run, in updates or in passes over the data.", ("steps", "epochs")),
    FieldGroup(
        "optimization",
        "Steps are optimizer updates, never micro-batches.",
        (
            "optimizer",
            "lr",
            "scale_from",
            "lr_rule",
            "schedule",
            "min_lr",
            "decay_steps",
            "warmup_steps",
            "beta1",
            "beta2",
            "eps",
            "momentum",
            "weight_decay",
            "no_weight_decay",
            "max_grad_norm",
            "seed",
        ),
    ),
    FieldGroup(
        "machine",
        "Device, precision, memory and execution.",
        (
            "device",
            "precision",
            "logits",
            "memory",
            "gpu",
            "gradient_checkpointing",
            "offload",
            "layout",
            "attention",
            "compile",
        ),
    ),
    FieldGroup(
        "ranks",
        "How the processes started by torchrun share the work; without torchrun there is one. The update is the same "
        "for any number of them.",
        ("parallel", "timeout_s"),
    ),
    FieldGroup(
        "validation",
        "When a run validates, and what follows from the validation loss.",
        ("validation_every", "best_metric", "early_stopping", "early_stopping_min_delta"),
    ),
    FieldGroup("output", "Run directory, text samples and logging.", ("out", "sample_prompt", "log")),
    FieldGroup(
        "safety",
        "Checkpoints, interruptions and failures.",
        ("checkpoint_every", "keep", "async_checkpoint", "max_skipped", "grace_s", "deterministic"),
    ),
    FieldGroup(
        "reproducibility",
        "The same bits on any number of ranks and with any micro-batch.",
        ("reproducible", "quantum"),
    ),
)
"""Every field of a training run, in the order of ``--help``."""
