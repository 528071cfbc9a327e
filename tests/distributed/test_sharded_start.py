"""Sharded runs start and resume with each rank's own shards: the bits of one process, in a part of its memory."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from bigbatch.lm.checkpoint import newest
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.model.adapters import add_lora
from bigbatch.lm.training.setup import set_up_training
from distributed import sharded_start_cases as cases
from support.language_models import metrics, records, save_model_folder, write_jsonl
from support.process_pool import Pools
from support.rank_faults import all_of, signal_in_update
from support.tiers import slow, slow_except
from support.torchrun_ranks import run

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", {}),
    "tied": ("qwen2", {}),
    "positions": ("gpt2", {}),
    "tiny": ("tiny", {"max_length": 64}),
    "several files": ("deep", {}),
    "float64": ("llama", {"precision": "float64"}),
    "bfloat16 weights": ("qwen2", {"precision": "bf16-weights"}),
    "lora": ("llama", {"lora_rank": 2}),
    "lora on tied": ("qwen2", {"lora_rank": 2, "precision": "bf16-weights"}),
    "lora on Conv1D": ("gpt2", {"lora_rank": 2, "gradient_checkpointing": "full"}),
    "some targets": ("qwen2", {"lora_rank": 2, "lora_targets": "q_proj,v_proj", "rslora": True, "lora_dropout": 0.1}),
    "dora": ("llama", {"lora_rank": 2, "dora": True}),
    "dora on bfloat16": ("qwen2", {"lora_rank": 2, "dora": True, "precision": "bf16-weights"}),
    "dora on Conv1D": ("gpt2", {"lora_rank": 2, "dora": True}),
    "lora on tiny": ("tiny", {"lora_rank": 2, "max_length": 64}),
    "packed": ("llama", {"layout": "packed"}),
    "other files": ("bin", {}),
    "converted": ("mixtral", {}),
    "from a configuration": ("new", {}),
    "from a tied configuration": ("new", {"model_config": "qwen2", "precision": "bf16-weights", "seed": 3}),
    "from a mixture": ("new", {"model_config": "mixtral", "layout": "padded"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and models of every kind."""
    folder = tmp_path_factory.mktemp("models")
    write_jsonl(folder / "data.jsonl", records(40))
    for kind in ("llama", "qwen2", "gpt2"):
        save_model_folder(folder / kind, kind=kind)
    cases.save_deep_model(folder / "deep", max_shard_size="1MB")
    shutil.copytree(folder / "llama", folder / "bin")
    _as_pickle(folder / "bin")
    shutil.copytree(folder / "llama", folder / "mixtral")
    _as_mixture(folder / "mixtral")
    return folder


def _as_pickle(folder: Path) -> None:
    import torch

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _as_mixture(folder: Path) -> None:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 1, "num_local_experts": 2, "vocab_size": 308, "max_position_embeddings": 64}
    model = MixtralForCausalLM(MixtralConfig(**size, **experts, bos_token_id=0, eos_token_id=1))
    model.save_pretrained(folder)


def settings_of(models: Path, kind: str, more: dict[str, Any]) -> dict[str, Any]:
    common = {"max_length": 32, "token_budget": 64, "steps": 2, "device": "cpu", "data": str(models / "data.jsonl")}
    if kind == "new":
        return {**common, **more, "model_config": str(models / more.get("model_config", "llama"))}
    return {**common, "model": kind if kind == "tiny" else str(models / kind), **more}


@pytest.mark.parametrize("case", slow_except(CASES, "tiny", "several files", "lora on tiny"))
def test_sharded_start_has_the_bits_of_one_process(models: Path, pools: Pools, case: str) -> None:
    settings = settings_of(models, *CASES[case])
    alone = set_up_training(TrainConfig(**settings))
    expected = cases.describe(alone)
    for found, gathered in pools(2).run(cases.start, settings):
        frozen = found.pop("frozen")
        assert (frozen is None) == ("lora_rank" not in settings)
        assert found == expected
        if gathered is not None:
            assert {name: values for name, (*_, values) in gathered.items()} == {
                name: values for name, (*_, values) in expected["state"].items()
            }


@pytest.mark.slow
def test_hsdp_start_is_bit_identical_to_one_process(models: Path, pools: Pools) -> None:
    settings = settings_of(models, "qwen2", {"lora_rank": 2})
    expected = cases.describe(set_up_training(TrainConfig(**settings)))
    for found, _ in pools(4).run(cases.start, settings, "hsdp"):
        assert found["state"] == expected["state"]


