"""The table of ``bigbatch plan --offload``: peaks against whole predictions, choice, refusals, and its own time."""

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from bigbatch.errors import InputError
from bigbatch.lm.config.field_types import AUTO_MODES, CHECKPOINTING_MODES
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.planning.data_statistics import DataStatistics
from bigbatch.lm.planning.device_target import resolve_target
from bigbatch.lm.planning.estimator import RunEstimator
from bigbatch.lm.planning.layer_series import LayerSeries, NarrowEstimator, with_layers
from bigbatch.lm.planning.offload_cases import OffloadCases
from bigbatch.lm.planning.offload_table import OffloadTable, offload_table
from bigbatch.offload.cards import card
from bigbatch.offload.choice import Candidate, choose
from bigbatch.offload.costs import placement
from bigbatch.offload.levels import LEVELS
from support.language_models import records, write_jsonl
from support.tiers import slow, slow_except

MIB, GIB = 2**20, 2**30
DEEP: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 10, "num_attention_heads": 4}


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**DEEP, "intermediate_size": 128, "num_key_value_heads": 2, **changes})


def asked(**changes: Any) -> TrainConfig:
    given = {"model": "m", "gpu": "h100", "precision": "bf16", "microbatch": "auto", "max_length": 128, "lr": 1e-3}
    return TrainConfig(**given | changes).resolved()


def data_of(model_config: Any, *, length: int = 128, number: int = 64) -> DataStatistics:
    return DataStatistics(model_config, length, (length,), (length,) * number, number, 1, ())


def cases_of(config: TrainConfig, data: DataStatistics, **options: Any) -> OffloadCases:
    return OffloadCases(config, resolve_target(config), data, **options)


@pytest.mark.parametrize("mode", slow_except(CHECKPOINTING_MODES, "full"))
@pytest.mark.parametrize("make", [RunEstimator, NarrowEstimator])
def test_few_layers_predict_all_of_them(mode: str, make: type[RunEstimator]) -> None:
    config, data = asked(gradient_checkpointing=mode), data_of(llama())
    target = resolve_target(config)
    whole = make(config, target, data)
    series = LayerSeries(make, config, target, data, num_parameters=whole.num_parameters)
    assert series.first.num_parameters < whole.num_parameters
    found = whole.predict(1024)
    expected = max(found.phases[phase] for phase in ("forward", "backward")) - found.resident_bytes
    assert series.activation_bytes(1024) == pytest.approx(expected, rel=0.01)
    assert series.total(lambda each: each.predictor.state_bytes) == whole.predictor.state_bytes


def test_unequal_layers_are_predicted_whole() -> None:
    config, data = asked(), data_of(llama())
    series = LayerSeries(RunEstimator, config, resolve_target(config), data, num_parameters=1)
    assert series.first.outline.model.config.num_hidden_layers == 10


def test_kinds_of_layers_are_cut_with_them() -> None:
    found = with_layers(GPT2Config(n_layer=12), 4)
    assert found.n_layer == 4
    config = llama()
    config.layer_types = ["full_attention"] * 10
    assert with_layers(config, 4).layer_types == ["full_attention"] * 4
    assert config.layer_types == ["full_attention"] * 10, "the original is not changed"


@pytest.mark.slow
def test_level_none_peaks_as_forecast_says() -> None:
    """A candidate's peak at its size is that of a whole prediction of the same step."""
    config = asked(gradient_checkpointing="none")
    data = data_of(llama())
    cases = cases_of(config, data, levels=("none",))
    (found,) = cases.candidates(100 * MIB, card("h100"))
    whole = RunEstimator(config, resolve_target(config), data)
    assert found.card_bytes == pytest.approx(whole.predict(found.size).peak_bytes, rel=0.02)
    assert found.card_bytes <= 100 * MIB
    assert whole.predict(found.size + 1024).peak_bytes > 100 * MIB


def test_state_of_model_is_counted_by_hand() -> None:
    cases = cases_of(asked(), data_of(llama()))
    norms, embedding = 21 * 64, 512 * 64
    state, n = cases.state, cases.num_parameters
    assert (state.weight_bytes, state.sum_bytes, state.num_trained) == (4 * n, 4 * n, n)
    assert state.state_bytes == pytest.approx(8 * n, rel=0.03)  # rounded to 512 bytes on CUDA
    assert state.narrowed == n - norms - embedding, "autocast does not cast norms and embeddings"
    assert state.starts_wide == 0
    assert state.largest == embedding
    assert state.largest_state_bytes == 8 * embedding + 4


def test_master_weights_are_left_out_without_autocast() -> None:
    cases = cases_of(asked(precision="bf16-weights", gradient_checkpointing="none"), data_of(llama()))
    assert {each.level for each in cases.candidates(GIB, card("h100"))} == {"none", "optimizer", "gradients"}


def test_adapters_have_little_to_offload() -> None:
    cases = cases_of(asked(lora_rank=2), data_of(llama()))
    assert cases.num_trained < cases.num_parameters
    assert placement(cases.state, "optimizer").host_bytes < cases.state.frozen_bytes
    assert cases.state.starts_wide == cases.state.narrowed > 0


