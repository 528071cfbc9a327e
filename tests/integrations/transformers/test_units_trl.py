"""The units of TRL's losses, and those that are refused."""

import random

import datasets
import pytest
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from bigbatch.errors import InputError
from bigbatch.integrations.transformers import verify
from bigbatch.integrations.transformers.units import UnitFinder
from integrations.transformers.trl_cases import KTOConfig, KTOTrainer
from support import tiny_trainers as tiny
from support.tiers import slow, slow_except

SUM = "sum / num_items"
SETTINGS = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "use_cpu": True, "report_to": [],
    "save_strategy": "no", "bf16": False, "dataloader_pin_memory": False,
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing(_kwargs)?` is deprecated and will be removed in v6:FutureWarning",
)
LORA = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()


def rows(*columns, label=False):
    numbers = random.Random(3)

    def words(low, high):
        return " ".join(f"w{numbers.randrange(30)}" for _ in range(numbers.randint(low, high)))

    found = [{"prompt": words(2, 5) + " ", **{column: words(2, 9) for column in columns}} for _ in range(14)]
    if label:
        found = [{**row, "label": bool(index % 2)} for index, row in enumerate(found)]
    return datasets.Dataset.from_list(found)


def model():
    return tiny.llama().float()


def make(kind, config, folder, data, network=None, peft=None, reference=True, **settings):
    extra = {"ref_model": model()} if kind in (DPOTrainer, KTOTrainer) and peft is None and reference else {}
    args = config(output_dir=str(folder), **{**SETTINGS, **settings})
    return kind(
        network or model(), args=args, train_dataset=data, processing_class=tiny.tokenizer(), peft_config=peft, **extra
    )


def sft(folder, peft=None, **settings):
    return make(SFTTrainer, SFTConfig, folder, rows("completion"), peft=peft, **settings)


def dpo(folder, peft=None, **settings):
    return make(DPOTrainer, DPOConfig, folder, rows("chosen", "rejected"), peft=peft, **settings)


def kto(folder, **settings):
    data = rows("completion", label=True)
    return make(KTOTrainer, KTOConfig, folder, data, train_sampling_strategy="sequential", **settings)


def reward(folder, **settings):
    data = rows("chosen", "rejected")
    return make(RewardTrainer, RewardConfig, folder, data, tiny.llama_classifier(), **settings)


CASES = {
    "sft": (SUM, sft, {}),
    "sft dft": (SUM, sft, {"loss_type": "dft"}),
    "sft packed": (SUM, sft, {"padding_free": True, "max_length": None}),
    "sft with LoRA": (SUM, sft, {"peft": LORA}),
    "dpo": ("samples", dpo, {}),
    "dpo ipo": ("samples", dpo, {"loss_type": ["ipo"]}),
    "dpo with LoRA": ("samples", dpo, {"peft": LORA}),
    "dpo of two terms per pair": ("samples", dpo, {"loss_type": ["sigmoid", "hinge"]}),
    "reward": ("samples", reward, {}),
    "reward, centered": ("samples", reward, {"center_rewards_coefficient": 0.1}),
    "kto apo_zero_unpaired": ("samples", kto, {"loss_type": "apo_zero_unpaired"}),
}


def finder_of(trainer):
    return UnitFinder(
        trainer,
        trainer.data_collator,
        lambda model, inputs, num_items: trainer.compute_loss(model, inputs, num_items_in_batch=num_items),
    )


def samples_of(trainer):
    return [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))]


def metrics_of(trainer):
    """Return what losses write to a trainer, by names of old and new versions."""
    names = ("_metrics", "_stored_metrics", "_total_train_tokens")
    return [repr(getattr(trainer, name, None)) for name in names]


@pytest.mark.parametrize("name", slow_except(CASES, "sft", "dpo", "reward", "kto apo_zero_unpaired"))
def test_units_of_trl(tmp_path, name):
    expected, build, settings = CASES[name]
    trainer = build(tmp_path, **settings)
    before = metrics_of(trainer)
    unit = finder_of(trainer).unit(samples_of(trainer))
    assert (unit.name, unit.takes_num_items) == (expected, expected == SUM)
    assert metrics_of(trainer) == before


@pytest.mark.parametrize(
    ("build", "settings", "sentence"),
    [
        (dpo, {"loss_type": ["sigmoid", "sft"]}, "several terms in different units"),
        (dpo, {"loss_type": ["aot"]}, "loss_type='aot' sorts the log-ratios of a micro-batch"),
        (kto, {"loss_type": "kto"}, "loss_type='kto' subtracts a KL estimate that is the mean over a micro-batch"),
    ],
)
def test_coupled_losses_of_trl_are_refused(tmp_path, build, settings, sentence):
    trainer = build(tmp_path, **settings)
    with pytest.raises(InputError, match=sentence):
        finder_of(trainer).unit(samples_of(trainer))


def test_count_of_dpo_is_pairs(tmp_path):
    trainer = dpo(tmp_path)
    samples = samples_of(trainer)
    unit = finder_of(trainer).unit(samples)
    assert unit.count(trainer.data_collator(samples[:5])) == 5


def test_packed_row_counts_its_labels(tmp_path):
    trainer = sft(tmp_path, padding_free=True, max_length=None)
    samples = samples_of(trainer)
    unit = finder_of(trainer).unit(samples)
    packed = trainer.data_collator(samples[:5])
    assert packed["input_ids"].shape[0] == 1
    assert int(unit.count(packed)) == sum(
        int(trainer.data_collator([sample])["labels"].ne(tiny.IGNORED).sum()) for sample in samples[:5]
    )


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (sft, {}),
        slow(sft, {"padding_free": True, "max_length": None}),
        slow(dpo, {}),
        slow(dpo, {"loss_type": ["ipo"]}),
        (reward, {}),
        (kto, {"loss_type": "apo_zero_unpaired"}),
    ],
)
def test_trl_is_verified(tmp_path, build, settings):
    trainer = build(tmp_path, **settings, gradient_accumulation_steps=2)
    before = metrics_of(trainer)
    result = verify(trainer)
    assert result.exact
    assert result.relative_error <= 1e-6
    first, last = result.windows
    assert first.stock_error <= 1e-5
    assert (last.stock_error >= 0.1) == (build is not sft)
    assert metrics_of(trainer) == before
