"""The losses of sentence-transformers have the gradient of the whole batch, whatever the micro-batch."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bigbatch

pytest.importorskip("sentence_transformers", minversion="6.0", reason="sentence-transformers is not installed")

from sentence_transformers.sentence_transformer import losses
from torch import nn

from bigbatch.integrations.sentence_transformers import exact
from integrations.sentence_transformers import st_cases as cases
from support.tiers import slow_except

EXACT = 1e-12
NUMBER = 55  # two batches of 24, and one of 7
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")

CLASSES = [number % 5 for number in range(NUMBER)]
BINARY = [number % 2 for number in range(NUMBER)]
SCORES = [number % 7 / 7 for number in range(NUMBER)]
VECTORS = torch.randn(NUMBER, cases.WIDTH, generator=torch.Generator().manual_seed(0)).tolist()


def pairs(**others):
    return cases.rows(NUMBER, **others)


def triplets(**others):
    return cases.rows(NUMBER, ("anchor", "positive", "negative"), **others)


def texts(**others):
    return cases.rows(NUMBER, ("text",), **others)


def guide(**settings):
    return cases.model(seed=5, **settings)


def matryoshka(loss, **settings):
    return lambda model: losses.MatryoshkaLoss(model, loss(model), [16, 8, 4], **settings)


class OwnHead(nn.Module):
    """A loss with parameters, batch norm, dropout, and a penalty on the weights of the model."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.head = nn.Sequential(nn.Linear(cases.WIDTH, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))

    def forward(self, features, labels):
        left, right = (F.normalize(self.head(self.model(each)["sentence_embedding"]), dim=-1) for each in features)
        scores = self.scale * left @ right.T
        penalty = sum(parameter.square().sum() for parameter in self.model.parameters())
        return F.cross_entropy(scores, torch.arange(len(scores))) + 1e-3 * penalty


LOSSES = {
    "mnrl": (pairs(), losses.MultipleNegativesRankingLoss),
    "mnrl, hard negatives": (
        cases.rows(NUMBER, ("a", "p", "n", "m")),
        lambda model: losses.MultipleNegativesRankingLoss(
            model, directions=DIRECTIONS, hardness_mode="all_negatives", hardness_strength=2.0
        ),
    ),
    "symmetric": (pairs(), losses.MultipleNegativesSymmetricRankingLoss),
    "cached": (triplets(), lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=5)),
    "cached, tokens": (
        pairs(),
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=5, mini_batch_num_tokens=60),
    ),
    "cached, symmetric": (
        pairs(),
        lambda model: losses.CachedMultipleNegativesSymmetricRankingLoss(model, mini_batch_size=5),
    ),
    "gist": (triplets(), lambda model: losses.GISTEmbedLoss(model, guide())),
    "gist, other tokenizer": (pairs(), lambda model: losses.GISTEmbedLoss(model, guide(reverse=True))),
    "gist by itself": (pairs(), lambda model: losses.GISTEmbedLoss(model, model)),
    "cached gist": (triplets(), lambda model: losses.CachedGISTEmbedLoss(model, guide(), mini_batch_size=6)),
    "mega batch": (pairs(), lambda model: losses.MegaBatchMarginLoss(model, mini_batch_size=9)),
    "mega batch, whole": (
        pairs(),
        lambda model: losses.MegaBatchMarginLoss(model, use_mini_batched_version=False),
    ),
    "batch all": (texts(label=CLASSES), losses.BatchAllTripletLoss),
    "batch hard": (texts(label=CLASSES), losses.BatchHardTripletLoss),
    "batch semi-hard": (texts(label=CLASSES), losses.BatchSemiHardTripletLoss),
    "batch hard soft": (texts(label=CLASSES), losses.BatchHardSoftMarginTripletLoss),
    "cosent": (pairs(label=SCORES), losses.CoSENTLoss),
    "angle": (pairs(label=SCORES), losses.AnglELoss),
    "cosine": (pairs(label=SCORES), losses.CosineSimilarityLoss),
    "contrastive": (pairs(label=BINARY), losses.ContrastiveLoss),
    "online contrastive": (pairs(label=BINARY), losses.OnlineContrastiveLoss),
    "triplet": (triplets(), losses.TripletLoss),
    "softmax": (pairs(label=CLASSES), lambda model: losses.SoftmaxLoss(model, cases.WIDTH, 5)),
    "mse": (texts(label=VECTORS), losses.MSELoss),
    "distill": (texts(label=VECTORS), lambda model: losses.EmbedDistillLoss(model, projection_dim=cases.WIDTH)),
    "margin mse": (triplets(label=SCORES), losses.MarginMSELoss),
    "kl": (triplets(label=[[score, 1 - score] for score in SCORES]), losses.DistillKLDivLoss),
    "orthogonal": (pairs(), losses.GlobalOrthogonalRegularizationLoss),
    "matryoshka": (triplets(), matryoshka(losses.MultipleNegativesRankingLoss)),
    "matryoshka, drawn": (pairs(), matryoshka(losses.MultipleNegativesRankingLoss, n_dims_per_step=1)),
    "matryoshka, cached": (
        pairs(),
        matryoshka(lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=7)),
    ),
    "matryoshka, cosent": (pairs(label=SCORES), matryoshka(losses.CoSENTLoss)),
    "own": (pairs(), OwnHead),
}


