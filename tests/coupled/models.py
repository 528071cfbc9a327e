"""Encoders, losses that couple samples, and the gradient of the whole batch by plain autograd."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch
from bigbatch import losses

NUM_SAMPLES = 22
TOLERANCE = 1e-12


class Towers(nn.Module):
    """Two encoders, a shared layer, a learned scale, and a projection head with batch norm."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4))
        self.right = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4))
        self.shared = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4))
        self.log_scale = nn.Parameter(torch.tensor(0.5))
        self.head = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))


def towers(dropout: float = 0.0, seed: int = 0) -> Towers:
    torch.manual_seed(seed)
    return Towers(dropout).double()


def batch(num_samples: int = NUM_SAMPLES, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "left": torch.randn(num_samples, 5, generator=generator, dtype=torch.float64),
        "right": torch.randn(num_samples, 3, generator=generator, dtype=torch.float64),
        "other": torch.randn(num_samples, 5, generator=generator, dtype=torch.float64),
        "label": torch.randint(0, 4, (num_samples,), generator=generator),
    }


def rows_of(data: dict[str, Tensor], rows: Any) -> dict[str, Tensor]:
    return {name: column[rows] for name, column in data.items()}


def two_towers(model: Any, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return model.left(data["left"]), model.right(data["right"])


def shared_tower(model: Any, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return model.shared(data["left"]), model.shared(data["other"])


def with_labels(model: Any, data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"features": model.left(data["left"]), "labels": data["label"]}


def batch_hard_triplet(_model: Any, features: dict[str, Tensor]) -> Tensor:
    """Hermans et al., arXiv:1703.07737: the farthest positive and the nearest negative of each anchor."""
    points, labels = features["features"], features["labels"]
    distance = (points[:, None] - points[None]).square().sum(-1)
    same = labels[:, None] == labels[None]
    farthest = distance.masked_fill(~same, -torch.inf).amax(1)
    nearest = distance.masked_fill(same, torch.inf).amin(1)
    return F.softplus(farthest - nearest).mean()


def barlow_twins(model: Any, features: tuple[Tensor, Tensor]) -> Tensor:
    """Zbontar et al., arXiv:2103.03230, with the projection head, and its batch norm, in the loss."""
    left, right = (model.head(feature) for feature in features)
    left, right = ((z - z.mean(0)) / z.std(0) for z in (left, right))
    correlation = left.T @ right / len(left)
    diagonal = torch.diagonal(correlation)
    return (diagonal - 1).square().sum() + 0.05 * (correlation.square().sum() - diagonal.square().sum())


def vicreg(_model: Any, features: tuple[Tensor, Tensor]) -> Tensor:
    """Bardes et al., arXiv:2105.04906."""
    total = 25 * F.mse_loss(*features)
    for z in features:
        centred = z - z.mean(0)
        covariance = centred.T @ centred / (len(z) - 1)
        total = total + 25 * F.relu(1 - (centred.var(0) + 1e-4).sqrt()).mean()
        total = total + (covariance.square().sum() - torch.diagonal(covariance).square().sum()) / z.shape[1]
    return total


@dataclass(frozen=True)
class Case:
    encode: Callable[[Any, Any], Any]
    loss: Callable[[Any, Any], Tensor]


CLIP = losses.clip(logit_scale=lambda model: getattr(model, "module", model).log_scale.exp())
CASES = {
    "info_nce": Case(two_towers, losses.info_nce),
    "clip": Case(two_towers, CLIP),
    "clip, shared encoder": Case(shared_tower, CLIP),
    "sup_con": Case(with_labels, losses.sup_con(temperature=0.5)),
    "multiple negatives": Case(two_towers, losses.multiple_negatives_ranking(scale=5.0)),
    "batch-hard triplet": Case(with_labels, batch_hard_triplet),
    "barlow twins, head with batch norm": Case(two_towers, barlow_twins),
    "vicreg": Case(two_towers, vicreg),
}


def whole_batch(model: nn.Module, case: Case, data: dict[str, Tensor]) -> tuple[nn.Module, float]:
    """Return a copy of the model with the gradient of the whole batch, and the loss."""
    reference = copy.deepcopy(model)
    reference.zero_grad()
    loss = case.loss(reference, case.encode(reference, data))
    loss.backward()
    return reference, loss.item()


def gradient_error(model: nn.Module, reference: nn.Module) -> float:
    """Return ‖gradient − reference‖ / ‖reference‖ over all parameters."""
    return relative_error([p.grad for p in model.parameters()], [p.grad for p in reference.parameters()])


def relative_error(found: list[Tensor | None], expected: list[Tensor | None]) -> float:
    pairs = list(zip(found, expected, strict=True))
    difference = [(torch.zeros_like(b) if a is None else a) - b for a, b in pairs if b is not None]
    extra = [a for a, b in pairs if b is None and a is not None]
    norm = torch.nn.utils.get_total_norm([b for _, b in pairs if b is not None])
    return (torch.nn.utils.get_total_norm([*difference, *extra]) / norm).item()


def engine_of(model: nn.Module, case: Any, microbatch: Any, optimizer: Any = None, **options: Any) -> bigbatch.Engine:
    return bigbatch.Engine(model, optimizer, bigbatch.Coupled(case.encode, case.loss), microbatch=microbatch, **options)
