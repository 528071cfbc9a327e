"""The batch of a SentenceTransformerTrainer is the batch of its loss, and everything else stays the trainer's."""

import warnings
from collections.abc import Callable
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers", minversion="6.0", reason="sentence-transformers is not installed")

from datasets import DatasetDict, Features, IterableDataset, Value
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import TrainerCallback

from bigbatch.integrations.sentence_transformers import exact
from integrations.sentence_transformers import st_cases as cases
from support.tiers import slow

EXACT = 1e-12
CHECKPOINTS = pytest.mark.skipif(
    "kwargs" not in signature(cases.SentenceTransformer.gradient_checkpointing_enable).parameters,
    reason="this sentence-transformers cannot enable checkpointing with this transformers",
)


def compared(
    folder: Path,
    data: Callable[[], Any] | Any,
    loss: cases.Loss = cases.mnrl,
    *,
    own: Callable[[], Any] = cases.model,
    microbatch: int = 5,
    **settings: Any,
) -> tuple[Any, list[float]]:
    """Train a trainer with `exact` and a stock one; return the first, and the errors of its updates."""
    found = []
    for _ in range(2):
        rows = data() if callable(data) else data
        trainer, recorder = cases.make(folder, rows, loss, own(), **settings)
        found.append((trainer, recorder))
    exact(found[0][0], microbatch=microbatch)
    for trainer, _ in found:
        trainer.train()
    return found[0][0], cases.errors(found[0][1], found[1][1])


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], cases.Recorder]:
    """Return a function that returns the updates of a stock trainer on some rows; trained once."""

    @cache
    def updates_of(number: int) -> cases.Recorder:
        trainer, recorder = cases.make(tmp_path_factory.mktemp("stock"), cases.rows(number))
        trainer.train()
        return recorder

    return updates_of


@pytest.mark.slow
def test_batch_of_256_in_micro_batches_of_8(tmp_path: Path):
    trainer, errors = compared(tmp_path, cases.rows(600), microbatch=8, per_device_train_batch_size=256)
    assert len(errors) == 3  # 256, 256 and 88
    assert max(errors) <= EXACT
    assert trainer.bigbatch_report.num_microbatches == 11


@pytest.mark.parametrize("microbatch", [1, 7, 24, 1000])
def test_every_micro_batch_is_exact(tmp_path: Path, stock: Callable[[int], cases.Recorder], microbatch: int):
    trainer, found = cases.make(tmp_path, cases.rows(50))
    exact(trainer, microbatch=microbatch).train()
    assert max(cases.errors(found, stock(50))) <= EXACT


@pytest.mark.parametrize(
    "settings", [slow({}), {"microbatch": "auto"}, {"memory": "8GiB"}, slow({"memory": "90%"})], ids=str
)
def test_micro_batch_is_chosen(tmp_path: Path, stock: Callable[[int], cases.Recorder], settings: dict[str, Any]):
    trainer, found = cases.make(tmp_path, cases.rows(48))
    exact(trainer, **settings).train()
    assert max(cases.errors(found, stock(48))) <= EXACT


class _NotedCollator:
    """Notes the rows of each micro-batch that is collated."""

    def __init__(self, collator: Any) -> None:
        self._collator, self.rows = collator, []

    def __call__(self, rows: Any) -> Any:
        self.rows.append([dict(row) for row in rows])
        return self._collator(rows)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._collator, name)


class _RandomStates(TrainerCallback):
    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []

    def on_step_begin(self, *_, **__):
        self.states.append(torch.get_rng_state())


def test_dropout_draws_the_same_masks_again(tmp_path: Path):
    states = _RandomStates()
    trainer, found = cases.make(tmp_path, cases.rows(55), own=cases.model(0.3), callbacks=[states])
    collator = trainer.data_collator
    trainer.data_collator = noted = _NotedCollator(collator)
    exact(trainer, microbatch=5).train()
    model = cases.model(0.3).train()
    loss = losses.MultipleNegativesRankingLoss(model)
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    sizes = [5, 5, 2]
    for number, (gradients, weights) in enumerate(zip(found.gradients, found.weights, strict=True)):
        with torch.no_grad():
            for own, value in zip(parameters, weights, strict=True):
                model.get_parameter(names[id(own)]).copy_(value)
        torch.set_rng_state(states.states[number])
        parts = noted.rows[sum(sizes[:number]) : sum(sizes[: number + 1])]
        columns = [trainer.collect_features(collator(part))[0] for part in parts]
        embedded = [[model(features)["sentence_embedding"] for features in each] for each in columns]
        model.zero_grad()
        loss.compute_loss_from_embeddings([torch.cat(each) for each in zip(*embedded, strict=True)], None).backward()
        full = [model.get_parameter(names[id(own)]).grad for own in parameters]
        assert cases.relative_error(gradients, full) <= EXACT
    assert [len(part) for part in noted.rows] == [5, 5, 5, 5, 4] * 2 + [5, 2]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_out_of_memory_halves_micro_batches(tmp_path: Path, stock: Callable[[int], cases.Recorder], dropout: float):
    own = cases.model(dropout)
    vars(own[0])["forward"] = cases.runs_out(own[0].forward, 3)
    trainer, found = cases.make(tmp_path, cases.rows(48), own=own)
    exact(trainer, microbatch=20).train()
    assert trainer.bigbatch_report.retries > 0
    assert trainer.bigbatch_report.items == 24
    if not dropout:
        assert max(cases.errors(found, stock(48))) <= EXACT