@pytest.mark.parametrize("more", [{}, {"lora_rank": 2}])
def test_start_holds_and_reads_shards_alone(tmp_path: Path, pools: Pools, more: dict[str, Any]) -> None:
    full_bytes = cases.save_deep_model(tmp_path / "deep")
    write_jsonl(tmp_path / "data.jsonl", records(40))
    for found in pools(2).run(cases.measure_start, settings_of(tmp_path, "deep", more)):
        assert found["own"] < 0.55 * full_bytes
        assert found["peak"] < 0.75 * full_bytes, found["peak"] / full_bytes
        sampled = 4096 * 80  # bytes of each tensor, which ranks compare before they load
        assert found["own"] * 0.9 < found["slices"] <= found["own"] + sampled


def test_only_first_rank_holds_a_whole_new_model(tmp_path: Path, pools: Pools) -> None:
    full_bytes = cases.save_deep_model(tmp_path / "deep")
    write_jsonl(tmp_path / "data.jsonl", records(40))
    first, second = pools(2).run(cases.measure_start, settings_of(tmp_path, "new", {"model_config": "deep"}))
    assert first["peak"] > full_bytes  # on its host, which is the device here
    assert second["peak"] < 0.75 * full_bytes, second["peak"] / full_bytes
    assert second["own"] < 0.55 * full_bytes
    assert first["slices"] == second["slices"] == 0


WORDS = [
    "--data", "data.jsonl", "--model", "deep", "--max-length", "32", "--steps", "2", "--global-batch", "8",
    "--token-budget", "64", "--validation-fraction", "0", "--device", "cpu", "--deterministic",
    "--checkpoint-every", "2",
]  # fmt: skip


@pytest.mark.parametrize("writer", ["fsdp", slow("ddp"), slow("alone")])
def test_resume_holds_and_reads_shards_alone(tmp_path: Path, pools: Pools, writer: str) -> None:
    cases.save_deep_model(tmp_path / "deep")
    write_jsonl(tmp_path / "data.jsonl", records(40))
    size = 1 if writer == "alone" else 2
    parallel = [] if writer == "alone" else ["--parallel", writer]
    run(["train", *WORDS, "--out", "run", *parallel], size, folder=tmp_path, alone=size == 1)
    path, _ = newest(tmp_path / "run" / "checkpoints")
    assert path is not None
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    small = sum(num_bytes for name, num_bytes in sizes.items() if name.startswith(("random", "state", "manifest")))
    total, largest = sum(sizes.values()), max(sizes.values())
    found = pools(2).run(cases.measure_resume, settings_of(tmp_path, "deep", {"steps": 2}), tmp_path / "run")
    for rank in found:
        assert rank["slices"] <= rank["own"] < 0.55 * total
        assert rank["whole"] <= 2 * small
        assert rank["hashed"] <= max(0.55 * total, largest)
        assert rank["peak"] < 0.75 * total
    assert sum(rank["hashed"] for rank in found) + sizes["manifest.json"] == total


LORA = ("--lora-rank", "2", "--lora-targets", "q_proj,v_proj")


@pytest.mark.slow
@pytest.mark.parametrize(("more", "layers", "cap"), [((), 8, 3.3), (LORA, 12, 0.97)], ids=["all weights", "adapters"])
def test_model_above_cap_trains_and_resumes_sharded(
    tmp_path: Path, more: tuple[str, ...], layers: int, cap: float
) -> None:
    """Whole, a frozen model is 1.0 of its bytes and does not start; a trained one needs more than four times them."""
    full_bytes = cases.save_deep_model(tmp_path / "deep", layers=layers)
    write_jsonl(tmp_path / "data.jsonl", records(40))
    limit = partial(cases.cap_memory, int(cap * full_bytes))
    words = ["train", *WORDS, *more, "--gradient-checkpointing", "full"]
    words[words.index("--steps") + 1], words[words.index("--global-batch") + 1] = "3", "4"
    whole = run([*words, "--out", "whole"], 1, folder=tmp_path, alone=True, patch=limit, codes=1)
    assert "out of memory" in whole.stderr().lower()
    stop = all_of(limit, signal_in_update(2))
    first = run([*words, "--parallel", "fsdp", "--out", "run"], 2, folder=tmp_path, patch=stop, codes=75)
    assert "after update 2 of 3; the model is saved" in first.stdout()
    again = run(["resume", "run"], 2, folder=tmp_path, patch=limit)
    assert "resuming run after update 2" in again.stdout()
    assert len(metrics(tmp_path / "run")) == 3
    for rank in range(2):
        assert 0 < json.loads((tmp_path / f"peak-{rank}.json").read_text()) <= cap * full_bytes
    if more:
        assert set(load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")) == adapter_names(tmp_path)
        return
    assert sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").parameters()) == (
        full_bytes
    )


def adapter_names(folder: Path) -> set[str]:
    """Return the names of the adapters of the deep model of `LORA`, as peft saves them."""
    model = AutoModelForCausalLM.from_pretrained(folder / "deep")
    model = add_lora(model, rank=2, alpha=4.0, seed=0, targets=LORA[-1])
    return set(get_peft_model_state_dict(model, save_embedding_layers=False))
