"""How far products in float8 move the gradient of a model, measured on its own samples.

samples → gradient with products in float8 ┐
        → gradient with those of autocast  ┴→ cosine, relative difference
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigbatch.gradients.loss_totals import as_terms
from bigbatch.lm.model.setup import ModelSetup
from bigbatch.preserve import preserved
from bigbatch.rng import seed_everything

NUM_SAMPLES = 4
"""Of the first batch that are measured: a few seconds at most."""


@dataclass(frozen=True)
class Fp8Gradient:
    """The gradient of a few samples with products in float8, g, compared with that of products in bfloat16, h.

    Attributes:
        cosine: g·h / (‖g‖·‖h‖) over all trained parameters; NaN if one of them is zero or not finite.
        relative_difference: ‖g − h‖ / ‖h‖.
        num_samples: Samples, each computed by itself.
    """

    cosine: float
    relative_difference: float
    num_samples: int

    def __str__(self) -> str:
        samples = "first sample" if self.num_samples == 1 else f"first {self.num_samples} samples"
        if math.isnan(self.cosine):
            return f"fp8: the gradient of the {samples} is zero or not finite, so its error is not known"
        return f"fp8: cosine of the gradient with that of bf16 products {self.cosine:.4f} ({samples})"


def compare_gradients(
    model_setup: ModelSetup, samples: Sequence[dict[str, Tensor]], device: torch.device
) -> Fp8Gradient | None:
    """Compare the gradients of samples with and without products in float8; None for a model without them.

    Needs memory for one gradient and one sample: layers run eagerly and recompute their activations, and the first
    gradient waits in host memory. The state of the model is restored.

    Args:
        model_setup: With the loss of training.
        samples: At least one.
        device: Of the model.
    """
    if model_setup.fp8 is None:
        return None
    layers = model_setup.layers
    assert layers is not None, "only decoder layers have products in float8"
    with layers.eager_recomputing(), preserved(model_setup.model, parameters=False):
        narrow = [gradient.cpu() for gradient in _gradients(model_setup, samples, device)]
        with model_setup.fp8.disabled():
            wide = _gradients(model_setup, samples, device)
        dot, narrow_square, wide_square, difference_square = _products(narrow, wide)
    size = math.sqrt(narrow_square * wide_square)
    is_known = 0 < size < math.inf
    return Fp8Gradient(
        dot / size if is_known else math.nan,
        math.sqrt(difference_square / wide_square) if is_known else math.nan,
        len(samples),
    )


def _gradients(model_setup: ModelSetup, samples: Sequence[dict[str, Tensor]], device: torch.device) -> list[Tensor]:
    """Return the gradient of the summed loss by each trained parameter that has one."""
    model = model_setup.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    seed_everything(0)
    for sample in samples:
        microbatch = {name: tensor.to(device) for name, tensor in model_setup.collate([sample]).items()}
        terms = as_terms(model_setup.loss_fn(model, microbatch)).values()
        torch.autograd.backward([torch.stack([loss_sum for loss_sum, _ in terms]).sum()])
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    for parameter in trained:
        parameter.grad = None
    return found


def _products(narrow: Sequence[Tensor], wide: Sequence[Tensor]) -> tuple[float, float, float, float]:
    """Return g·h, g·g, h·h and ‖g − h‖², summed in float64, one parameter at a time."""
    sums = torch.zeros(4, dtype=torch.float64)
    for on_host, other in zip(narrow, wide, strict=True):
        one = on_host.to(other.device).double().flatten()
        two = other.double().flatten()
        sums += torch.stack([one @ two, one @ one, two @ two, (one - two) @ (one - two)]).cpu()
    dot, first, second, difference = sums.tolist()
    return dot, first, second, difference