def test_each_dataset_has_its_loss(tmp_path: Path):
    data = DatasetDict(
        {
            "pairs": cases.rows(40, seed=1),
            "scores": cases.rows(30, ("x", "y"), seed=2, label=[number / 30 for number in range(30)]),
            "classes": cases.rows(30, ("t", "u"), seed=3, label=[number % 3 for number in range(30)]),
        }
    )

    def loss(model: Any) -> Any:
        return {
            "pairs": losses.MultipleNegativesRankingLoss(model),
            "scores": losses.MatryoshkaLoss(model, losses.CoSENTLoss(model), [16, 8]),
            "classes": losses.SoftmaxLoss(model, cases.WIDTH, 3),
        }

    _, errors = compared(tmp_path, data, loss, per_device_train_batch_size=16)
    assert len(errors) == 7
    assert max(errors) <= EXACT


def test_datasets_of_different_columns_share_a_loss(tmp_path: Path):
    data = DatasetDict({"p": cases.rows(30, seed=1), "q": cases.rows(30, ("x", "y", "z"), seed=2)})
    prompts = {"p": {"anchor": "w1 w2 "}, "q": "w3 "}
    _, errors = compared(tmp_path, data, microbatch=5, per_device_train_batch_size=16, prompts=prompts)
    assert max(errors) <= EXACT


def test_prompts_outside_of_pooling_are_exact(tmp_path: Path):
    _, errors = compared(
        tmp_path,
        cases.rows(48),
        own=lambda: cases.model(include_prompt=False, max_length=8),
        prompts={"anchor": "w1 w2 w3 "},
    )
    assert max(errors) <= EXACT


@pytest.mark.parametrize(
    "settings",
    [
        {"max_grad_norm": 0.5},
        pytest.param({"gradient_checkpointing": True}, marks=CHECKPOINTS),
        pytest.param(
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            marks=(CHECKPOINTS, pytest.mark.slow),
        ),
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2},
        slow({"dataloader_drop_last": True}),
        slow({"batch_sampler": "no_duplicates"}),
        slow({"include_num_input_tokens_seen": "all"}),
    ],
    ids=["clip", "checkpointing", "reentrant", "workers", "drop last", "no duplicates", "tokens seen"],
)
def test_arguments_stay_the_trainers(tmp_path: Path, settings: dict[str, Any]):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
        warnings.filterwarnings(
            "ignore", "None of the inputs have requires_grad=True", UserWarning
        )  # in the first pass
        _, errors = compared(tmp_path, cases.rows(55), **settings)
    assert max(errors) <= EXACT


def test_autocast_is_as_close_as_stock(tmp_path: Path):
    whole, wanted = cases.make(tmp_path, cases.rows(48), dtype=torch.float32)
    whole.train()
    trainer, found = cases.make(tmp_path, cases.rows(48), dtype=torch.float32, bf16=True)
    exact(trainer, microbatch=5).train()
    stock, stocks = cases.make(tmp_path, cases.rows(48), dtype=torch.float32, bf16=True)
    stock.train()
    own, theirs = cases.errors(found, wanted)[0], cases.errors(stocks, wanted)[0]
    assert 1e-4 < own <= 1.5 * theirs


@pytest.mark.parametrize("name", ["mnrl", "cached"])
def test_grad_scaler_leaves_gradients_exact(tmp_path: Path, name: str):
    kinds = {"mnrl": losses.MultipleNegativesRankingLoss, "cached": losses.CachedMultipleNegativesRankingLoss}
    found = []
    for uses_exact in (True, False):
        trainer, recorder = cases.make(tmp_path, cases.rows(48), kinds[name], max_grad_norm=1e9)
        if uses_exact:
            exact(trainer, microbatch=5)
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            trainer.accelerator.state._mixed_precision = "fp16"
            trainer.accelerator.native_amp = True
        trainer.train()
        found.append(recorder)
    assert max(cases.errors(*found)) <= (EXACT if name == "mnrl" else cases.EXACT_WHERE_CACHED)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_on_gpu(tmp_path: Path, precision: str):
    found = []
    for uses_exact, settings in ((True, {precision: True}), (False, {precision: True}), (False, {})):
        trainer, recorder = cases.make(
            tmp_path,
            cases.rows(48),
            own=cases.model().cuda(),
            dtype=torch.float32,
            use_cpu=False,
            max_grad_norm=1e9,
            **settings,
        )
        (exact(trainer, memory="2GiB") if uses_exact else trainer).train()
        found.append(recorder)
    own, stock = (cases.relative_error(each.gradients[0], found[2].gradients[0]) for each in found[:2])
    assert own <= 2 * stock + 1e-4


