"""LoRA adapters: what peft receives, what is trained, saved adapters that peft loads, and merged models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from bigbatch.errors import BigbatchError, InputError
from bigbatch.lm.data.tokenizer import load_tokenizer
from bigbatch.lm.model.adapters import add_lora, base_of, load_adapted, merge_adapters, save_adapters
from bigbatch.lm.model.decoder_layers import uses_randomness
from support.language_models import load_peft, save_model_folder
from support.tiers import slow

INPUT = torch.tensor([[0, 5, 200, 17, 40]])
ATTENTION = {"llama": "q_proj,v_proj", "qwen2": "self_attn.q_proj,layers.1.mlp.up_proj", "gpt2": "c_attn"}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "dropout": {"dropout": 0.1},
}


def base(folder: Path, kind: str = "llama") -> Path:
    save_model_folder(folder, kind=kind)
    if kind == "mixtral":
        size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = MixtralConfig(**size, num_key_value_heads=1, num_local_experts=2, vocab_size=308)
        MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def adapted(folder: Path, dtype: torch.dtype | str = "auto", **options: Any) -> Any:
    """Return a model with adapters that are not neutral."""
    model = add_lora(load(folder, dtype), rank=2, alpha=3.0, seed=0, **options)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUT).logits


def difference(one: nn.Module, other: nn.Module) -> float:
    return (logits(one).double() - logits(other).double()).abs().max().item()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", ["llama", slow("gpt2"), slow("qwen2")])
def test_saved_adapters_and_merged_model_have_same_logits(tmp_path: Path, kind: str, option: str) -> None:
    folder = base(tmp_path / "base", kind)
    model = adapted(folder, **OPTIONS[option])
    assert difference(model, load(folder)) > 0.01
    tokenizer = load_tokenizer(str(folder))
    save_adapters(model, tokenizer, tmp_path / "adapter", base=str(folder))
    assert difference(load_peft(folder, tmp_path / "adapter"), model) < 1e-5
    ours = load_adapted(tmp_path / "adapter", base=base_of(tmp_path / "adapter"), dtype="auto")
    assert difference(ours, model) < 1e-5
    merge_adapters(ours, tokenizer, tmp_path / "merged")
    assert difference(load(tmp_path / "merged"), model) < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_adapters_of_a_mixture_are_saved_and_merged(tmp_path: Path) -> None:
    folder = base(tmp_path / "base", "mixtral")
    model, tokenizer = adapted(folder), load_tokenizer(str(folder))
    save_adapters(model, tokenizer, tmp_path / "adapter", base=str(folder))
    assert difference(load_peft(folder, tmp_path / "adapter"), model) < 1e-5
    merge_adapters(load_adapted(tmp_path / "adapter", base=str(folder), dtype="auto"), tokenizer, tmp_path / "merged")
    assert difference(load(tmp_path / "merged"), model) < 1e-5


@pytest.mark.parametrize("kind", list(ATTENTION))
def test_settings_reach_peft_and_trained_layers(tmp_path: Path, kind: str) -> None:
    folder = base(tmp_path / "base", kind)
    targets = ATTENTION[kind]
    model = adapted(folder, targets=targets, rslora=True, dora=True, dropout=0.25)
    found = {name.partition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    plain = [n for n, m in load(folder).named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    expected = {n for n in plain if any(n == end or n.endswith(f".{end}") for end in targets.split(","))}
    assert found == {f"base_model.model.{name}" for name in expected}
    save_adapters(model, load_tokenizer(str(folder)), tmp_path / "adapter", base=str(folder))
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["target_modules"] == sorted(targets.split(","))
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"]) == (2, 3.0, 0.25)
    assert (saved["use_rslora"], saved["use_dora"], saved["fan_in_fan_out"]) == (True, True, kind == "gpt2")
    assert saved["base_model_name_or_path"] == str(folder)
    layer = model.get_submodule(min(found))
    assert layer.scaling["default"] == pytest.approx(3 / 2**0.5)
    assert any("lora_magnitude_vector" in name for name in load_file(tmp_path / "adapter/adapter_model.safetensors"))


def test_adapters_start_neutral_and_leave_output_layer(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    for options in OPTIONS.values():
        model = add_lora(load(folder), rank=2, alpha=3.0, seed=0, **options).eval()
        assert difference(model, load(folder)) < 1e-6
        assert not any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad)


def test_dropout_of_adapters_is_seen_as_randomness(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    assert uses_randomness(adapted(folder, dropout=0.1))
    assert not uses_randomness(adapted(folder, dropout=0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_merged_model_has_dtype_of_base(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = base(tmp_path / "base")
    load(folder, dtype).save_pretrained(folder)
    model, tokenizer = adapted(folder), load_tokenizer(str(folder))
    save_adapters(model, tokenizer, tmp_path / "adapter", base=str(folder))
    merge_adapters(load_adapted(tmp_path / "adapter", base=str(folder), dtype="auto"), tokenizer, tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert merged.dtype == dtype
    assert difference(merged, model) < (0.05 if dtype == torch.bfloat16 else 1e-12)


def test_saved_adapters_are_the_same_bytes(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    for name in ("one", "two"):
        save_adapters(adapted(folder), load_tokenizer(str(folder)), tmp_path / name, base=str(folder))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_relative_base_is_saved_as_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    save_adapters(adapted(folder), load_tokenizer("base"), Path("adapter"), base="base")
    assert base_of(tmp_path / "adapter") == str(folder)


def test_unknown_target_lists_linear_layers(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        add_lora(load(base(tmp_path, "gpt2")), rank=2, alpha=3.0, seed=0, targets="c_attn,q_proj")
    assert str(caught.value) == (
        "--lora-targets q_proj is not the name of a linear layer of this GPT2LMHeadModel. Its linear layers are "
        "c_attn, c_proj, c_fc, lm_head."
    )


def test_tied_output_layer_is_rejected_as_target(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        add_lora(load(base(tmp_path, "qwen2")), rank=2, alpha=3.0, seed=0, targets="q_proj,lm_head")
    assert str(caught.value) == (
        "--lora-targets lm_head: the weight of lm_head is also that of model.embed_tokens, which has no adapter, so "
        "the two could not be merged. Leave it out."
    )


def test_untied_output_layer_can_have_an_adapter(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    model, tokenizer = adapted(folder, targets="lm_head"), load_tokenizer(str(folder))
    save_adapters(model, tokenizer, tmp_path / "adapter", base=str(folder))
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert difference(load_peft(folder, tmp_path / "adapter"), model) < 1e-5


def damage(folder: Path, how: str) -> None:
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, settings = load_file(weights), json.loads(config.read_text(encoding="utf-8"))
    if how == "incomplete":
        tensors.popitem()
        save_file(tensors, weights)
    elif how == "of another rank":
        config.write_text(json.dumps(settings | {"r": 3}), encoding="utf-8")
    elif how == "without weights":
        weights.unlink()
    elif how == "cut off":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        config.write_text(json.dumps(settings | {"target_modules": ["nothing"]}), encoding="utf-8")


@pytest.mark.parametrize("how", ["incomplete", "of another rank", "without weights", "cut off", "of other layers"])
def test_adapters_that_do_not_fit_are_one_sentence(tmp_path: Path, how: str) -> None:
    folder = base(tmp_path / "base")
    save_adapters(adapted(folder), load_tokenizer(str(folder)), tmp_path / "adapter", base=str(folder))
    damage(tmp_path / "adapter", how)
    with pytest.raises(InputError) as caught:
        load_adapted(tmp_path / "adapter", base=str(folder), dtype="auto")
    said = str(caught.value)
    assert said.startswith(f"the adapters in {tmp_path / 'adapter'} do not fit the model {folder}: ")
    assert said.endswith(".")
    assert "\n" not in said


def test_adapters_that_are_not_finite_are_not_merged(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    model, tokenizer = adapted(folder), load_tokenizer(str(folder))
    next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)
    with pytest.raises(BigbatchError, match=r"^the adapters cannot be merged: NaNs detected"):
        merge_adapters(model, tokenizer, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "{path} is not the configuration of LoRA adapters: its peft_type is IA3."),
        ({"peft_type": "LORA"}, "{path} does not name the model of its adapters: pass it with --model."),
        (
            {"peft_type": "LORA", "base_model_name_or_path": "/nowhere/at-all"},
            "the model /nowhere/at-all, on which the adapters in {folder} were trained, does not exist: pass its "
            "folder with --model.",
        ),
    ],
    ids=["other adapters", "no model", "missing model"],
)
def test_unusable_adapter_configuration_is_one_sentence(tmp_path: Path, settings: dict[str, str], said: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        base_of(tmp_path)
    assert str(caught.value) == said.format(path=path, folder=tmp_path)
