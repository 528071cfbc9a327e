"""The ready-made losses, against their definitions written as loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigbatch
from bigbatch import losses


def features(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def cross_entropy(scores: list[float], target: int) -> float:
    return math.log(sum(math.exp(score) for score in scores)) - scores[target]


def test_info_nce_is_mean_cross_entropy() -> None:
    q, k = features(0, 5, 3), features(1, 5, 3)
    expected = sum(cross_entropy([cosine(q[i], k[j]) / 0.2 for j in range(5)], i) for i in range(5)) / 5
    assert losses.info_nce(q, k, temperature=0.2).item() == pytest.approx(expected)


def test_clip_is_mean_of_both_directions() -> None:
    a, b = features(0, 5, 3), features(1, 5, 3)
    both = losses.info_nce(a, b, temperature=1 / 7) + losses.info_nce(b, a, temperature=1 / 7)
    assert losses.clip(a, b, logit_scale=7.0).item() == pytest.approx(both.item() / 2)


def test_multiple_negatives_ranking_uses_hard_negatives() -> None:
    a, p, n = features(0, 4, 3), features(1, 4, 3), features(2, 4, 3)
    columns = [*p, *n]
    expected = sum(cross_entropy([20 * cosine(a[i], c) for c in columns], i) for i in range(4)) / 4
    assert losses.multiple_negatives_ranking(a, p, n).item() == pytest.approx(expected)


def test_sup_con_is_mean_over_positives_of_each_view() -> None:
    points, labels = features(0, 6, 3), torch.tensor([0, 1, 0, 2, 1, 0])
    total, anchors = 0.0, 0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        if positives:
            scores = [cosine(points[i], points[j]) / 0.3 for j in others]
            total += sum(cross_entropy(scores, others.index(j)) for j in positives) / len(positives)
            anchors += 1
    points.requires_grad_()
    loss = losses.sup_con(points, labels, temperature=0.3)
    assert loss.item() == pytest.approx(total / anchors)
    loss.backward()
    assert points.grad is not None
    assert points.grad.isfinite().all()


def test_sup_con_accepts_views() -> None:
    views, labels = features(0, 4, 2, 3), torch.arange(4)
    flat = losses.sup_con(views.reshape(8, 3), labels.repeat_interleave(2))
    assert losses.sup_con(views, labels).item() == pytest.approx(flat.item())


def test_sup_con_without_pairs_is_zero() -> None:
    points = features(0, 4, 3).requires_grad_()
    loss = losses.sup_con(points, torch.arange(4))
    loss.backward()
    assert loss.item() == 0
    assert points.grad is not None
    assert not points.grad.any()


@pytest.mark.parametrize(
    "loss",
    [losses.info_nce, losses.info_nce(), losses.info_nce(temperature=lambda model: model.temperature)],
    ids=["function", "default", "temperature"],
)
@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_losses_go_into_coupled(loss: Any, kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    model.temperature = nn.Parameter(torch.tensor(0.07, dtype=torch.float64))

    def encode(model: Any, part: tuple[Tensor, Tensor]) -> Any:
        pair = model(part[0]), model(part[1])
        return dict(zip(("queries", "keys"), pair, strict=True)) if kind is dict else kind(pair)

    data = features(0, 9, 3), features(1, 9, 3)
    report = bigbatch.Engine(model, None, bigbatch.Coupled(encode, loss), microbatch=2).backward(data)
    expected = losses.info_nce(model(data[0]), model(data[1]))
    assert report.loss == pytest.approx(expected.item())


def test_losses_have_docstrings_with_a_paper() -> None:
    for name in ("info_nce", "clip", "sup_con", "multiple_negatives_ranking"):
        assert "arXiv:" in getattr(bigbatch.losses, name).__doc__


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), "0.1"])
def test_temperature_that_is_not_above_zero_is_rejected(temperature: Any) -> None:
    points = features(0, 4, 3)
    for call in (
        lambda: losses.info_nce(points, points, temperature=temperature),
        lambda: losses.sup_con(points, torch.zeros(4, dtype=torch.long), temperature=temperature),
    ):
        with pytest.raises(ValueError, match=r"^temperature is .*: it must be a number above 0\.$"):
            call()
    with pytest.raises(ValueError, match=r"^logit_scale is .*: it must be a number above 0\.$"):
        losses.clip(points, points, logit_scale=temperature)