def test_cards_share_the_batch_and_shards_the_state() -> None:
    config = asked(parallel="fsdp")
    whole, share = cases_of(config, data_of(llama())), cases_of(config, data_of(llama()), num_cards=8)
    assert (whole.tokens, share.tokens) == (64 * 128, 8 * 128)
    assert share.state == whole.state.sharded(8)
    replicas = cases_of(asked(), data_of(llama()), num_cards=8)
    assert (replicas.tokens, replicas.state) == (8 * 128, whole.state)


# the table ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    write_jsonl(folder / "data.jsonl", records(40))
    llama(num_hidden_layers=2).save_pretrained(folder / "base")
    return folder


def table_of(place: Path, *, num_cards: int = 1, host_memory: str | None = None, **settings: Any) -> OffloadTable:
    given = {"data": str(place / "data.jsonl"), "model": str(place / "base"), "offload": "auto", "max_length": 64}
    config = TrainConfig(**given | settings)
    return offload_table(config, num_cards=num_cards, host_memory=host_memory, progress=lambda *_: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without CUDA")
def test_table_without_memory_has_common_sizes(place: Path) -> None:
    found = table_of(place, gradient_checkpointing="none")
    assert list(dict.fromkeys(row.memory.name for row in found.rows)) == ["12GB", "16GB", "24GB", "40GB", "80GB"]
    for name in {row.memory.name for row in found.rows}:
        (chosen,) = (row for row in found.rows if row.memory.name == name and row.is_chosen)
        assert chosen.candidate.level == "none", "everything fits"
    assert found.obstacle is None
    assert found.host_bytes is None


def test_table_of_one_memory_has_every_case(place: Path) -> None:
    found = table_of(place, gpu="h100")
    cases = [(row.candidate.level, row.candidate.checkpointing) for row in found.rows]
    levels = dict.fromkeys(level for level, _ in cases)
    assert cases == [(level, mode) for level in levels for mode in AUTO_MODES]
    assert set(levels) <= set(LEVELS)
    fastest = min(found.rows, key=lambda row: row.candidate.time.total_s)
    assert [row for row in found.rows if row.is_chosen] == [fastest]
    assert {row.memory.card.name for row in found.rows} == {"h100"}


def test_memory_in_which_nothing_fits_has_a_reason(place: Path) -> None:
    found = table_of(place, memory="1MiB", device="cuda", gradient_checkpointing="none")
    assert not any(row.fits or row.is_chosen for row in found.rows)
    assert found.obstacle is not None
    assert re.fullmatch(
        r"no level of offload fits: the least, offload \w+ with checkpointing \w+, needs [\d.]+ MiB on the card, and "
        r"972\.8 KiB are usable\.",
        found.obstacle,
    )
    assert {row.memory.card.name for row in found.rows} == {"rtx-3060-12gb"}, "the typical card of that size"


def test_level_that_is_asked_for_is_the_only_one(place: Path) -> None:
    settings = {"gradient_checkpointing": "full", "microbatch": 2}
    (only,) = table_of(place, gpu="h100", offload="optimizer", **settings).rows
    assert (only.candidate.level, only.candidate.checkpointing, only.candidate.size) == ("optimizer", "full", 2)


def test_host_memory_limits_levels(place: Path) -> None:
    found = table_of(place, gpu="h100", offload="optimizer", host_memory="100KiB", gradient_checkpointing="none")
    assert not any(row.fits for row in found.rows)
    assert found.host_bytes == 100 * 1024
    assert found.obstacle is not None
    assert found.obstacle.endswith(" of host memory, and 100.0 KiB are available.")


def by_mode(
    data: DataStatistics, usable_bytes: int, name: str, *, host_bytes: int | None = None, **settings: Any
) -> dict[str, Candidate]:
    """Predict every mode without offload of the optimizer."""
    found = {}
    for mode in CHECKPOINTING_MODES:
        cases = cases_of(asked(gradient_checkpointing=mode, **settings), data, levels=["none"])
        (found[mode],) = cases.candidates(usable_bytes, card(name), host_bytes)
    return found


def test_inputs_of_layers_are_counted_on_card_and_host() -> None:
    """Those of nine of ten layers leave; at the peak, in the loss, the last one is on the card."""
    data = data_of(llama())
    full, offloaded = (
        cases_of(asked(gradient_checkpointing=mode, microbatch=64), data, levels=["none", "master"]).candidates(
            GIB, card("h100")
        )
        for mode in ("full", "offload")
    )
    num_bytes = 64 * 128 * 64 * 4
    for one, other in zip(full, offloaded, strict=True):
        assert (one.level, one.size) == (other.level, other.size)
        assert other.host_bytes - one.host_bytes == 9 * num_bytes
        assert one.card_bytes - other.card_bytes == pytest.approx(9 * num_bytes, rel=0.01)
        assert other.time == replace(one.time, inputs_s=other.time.inputs_s)
        assert other.time.inputs_s > 0, "narrow layers compute for less time than their inputs take"


@pytest.mark.slow
def test_wide_layers_hide_copies_of_inputs() -> None:
    config = llama(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32)
    data = data_of(config, length=2048)
    found = by_mode(data, 70 * GIB, "h200")
    assert found["offload"].time.inputs_s == 0
    assert found["offload"].time.total_s <= found["full"].time.total_s


@pytest.mark.parametrize("usable_share", [0.9, slow(1.1)])
def test_inputs_leave_card_where_others_do_not_fit(usable_share: float) -> None:
    cases = by_mode(data_of(llama(), number=512), GIB, "h100", microbatch=512)
    usable_bytes = int(cases["full"].card_bytes * usable_share)
    assert cases["offload"].card_bytes < 0.9 * cases["full"].card_bytes
    found = choose(list(cases.values()), card_bytes=usable_bytes, host_bytes=None)
    assert (found.checkpointing == "offload") == (usable_share < 1)


@pytest.mark.slow
def test_host_memory_limits_microbatch_of_inputs() -> None:
    of_row = 9 * 128 * 64 * 4
    for host_bytes, rows in ((None, 64), (5 * of_row + 1, 5), (0, 1)):
        found = by_mode(data_of(llama()), GIB, "h100", host_bytes=host_bytes)
        assert found["full"].size == 64 * 128
        assert found["offload"].size == rows * 128
        assert found["offload"].host_bytes == rows * of_row


def test_sharded_offload_is_predicted_but_never_chosen(place: Path) -> None:
    found = table_of(place, gpu="h100", offload="none", parallel="fsdp", num_cards=8, gradient_checkpointing="none")
    assert {row.is_supported for row in found.rows if row.candidate.level == "none"} == {True}
    assert {row.is_supported for row in found.rows if row.candidate.level != "none"} == {False}
    (chosen,) = (row for row in found.rows if row.is_chosen)
    assert chosen.candidate.level == "none"
    assert "offload of sharded models is predicted here and not supported in training" in found.notes


def test_plan_of_offload_is_for_cuda(place: Path) -> None:
    with pytest.raises(InputError) as caught:
        table_of(place, device="cpu")
    assert str(caught.value) == (
        "--device cpu has no memory but that of the host: --offload and --cards are planned for CUDA. Leave --device "
        "out."
    )


def test_master_weights_need_autocast(place: Path) -> None:
    with pytest.raises(InputError) as caught:
        table_of(place, gpu="h100", offload="master", precision="fp16")
    assert str(caught.value) == (
        "--offload master keeps float32 weights of linear layers in host memory, and this run has none that it "
        "computes with in bf16: pass --offload optimizer."
    )


@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"reproducible": True, "quantum": 1}])
def test_sums_that_host_cannot_add_are_refused(place: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        table_of(place, gpu="h100", offload="gradients", **settings)
    assert str(caught.value) == (
        "--offload gradients is not supported with --precision fp16 and --reproducible: pass --offload optimizer."
    )


@pytest.mark.parametrize("setting", ["memory", "host_memory"])
def test_share_of_unknown_memory_is_refused(place: Path, setting: str) -> None:
    with pytest.raises(InputError, match=f"^--{setting.replace('_', '-')} 50% is a share of a device's memory"):
        table_of(place, **{"gpu": None, setting: "50%", "device": "cuda"})


BILLIONS = {
    7: (LlamaConfig(), 6_738_415_616, {}, 1),
    70: (
        LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128256,
        ),
        70_553_706_496,
        {"parallel": "fsdp"},
        8,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("billions", BILLIONS)
def test_large_model_is_planned_in_a_minute(billions: int) -> None:
    """Seconds of one core, which other processes of the machine do not lengthen."""
    shape, num_parameters, settings, num_cards = BILLIONS[billions]
    config = asked(max_length=1024, **settings)
    started_s = time.process_time()
    cases = cases_of(config, data_of(shape, length=1024), num_cards=num_cards)
    for name in ("rtx-4090", "h100"):
        found = cases.candidates(80 * GIB, card(name))
        assert len(found) == 12
    assert time.process_time() - started_s < 60
    assert cases.num_parameters == num_parameters
    if billions == 7:  # 2 bytes a weight fit in 24 GB, 4 do not
        small = cases.candidates(23 * GIB, card("rtx-4090"))
        assert choose(small, card_bytes=23 * GIB, host_bytes=None).level == "gradients"
        assert 4 * num_parameters > 23 * GIB
    on_h100 = {each.level: each.card_bytes for each in found if each.checkpointing == "full"}
    assert on_h100["gradients"] < 80 * GIB < on_h100["none"]
    assert (on_h100["optimizer"] < 80 * GIB) == (billions == 7)
    by_hand = 16 * num_parameters / (8 if billions == 70 else 1)
    assert placement(cases.state, "none").card_bytes == pytest.approx(by_hand, rel=1e-3)
