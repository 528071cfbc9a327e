"""What `bigbatch plan` says against what training then does, and what it says where training could not begin."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    T5Config,
)
from transformers.utils import logging

from bigbatch.autotune.peak_prediction import state_of
from bigbatch.batching.token_groups import DEFAULT_COST
from bigbatch.errors import BigbatchError, InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.tokenizer import train_tokenizer
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.planning.data_statistics import (
    MOST_DOCUMENTS,
    DataStatistics,
    estimated_lengths,
    measure_data,
)
from bigbatch.lm.planning.device_target import PlanTarget, resolve_target
from bigbatch.lm.planning.estimator import ASKED, FASTEST, FIXED, LARGEST, LEAST, MemorySaving, RunEstimator
from bigbatch.lm.planning.forecast import Forecast, forecast
from bigbatch.lm.training.setup import set_up_training
from bigbatch.lm.training.trainer import Trainer
from bigbatch.memory.allocation_tracker import AllocationTracker, MemoryCategory
from bigbatch.memory.usage import MemoryBudget
from support.language_models import WORDS, records, save_model_folder, write_jsonl
from support.tiers import slow

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 308}
WIDE = {"intermediate_size": 32, "max_position_embeddings": 64, **SHAPE}
HEADS = {"num_key_value_heads": 1, "head_dim": 8}
KINDS: dict[str, Any] = {
    "mistral": lambda: MistralConfig(**WIDE, **HEADS, sliding_window=8),
    "gemma2": lambda: Gemma2Config(**WIDE, **HEADS, sliding_window=64),
    "bloom": lambda: BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=308),
    "opt": lambda: OPTConfig(ffn_dim=32, max_position_embeddings=64, word_embed_proj_dim=16, **SHAPE),
    "mamba": lambda: MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=308, state_size=4),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ragged and even data, and models with and without weights."""
    folder = tmp_path_factory.mktemp("forecast")
    write_jsonl(folder / "data.jsonl", records(40))
    write_jsonl(folder / "even.jsonl", [{"text": " ".join(WORDS)}] * 16)
    for kind in ("llama", "gpt2"):
        save_model_folder(folder / kind, kind=kind)
    return folder


def configured(folder: Path, config: Any) -> str:
    """Save a configuration without weights and tokenizer; give its folder."""
    config.save_pretrained(folder)
    return str(folder)


def whole(place: Path, folder: Path, kind: str) -> str:
    """Save a model of a kind with its tokenizer; give its folder."""
    if kind in ("llama", "gpt2"):
        return str(place / kind)
    logging.disable_progress_bar()
    AutoModelForCausalLM.from_config(KINDS[kind]()).save_pretrained(folder)
    train_tokenizer([row["completion"] for row in records(50)], vocabulary_size=300).save_pretrained(folder)
    return str(folder)


def asked(place: Path, **settings: Any) -> TrainConfig:
    given = {"data": str(place / "data.jsonl"), "model": str(place / "llama"), "device": "cpu"}
    return TrainConfig(**given | settings)


def forecast_of(place: Path, **settings: Any) -> Forecast:
    return forecast(asked(place, **settings), progress=lambda *_: None)


def survey_of(place: Path, **settings: Any) -> DataStatistics:
    return measured_once(place, tuple(settings.items()))


@cache
def measured_once(place: Path, settings: tuple[tuple[str, Any], ...]) -> DataStatistics:
    return measure_data(asked(place, **dict(settings)).resolved(), progress=lambda *_: None)


def desk_of(place: Path, usable_bytes: int | None, **settings: Any) -> RunEstimator:
    """Plan for so much memory, whatever this machine has."""
    config = asked(place, **settings).resolved()
    config = config.model_copy(update={"precision": "float32" if config.precision == "auto" else config.precision})
    room = None if usable_bytes is None else MemoryBudget(2 * usable_bytes, usable_bytes)
    target = PlanTarget("elsewhere", CPU, DeviceSpec(CPU, config.precision), room, is_local=False)
    return RunEstimator(config, target, survey_of(place, **settings))


