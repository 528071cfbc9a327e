import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bigbatch.lm.config.field_groups import EXCLUSIVE, GROUPS
from bigbatch.lm.config.field_types import LARGEST_SEED
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.config.train_fields import DEFAULT_STEPS


def error_types(**given: object) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        TrainConfig.model_validate(given)
    return [error["type"] for error in caught.value.errors()]


def test_every_field_has_one_group_and_description():
    grouped = [name for group in GROUPS for name in group.fields]
    assert sorted(grouped) == sorted(TrainConfig.model_fields)
    assert all(info.description for info in TrainConfig.model_fields.values())


def test_unknown_names_are_rejected():
    assert error_types(lerning_rate=1) == ["extra_forbidden"]


def test_config_is_frozen():
    config = TrainConfig()
    with pytest.raises(ValidationError):
        config.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("value", ["64", " 64 ", 64, "6_4"])
def test_integers_are_numbers_or_text(value: object):
    assert TrainConfig.model_validate({"global_batch": value}).global_batch == 64


@pytest.mark.parametrize("value", [2.5, "2.5", True, "true", "", [1], {}, "nan", "9" * 6000, 2**31, 0, -1])
@pytest.mark.parametrize(
    "name",
    ["global_batch", "global_batch_tokens", "microbatch", "token_budget", "steps", "epochs", "max_length"],
)
def test_counts_reject_non_positive_or_fractional_values(name: str, value: object):
    assert len(error_types(**{name: value})) == 1


@pytest.mark.parametrize("value", [True, "fast", float("nan"), "nan", float("inf"), "inf", "1e999", -1, {}])
@pytest.mark.parametrize("name", ["lr", "weight_decay", "max_grad_norm", "validation_fraction", "lora_alpha"])
def test_numbers_are_finite_and_not_negative(name: str, value: object):
    assert len(error_types(**{name: value})) == 1


def test_ranges_end_as_documented():
    TrainConfig(weight_decay=0, validation_fraction=0, warmup_steps=0, lora_rank=0, seed=LARGEST_SEED)
    assert error_types(lr=0) == ["greater_than"]
    assert error_types(validation_fraction=1) == ["less_than"]
    assert error_types(seed=LARGEST_SEED + 1) == ["less_than_equal"]
    assert error_types(seed=-1) == ["greater_than_equal"]


@pytest.mark.parametrize("value", [0, "0", 0.0, "none", "None", None])
def test_no_clipping_has_one_value(value: object):
    assert TrainConfig.model_validate({"max_grad_norm": value}).max_grad_norm is None


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12", "mps"])
def test_known_devices_are_accepted(device: str):
    assert TrainConfig(device=device).device == device


@pytest.mark.parametrize("device", ["", "GPU", "cuda:", "cuda:x", "cuda:-1", "CPU", "cpu:0"])
def test_other_devices_are_rejected(device: str):
    assert error_types(device=device) == ["device_name"]


@pytest.mark.parametrize("text", ["a\0b", "\udcff"])
@pytest.mark.parametrize("name", ["data", "model", "out", "sample_prompt"])
def test_text_that_no_file_can_hold_is_rejected(name: str, text: str):
    assert len(errors_of_values(name, text)) == 1


@pytest.mark.parametrize("name", ["data", "model", "out"])
def test_names_are_not_empty(name: str):
    assert len(errors_of_values(name, "")) == 1


def errors_of_values(name: str, text: str) -> list[str]:
    """Return the errors, without that of pydantic 2.11 for the list that remains without the value."""
    return [kind for kind in error_types(**{name: text}) if kind != "too_short"]


@pytest.mark.parametrize("names", EXCLUSIVE)
def test_one_quantity_has_one_name(names: tuple[str, str]):
    given: dict[str, object] = {"memory": "4GiB", "gpu": "t4", "global_batch_schedule": "0:4"}
    given |= {"text_column": "a", "messages_column": "b"}
    assert error_types(**{name: given.get(name, 4) for name in names}) == ["exclusive"]


