"""Runs of other objectives: their metrics, what they save, and the reference of dpo."""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import bigbatch.lm
from bigbatch.cli import main
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.training.setup import set_up_training
from bigbatch.lm.training.trainer import Trainer
from support.language_models import examples, metrics, pairs, save_model_folder, write_jsonl
from support.tiers import slow

Capture = pytest.CaptureFixture[str]
PEFT = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    save_model_folder(folder / "base")
    write_jsonl(folder / "pairs.jsonl", pairs(40))
    write_jsonl(folder / "queries.jsonl", examples(40))
    return folder


def words(folder: Path, objective: str, *more: str) -> list[str]:
    data = "queries" if objective == "embedding" else "pairs"
    return [
        "--objective", objective, "--model", str(folder / "base"), "--data", str(folder / f"{data}.jsonl"),
        "--device", "cpu", "--max-length", "64", *more,
    ]  # fmt: skip


def train(folder: Path, objective: str, out: Path, *more: str) -> list[dict[str, Any]]:
    settings = ["--steps", "4", "--global-batch", "8", "--lr", "0.01", "--validation-every", "2", "--out", str(out)]
    cut = [] if "--microbatch" in more else ["--microbatch", "3"]
    assert main(["train", *words(folder, objective, *settings, *cut, *more)]) == 0
    return metrics(out)


@pytest.mark.parametrize("objective", ["reward", slow("dpo"), slow("embedding")])
def test_metrics_do_not_depend_on_microbatch(folder: Path, tmp_path: Path, objective: str) -> None:
    first, *others = (
        train(folder, objective, tmp_path / size, "--microbatch", size, "--precision", "float64")
        for size in ("1", "3", "8")
    )
    names = [name for name in first[1] if re.search("accuracy|margin|reward|loss", name)]
    assert {"loss", "accuracy", "validation_loss", "validation_accuracy"} <= set(names)
    assert "validation_loss" not in first[0]
    for rows in others:
        for row, other in zip(rows, first, strict=True):
            assert row["items"] == 8
            for name in set(names) & other.keys():
                if objective == "dpo" and row["step"] == 1 and "accuracy" in name:
                    continue  # of margins that are 0 within rounding
                assert row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), (row["step"], name)


@pytest.mark.parametrize("objective", ["reward", "dpo"])
def test_reproducible_runs_are_equal(folder: Path, tmp_path: Path, objective: str, capfd: Capture) -> None:
    for size in ("2", "6"):
        train(folder, objective, tmp_path / size, "--microbatch", size, "--reproducible")
    capfd.readouterr()
    assert main(["diff", str(tmp_path / "2"), str(tmp_path / "6")]) == 0
    assert capfd.readouterr().out.startswith("equal in 4 updates")


def test_reward_model_scores_as_in_training(folder: Path, tmp_path: Path, capfd: Capture) -> None:
    rows = train(folder, "reward", tmp_path / "run")
    assert "for AutoModelForSequenceClassification.from_pretrained" in capfd.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    config = TrainConfig.model_validate(json.loads((tmp_path / "run" / "config.json").read_text()))
    held_out = set_up_training(config).validation
    assert held_out is not None
    margins = []
    for i in range(len(held_out)):
        texts = [tokenizer.decode(row[1:]) for row in held_out[i]["sequences"]]
        with torch.no_grad():
            scores = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
        margins.append(float(scores[0] - scores[1]))
    assert sum(margins) / len(margins) == pytest.approx(rows[-1]["validation_margin"], rel=1e-4, abs=1e-6)
    assert main(["generate", str(tmp_path / "run")]) == 2
    assert capfd.readouterr().err == (
        f"bigbatch generate: the model in {tmp_path / 'run' / 'model'} scores texts (--objective reward) and generates "
        "none.\n"
    )


@PEFT
@pytest.mark.parametrize("objective", ["reward", "embedding"])
def test_merged_adapters_give_what_the_run_trained(
    folder: Path, tmp_path: Path, objective: str, capfd: Capture
) -> None:
    rows = train(folder, objective, tmp_path / "run", "--lora-rank", "2", "--keep", "1")
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    config = TrainConfig.model_validate(
        json.loads((tmp_path / "run" / "config.json").read_text())
        | {"model": str(tmp_path / "merged"), "lora_rank": 0, "lora_alpha": None, "lr": 1e-9, "steps": 1}
    )
    setup = set_up_training(config.model_copy(update={"out": None}))
    trainer = Trainer(setup)
    assert trainer.validate() == pytest.approx(rows[-1]["validation_loss"], rel=1e-5)
    assert main(["generate", str(tmp_path / "run")]) == 2
    kind = {"reward": "scores texts (--objective reward)", "embedding": "encodes texts (--objective embedding)"}
    assert f"{kind[objective]} and generates none." in capfd.readouterr().err