def test_stream_is_exact(tmp_path: Path):
    rows = cases.rows(40)
    features = Features({"anchor": Value("string"), "positive": Value("string")})

    def stream() -> IterableDataset:
        return IterableDataset.from_generator(lambda: iter([dict(row) for row in rows]), features=features)

    _, errors = compared(tmp_path, stream, max_steps=3, accelerator_config={"dispatch_batches": False})
    assert max(errors) <= EXACT


def test_static_embedding_is_exact(tmp_path: Path):
    def own() -> Any:
        torch.manual_seed(0)
        tokenizer = cases.model().tokenizer.backend_tokenizer
        return cases.SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")

    _, errors = compared(tmp_path, cases.rows(48), own=own)
    assert max(errors) <= EXACT


def test_frozen_layers_stay_frozen(tmp_path: Path):
    def own() -> Any:
        model = cases.model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layer.1" in name)
        return model

    _, errors = compared(tmp_path, cases.rows(48), own=own)
    assert max(errors) <= EXACT


class _OwnLoss(SentenceTransformerTrainer):
    """Adds a term to the loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs)
        return (2 * loss, {}) if return_outputs else 2 * loss


def test_own_compute_loss_runs_once(tmp_path: Path):
    _, errors = compared(tmp_path, cases.rows(48), kind=_OwnLoss)
    assert max(errors) <= EXACT


def test_evaluation_is_the_trainers(tmp_path: Path):
    data, labels = cases.rows(20, seed=9), [number / 20 for number in range(20)]
    logs = []
    for uses_exact in (True, False):
        trainer, _ = cases.make(
            tmp_path, cases.rows(48), eval_dataset=data, eval_strategy="steps", eval_steps=1, optim="sgd"
        )
        trainer.evaluator = EmbeddingSimilarityEvaluator(data["anchor"], data["positive"], labels, name="own")
        if uses_exact:
            exact(trainer, microbatch=5)
        trainer.train()
        logs.append([log for log in trainer.state.log_history if "eval_loss" in log])
    assert len(logs[0]) == 2
    for own, stock in zip(*logs, strict=True):
        assert own["eval_loss"] == pytest.approx(stock["eval_loss"], rel=1e-9)
        name = "eval_own_spearman_cosine"
        assert own[name] == stock[name]


def test_resumed_run_is_the_same(tmp_path: Path):
    def trainer(folder: Path, **settings: Any) -> Any:
        made, _ = cases.make(
            folder, cases.rows(96), own=cases.model(0.1), save_strategy="steps", save_steps=2, **settings
        )
        return exact(made, microbatch=5)

    whole = trainer(tmp_path / "whole")
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for own, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(own, other)
    loaded = cases.SentenceTransformer(str(tmp_path / "whole" / "checkpoint-4"), device="cpu")
    text = cases.rows(3)["anchor"]
    assert torch.allclose(loaded.encode(text, convert_to_tensor=True), whole.model.encode(text, convert_to_tensor=True))


def test_model_init_makes_another_engine(tmp_path: Path):
    found = []
    for uses_exact in (True, False):
        recorder = cases.Recorder()
        trainer = SentenceTransformerTrainer(
            args=cases.arguments(tmp_path),
            model_init=lambda: cases.model(),
            train_dataset=cases.rows(48),
            loss=losses.MultipleNegativesRankingLoss,
            callbacks=[recorder],
        )
        if uses_exact:
            exact(trainer, microbatch=5)
        trainer.train()
        trainer.train()
        found.append(recorder)
    assert len(found[0].gradients) == 4
    assert max(cases.errors(*found)) <= EXACT


def test_not_finite_batch_changes_nothing(tmp_path: Path):
    class Nan(losses.MultipleNegativesRankingLoss):
        def forward(self, features, labels):
            return super().forward(features, labels) * torch.nan

    trainer, _ = cases.make(tmp_path, cases.rows(20), Nan)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.warns(UserWarning, match="has a non-finite gradient: it changes no weight"):
        exact(trainer, microbatch=5).train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