def card_of(place: Path, usable_bytes: int, **settings: Any) -> RunEstimator:
    """Plan for a card of so much memory."""
    config = asked(place, precision="bf16", **settings).resolved()
    room = MemoryBudget(2 * usable_bytes, usable_bytes)
    target = PlanTarget("a card", torch.device("cuda"), DeviceSpec(CPU, "bf16"), room, is_local=False)
    return RunEstimator(config, target, survey_of(place, **settings))


# memory ----------------------------------------------------------------------------------------------------------


def tracked_peak(config: TrainConfig) -> int:
    """What the second update of a run allocates at its peak."""
    prepared = set_up_training(config)
    trainer = Trainer(prepared)
    samples = trainer.fetch(trainer.schedule.first_window())
    assert trainer.engine.step(samples).num_microbatches == 2
    with AllocationTracker(CPU) as tracker:
        tracker.track([*prepared.model.parameters(), *prepared.model.buffers()], MemoryCategory.PARAMETERS)
        tracker.track(state_of(trainer.optimizer), MemoryCategory.OPTIMIZER)
        trainer.engine.step(samples)
    return tracker.peak_bytes


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"lora_rank": 2}),
        slow("llama", {"lora_rank": 2, "lora_targets": "q_proj,down_proj", "dora": True}),
        slow("llama", {"lora_rank": 2, "quantize": "nf4"}),
        ("llama", {"lora_rank": 2, "quantize": "nf4-double", "precision": "bf16"}),
        ("llama", {"gradient_checkpointing": True}),
        ("llama", {"precision": "bf16-weights"}),
        *(
            slow("llama", {"optimizer": name, "lr": 0.01})
            for name in ("adamw-8bit", "muon", "lion", "adafactor", "sgd")
        ),
        slow("llama", {"precision": "bf16", "max_grad_norm": None}),
        slow("gpt2", {"lora_rank": 2, "gradient_checkpointing": True}),
        ("gpt2", {}),
        *(slow(kind, {}) for kind in KINDS),
    ],
)
def test_peak_equals_second_update_of_run(place: Path, tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    settings = settings | {"data": str(place / "even.jsonl"), "validation_fraction": 0, "global_batch": 8}
    settings |= {"model": whole(place, tmp_path, kind), "microbatch": 4, "max_length": 32}
    found = desk_of(place, None, **settings).predict(4)
    assert found.peak_bytes == pytest.approx(tracked_peak(asked(place, **settings)), rel=0.01)
    assert sum(found.parts.values()) == found.peak_bytes


def test_limit_above_batch_needs_same_memory(place: Path) -> None:
    for limit in ({"microbatch": 10**6}, {"token_budget": 10**6}):
        desk = desk_of(place, None, **limit)
        assert desk._worst_cases(10**6) == [(32, 32)]
        cut = desk.plan(10**6, DEFAULT_COST)
        assert cut.num_microbatches == 1
        assert cut.token_budget in (None, cut.largest_tokens)


def test_token_budget_is_predicted_by_best_filling(place: Path) -> None:
    desk = desk_of(place, None, token_budget=40)
    assert desk._worst_cases(40) == [(1, 32), (2, 20)]
    assert desk.predict(40).peak_bytes > desk.predict(32).peak_bytes


def test_size_below_longest_sequence_runs_it_alone(place: Path) -> None:
    desk = desk_of(place, None)
    assert desk.predict(10) == desk.predict(32)
    cut = desk.plan(10, DEFAULT_COST)
    alone = [cut.lengths[row] for row, *others in cut.microbatches[0] if not others]
    assert max(cut.lengths) in alone
    assert cut.token_budget == cut.largest_tokens == max(cut.lengths)


@pytest.mark.parametrize("share", [0.1, 0.8])
def test_largest_microbatch_that_fits_is_found(place: Path, share: float) -> None:
    one, most = (desk_of(place, 2**30).predict(size).peak_bytes for size in (32, 32 * 32))
    usable_bytes = int(one + share * (most - one))
    desk = desk_of(place, usable_bytes)
    size, reason = desk.microbatch()
    assert reason == LARGEST
    assert desk.predict(size).peak_bytes <= usable_bytes < desk.predict(size + 32).peak_bytes


def test_oversized_single_sequence_is_reported(place: Path) -> None:
    desk = desk_of(place, desk_of(place, 2**30).predict(32).peak_bytes - 1)
    assert desk.microbatch() == (32, LEAST)


def test_auto_chooses_fastest_where_measurable(place: Path) -> None:
    found = forecast_of(place)
    assert (found.unit, found.reason, found.untimed) == ("tokens", FASTEST, None)
    assert found.update_s > 0
    assert found.plan.largest_tokens <= max(found.size, found.longest)


# the first update ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"microbatch": 5},
        {"microbatch": 5, "global_batch": 1000},
        {"token_budget": 70},
        {"token_budget": 70, "global_batch_tokens": 200},
        {"token_budget": 40, "max_length": 20, "epochs": 3, "seed": 4},
        {"microbatch": 3, "steps": 7},
    ],
)
def test_first_update_equals_that_of_run(place: Path, settings: dict[str, Any]) -> None:
    found = desk_of(place, None, **settings).plan(
        settings.get("token_budget", settings.get("microbatch")), DEFAULT_COST
    )
    trainer = Trainer(set_up_training(asked(place, **settings)))
    samples = trainer.fetch(trainer.schedule.first_window())
    lengths = [len(sample["input_ids"]) for sample in samples]
    made = [[lengths[i] for i in rows] for rows in trainer.engine.groups(lengths)]
    assert [[found.lengths[i] for i in rows] for rows in found.microbatches[0]] == made
    assert trainer.engine.step(samples).num_microbatches == found.num_microbatches
    data = survey_of(place, **settings)
    assert (data.num_updates, data.max_length) == (trainer.total_steps, trainer.config.max_length)


