"""Models: a tiny one from a config, folders that load whole or not at all, LoRA, and what is saved."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from bigbatch.errors import InputError
from bigbatch.lm.data.tokenizer import train_tokenizer
from bigbatch.lm.model.adapters import add_lora
from bigbatch.lm.model.pretrained import load_model, save_model, tiny_model
from support.language_models import records, save_model_folder

TOKENIZER = train_tokenizer([row["completion"] for row in records(50)], vocabulary_size=300)
INPUT = torch.tensor([[0, 5, 200, 17, 40]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=INPUT).logits


def test_tiny_model_depends_on_seed_alone() -> None:
    before = torch.random.get_rng_state()
    one, again, other = (tiny_model(TOKENIZER, max_length=64, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(logits(one), logits(again))
    assert not torch.equal(logits(one), logits(other))
    assert 1e6 < one.num_parameters() < 6e6
    assert (one.config.bos_token_id, one.config.eos_token_id) == (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id)
    assert tiny_model(TOKENIZER, max_length=5000, seed=0).config.max_position_embeddings == 5000


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_lora_adapters_start_neutral_and_train_alone(tmp_path: Path, kind: str) -> None:
    model = load_model(str(save_model_folder(tmp_path, kind=kind)), dtype=torch.float32)
    expected = logits(model)
    adapted = add_lora(model, rank=2, alpha=4.0, seed=0)
    assert torch.equal(logits(adapted), expected)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_saved_adapters_are_merged_and_stay_in_model(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    base = save_model_folder(tmp_path / "base", kind=kind)
    adapted = add_lora(load_model(str(base), dtype=dtype), rank=2, alpha=4.0, seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    save_model(adapted, TOKENIZER, tmp_path / "model")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values())
    assert loaded.dtype == dtype
    close = {"atol": 0.05} if dtype == torch.bfloat16 else {"atol": 1e-5}
    assert torch.allclose(logits(loaded), logits(adapted), **close)
    assert not torch.allclose(logits(load_model(str(base), dtype=dtype)), logits(adapted), **close)
    assert any("lora_" in name for name, _ in adapted.named_parameters())
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("für").input_ids == TOKENIZER("für").input_ids


def test_saved_model_replaces_older_one_atomically(tmp_path: Path) -> None:
    model = tiny_model(TOKENIZER, max_length=64, seed=0)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stray.txt").touch()
    save_model(model, TOKENIZER, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "stray.txt").exists()
    assert torch.equal(logits(load_model(str(tmp_path / "model"), dtype=torch.float32)), logits(model))


def spoil(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "cut off":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "gone":
        weights.unlink()
    elif how == "incomplete":
        tensors = load_file(weights)
        del tensors["model.norm.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "of another shape":
        tensors = load_file(weights)
        tensors["model.norm.weight"] = torch.ones(7)
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "without a configuration":
        (folder / "config.json").unlink()
    elif how == "with a broken configuration":
        (folder / "config.json").write_text("{", encoding="utf-8")
    else:
        (folder / "config.json").write_text('{"model_type": "nothing-we-know"}', encoding="utf-8")


@pytest.mark.parametrize(
    "how",
    [
        "cut off",
        "empty",
        "gone",
        "incomplete",
        "of another shape",
        "without a configuration",
        "with a broken configuration",
        "of an unknown kind",
    ],
)
def test_incomplete_model_is_one_sentence(tmp_path: Path, how: str) -> None:
    spoil(save_model_folder(tmp_path / "m"), how)
    with pytest.raises(InputError) as caught:
        load_model(str(tmp_path / "m"), dtype=torch.float32)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'm'} does not load as a causal language model: ")
    assert said.endswith(".")
    assert "\n" not in said


def test_missing_weights_are_not_initialized(tmp_path: Path) -> None:
    spoil(save_model_folder(tmp_path), "incomplete")
    with pytest.raises(InputError, match=r": its weights lack 1 tensor, such as model\.norm\.weight\.$"):
        load_model(str(tmp_path), dtype=torch.float32)


def test_weights_of_other_shape_report_both_shapes(tmp_path: Path) -> None:
    spoil(save_model_folder(tmp_path), "of another shape")
    with pytest.raises(InputError, match=r"in 1 tensor, such as model\.norm\.weight: \[7\] and not \[16\]\.$"):
        load_model(str(tmp_path), dtype=torch.float32)


def test_model_without_language_head_is_rejected(tmp_path: Path) -> None:
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(**size, vocab_size=50)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="does not load as a causal language model: its weights lack"):
        load_model(str(tmp_path), dtype=torch.float32)


def test_invalid_hub_name_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^no-such-model does not load as a causal language model: "):
        load_model("no-such-model", dtype=torch.float32)