@pytest.mark.parametrize("value", ["auto", "Auto", " AUTO "])
def test_auto_microbatch_has_any_spelling(value: str):
    assert TrainConfig.model_validate({"microbatch": value}).microbatch == "auto"


def test_microbatch_is_auto_or_count():
    assert TrainConfig.model_validate({"microbatch": "4"}).microbatch == 4
    for wrong in ("fast", 2.5, True, "", [1]):
        assert error_types(microbatch=wrong) == ["auto_or_count"]
    assert error_types(microbatch=0) == ["greater_than_equal"]
    assert error_types(microbatch=2**31) == ["less_than_equal"]
    assert error_types(microbatch="9" * 6000) == ["int_parsing_size"]


@pytest.mark.parametrize("memory", ["24GiB", "24 gb", "80%", "1.5TiB"])
def test_memory_is_kept_as_written(memory: str):
    assert TrainConfig(memory=memory).memory == memory


@pytest.mark.parametrize("memory", ["", "24", 24, 2.5, "0GiB", "-1GiB", "101%", "nan", "24XB", "a\0b", "\udcff"])
def test_meaningless_memory_is_rejected(memory: object):
    assert error_types(memory=memory) == ["memory"]


@pytest.mark.parametrize("memory", [True, ["24GiB"], {}])
def test_memory_is_text(memory: object):
    assert error_types(memory=memory) == ["string_type"]


def test_gpu_is_saved_by_its_known_name():
    assert TrainConfig(gpu="NVIDIA A100 40GB").gpu == "a100-40gb"
    assert TrainConfig(gpu="a100").gpu == "a100-40gb"
    assert error_types(gpu="a100-60gb") == ["gpu"]
    assert error_types(gpu=4090) == ["string_type"]


@pytest.mark.parametrize("name", ["gradient_checkpointing", "layout", "attention", "compile", "logits"])
@pytest.mark.parametrize("value", [1, 0, 1.0, "true", "yes", "", "Full", None, ["full"]])
def test_choices_are_limited_to_known_words(name: str, value: object):
    assert error_types(**{name: value}) == ["literal_error"]


def test_checkpointing_may_be_switch_or_known_mode():
    words = {True: "full", False: "none", "auto": "auto", "none": "none", "selective": "selective", "full": "full"}
    for value, word in words.items():
        assert TrainConfig(gradient_checkpointing=value).gradient_checkpointing == word
    assert error_types(layout=True) == error_types(compile=False) == ["literal_error"]


def test_resolved_writes_out_main_job():
    config = TrainConfig().resolved()
    assert (config.global_batch, config.global_batch_tokens) == (32, None)
    assert (config.steps, config.epochs) == (DEFAULT_STEPS, None)
    assert (config.lr, config.lora_alpha) == (5e-3, None)
    assert (config.microbatch, config.token_budget) == ("auto", None)
    assert (config.memory, config.gpu) == (None, None)
    assert (config.gradient_checkpointing, config.layout, config.compile) == ("auto", "auto", "auto")
    assert config.resolved() == config


@pytest.mark.parametrize(
    "idle",
    [
        {"lora_alpha": 8.0},
        {"lora_targets": "q_proj"},
        {"lora_dropout": 0.1},
        {"rslora": True},
        {"dora": True},
        {"steps": 3, "warmup_steps": 4},
    ],
)
def test_settings_without_effect_are_rejected(idle: dict[str, Any]):
    assert error_types(**idle) == ["idle"]


def test_resolved_trains_other_data_for_one_epoch():
    for config in (TrainConfig(data="texts"), TrainConfig(model="gpt2"), TrainConfig(data="python-stdlib-functions")):
        assert (config.resolved().steps, config.resolved().epochs) == (None, 1)


def test_resolved_learning_rate_follows_model():
    assert TrainConfig(model="gpt2").resolved().lr == 2e-5
    lora = TrainConfig(model="gpt2", lora_rank=8).resolved()
    assert (lora.lr, lora.lora_alpha) == (2e-4, 16.0)


