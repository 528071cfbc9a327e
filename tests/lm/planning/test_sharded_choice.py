"""The micro-batch that is predicted for sharded models: what is gathered, what pays, and ``bigbatch plan``."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.distributed.ranks import SINGLE_PROCESS, RankContext
from bigbatch.lm.planning.data_statistics import DataStatistics, measure_data
from bigbatch.lm.planning.device_target import resolve_target
from bigbatch.lm.planning.offload_cases import LEAST_TOKENS, SLOWER, OffloadCases
from bigbatch.lm.planning.offload_table import offload_table
from bigbatch.lm.planning.sharded_choice import fastest, sharded_cases, with_chosen_microbatch
from bigbatch.lm.planning.sharded_memory import ShardedModel, less_margin
from bigbatch.lm.training.microbatch_limits import microbatch_of
from bigbatch.memory.limit import gpu_limit, gpu_memory
from bigbatch.memory.usage import MemoryBudget
from bigbatch.offload.cards import card
from support.language_models import records, write_jsonl

GIB = 2**30
LAYER = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64  # attention of 4 heads with 2 of keys, MLP, two norms
EMBEDDING = 512 * 64
REST = 2 * EMBEDDING + 64  # with head and last norm
EIGHT = RankContext(8, 0, 8, "fsdp")


def llama(**changes: Any) -> LlamaConfig:
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaConfig(**shape | {"num_attention_heads": 4, "num_key_value_heads": 2} | changes)


def sharded(kind: str, precision: str, *, is_replicated: bool = False) -> ShardedModel:
    with torch.device("meta"):
        model = LlamaForCausalLM(llama())
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return ShardedModel.of(model, layers, DeviceSpec(torch.device(kind), precision), is_replicated=is_replicated)


# what is gathered -------------------------------------------------------------------------------------------------


def test_two_layers_and_the_rest_are_gathered() -> None:
    found = sharded("cpu", "float32")
    assert (found.layer, found.layers, found.rest) == (LAYER, 2 * LAYER, REST)
    assert found.window_bytes(2**60) == 4 * (2 * LAYER + REST) + 4 * (LAYER + REST - EMBEDDING), "and gradients"
    assert found.end_bytes(2**60) == found.window_bytes(2**60) + 4 * (EMBEDDING + REST)


def test_layers_are_gathered_in_bfloat16_on_cuda() -> None:
    found = sharded("cuda", "bf16")
    assert found.window_bytes(0) == 2 * 2 * LAYER + 4 * REST + 4 * (LAYER + REST - EMBEDDING)
    assert found.gathers_narrow
    assert not sharded("cpu", "bf16").gathers_narrow, "autocast casts them there"


def test_small_models_stay_whole_for_a_window() -> None:
    found = sharded("cuda", "bf16")
    weights, gradients = 2 * 2 * LAYER + 4 * REST, 4 * (2 * LAYER + REST)
    assert not found.keeps_weights(8 * weights - 1)
    assert found.keeps_weights(8 * weights)
    assert found.window_bytes(8 * weights) == weights + 2 * LAYER + 4 * (LAYER + REST - EMBEDDING)
    assert not found.keeps_gradients(8 * (weights + gradients) - 1)
    assert found.keeps_gradients(8 * (weights + gradients))
    assert found.window_bytes(2**60) == weights + 2 * LAYER + gradients + 4 * LAYER
    assert not sharded("cuda", "bf16", is_replicated=True).keeps_gradients(2**60), "reduced with every micro-batch"
    assert found.fabric_bytes(2**60, num_shards=8) == 0
    assert found.fabric_bytes(0, num_shards=8) == (2 * weights + gradients) * 7 // 8


# what is chosen ---------------------------------------------------------------------------------------------------


def asked(**changes: Any) -> TrainConfig:
    given = {"model": "m", "gpu": "h100", "precision": "bf16", "parallel": "fsdp", "max_length": 1024, "lr": 1e-3}
    return TrainConfig(**given | changes).resolved()


def data_of(*, length: int = 1024, number: int = 1024) -> DataStatistics:
    return DataStatistics(llama(), length, (length,), (length,) * number, number, 1, ())


def cases_of(config: TrainConfig, ranks: RankContext = EIGHT) -> OffloadCases:
    return sharded_cases(config, resolve_target(config), data_of(), ranks, device_bytes=80 * GIB)


def test_smaller_microbatch_is_preferred_if_as_fast() -> None:
    cases = cases_of(asked(gradient_checkpointing="none"))
    (found,) = cases.candidates(70 * GIB, card("h100"))
    fixed = asked(gradient_checkpointing="none", token_budget=32_768)
    (largest,) = cases_of(fixed).candidates(70 * GIB, card("h100"))
    assert LEAST_TOKENS <= found.size < 32_768
    assert found.card_bytes < largest.card_bytes
    assert found.time.total_s <= SLOWER * largest.time.total_s


def test_less_memory_takes_fewer_tokens_then_checkpointing() -> None:
    cases = cases_of(asked())
    limits = (70 * GIB, GIB // 8, 76 * 2**20)
    chosen = [fastest(cases.candidates(usable, card("h100")), usable, asked(), num_ranks=8) for usable in limits]
    assert all(each.card_bytes <= usable for each, usable in zip(chosen, limits, strict=True))
    assert [each.checkpointing for each in chosen] == ["none", "none", "selective"]
    assert chosen[0].size > chosen[1].size > chosen[2].size


def test_nothing_that_fits_is_refused_with_the_least() -> None:
    candidates = cases_of(asked()).candidates(1000, card("h100"))
    with pytest.raises(
        InputError, match=r"^m does not fit with --parallel fsdp on 8 ranks: .* 1000 B are usable\. Use"
    ):
        fastest(candidates, 1000, asked(), num_ranks=8)


def test_machines_share_the_model_among_their_own_ranks() -> None:
    config = asked(parallel="hsdp", gradient_checkpointing="none")
    cases = cases_of(config, RankContext(8, 0, 2, "hsdp"))
    whole = cases_of(asked(gradient_checkpointing="none"), RankContext(1, 0, 1, "fsdp"))
    assert cases.state == whole.state.sharded(2)
    assert cases.tokens == 1024 * 1024 // 8, "all ranks share the batch"


def test_plan_agrees_with_the_choice(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data.jsonl", records(40))
    llama().save_pretrained(tmp_path / "base")
    settings = {"data": str(tmp_path / "data.jsonl"), "model": str(tmp_path / "base"), "max_length": 64}
    config = TrainConfig(**settings, gpu="h100", parallel="fsdp")
    table = offload_table(config, num_cards=8, host_memory=None, progress=lambda *_: None)
    (planned,) = (row.candidate for row in table.rows if row.is_chosen)

    config = config.resolved()
    target, data = resolve_target(config), measure_data(config, progress=lambda *_: None)
    config = config.model_copy(update={"precision": target.device_spec.precision})
    cases = sharded_cases(config, target, data, EIGHT, device_bytes=gpu_memory("h100"))
    usable = less_margin(MemoryBudget.from_limit(gpu_limit("h100"), None).usable_bytes)
    chosen = fastest(cases.candidates(usable, card("h100")), usable, config, num_ranks=8)
    assert replace(chosen) == planned


# what is not chosen here ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({}, SINGLE_PROCESS),
        ({}, RankContext(2, 0, 2, "ddp")),
        ({"deterministic": True}, EIGHT),
        ({"token_budget": 64}, EIGHT),
        ({"microbatch": 4}, EIGHT),
    ],
)
def test_other_runs_are_left_as_they_are(settings: dict[str, Any], ranks: RankContext) -> None:
    config = TrainConfig(parallel=ranks.parallel, **settings)
    found = with_chosen_microbatch(config, ranks, progress=lambda *_: None)
    assert (found.config, found.sentence, found.record, found.asked) == (config, None, None, {})


def test_python_api_names_what_to_pass() -> None:
    with pytest.raises(InputError) as caught:
        microbatch_of(asked(), longest=8, ranks=EIGHT)
    assert str(caught.value) == (
        "--microbatch auto of --parallel fsdp is chosen by bigbatch train and bigbatch resume, by prediction: pass "
        "token_budget or microbatch here."
    )
