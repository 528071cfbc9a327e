"""Pretraining from a configuration: weights, tokenizer, refusals, resume, and the folder that is saved."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bigbatch.cli import main
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.tokenizer import train_tokenizer
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.training.setup import set_up_training
from bigbatch.lm.training.trainer import Trainer
from support.language_models import RecordingCallback, metrics, records, run, write_jsonl
from support.run_comparison import differences

SHAPE = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "vocab_size": 320,
    "bos_token_id": 1000, "eos_token_id": 2000, "pad_token_id": None,
}  # fmt: skip


def write_config(path: Path, **changes: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(SHAPE | changes))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with data, a configuration and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "data.jsonl", records(40))
    write_config(tmp_path / "shape" / "config.json")
    train_tokenizer([row["completion"] for row in records(50)], vocabulary_size=300).save_pretrained("words")
    return tmp_path


def settings(**more: Any) -> dict[str, Any]:
    return {
        "data": "data.jsonl", "model_config": "shape", "tokenizer": "words", "global_batch": 8, "microbatch": 4,
        "steps": 4, "max_length": 32, "lr": 1e-2, **more,
    }  # fmt: skip


WORDS = [
    "--data", "data.jsonl", "--global-batch", "8", "--microbatch", "4", "--steps", "4", "--max-length", "32",
    "--device", "cpu",
]  # fmt: skip
NEW = ["--model-config", "shape", "--tokenizer", "words"]


def initial(**more: Any) -> Any:
    return set_up_training(TrainConfig(device="cpu", **settings(**more))).model


def refusal(*given: str, capfd: pytest.CaptureFixture[str], command: str = "train") -> str:
    assert main([command, *given]) == 2
    return capfd.readouterr().err.removeprefix(f"bigbatch {command}: ").removesuffix("\n")


# weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie_word_embeddings": True},
        {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
        {
            "model_type": "qwen2_moe",
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ],
    ids=["llama", "tied", "gpt2", "mixture"],
)
def test_weights_are_those_of_the_model_under_the_seed(folder: Path, shape: dict[str, Any]) -> None:
    write_config(folder / "shape" / "config.json", **shape)
    before = torch.random.get_rng_state()
    model = initial(seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    tokenizer = AutoTokenizer.from_pretrained("words")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(3)
    expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("shape", **ids), dtype=torch.float32)
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name], parameter) for name, parameter in expected.named_parameters())
    assert not all(torch.equal(a, b) for a, b in zip(initial(seed=4).parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(("precision", "dtype"), [("float64", torch.float64), ("bf16-weights", torch.bfloat16)])
def test_weights_of_other_dtypes_are_rounded_ones(folder: Path, precision: str, dtype: torch.dtype) -> None:
    plain, other = initial(), initial(precision=precision)
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        assert two.dtype == dtype
        assert torch.equal(one.to(dtype), two)
    assert other.config.dtype == dtype
    frequencies = [model.model.rotary_emb.inv_freq for model in (plain, other)]
    assert frequencies[0].dtype == frequencies[1].dtype == torch.float32
    assert torch.equal(*frequencies)


def test_special_tokens_are_those_of_the_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained("words")
    config = initial().config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id,
    )  # fmt: skip
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained("words")
    model = initial()
    assert model.config.pad_token_id is None
    assert model.get_input_embeddings().padding_idx is None  # else its embedding would not be trained


# tokenizers ------------------------------------------------------------------------------------------------------


def test_tokenizer_is_a_file_folder_or_trained_on_data(folder: Path) -> None:
    by_folder = set_up_training(TrainConfig(device="cpu", **settings()))
    for given in ("words/tokenizer.json", None):
        if given is None:
            for path in Path("words").iterdir():
                path.rename(folder / "shape" / path.name)
        found = set_up_training(TrainConfig(device="cpu", **settings(tokenizer=given)))
        assert found.data_fingerprint == by_folder.data_fingerprint
        assert all(
            torch.equal(a, b) for a, b in zip(found.model.parameters(), by_folder.model.parameters(), strict=True)
        )
    trained = set_up_training(TrainConfig(device="cpu", **settings(tokenizer="train:270")))
    assert 259 <= len(trained.tokenizer) <= 270
    assert trained.model.config.eos_token_id == trained.tokenizer.eos_token_id


def test_end_token_of_a_bare_file_is_recognized_or_refused(folder: Path) -> None:
    (folder / "words" / "tokenizer_config.json").unlink()
    found = set_up_training(TrainConfig(device="cpu", **settings(tokenizer="words/tokenizer.json")))
    assert found.tokenizer.eos_token == "<|end|>"
    path = folder / "words" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("<|end|>", "<|stop|>"), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        initial(tokenizer="words/tokenizer.json")
    assert str(caught.value) == (
        "the tokenizer words/tokenizer.json does not say which token ends a document, and has none of <|end|>, </s>, "
        "<|endoftext|>, <|end_of_text|>, <eos>, [EOS]. Save it in a folder with a tokenizer_config.json that sets "
        "eos_token, and pass the folder."
    )


def test_tokens_made_ahead_need_their_tokenizer(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["--model-config", "shape", "--tokenizer", "train:300"]
    assert main(["tokenize", "--data", "data.jsonl", *given, "--out", "tokens"]) == 0
    assert "next: bigbatch train --data tokens --model-config shape --tokenizer train:300\n" in capfd.readouterr().out
    words = ["--data", "tokens", *WORDS[2:]]
    assert main(["train", *words, *given, "--out", "run"]) == 0
    capfd.readouterr()
    said = refusal(*words, *given[:-1], "train:260", "--out", "other", capfd=capfd)
    assert said.startswith(
        "--tokenizer train:260 is smaller than the tokenizer with which tokens was tokenized, which "
    )
    said = refusal(*words, *NEW, "--out", "other", capfd=capfd)
    assert said == (
        "tokens was tokenized with the tokenizer of train:300, and that of words differs in its tokens, special tokens "
        "or chat template. Tokenize the data again, or pass the same --model."
    )


# refusals --------------------------------------------------------------------------------------------------------


def test_folder_without_weights_names_the_flag(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    expected = (
        "--model shape has a configuration and no weights: pass --model-config shape to pretrain a new model, or add "
        "its weights."
    )
    assert refusal(*WORDS, "--model", "shape", capfd=capfd) == expected
    assert refusal(*WORDS, "--model", "shape", capfd=capfd, command="verify") == expected


def test_missing_parts_of_a_new_model_are_named(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def said(*given: str) -> str:
        return refusal(*WORDS, *given, capfd=capfd)

    need = (
        "so --tokenizer is needed: pass a tokenizer folder, a tokenizer.json, or train:N to train one of N tokens on "
        "the data."
    )
    assert said("--model-config", "shape") == f"--model-config shape has no tokenizer, {need}"
    assert said("--model-config", "shape/config.json") == f"--model-config shape/config.json is a file, {need}"
    assert said("--model-config", "shap", *NEW[2:]) == (
        "there is no file or folder 'shap' for --model-config. Did you mean shape?"
    )
    assert said("--model-config", "words", *NEW[2:]) == (
        "--model-config words is a folder without config.json: pass a folder with one."
    )
    assert said("--tokenizer", "words") == "--tokenizer does nothing without --model-config: give both."
    assert said("--model", "words", *NEW) == "--model and --model-config exclude each other: give one of them."
    assert said(*NEW, "--lora-rank", "2") == (
        "--lora-rank adapts weights that are trained, and those of --model-config are random: leave one out."
    )
    assert said("--model-config", "shape", "--tokenizer", "train:258") == (
        "--tokenizer is 'train:258': train: needs the number of tokens, 259 or more, such as train:8192."
    )


@pytest.mark.parametrize("command", ["train", "plan", "verify"])
def test_tokenizer_larger_than_vocabulary_is_refused(
    folder: Path, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    write_config(folder / "shape" / "config.json", vocab_size=200)
    size = len(AutoTokenizer.from_pretrained("words"))
    assert refusal(*WORDS, *NEW, capfd=capfd, command=command) == (
        f"--tokenizer words has {size} tokens, more than the vocab_size 200 of --model-config shape: set vocab_size to "
        f"{size} or more, or pass a smaller tokenizer."
    )


def test_impossible_configuration_is_one_sentence(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_config(folder / "shape" / "config.json", hidden_act="nothing")
    said = refusal(*WORDS, *NEW, capfd=capfd)
    assert said == "the configuration of shape makes no model: 'nothing'."
    write_config(folder / "shape" / "config.json", model_type="t5")
    assert refusal(*WORDS, *NEW, capfd=capfd) == "shape is a t5 model, which is not a causal language model."


# runs ------------------------------------------------------------------------------------------------------------


def test_run_learns_and_saves_a_loadable_model(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *WORDS, *NEW, "--lr", "1e-2", "--out", "run"]) == 0
    printed = capfd.readouterr().out
    assert "--model-config shape --tokenizer words" in printed.splitlines()[-1]
    rows = metrics(folder / "run")
    assert rows[-1]["loss"] < rows[0]["loss"]
    model, tokenizer = (kind.from_pretrained("run/model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert main(["generate", "run", "def", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    assert main(["train", *WORDS, "--model", "run/model", "--out", "tuned"]) == 0


def test_plan_and_verify_accept_a_configuration(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *WORDS, *NEW, "--json"]) == 0
    planned = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert planned["parameters"] == sum(p.numel() for p in initial().parameters())
    assert main(["plan", *WORDS, *NEW, "--keep", "best", "--early-stopping", "2", "--json"]) == 0
    choosing = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert {name: choosing[name] for name in ("parameters", "microbatch", "peak_bytes") if name in choosing} == {
        name: planned[name] for name in ("parameters", "microbatch", "peak_bytes") if name in planned
    }
    assert main(["verify", *WORDS, *NEW, "--samples", "6", "--precision", "float64"]) == 0


RANDOM = "the weights of the new model are random, from --seed 0\n"


def test_stopped_run_resumes_bit_identically(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    more = {"keep": "best", "validation_every": 1, "deterministic": True, "tokenizer": "train:300"}
    run(folder / "whole", **settings(**more))
    prepared = set_up_training(TrainConfig(device="cpu", **settings(**more), out=folder / "run"))
    directory = RunDirectory.create(folder / "run", prepared.config.model_dump(mode="json"))
    trainer, recorder = Trainer(prepared), RecordingCallback()
    directory.record_facts(trainer.initial_facts)
    trainer.run(directory, callback=recorder, should_stop=lambda: len(recorder.rows) == 2)
    assert main(["resume", "run"]) == 0
    assert differences(folder / "run", folder / "whole") == []
    resumed = capfd.readouterr().out
    assert "resuming run after update 2\n" in resumed
    assert RANDOM not in resumed
    shutil.rmtree(folder / "run" / "checkpoints")
    shutil.rmtree(folder / "run" / "model")
    assert main(["resume", "run"]) == 0
    restarted = capfd.readouterr().out
    assert "resuming run from the beginning (no checkpoint)\n" in restarted
    assert RANDOM in restarted


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_edited_configuration_or_tokenizer_is_refused(
    folder: Path, capfd: pytest.CaptureFixture[str], has_checkpoint: bool
) -> None:
    assert main(["train", *WORDS, *NEW, "--checkpoint-every", "2", "--out", "run"]) == 0
    for path in ("model", *(() if has_checkpoint else ("checkpoints",))):
        (folder / "run" / path).rename(folder / f"old-{path}")
    config = (folder / "shape" / "config.json").read_text()
    write_config(folder / "shape" / "config.json", intermediate_size=64)
    assert refusal("run", capfd=capfd, command="resume") == (
        "the configuration of the model shape has changed since run was started: intermediate_size is 64 and was "
        "32. Restore it, or start a new run."
    )
    (folder / "shape" / "config.json").write_text(config)
    tokenizer = folder / "words" / "tokenizer.json"
    content = tokenizer.read_text(encoding="utf-8")
    merges = json.loads(content)
    merges["model"]["merges"] = merges["model"]["merges"][:-1]
    tokenizer.write_text(json.dumps(merges), encoding="utf-8")
    assert refusal("run", capfd=capfd, command="resume") == (
        "the tokenizer words has changed since run started. Restore it, or start a new run."
    )
    tokenizer.write_text(content, encoding="utf-8")
    assert main(["resume", "run"]) == 0
