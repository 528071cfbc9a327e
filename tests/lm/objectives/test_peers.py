"""The loss and the tokens of each objective against those of TRL and sentence-transformers, on one unsplit batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from bigbatch.lm.training.setup import TrainingSetup
from lm.objectives import cases
from support.language_models import examples, pairs, write_jsonl

pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing(_kwargs)?` is deprecated and will be removed in v6:FutureWarning",
)
TOLERANCE = 1e-6
CHATS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in pairs(cases.NUM_SAMPLES)
]
WITHOUT_PROMPT = [
    {name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in pairs(cases.NUM_SAMPLES)
]
DATA = {"prompt": pairs(cases.NUM_SAMPLES), "no prompt": WITHOUT_PROMPT, "messages": CHATS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.make_folder(tmp_path_factory.mktemp("peers"))


def perturb(model: Any) -> None:
    """Move the weights away from those of the reference, the same way for two copies of a model."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def loss_of(setup: TrainingSetup, samples: list[dict[str, Any]]) -> float:
    batch = setup.collate(samples)
    setup.model.eval()
    with torch.no_grad():
        loss_sum, items = setup.loss_fn(setup.model, batch)
    assert int(items) == len(samples)
    return float(loss_sum / items)


def common(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "trl"), "max_length": 64, "report_to": "none", "use_cpu": True, "bf16": False,
        "per_device_train_batch_size": cases.NUM_SAMPLES,
    }  # fmt: skip


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"dpo_beta": 0.4}, {"beta": 0.4}),
        ({"dpo_loss": "ipo"}, {"loss_type": ["ipo"]}),
    ],
    ids=["sigmoid", "beta", "ipo"],
)
def test_dpo_loss_equals_that_of_trl(
    folder: Path, tmp_path: Path, data: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", DATA[data])
    setup = cases.set_up(folder, "dpo", data=str(path), **ours)
    samples = [setup.training[i] for i in range(cases.NUM_SAMPLES)]
    cases.add_reference(setup, samples)
    perturb(setup.model)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**common(folder), **theirs),
        train_dataset=Dataset.from_list(DATA[data]),
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
    )
    rows = [trainer.train_dataset[i] for i in range(cases.NUM_SAMPLES)]
    for row, sample in zip(rows, samples, strict=True):
        for name, tokens, answer in zip(("chosen", "rejected"), sample["sequences"], sample["answers"], strict=True):
            assert tokens.tolist() == row["prompt_ids"] + row[f"{name}_ids"]
            assert int(answer.sum()) == len(row[f"{name}_ids"]) - (not row["prompt_ids"])
    perturb(trainer.model)
    trainer.model.eval()
    with torch.no_grad():
        expected = float(trainer.compute_loss(trainer.model, trainer.data_collator(rows)))
    # TRL's log-probabilities are in float32.
    assert loss_of(setup, samples) == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
    assert abs(expected - 0.6931) > 0.001, "the model differs from the reference"


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("center", [None, 0.05])
def test_reward_loss_equals_that_of_trl(folder: Path, tmp_path: Path, data: str, center: float | None) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", DATA[data])
    setup = cases.set_up(folder, "reward", data=str(path), center_rewards_coefficient=center)
    samples = [setup.training[i] for i in range(cases.NUM_SAMPLES)]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1, dtype=torch.float64)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**common(folder), center_rewards_coefficient=center),
        train_dataset=Dataset.from_list(DATA[data]),
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
    )
    trainer.model.load_state_dict(setup.model.state_dict())  # the head of each is new
    rows = [trainer.train_dataset[i] for i in range(cases.NUM_SAMPLES)]
    for row, sample in zip(rows, samples, strict=True):
        assert [tokens.tolist() for tokens in sample["sequences"]] == [row["chosen_ids"], row["rejected_ids"]]
    trainer.model.eval()
    with torch.no_grad():
        expected = float(trainer.compute_loss(trainer.model, trainer.data_collator(rows)))
    assert loss_of(setup, samples) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embedding_loss_equals_that_of_sentence_transformers(folder: Path, tmp_path: Path, pooling: str) -> None:
    rows = examples(cases.NUM_SAMPLES)
    setup = cases.set_up(folder, "embedding", pooling=pooling, temperature=0.05)
    samples = [setup.training[i] for i in range(cases.NUM_SAMPLES)]
    model_setup = setup.model_setup
    assert model_setup.write_files is not None
    setup.model.save_pretrained(tmp_path / "saved")
    setup.tokenizer.save_pretrained(tmp_path / "saved")
    model_setup.write_files(tmp_path / "saved")
    model = SentenceTransformer(str(tmp_path / "saved"), device="cpu", model_kwargs={"dtype": torch.float64})
    texts = [[row[name] for row in rows] for name in ("query", "positive")] + [[row["negative"][0] for row in rows]]
    features = [model.preprocess(column) for column in texts]
    model.eval()
    with torch.no_grad():
        loss = MultipleNegativesRankingLoss(model, scale=1 / 0.05)
        expected = float(loss(features, torch.zeros(0)))
        setup.model.eval()
        loss_fn = setup.loss_fn
        found = loss_fn.loss(setup.model, loss_fn.encode(setup.model, setup.collate(samples)))
    assert float(found) == pytest.approx(expected, rel=TOLERANCE)
    for column, part in zip(features, range(3), strict=True):
        own = [sample["sequences"][part].tolist() for sample in samples]
        mask = column["attention_mask"].bool()
        assert own == [ids[kept].tolist() for ids, kept in zip(column["input_ids"], mask, strict=True)]