def test_deterministic_plan_uses_the_micro_batch_of_training(place: Path) -> None:
    found = forecast_of(place, deterministic=True)
    trainer = Trainer(set_up_training(asked(place, deterministic=True)))
    assert (found.unit, found.reason, found.config.gradient_checkpointing) == ("tokens", FIXED, "auto")
    assert found.size == trainer.engine.token_budget == 8 * found.longest


def test_forecast_is_complete(place: Path) -> None:
    found = forecast_of(place, microbatch=5)
    desk = desk_of(place, None, microbatch=5)
    assert (found.unit, found.size, found.longest, found.reason) == ("samples", 5, 32, ASKED)
    assert found.prediction == desk.predict(5)
    assert found.plan == desk.plan(5, DEFAULT_COST)
    assert (found.num_parameters, found.num_trained) == (15_056, 15_056)
    assert (found.fits, found.untimed, found.notes, found.num_updates) == (True, None, (), 2)
    assert found.config.precision == "float32"


# memory savings --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model so wide that adapters are a small part of it."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    return configured(tmp_path_factory.mktemp("wide") / "m", LlamaConfig(**shape, vocab_size=308))


CHECKPOINTING, NARROW, LORA = "--gradient-checkpointing full", "--precision bf16-weights", "--lora-rank 16"
NF4 = "--quantize nf4"  # of a run with adapters


