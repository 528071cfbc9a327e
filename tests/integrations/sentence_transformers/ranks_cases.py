"""Trainers of sentence-transformers on several ranks: functions that ranks run in test_ranks.py."""

import os
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from datasets import DatasetDict
from sentence_transformers.sentence_transformer import losses
from torch import nn

import bigbatch
from bigbatch.integrations.sentence_transformers import exact
from integrations.sentence_transformers import st_cases as cases
from integrations.sentence_transformers.st_cases import runs_out
from integrations.transformers.ranks_cases import launched, whole

SIZE = 12  # of the batch of each rank
NUMBER = 60  # two updates, and 12 samples that are dropped


class Recorder(cases.Recorder):
    """Records whole gradients and weights."""

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.gradients.append([None if p.grad is None else whole(p.grad).clone() for p in parameters])
        self.weights.append([whole(p).detach().clone() for p in parameters])


LOSSES = {
    "mnrl": losses.MultipleNegativesRankingLoss,
    "gathered": lambda model: losses.MultipleNegativesRankingLoss(model, gather_across_devices=True),
    "cached": lambda model: losses.CachedMultipleNegativesRankingLoss(
        model, mini_batch_size=5, gather_across_devices=True
    ),
    "matryoshka": lambda model: losses.MatryoshkaLoss(
        model,
        losses.MultipleNegativesRankingLoss(
            model, gather_across_devices=True, directions=("query_to_doc", "doc_to_query", "query_to_query")
        ),
        [16, 8],
    ),
    "gist": lambda model: losses.GISTEmbedLoss(
        model, cases.model(seed=5), gather_across_devices=True, contrast_anchors=False
    ),
}


def compared(name: str, microbatch: int | None = 5, memory: str | None = None, most: int = 99) -> Any:
    """Train with `exact` and a stock trainer.

    Args:
        name: Of the loss.
        microbatch: As for `exact`.
        memory: As for `exact`.
        most: Samples for whose gradients the memory of the first rank suffices.

    Returns:
        Errors against the stock trainer, and micro-batches of both ranks.
    """
    found, reports = [], []
    for uses_exact in (True, False):
        with launched() as folder:
            recorder, own = Recorder(), cases.model()
            trainer, _ = cases.make(
                folder, cases.rows(NUMBER), LOSSES[name], own, callbacks=[recorder],
                per_device_train_batch_size=SIZE, ddp_backend="gloo",
            )  # fmt: skip
            if uses_exact:
                vars(own[0])["forward"] = runs_out(own[0].forward, 99 if dist.get_rank() else most)
                exact(trainer, microbatch=microbatch, memory=memory)
            trainer.train()
            found.append(recorder)
            reports.append(trainer)
    return cases.errors(*found), list(reports[0].bigbatch_report.ranks.num_microbatches)


def own_parameters() -> tuple[list[float], float]:
    """Train a loss with parameters that differ between ranks at first; return errors and their later difference."""
    data = cases.rows(NUMBER, label=[number % 5 for number in range(NUMBER)])

    def loss(model: Any) -> nn.Module:
        torch.manual_seed(dist.get_rank())
        return losses.SoftmaxLoss(model, cases.WIDTH, 5)

    with launched() as folder:
        recorder, noted = Recorder(), _Noted()
        trainer, _ = cases.make(
            folder, data, loss, callbacks=[recorder, noted], per_device_train_batch_size=SIZE, ddp_backend="gloo"
        )
        noted.trainer = trainer
        exact(trainer, microbatch=5).train()
        weight = trainer.loss.classifier.weight.detach()
        both = [torch.empty_like(weight) for _ in range(2)]
        dist.all_gather(both, weight)
        return noted.errors(recorder), float((both[0] - both[1]).abs().max())