@pytest.mark.parametrize("given", ["q_proj, mlp.up_proj", ["q_proj", "mlp.up_proj"], ("q_proj", "mlp.up_proj ")])
def test_lora_targets_are_text_or_a_list(given: Any):
    assert TrainConfig(lora_rank=2, lora_targets=given).lora_targets == "q_proj,mlp.up_proj"
    assert TrainConfig(lora_rank=2, lora_targets="all-linear").lora_targets == "all-linear"


def test_adapters_on_saved_model_are_saved():
    assert TrainConfig(model="gpt2", lora_rank=2).saves_adapters
    assert not TrainConfig(model="gpt2").saves_adapters
    assert not TrainConfig(lora_rank=2).saves_adapters


def test_resolved_keeps_explicit_settings():
    asked = TrainConfig(global_batch_tokens=4096, epochs=2, lr=1.0, max_length=64, lora_rank=4, lora_alpha=1.0)
    assert asked.resolved() == asked.model_copy(update={"microbatch": "auto", "keep": 2})
    assert TrainConfig(microbatch=3).resolved().microbatch == 3
    budget = TrainConfig(token_budget=4096).resolved()
    assert (budget.microbatch, budget.token_budget) == (None, 4096)
    assert budget.resolved() == budget


def test_warmup_and_validation_scale_unless_explicit():
    assert [TrainConfig().warmup_steps_of(steps) for steps in (1, 19, 20, 300)] == [0, 1, 2, 30]
    assert TrainConfig(warmup_steps=0).warmup_steps_of(300) == 0
    assert [TrainConfig().validation_every_of(steps) for steps in (1, 9, 300)] == [1, 1, 30]
    assert TrainConfig(validation_every=7).validation_every_of(300) == 7


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig().resolved(),
        TrainConfig(out=Path("runs/ä"), max_grad_norm=None, precision="bf16-weights", sample_prompt="", lora_rank=2),
        TrainConfig(token_budget=4096, memory="80 %", gradient_checkpointing=True).resolved(),
        TrainConfig(microbatch=4, gpu="RTX 4090"),
        TrainConfig(model="gpt2", lora_rank=2, lora_targets="c_attn", lora_dropout=0.1, rslora=True, dora=True),
        TrainConfig(microbatch="auto"),
    ],
)
def test_json_loads_back_equal(config: TrainConfig):
    assert TrainConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


def test_config_loads_no_torch():
    code = "import sys, bigbatch.lm.config.train_config; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_reproducible_embedding_is_refused() -> None:
    with pytest.raises(ValidationError, match="reproducible is not supported with objective embedding"):
        TrainConfig(reproducible=True, objective="embedding")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"reproducible": True},
            "precision fp8 excludes reproducible: its rounding depends on what is computed together: use bf16",
        ),
        ({"objective": "dpo"}, "precision fp8 is not supported with objective dpo: use bf16"),
        (
            {"quantize": "nf4", "model": "gpt2", "lora_rank": 4},
            "precision fp8 is not supported with quantize, whose weights are multiplied in 16 bits: use bf16",
        ),
        ({"parallel": "fsdp"}, "precision fp8 is not supported with parallel fsdp: use parallel ddp, or bf16"),
        (
            {"offload": "master"},
            "precision fp8 is not supported with offload master: its layers read float32 weights on the device: use "
            "offload none or optimizer",
        ),
    ],
)
def test_fp8_refuses_what_it_excludes(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainConfig(precision="fp8", **settings)
    assert caught.value.errors()[0]["msg"] == sentence


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "embedding"},
        {"objective": "reward"},
        {"parallel": "hsdp"},
        {"offload": "gradients"},
        {"offload": "auto"},
    ],
)
def test_fp8_refuses_every_value_of_them(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"not supported with {' '.join(*settings.items())}"):
        TrainConfig(precision="fp8", **settings)


def test_fp8_allows_what_it_computes_with() -> None:
    settings: dict[str, Any] = {"offload": "optimizer", "optimizer": "adamw", "lora_rank": 4, "logits": "bf16"}
    assert TrainConfig(precision="fp8", **settings).offload == "optimizer"
    assert TrainConfig(precision="fp8", optimizer="adamw-8bit").precision == "fp8"
