"""Weights for a trainer that generates its data: the completions of a window are counted before its first update."""

import copy

import datasets
import pytest
import torch

from bigbatch.errors import InputError
from bigbatch.integrations.transformers import verify, weights
from integrations.transformers import trainer_cases as cases
from support import full_batch_reference as ref
from support import tiny_trainers as tiny

# TRL calls them before and after it generates.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(dis|en)able` is deprecated:FutureWarning")
try:
    from trl import GRPOConfig, GRPOTrainer
except RuntimeError as error:
    pytest.skip(f"this version of TRL cannot import GRPO here: {error}", allow_module_level=True)

NUM_STEPS = 4
SETTINGS = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": NUM_STEPS, "num_generations": 2, "max_steps": 2,
    "max_completion_length": 12, "loss_type": "bnpo", "scale_rewards": "none", "use_cpu": True, "report_to": [],
    "save_strategy": "no", "bf16": False, "max_grad_norm": 0.0, "learning_rate": 1e-3, "disable_tqdm": True,
    "dataloader_pin_memory": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()


def length_reward(completions, **_):
    return [float(len(completion) % 7) for completion in completions]


def tokens(inputs):
    return inputs["completion_mask"].sum()


def make_trainer(folder, callbacks=(), **settings):
    return GRPOTrainer(
        tiny.llama().float(),
        reward_funcs=length_reward,
        args=GRPOConfig(str(folder), **{**SETTINGS, **settings}),
        train_dataset=datasets.Dataset.from_list([{"prompt": f"w{i} w{i + 1} "} for i in range(16)]),
        processing_class=tiny.tokenizer(),
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_sums_of_grpo_are_refused(tmp_path, loss_type):
    trainer = make_trainer(tmp_path, loss_type=loss_type)
    with pytest.raises(
        InputError, match=r"^compute_loss of GRPOTrainer reads inputs\['num_items_in_batch'\], the items"
    ):
        weights(trainer, items=tokens).train()


def test_generated_data_cannot_be_verified(tmp_path):
    with pytest.raises(InputError) as caught:
        verify(weights(make_trainer(tmp_path), items=tokens))
    assert str(caught.value) == (
        "GRPOTrainer generates the data of a window while it trains, so a window has other data in each run, and "
        "verify() cannot compare two."
    )


@pytest.mark.parametrize("steps_per_generation", [1, 4, 8])
def test_grpo_is_averaged_over_tokens_of_the_window(tmp_path, steps_per_generation):
    torch.manual_seed(0)
    recorder, prepared = cases.Recorder(), []

    def items(inputs):
        prepared.append(copy.copy(inputs))
        return tokens(inputs)

    trainer = make_trainer(tmp_path, [recorder], steps_per_generation=steps_per_generation)
    weights(trainer, items=items).train()
    assert len(prepared) == 2 * NUM_STEPS
    assert trainer._step == 2 * NUM_STEPS

    trainer.__class__ = GRPOTrainer
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model
    for window in range(2):
        model.load_state_dict(recorder.weights[window])
        model.zero_grad()
        batches = prepared[NUM_STEPS * window :][:NUM_STEPS]
        total = sum(float(tokens(inputs)) for inputs in batches)
        for inputs in batches:
            (trainer.compute_loss(model, copy.copy(inputs)) * float(tokens(inputs)) / total).backward()
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert ref.relative_error(recorder.gradients[window], expected) <= 1e-5
