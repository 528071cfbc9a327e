"""Models are trained on pairs without their own dropout, and saved with its rates."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel

from bigbatch.cli import main
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.model.decoder_layers import uses_randomness
from bigbatch.lm.objectives import setup as objective_setup
from bigbatch.lm.objectives.dropout import disable_dropout
from bigbatch.lm.training.resume import check_facts, run_facts
from bigbatch.lm.training.setup import set_up_training
from support.language_models import metrics, pairs, save_model_folder, write_jsonl

RATES = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dropout")
    save_model_folder(folder / "gpt2", kind="gpt2", dropout=0.5)
    save_model_folder(folder / "none", kind="gpt2", dropout=0.0)
    write_jsonl(folder / "pairs.jsonl", pairs(16))
    return folder


def train(folder: Path, objective: str, out: Path, *more: str, model: str = "gpt2") -> int:
    return main(
        [
            "train", "--objective", objective, "--model", str(folder / model), "--data", str(folder / "pairs.jsonl"),
            "--device", "cpu", "--max-length", "48", "--global-batch", "8", "--microbatch", "4", "--lr", "1e-4",
            "--validation-fraction", "0", "--steps", "2", "--no-cache", "--out", str(out), *more,
        ]
    )  # fmt: skip


def falcon() -> Any:
    """Return a model that reads rates of its configuration in forward."""
    size = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return FalconForCausalLM(FalconConfig(**size, hidden_dropout=0.5, attention_dropout=0.5))


def gpt2(rate: float) -> Any:
    rates = dict.fromkeys(RATES, rate)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32, **rates))


@pytest.mark.parametrize("make", [falcon, lambda: gpt2(0.5)])
def test_training_forward_without_dropout_equals_evaluation(make: Any) -> None:
    model = make()
    tokens = torch.arange(12).view(2, 6)
    assert not model.train()(tokens).logits.equal(model.eval()(tokens).logits)
    assert disable_dropout(model)
    assert not uses_randomness(model)
    assert model.train()(tokens).logits.equal(model.eval()(tokens).logits)


def test_model_without_dropout_is_unchanged() -> None:
    model = gpt2(0.0)
    before = model.config.to_dict()
    assert before["summary_first_dropout"] > 0  # which the model does not use
    assert disable_dropout(model) is None
    assert model.config.to_dict() == before


@pytest.mark.parametrize("more", [(), ("--lora-rank", "2", "--lora-dropout", "0.5")])
@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed:FutureWarning")
def test_margins_of_first_update_are_zero(
    folder: Path, tmp_path: Path, more: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(folder, "dpo", tmp_path / "run", "--precision", "float64", *more) == 0
    assert "the dropout of the model is set to 0 for --objective dpo" in capfd.readouterr().out.replace("\n", " ")
    assert metrics(tmp_path / "run")[0]["margin"] == pytest.approx(0, abs=1e-12)


def test_saved_model_keeps_its_rates(folder: Path, tmp_path: Path) -> None:
    assert train(folder, "reward", tmp_path / "run") == 0
    saved = AutoConfig.from_pretrained(tmp_path / "run/model").to_dict()
    base = AutoConfig.from_pretrained(folder / "gpt2").to_dict()
    assert {name: saved[name] for name in RATES} == RATES
    assert {name for name in saved if "drop" in name and saved[name] != base[name]} == set()


def test_line_is_left_out_without_dropout(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(folder, "dpo", tmp_path / "run", model="none") == 0
    assert "the dropout of the model" not in capfd.readouterr().out.replace("\n", " ")


def test_run_with_dropout_is_not_resumed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(objective_setup, "disable_dropout", lambda model: None)
        assert train(folder, "dpo", run) == 0
    config = TrainConfig.model_validate(json.loads((run / "config.json").read_text()))
    facts = json.loads((run / "run-manifest.json").read_text())["facts"]
    assert facts["model"]["attn_pdrop"] == 0.5
    with pytest.raises(InputError) as caught:
        check_facts(config, facts, run_facts(set_up_training(config)), allowed=())
    assert str(caught.value) == (
        f"{run} was started by an earlier version of bigbatch, which trained with the dropout of {folder / 'gpt2'} "
        "(attn_pdrop 0.5), and this version sets it to 0 for --objective dpo. Start a new run."
    )
