"""The fields of a training run about its optimizer, and its learning rate over time. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from bigbatch.lm.config.field_types import LARGEST_COUNT, Count, LrRule, NormLimit, Number, Text, Whole
from bigbatch.lm.config.optimizer_settings import DECAY_PERCENT, OptimizerName

DEFAULT_LR_TINY = 5e-3
DEFAULT_LR = 2e-5
DEFAULT_LR_LORA = 2e-4
DEFAULT_LR_PRETRAINING = 5e-4
WARMUP_PERCENT = 10


class OptimizationFields(BaseModel):
    """The fields of the group "optimization" of ``--help``, in its order, but for the seed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    optimizer: OptimizerName = Field(
        default="adamw",
        description="adamw; adamw-8bit = AdamW with moments in 8 bits, which needs the package bitsandbytes; muon = "
        "orthogonalized momentum for the matrices of the layers, with the learning rate and weight decay of AdamW, "
        "which updates embeddings, head, biases and norms; lion; adafactor and sgd, which need --lr",
    )
    lr: Number | None = Field(
        default=None,
        gt=0,
        description="peak learning rate, reached at the end of the warm-up "
        f"(default: {DEFAULT_LR_TINY:g} for tiny, {DEFAULT_LR:g} for other models, {DEFAULT_LR_LORA:g} with LoRA, "
        f"{DEFAULT_LR_PRETRAINING:g} with --model-config; with --objective dpo 1e-06 and 1e-05; a fifth of these for "
        "lion)",
    )
    scale_from: Count | None = Field(
        default=None,
        description="global batch at which --lr and the betas were tuned, in the unit of this run's batch; prints "
        "the effect of each scaling rule and changes nothing without --lr-rule (default: none)",
    )
    lr_rule: LrRule = Field(
        default="none",
        description="scaling rule for a batch of k times --scale-from: sqrt = lr × √k; sde = sqrt, and 1 − k·(1 − β) "
        "for both betas and epsilon / √k; half-life = β2 to the power of k; sqrt+half-life = both; linear = lr × k, "
        "the rule of SGD; none = no change",
    )
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        default="cosine",
        description="learning rate after the warm-up: cosine and linear = decays to --min-lr at the last update; wsd = "
        "stays at the peak and decays linearly to --min-lr in the last --decay-steps; constant = stays at the peak",
    )
    min_lr: Number | None = Field(
        default=None,
        ge=0,
        description="learning rate at the last update (default: a tenth of --lr for cosine, 0 for linear and wsd, "
        "reached one update later)",
    )
    decay_steps: Count | None = Field(
        default=None,
        description=f"updates of the decay of --schedule wsd (default: {DECAY_PERCENT} % of the steps)",
    )
    warmup_steps: Whole | None = Field(
        default=None,
        ge=0,
        le=LARGEST_COUNT,
        description="updates over which the learning rate rises linearly from zero "
        f"(default: {WARMUP_PERCENT} % of the steps)",
    )
    beta1: Number | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="decay of the mean of gradients of adamw, adamw-8bit, lion and the AdamW part of muon "
        "(default: 0.9)",
    )
    beta2: Number | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="decay of the mean of squared gradients of adamw, adamw-8bit and the AdamW part of muon "
        "(default: 0.95), and of the momentum of lion (default: 0.99)",
    )
    eps: Number | None = Field(
        default=None,
        gt=0,
        description="added to the root of the mean squares of adamw, adamw-8bit and the AdamW part of muon "
        "(default: 1e-8)",
    )
    momentum: Number | None = Field(
        default=None, ge=0, lt=1, description="momentum of sgd (default: 0.9) and muon (default: 0.95)"
    )
    weight_decay: Number = Field(
        default=0.1,
        ge=0,
        description="weight decay, decoupled from the gradient except for sgd; biases and norms have none",
    )
    no_weight_decay: Text | None = Field(
        default=None,
        min_length=1,
        description="parts of parameter names that have no weight decay either, comma-separated, such as "
        "embed_tokens (default: none)",
    )
    max_grad_norm: NormLimit = Field(
        default=1.0, description="clip the gradient of the global batch to this norm; 0 or none = no clipping"
    )