def test_embedding_folder_loads_in_both_libraries(folder: Path, tmp_path: Path) -> None:
    train(folder, "embedding", tmp_path / "run", "--pooling", "last")
    path = tmp_path / "run" / "model"
    vector = SentenceTransformer(str(path), device="cpu").encode(["def return"], convert_to_tensor=True)
    tokens = AutoTokenizer.from_pretrained(path)("def return", return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(path)(**tokens).last_hidden_state[:, -1]
    assert torch.allclose(vector, torch.nn.functional.normalize(hidden, dim=-1), atol=1e-5)


# reference of dpo ------------------------------------------------------------------------------------------------


def test_reference_is_the_model_at_the_start(folder: Path, tmp_path: Path) -> None:
    train(folder, "dpo", tmp_path / "run", "--precision", "float64")
    stored = load_file(tmp_path / "run" / "reference.safetensors")
    setup = set_up_training(
        TrainConfig.model_validate(json.loads((tmp_path / "run" / "config.json").read_text()) | {"out": None})
    )
    for name, part in (("training", setup.training), ("validation", setup.validation)):
        assert part is not None
        assert stored[name].shape == (len(part), 2)
        sample = part[1]
        for tokens, answer, found in zip(sample["sequences"], sample["answers"], stored[name][1], strict=True):
            with torch.no_grad():
                log_probs = setup.model(input_ids=tokens[None]).logits[0].log_softmax(-1)
            own = log_probs[:-1].gather(1, tokens[1:, None])[answer[1:]]
            assert float(found) == pytest.approx(float(own.sum()), rel=1e-6)


def test_resumed_run_reads_the_reference(folder: Path, tmp_path: Path) -> None:
    train(folder, "dpo", tmp_path / "run", "--checkpoint-every", "2", "--keep", "5")
    path = tmp_path / "run" / "reference.safetensors"
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({name: tensor - 1.5 for name, tensor in load_file(path).items()}, path, metadata=metadata)
    prepared = resumed(tmp_path / "run")
    assert prepared.setup.training.reference is not None  # type: ignore[union-attr]
    assert torch.equal(prepared.setup.training.reference, load_file(path)["training"])  # type: ignore[union-attr]
    path.write_bytes(b"damaged")
    again = resumed(tmp_path / "run").setup.training.reference  # type: ignore[union-attr]
    assert again is not None
    assert torch.allclose(again - 1.5, prepared.setup.training.reference)  # type: ignore[union-attr]


def test_reference_is_not_that_of_other_validation_data(folder: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.jsonl"
    write_jsonl(held_out, pairs(8))
    train(folder, "dpo", tmp_path / "run", "--validation-data", str(held_out))
    before = resumed(tmp_path / "run").setup.validation.reference  # type: ignore[union-attr]
    exchanged = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs(8)]
    write_jsonl(held_out, exchanged)  # of the same lengths
    after = resumed(tmp_path / "run").setup.validation.reference  # type: ignore[union-attr]
    assert before is not None
    assert after is not None
    assert torch.allclose(after, before.flip(1))


def resumed(run: Path, **settings: Any) -> Trainer:
    config = TrainConfig.model_validate(json.loads((run / "config.json").read_text()) | settings)
    trainer = Trainer(set_up_training(config))
    trainer.prepare(run)
    return trainer


def test_lost_reference_of_a_changed_model_is_refused(folder: Path, tmp_path: Path) -> None:
    train(folder, "dpo", tmp_path / "run")
    (tmp_path / "run" / "reference.safetensors").unlink()
    with pytest.raises(InputError) as caught:
        resumed(tmp_path / "run", model=str(tmp_path / "run" / "model"))
    assert str(caught.value) == (
        f"{tmp_path / 'run' / 'reference.safetensors'} is lost or damaged, and the weights of "
        f"{tmp_path / 'run' / 'model'} are not those that {tmp_path / 'run'} was started with, so the reference cannot "
        "be computed again. Restore one of the two."
    )


# commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [slow("reward"), "dpo", slow("embedding")])
def test_plan_counts_padded_tokens_of_samples(folder: Path, objective: str, capfd: Capture) -> None:
    capfd.readouterr()
    assert main(["plan", *words(folder, objective, "--global-batch", "8", "--microbatch", "2", "--json")]) == 0
    plan = json.loads(capfd.readouterr().out)
    source = folder / ("queries.jsonl" if objective == "embedding" else "pairs.jsonl")
    settings = {"objective": objective, "model": str(folder / "base"), "max_length": 64, "data": str(source)}
    data = set_up_training(TrainConfig.model_validate(settings | {"device": "cpu"}))
    window = data.order.epoch(0).part(0, 8).tolist()
    assert plan["first_update"]["tokens"] == sum(int(data.training.lengths[i]) for i in window)
    assert plan["peak_bytes"] > 0
    assert plan["updates"] == -(-len(data.training) // 8)
    has_reference = any("reference" in note for note in plan["notes"])
    assert has_reference == (objective == "dpo")


def test_inspect_shows_both_sequences(folder: Path, capfd: Capture) -> None:
    capfd.readouterr()
    data = str(folder / "pairs.jsonl")
    assert main(["inspect", data, "--objective", "dpo", "--model", str(folder / "base"), "--samples", "1"]) == 0
    printed = capfd.readouterr().out
    assert "40 pairs: 40 preference" in printed
    first, second = re.findall(r"sample \d: \S+?:(\d+), (chosen|rejected),", printed)
    assert (first[0], first[1], second[1]) == (second[0], "chosen", "rejected")


def test_tokens_of_another_objective_are_refused(folder: Path, tmp_path: Path, capfd: Capture) -> None:
    write_jsonl(tmp_path / "text.jsonl", [{"text": "def value"}] * 30)
    assert main(["tokenize", "--data", str(tmp_path / "text.jsonl"), "--out", str(tmp_path / "tokens")]) == 0
    capfd.readouterr()
    command = ["train", "--objective", "reward", "--data", str(tmp_path / "tokens"), "--out", str(tmp_path / "run")]
    assert main([*command, "--device", "cpu"]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"bigbatch train: {tmp_path / 'tokens'} holds tokens, which bigbatch tokenize writes for --objective sft "
        "alone. Pass the records that they were made from."
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--objective", "reward", "--train-on", "last-turn"], "--train-on does nothing with --objective reward"),
        (["--dpo-beta", "0.2"], "--dpo-beta does nothing with --objective sft"),
        (["--objective", "dpo", "--pooling", "last"], "--pooling does nothing with --objective dpo"),
        (
            ["--objective", "embedding", "--chat-template", "chatml"],
            "--chat-template does nothing with",
        ),
        (["--objective", "reward", "--sample-prompt", "x"], "--sample-prompt does nothing with --objective reward"),
        (["--objective", "dpo", "--text-column", "x"], "--text-column does nothing with --objective dpo"),
        (
            ["--objective", "dpo", "--dpo-loss", "ipo", "--dpo-label-smoothing", "0.1"],
            "--dpo-label-smoothing does noth",
        ),
        (
            ["--objective", "dpo", "--layout", "packed"],
            "--layout packed is not supported with --objective dpo: use auto",
        ),
        (["--objective", "reward", "--compile", "graphs"], "--compile graphs is not supported with --objective reward"),
    ],
)
def test_setting_without_effect_is_refused(given: list[str], message: str, capfd: Capture) -> None:
    assert main(["train", *given]) == 2
    assert capfd.readouterr().err.startswith(f"bigbatch train: {message}")


def test_python_api_trains_on_files_alone(folder: Path, tmp_path: Path) -> None:
    config = {
        "objective": "dpo", "model": str(folder / "base"), "data": str(folder / "pairs.jsonl"), "device": "cpu",
        "max_length": 64, "steps": 2, "global_batch": 8, "microbatch": 3, "out": str(tmp_path / "run"),
    }  # fmt: skip
    result = bigbatch.lm.train(config)
    assert [row["step"] for row in result.metrics] == [1, 2]
    assert "margin" in result.metrics[-1]
    assert (tmp_path / "run" / "reference.safetensors").is_file()
    with pytest.raises(InputError) as caught:
        bigbatch.lm.train({name: value for name, value in config.items() if name not in ("data", "out")}, pairs(8))
    assert str(caught.value) == (
        "objective dpo is not supported with a passed dataset: name a file of records in the setting data."
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (["--quantize", "nf4", "--lora-rank", "2"], "--quantize is not supported with --objective dpo: leave it out."),
        (
            ["--model-config", "config.json", "--tokenizer", "train:400"],
            "--model-config is not supported with --objective dpo: leave it out.",
        ),
    ],
)
def test_setting_of_token_training_is_refused(setting: list[str], message: str, capfd: Capture) -> None:
    assert main(["train", "--objective", "dpo", *setting]) == 2
    assert capfd.readouterr().err == f"bigbatch train: {message}\n"