@pytest.mark.parametrize(
    ("settings", "offered"),
    [
        ({}, {CHECKPOINTING, NARROW, LORA}),
        slow({"gradient_checkpointing": "full"}, {NARROW, LORA}),
        slow({"gradient_checkpointing": "selective"}, {CHECKPOINTING, NARROW, LORA}),
        slow({"gradient_checkpointing": "none"}, {CHECKPOINTING, NARROW, LORA}),
        slow({"precision": "bf16-weights"}, {CHECKPOINTING, LORA}),
        ({"lora_rank": 2}, {CHECKPOINTING, NARROW, NF4}),
        slow({"lora_rank": 2, "quantize": "nf4-double"}, {CHECKPOINTING, NARROW}),
    ],
)
def test_active_setting_is_not_suggested(place: Path, wide: str, settings: dict[str, Any], offered: set[str]) -> None:
    desk = desk_of(place, 2**30, model=wide, microbatch=8, **settings)
    levers = desk.memory_savings(8)
    assert {lever.flags for lever in levers} == offered
    peaks = [lever.peak_bytes for lever in levers]
    assert peaks == sorted(peaks)
    assert peaks[-1] < desk.predict(8).peak_bytes


def test_suggested_setting_shows_its_peak(place: Path, wide: str) -> None:
    changes = {
        CHECKPOINTING: {"gradient_checkpointing": "full"},
        NARROW: {"precision": "bf16-weights"},
        LORA: {"lora_rank": 16},
    }
    for lever in desk_of(place, None, model=wide, microbatch=8).memory_savings(8):
        with_it = desk_of(place, None, model=wide, microbatch=8, **changes[lever.flags])
        assert (lever.peak_bytes, lever.fits) == (with_it.predict(8).peak_bytes, None)


def test_fewest_settings_that_fit_are_suggested(place: Path, wide: str) -> None:
    singles = desk_of(place, 2**30, model=wide, microbatch=8).memory_savings(8)
    least = desk_of(place, singles[0].peak_bytes, model=wide, microbatch=8).memory_savings(8)
    assert least == [MemorySaving(lever.flags, lever.peak_bytes, lever is singles[0]) for lever in singles]
    fitting = desk_of(place, singles[0].peak_bytes - 1, model=wide, microbatch=8).memory_savings(8)
    together = [lever for lever in fitting if lever.fits]
    assert together
    assert {lever.flags for lever in together} <= {
        f"{CHECKPOINTING} {NARROW}", f"{CHECKPOINTING} {LORA}", f"{NARROW} {LORA}", f"{LORA} {NF4}"
    }  # fmt: skip
    assert len(fitting) == len(together) + 3


@pytest.mark.parametrize(
    ("fits", "gpu", "note"),
    [
        ({"none", "selective", "full", "offload"}, "h100", None),
        ({"selective", "full", "offload"}, "h100", "every second layer"),
        ({"full", "offload"}, "h100", "all layers"),
        slow({"full"}, None, "all layers"),
        slow({"offload"}, "h100", None),
        slow(set(), "h100", None),
    ],
)
def test_first_mode_in_which_longest_fits_is_planned(
    place: Path, monkeypatch: pytest.MonkeyPatch, fits: set[str], gpu: str | None, note: str | None
) -> None:
    monkeypatch.setattr(
        RunEstimator, "fits", lambda self, _: self._config.gradient_checkpointing.replace("auto", "none") in fits
    )
    settings: dict[str, Any] = {"memory": "1GiB"} if gpu is None else {"gpu": gpu, "device": "auto"}
    found = forecast_of(place, microbatch="auto", **settings)
    notes = [each for each in found.notes if each.startswith("activation checkpointing")]
    expected = f"activation checkpointing in {note}: the longest sequence does not fit without it"
    assert notes == ([] if note is None else [expected])


def test_unsupported_setting_is_not_suggested(place: Path, tmp_path: Path) -> None:
    mamba = configured(tmp_path, KINDS["mamba"]())
    assert LORA not in {lever.flags for lever in desk_of(place, None, model=mamba, microbatch=8).memory_savings(8)}
    with pytest.raises(InputError, match=rf"^--lora-rank is not supported for {mamba}: .*Mamba"):
        forecast_of(place, model=mamba, microbatch=8, lora_rank=2)


# data ------------------------------------------------------------------------------------------------------------