@pytest.mark.filterwarnings("ignore:.*SymmetricRankingLoss is deprecated", "ignore:.*teacher.*:UserWarning")
@pytest.mark.parametrize(
    "name", slow_except(LOSSES, "mnrl", "cached", "gist", "mega batch", "triplet", "cosine", "matryoshka")
)
def test_gradient_is_that_of_whole_batch(tmp_path: Path, name: str):
    data, loss = LOSSES[name]
    trainer, found = cases.make(tmp_path, data, loss)
    exact(trainer, microbatch=5).train()
    stock, wanted = cases.make(tmp_path, data, loss)
    stock.train()
    assert len(found.gradients) == 3
    is_cached = "cached" in name or name == "mega batch"
    assert max(cases.errors(found, wanted)) <= (cases.EXACT_WHERE_CACHED if is_cached else EXACT)
    assert trainer.bigbatch_report.num_microbatches == 2
    assert trainer.bigbatch_report.items == 7
    own, stocks = ([log for log in each.state.log_history if "loss" in log] for each in (trainer, stock))
    assert own == [pytest.approx(log, rel=1e-6) for log in stocks]


def test_buffers_of_loss_learn_once(tmp_path: Path):
    trainer, _ = cases.make(tmp_path, pairs(), OwnHead, optim="sgd")
    exact(trainer, microbatch=5).train()
    stock, _ = cases.make(tmp_path, pairs(), OwnHead, optim="sgd")
    stock.train()
    for name, buffer in stock.loss.head.named_buffers():
        torch.testing.assert_close(trainer.loss.head.get_buffer(name), buffer, rtol=1e-10, atol=1e-12)


def test_loss_is_unchanged_after_training(tmp_path: Path):
    trainer, _ = cases.make(tmp_path, pairs(), LOSSES["cached gist"][1])
    loss = trainer.loss
    attributes, children = dict(vars(loss)), dict(loss.named_children())
    exact(trainer, microbatch=5).train()
    assert vars(loss) == attributes
    assert dict(loss.named_children()) == children
    assert loss.model is trainer.model


@pytest.mark.filterwarnings("ignore:BatchNorm in training mode")
def test_batch_norm_of_model_is_warned_of(tmp_path: Path):
    class Norm(nn.BatchNorm1d):
        def forward(self, features):
            return features | {"sentence_embedding": super().forward(features["sentence_embedding"])}

    own = cases.model()
    own.append(Norm(cases.WIDTH))
    trainer, _ = cases.make(tmp_path, pairs(), own=own)
    with pytest.warns(UserWarning, match="BatchNorm in training mode"):
        exact(trainer, microbatch=5).train()


def test_matryoshka_2d_is_refused(tmp_path: Path):
    trainer, _ = cases.make(
        tmp_path,
        pairs(),
        lambda model: losses.Matryoshka2dLoss(model, losses.MultipleNegativesRankingLoss(model), [16, 8]),
    )
    with pytest.raises(bigbatch.InputError) as caught:
        exact(trainer)
    assert str(caught.value) == (
        "Matryoshka2dLoss uses the embeddings of all layers, and draws layers in each call: use MatryoshkaLoss or the "
        "loss inside it, or train without exact()."
    )