def test_named_validation_sets_are_refused(folder: Path, tmp_path: Path, capfd: Capture) -> None:
    named = ["--validation-data", f"more={folder / 'pairs.jsonl'}", "--out", str(tmp_path / "run")]
    write_jsonl(tmp_path / "own.jsonl", pairs(20)[10:])
    given = words(folder, "reward", *named)
    given[given.index("--data") + 1] = str(tmp_path / "own.jsonl")
    assert main(["train", *given]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == (
        "bigbatch train: --validation-data with names is not supported with --objective reward: pass the sources "
        "without NAME=."
    )


@pytest.mark.parametrize("flag", ["--data", "--validation-data"])
def test_shards_of_tokens_are_refused(folder: Path, tmp_path: Path, capfd: Capture, flag: str) -> None:
    (tmp_path / "00000.json").write_text('{"input_ids": [1, 2, 3]}')
    with tarfile.open(tmp_path / "tokens.tar", "w") as archive:
        archive.add(tmp_path / "00000.json", "00000.json")
    given = words(folder, "reward", "--validation-data", str(folder / "pairs.jsonl"), "--out", str(tmp_path / "run"))
    write_jsonl(tmp_path / "own.jsonl", pairs(20))
    given[given.index("--data") + 1] = str(tmp_path / "own.jsonl")
    given[given.index(flag) + 1] = str(tmp_path / "tokens.tar")
    assert main(["train", *given]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"bigbatch train: {tmp_path / 'tokens.tar'} holds tokens, which are for --objective sft alone. Pass records "
        "for --objective reward."
    )