def test_four_bytes_count_as_token_without_tokenizer(place: Path, wide: str) -> None:
    found = survey_of(place, model=wide, data=str(place / "even.jsonl"))
    assert found.lengths == (len(" ".join(WORDS).encode()) // 4,)
    assert found.notes == (
        f"lengths are estimated, 4 bytes a token: the folder {wide} contains no tokenizer. Save the model's tokenizer "
        "into it with tokenizer.save_pretrained(folder).",
    )
    documents = [Document("a", text="x" * 100), Document("b", text=""), Document("c", text="ü" * 32)]
    assert estimated_lengths(documents, 10) == [10, 10, 5, 1, 10, 6]


def test_sample_represents_many_documents(place: Path, tmp_path: Path) -> None:
    number = MOST_DOCUMENTS + 500
    rows = [{"text": "x" * (1 + i % 7)} for i in range(number)]
    rows[1001]["text"] = " ".join(WORDS)
    data = str(write_jsonl(tmp_path / "many.jsonl", rows))
    found = survey_of(place, data=data, validation_fraction=0, global_batch=2400, epochs=2)
    exact = set_up_training(asked(place, data=data, validation_fraction=0, global_batch=2400, epochs=2))
    assert found.notes == (f"lengths are those of {MOST_DOCUMENTS:,} of {number:,} documents",)
    assert found.longest == max(exact.training.lengths)
    assert (len(found.window), found.most_rows) == (2400, 2400)
    assert found.num_updates == Trainer(exact).total_steps == 4
    in_tokens = survey_of(place, data=data, validation_fraction=0, global_batch_tokens=4000)
    assert sum(in_tokens.window) == pytest.approx(4000, rel=0.01)
    assert in_tokens.num_updates == pytest.approx(sum(exact.training.lengths) / 4000, abs=1)


def test_one_short_document_is_a_batch(place: Path, tmp_path: Path) -> None:
    data = str(write_jsonl(tmp_path / "one.jsonl", [{"text": "x"}]))
    found = forecast_of(place, data=data)
    assert (found.plan.num_microbatches, len(found.plan.lengths), found.num_updates) == (1, 1, 1)


def test_model_without_position_limit_accepts_any_length(place: Path, tmp_path: Path) -> None:
    bloom = configured(tmp_path, KINDS["bloom"]())
    assert survey_of(place, model=bloom, max_length=5000).max_length == 5000
    assert survey_of(place, model=bloom).max_length == 1024
    assert survey_of(place).max_length == 64


# what is refused -------------------------------------------------------------------------------------------------


def test_length_above_positions_is_rejected(place: Path) -> None:
    with pytest.raises(
        InputError, match=r"^--max-length 65 is more than the 64 positions of .*: pass --max-length 64 "
    ):
        forecast_of(place, max_length=65)


def test_budget_below_longest_sequence_is_rejected(place: Path) -> None:
    with pytest.raises(InputError) as caught:
        forecast_of(place, token_budget=30)
    assert str(caught.value) == (
        "--token-budget 30 is less than the longest sequence, which has 32 tokens and is never cut: pass "
        "--token-budget 32 or more, or a smaller --max-length."
    )


def test_non_causal_model_is_rejected(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        forecast_of(place, model=configured(tmp_path, T5Config()))
    assert str(caught.value) == f"{tmp_path} is a t5 model, which is not a causal language model."


def test_invalid_model_dimensions_are_rejected(place: Path, tmp_path: Path) -> None:
    folder = configured(tmp_path, KINDS["opt"]())
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(written | {"num_attention_heads": 3}), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        forecast_of(place, model=folder, microbatch=1)
    assert str(caught.value).startswith(f"the configuration of {folder} makes no model: ")
    assert str(caught.value).endswith(".")


def test_step_that_needs_data_is_one_sentence(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    experts = configured(tmp_path, MixtralConfig(**WIDE, **HEADS, num_local_experts=2))
    with pytest.raises(BigbatchError) as caught:
        forecast_of(place, model=experts, microbatch=1)
    said = str(caught.value)
    assert said.startswith(f"the memory of {experts} cannot be predicted: the step cannot run without data (")
    assert said.endswith("). Run bigbatch train on the target machine: it finds the micro-batch by trying sizes.")
    assert not isinstance(caught.value, InputError)
    assert "Traceback" not in capfd.readouterr().err


# what is planned for ---------------------------------------------------------------------------------------------


def test_gpu_is_known_by_name(place: Path) -> None:
    found = forecast_of(place, device="auto", gpu="t4", microbatch=4)
    assert (found.target.name, found.target.is_local, found.fits) == ("t4, fp16", False, True)
    assert found.untimed == "the device is not in this machine"
    assert found.update_s is None
    assert "libraries" in found.prediction.parts
    assert str(found.target.budget).startswith(
        "memory is limited to the 13.8 GiB that are usually free on t4, of which "
    )


def test_gpu_with_another_device_is_rejected(place: Path) -> None:
    with pytest.raises(InputError) as caught:
        resolve_target(asked(place, gpu="t4"))
    assert str(caught.value) == "--gpu t4 and --device cpu exclude each other: pass one of them."


def test_memory_above_device_is_rejected(place: Path) -> None:
    with pytest.raises(InputError, match=r"^--memory 100TiB is more than the .*GiB that the device has: pass "):
        resolve_target(asked(place, memory="100TiB"))


def test_copies_of_weights_are_counted_where_training_makes_them(place: Path) -> None:
    """In bfloat16, 2 bytes for each weight of a linear layer; with "auto", only where they are a small part."""
    desk = desk_of(place, 2**30)
    linear = sum(m.weight.numel() for m in desk._outline(desk._config).model.modules() if isinstance(m, nn.Linear))

    def peak_bytes(usable_bytes: int, **settings: Any) -> int:
        return card_of(place, usable_bytes, **settings).predict(32).peak_bytes

    def saved(more_bytes: int, **settings: Any) -> int:
        return peak_bytes(2**30, **settings) - peak_bytes(more_bytes, **settings)

    assert saved(1, microbatch=4) == 0  # a given micro-batch leaves the copies where they are
    assert 2 * linear <= saved(1) <= 2 * linear + 512
    assert saved(2**29) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without CUDA")
class TestWithoutCuda:
    """CUDA is planned for where there is none."""

    def test_absent_device_is_planned_by_its_memory(self, place: Path) -> None:
        target = resolve_target(asked(place, device="cuda:1", memory="1GiB"))
        assert (target.name, target.device.type, target.device_spec.device) == ("a CUDA device, bf16", "cuda", CPU)
        assert target.budget == MemoryBudget.from_limit(2**30, "1GiB")
        assert target.notes[0].endswith(": estimated from CPU kernels with CUDA's allocation rounding.")

    def test_share_of_unknown_memory_is_rejected(self, place: Path) -> None:
        with pytest.raises(InputError) as caught:
            resolve_target(asked(place, device="cuda", memory="80%"))
        assert str(caught.value) == (
            "--memory 80% is a share of a device's memory, and no device is known: pass an amount such as 24GiB, or "
            "the name of a GPU, such as --gpu a100-40gb."
        )

    def test_microbatch_choice_requires_known_memory(self, place: Path) -> None:
        with pytest.raises(InputError) as caught:
            resolve_target(asked(place, device="cuda").resolved())
        assert str(caught.value) == (
            "--device cuda is not in this machine, so its memory is unknown. Pass a GPU, such as --gpu h100, or an "
            "amount, such as --memory 24GiB, or pass --microbatch or --token-budget."
        )

    def test_given_microbatch_is_predicted_without_limit(self, place: Path) -> None:
        found = forecast_of(place, device="cuda", microbatch=4)
        assert (found.fits, found.target.budget) == (None, None)
