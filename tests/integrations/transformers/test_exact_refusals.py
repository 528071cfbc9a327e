"""What `exact` refuses, in one sentence with the call to make."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Trainer

import bigbatch
from bigbatch.integrations.transformers import ExactTrainer, exact
from bigbatch.integrations.transformers.checks import Settings, check_trainer
from integrations.transformers import trainer_cases as cases
from integrations.transformers import trl_cases as trl
from integrations.transformers.test_exact_modes import pad, texts

WEIGHTS = "use weights(trainer, items=...) instead of exact(trainer)."


def refusal_of(trainer, **settings) -> str:
    kind = type(trainer)
    with pytest.raises(bigbatch.InputError) as caught:
        exact(trainer, **settings)
    assert type(trainer) is kind
    return str(caught.value)


def test_data_parallel_is_refused(tmp_path: Path):
    trainer, _ = cases.make(tmp_path)
    trainer.args._n_gpu = 2
    assert refusal_of(trainer) == (
        "MeanLoss would wrap the model in DataParallel over 2 GPUs: start one process a GPU with torchrun, or set "
        "CUDA_VISIBLE_DEVICES to one."
    )


def test_deepspeed_is_refused(tmp_path: Path):
    trainer, _ = cases.make(tmp_path)
    trainer.is_deepspeed_enabled = True
    assert refusal_of(trainer) == (
        f"MeanLoss trains with DeepSpeed, which owns the backward and the gradients: {WEIGHTS}"
    )


def test_context_parallelism_is_refused(tmp_path: Path):
    trainer, _ = cases.make(tmp_path)
    trainer.get_cp_size = lambda: 2
    assert refusal_of(trainer) == (f"MeanLoss splits each sample over 2 ranks (context parallelism): {WEIGHTS}")


def test_emptied_caches_are_refused(tmp_path: Path):
    trainer, _ = cases.make(tmp_path, torch_empty_cache_steps=3)
    assert refusal_of(trainer) == (
        "MeanLoss empties the cache of the device every 3 steps, which a window would do once for all of its "
        "micro-batches: set torch_empty_cache_steps to None; the cache is emptied when memory runs out."
    )


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_updates_within_backward_are_refused(tmp_path: Path, optim: str):
    trainer, _ = cases.make(tmp_path)
    trainer.args.optim = optim
    assert refusal_of(trainer) == (
        f'MeanLoss updates weights inside the backward (optim="{optim}"), before the gradient of the window is '
        "complete: use another optim."
    )


def test_router_loss_is_refused(tmp_path: Path):
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
    )
    trainer, _ = cases.make(tmp_path, Trainer, Qwen2MoeForCausalLM(config), texts(), pad)
    assert refusal_of(trainer) == (
        "Trainer adds an auxiliary loss of the routers (coefficient 0.1), which is computed from whole micro-batches "
        "and so changes with their size: set model.config.output_router_logits = False."
    )
    trainer.model.config.output_router_logits = False
    exact(trainer)


def test_two_units_are_refused(tmp_path: Path):
    trainer, _ = trl.make(tmp_path, "dpo", loss_type=["sigmoid", "sft"])
    assert refusal_of(trainer) == (
        "DPOTrainer adds a mean over tokens to a mean over pairs (loss_type=['sigmoid', 'sft']), and a window has one "
        'number of items: use loss types of one unit, such as loss_type=["sigmoid"].'
    )


@pytest.mark.parametrize(("kind", "loss_type", "reason"), [("kto", "kto", "KL"), ("dpo", ["aot"], "sorts")])
def test_coupled_losses_are_refused(tmp_path: Path, kind: str, loss_type, reason: str):
    trainer, _ = trl.make(tmp_path, kind, loss_type=loss_type)
    for items in ("auto", lambda inputs: 1):
        assert reason in refusal_of(trainer, items=items)


class Prepares(Trainer):
    """Generates in ``_prepare_inputs``, as GRPO does."""

    __module__ = "trl.trainer.of_a_test"

    def _prepare_inputs(self, inputs):
        raise AssertionError


def test_online_trainers_are_refused(tmp_path: Path):
    trainer, _ = cases.make(tmp_path, Prepares)
    assert refusal_of(trainer) == (
        f"Prepares generates its training data in _prepare_inputs, from whole generation batches: {WEIGHTS}"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"items": 3}, "items is 3: it must be"),
        ({"nonfinite": "stop"}, 'nonfinite is \'stop\': it must be "skip" or "raise".'),
        ({"microbatch": 0}, "microbatch"),
        ({"microbatch": "most"}, "microbatch is 'most': it must be \"auto\", an int, or a TokenBudget."),
        ({"microbatch": 2, "memory": "1GiB"}, "memory='1GiB' chooses the micro-batch, and microbatch=2 is fixed"),
        ({"microbatch": bigbatch.TokenBudget(9)}, "a TokenBudget needs the length of each sample: pass lengths="),
        ({"layout": "packed"}, 'layout="packed" needs lengths='),
        ({"layout": "rows"}, "layout is 'rows'"),
    ],
)
def test_invalid_settings_are_refused(tmp_path: Path, settings, message: str):
    trainer, _ = cases.make(tmp_path)
    assert refusal_of(trainer, **settings).startswith(message)


def test_other_objects_are_refused():
    assert refusal_of(nn.Linear(1, 1)) == (
        "trainer is a Linear: pass a transformers.Trainer, or an instance of a subclass."
    )


@pytest.mark.parametrize("name", ["get_batch_samples", "_get_num_items_in_batch"])
def test_own_count_needs_items(tmp_path: Path, name: str):
    def own(self, *_):
        raise AssertionError("it would be called with samples")

    trainer, _ = cases.make(tmp_path, type("Counts", (cases.MeanLoss,), {name: own}))
    assert refusal_of(trainer) == (
        f"Counts counts num_items_in_batch by itself ({name} is overridden), from collated batches that a window does "
        "not have: pass items=, a function from a collated micro-batch to this count."
    )
    exact(trainer, items=cases.num_labels).train()


def test_mean_that_claims_to_be_scaled_is_refused(tmp_path: Path):
    class Scaled(cases.MeanLoss):
        loss_is_scaled_for_ga = True

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs) / cases.STEPS

    trainer, _ = cases.make(tmp_path, Scaled)
    exact(trainer)
    with pytest.raises(bigbatch.InputError) as caught:
        trainer.train()
    assert str(caught.value) == (
        "loss_is_scaled_for_ga is True, and the loss is a mean over labels whatever num_items_in_batch is, so it seems "
        "to be divided by the number of accumulation steps, which would make updates too small: return the mean "
        "undivided, and set loss_is_scaled_for_ga to False."
    )


def test_mixin_after_the_trainer_is_refused():
    with pytest.raises(bigbatch.InputError) as caught:
        type("Mine", (cases.MeanLoss, ExactTrainer), {})
    assert str(caught.value) == (
        "Mine has MeanLoss before ExactTrainer among its base classes, whose __init__ would not run: write class "
        "Mine(ExactTrainer, MeanLoss)."
    )


def test_exact_trainers_pass_the_checks_again(tmp_path: Path):
    trainer, _ = cases.make(tmp_path)
    check_trainer(exact(trainer), Settings())


def test_own_division_is_not_taken_for_the_scale(tmp_path: Path):
    class Halves(cases.MeanLoss):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss / 2)
            return loss.detach()

    trainer, _ = cases.make(tmp_path, Halves)
    exact(trainer, items=cases.num_labels)
    with pytest.raises(bigbatch.InputError, match=re.escape("training_step of Halves multiplies the loss by 0.5")):
        trainer.train()