class _Noted(cases.TrainerCallback):
    """Notes the batches of both ranks, to compute the gradient of each update in one piece."""

    trainer: Any = None

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_step_begin(self, *_, **__):
        self.batches.append(None)

    def errors(self, recorder: Recorder) -> list[float]:
        """Return the error of each update against the mean of the losses of both ranks, without DDP."""
        trainer = self.trainer
        loader = trainer.accelerator.prepare(
            trainer._build_dataloader(trainer.train_dataset, SIZE, dataset_kind="train")
        )
        found = []
        parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        for number, batch in enumerate(loader):
            with torch.no_grad():
                for parameter, value in zip(parameters, recorder.weights[number], strict=True):
                    parameter.copy_(value)
            features, labels = trainer.collect_features(batch)
            for parameter in parameters:
                parameter.grad = None
            trainer.loss(features, labels).backward()
            gradients = [p.grad for p in parameters]
            for gradient in gradients:
                if gradient is not None:
                    dist.all_reduce(gradient)
                    gradient /= 2
            found.append(cases.relative_error(recorder.gradients[number], gradients))
        return found


def several_datasets() -> list[float]:
    """Train on datasets with losses of their own, of which each rank draws its batches."""
    data = DatasetDict(
        {
            "pairs": cases.rows(50, seed=1),
            "scores": cases.rows(50, ("x", "y"), seed=2, label=[number / 50 for number in range(50)]),
        }
    )

    def loss(model: Any) -> Any:
        return {"pairs": losses.MultipleNegativesRankingLoss(model), "scores": losses.CoSENTLoss(model)}

    with launched() as folder:
        found = []
        for uses_exact in (True, False):
            recorder = Recorder()
            trainer, _ = cases.make(
                folder, data, loss, callbacks=[recorder], per_device_train_batch_size=SIZE, ddp_backend="gloo"
            )
            (exact(trainer, microbatch=5) if uses_exact else trainer).train()
            found.append(recorder)
        return cases.errors(*found)


def sharded(name: str) -> list[float]:
    """Train a model that FSDP2 shards; the stock gradients are those of DDP."""
    config = {"fsdp_version": 2, "auto_wrap_policy": "NO_WRAP", "state_dict_type": "FULL_STATE_DICT"}
    found = []
    for settings in ({"fsdp": True, "fsdp_config": config}, {}):
        with patch.dict(os.environ), launched() as folder:
            recorder = Recorder()
            trainer, _ = cases.make(
                folder, cases.rows(NUMBER), LOSSES[name], callbacks=[recorder], per_device_train_batch_size=SIZE,
                ddp_backend="gloo", **settings,
            )  # fmt: skip
            (exact(trainer, microbatch=5) if settings else trainer).train()
            found.append(recorder)
    return cases.errors(*found)


class _OwnGather(nn.Module):
    """Gathers by itself."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Any, labels: Any) -> Any:
        (embedding,) = [self.model(each)["sentence_embedding"] for each in features[:1]]
        total = embedding.detach().sum()
        dist.all_reduce(total)
        return embedding.mean() * total


def refusals() -> list[str]:
    """Return what is refused on several ranks."""
    mnrl = losses.MultipleNegativesRankingLoss

    def gathered(model: Any) -> nn.Module:
        return mnrl(model, gather_across_devices=True)

    def drawn(model: Any) -> nn.Module:
        return losses.MatryoshkaLoss(model, gathered(model), [16, 8], n_dims_per_step=1)

    def guided(model: Any) -> nn.Module:
        return losses.CachedGISTEmbedLoss(model, cases.model(), gather_across_devices=True)

    data = cases.rows(NUMBER)
    both = DatasetDict({"a": data, "b": data})
    attempts: list[tuple[Any, Any, dict[str, Any]]] = [
        (both, lambda model: {"a": gathered(model), "b": mnrl(model)}, {}),
        (data, drawn, {}),
        (data, guided, {}),
        (data, _OwnGather, {}),
        (data, mnrl, {"accelerator_config": {"split_batches": True}}),
        (data, mnrl, {"dataloader_drop_last": False}),
    ]
    found = []
    for rows, loss, settings in attempts:
        with launched() as folder:
            keeps = settings.pop("dataloader_drop_last", True)
            trainer, _ = cases.make(folder, rows, loss, ddp_backend="gloo", **settings)
            trainer.args.dataloader_drop_last = keeps
            try:
                exact(trainer, microbatch=5).train()
            except bigbatch.InputError as error:
                found.append(str(error))
            else:
                found.append("")
    return found
