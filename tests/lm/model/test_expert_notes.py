"""How a mixture of experts is trained, and what is left out, is said in one line each."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    JetMoeConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
)

from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.model import expert_notes as notes
from bigbatch.lm.model.adapters import add_lora
from bigbatch.lm.model.load_balancing import LoadBalancedLoss

SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}
QWEN: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2,
}  # fmt: skip


def build(config_class: Any, **settings: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_class(**SHAPE | settings))


def expert_notes(model: Any, balanced: LoadBalancedLoss | None = None, **settings: Any) -> list[str]:
    return notes.expert_notes(model, TrainConfig(**settings), balanced)


def balanced_by(coefficient: float, scope: Any = "global") -> LoadBalancedLoss:
    """Return a loss that is not called."""

    def loss_fn(*_: Any) -> Any:
        raise AssertionError

    return LoadBalancedLoss(loss_fn, coefficient=coefficient, num_experts=4, top_k=2, scope=scope)


def test_trained_balancing_loss_is_said() -> None:
    model = build(MixtralConfig, num_local_experts=4)
    assert expert_notes(model, balanced_by(0.001)) == [
        "the load-balancing loss of the experts has weight 0.001 of the model, over the whole batch of each update: "
        "every sequence runs one forward more (--router-aux-loss microbatch avoids it, for another loss; "
        "--router-aux-loss-coef 0 leaves the loss out)"
    ]
    assert expert_notes(model, balanced_by(2.0, "microbatch"), router_aux_loss_coef=2.0) == [
        "the load-balancing loss of the experts has weight 2 by --router-aux-loss-coef, over each micro-batch, as "
        "asked: its gradient depends on the micro-batch"
    ]
    assert expert_notes(model, router_aux_loss_coef=0.0) == [
        "the load-balancing loss of the experts is not trained, by --router-aux-loss-coef 0"
    ]


def test_frozen_routers_are_said() -> None:
    model = AutoModelForCausalLM.from_config(GptOssConfig(**SHAPE, num_local_experts=4))
    adapted = add_lora(model, rank=2, alpha=4.0, seed=0)
    assert expert_notes(adapted, balanced_by(1.0, "microbatch"))[0].endswith(
        "; the routers are frozen, and it trains the adapters in the layers below them"
    )


@pytest.mark.parametrize(
    ("config_class", "settings", "coefficient"),
    [
        (MixtralConfig, {"num_local_experts": 4}, "router_aux_loss_coef 0.001"),
        (MixtralConfig, {"num_local_experts": 4, "router_aux_loss_coef": 1000.0}, "router_aux_loss_coef 1000"),
        (Qwen2MoeConfig, QWEN, "router_aux_loss_coef 0.001"),
        (GraniteMoeConfig, {"num_local_experts": 4, "router_aux_loss_coef": 2.5}, "router_aux_loss_coef 2.5"),
        (GptOssConfig, {"num_local_experts": 4}, "router_aux_loss_coef 0.001"),
        (JetMoeConfig, {"num_local_experts": 4, "kv_channels": 8}, "aux_loss_coef 0.01"),
    ],
)
def test_untrained_balancing_loss_is_said(config_class: Any, settings: dict[str, Any], coefficient: str) -> None:
    assert expert_notes(build(config_class, **settings)) == [
        f"the load-balancing loss of the experts is not trained: {coefficient} of the model has no effect, and the "
        "experts may be used unevenly"
    ]


@pytest.mark.parametrize(
    ("config_class", "settings"),
    [
        (LlamaConfig, {}),
        (MixtralConfig, {"num_local_experts": 4, "router_aux_loss_coef": 0.0}),
        (MixtralConfig, {"num_local_experts": 1, "num_experts_per_tok": 1}),
        (DeepseekV3Config, DEEPSEEK),  # balances its experts without a loss
    ],
)
def test_model_without_balancing_loss_has_no_note(config_class: Any, settings: dict[str, Any]) -> None:
    assert expert_notes(build(config_class, **settings)) == []


@pytest.mark.parametrize(
    ("config_class", "settings", "shares"),
    [
        (
            GptOssConfig,
            {"num_local_experts": 4},
            "0 of 4 expert weights, 0 of 2 routers and 8 of 8 other linear layers",
        ),
        (
            Qwen2MoeConfig,
            {**QWEN, "decoder_sparse_step": 2},
            "3 of 5 expert weights, 1 of 2 routers and 11 of 11 other linear layers",
        ),
        (
            JetMoeConfig,
            {"num_local_experts": 4, "kv_channels": 8},
            "0 of 8 expert weights, 4 of 4 routers and 2 of 2 other linear layers",
        ),
    ],
)
def test_lora_on_some_experts_is_said(config_class: Any, settings: dict[str, Any], shares: str) -> None:
    model = AutoModelForCausalLM.from_config(config_class(**SHAPE | settings))
    adapted = add_lora(model, rank=2, alpha=4.0, seed=0)
    assert expert_notes(adapted)[-1] == f"LoRA adapts {shares}; those without adapters are not trained"


def test_lora_on_every_expert_is_said() -> None:
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SHAPE | {"num_local_experts": 4}))
    assert expert_notes(add_lora(model, rank=2, alpha=4.0, seed=0))[-1] == (
        "LoRA adapts 4 of 4 expert weights, 2 of 2 routers and 8 of 8 other linear layers"
    )


def test_lora_on_dense_model_has_no_note() -> None:
    assert (
        expert_notes(add_lora(AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)), rank=2, alpha=4.0, seed=0)) == []
    )
