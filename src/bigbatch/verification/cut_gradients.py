"""Gradients of one batch under different splits (cuts), each from the same state and the same random seed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from bigbatch.batching.split import Split, split
from bigbatch.gradients.gradient_sums import GradientSums
from bigbatch.gradients.loss_totals import LossTotals, as_terms
from bigbatch.rng import seed_everything
from bigbatch.types import Collate

if TYPE_CHECKING:
    from bigbatch.types import CountItems, LossFunction

Gradients: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class CutGradients:
    """A model, a loss and a batch whose gradients are compared. Call inside `preserve.preserved`.

    Attributes:
        model: On its device, in the mode to verify.
        loss_fn: As for `bigbatch.Engine`.
        batch: As for `bigbatch.Engine`.
        collate: As for `bigbatch.Engine`.
        batch_dim: As for `bigbatch.Engine`.
        count_items: As for `bigbatch.Engine`.
        restore: Restores the buffers and attributes of the model; called before each cut.
    """

    model: nn.Module
    loss_fn: "LossFunction"
    batch: Any
    collate: Collate | None = None
    batch_dim: int | None = None
    count_items: "CountItems | None" = None
    restore: Callable[[], None] = lambda: None

    def names(self) -> dict[Tensor, str]:
        """Return the parameters that require a gradient, with their names."""
        return {p: name for name, p in self.model.named_parameters() if p.requires_grad}

    def split(self, microbatch: int) -> Split:
        """Split the batch into micro-batches on the device of the model."""
        device = next(self.model.parameters()).device
        return split(self.batch, microbatch, device=device, collate=self.collate, batch_dim=self.batch_dim)

    def _start(self, seed: int) -> None:
        """Set the state from which every cut starts."""
        self.restore()
        seed_everything(seed)

    def gradient(self, microbatch: int, *, seed: int = 0) -> Gradients:
        """Compute Σ_i ∇s_i / Σ_i n_i over the micro-batches, by parameter name.

        Args:
            microbatch: Samples per micro-batch.
            seed: Seed of all random generators before the first micro-batch.

        Raises:
            ValueError: The batch has no items.
        """
        loss_totals = LossTotals(None if self.count_items is None else self.count_items(self.batch))
        names = self.names()
        self._start(seed)
        with GradientSums(names) as sums:
            for part in self.split(microbatch):
                if (loss := loss_totals.record(as_terms(self.loss_fn(self.model, part)))) is not None:
                    sums.backward(loss)
            if not (divisor := loss_totals.divisor()):
                raise ValueError(
                    "the batch has no items, so the gradient of the mean loss is undefined. Pass samples with items."
                )
            return {name: gradient / divisor for name, gradient in sums.named_by(names).items()}

    def mean_of_means(self, microbatch: int) -> Gradients:
        """Compute the gradient of the mean of the micro-batches' mean losses; NaN if a micro-batch has no items."""
        names = self.names()
        parts = self.split(microbatch)
        self._start(0)
        with GradientSums(names) as sums:
            for part in parts:
                terms = as_terms(self.loss_fn(self.model, part)).values()
                sums.backward(torch.stack([loss_sum / items for loss_sum, items in terms]).sum() / len(parts))
            return {name: gradient.clone() for name, gradient in sums.named_by(names).items()}

    def terms(self, microbatch: int) -> list[dict[str, tuple[float, float]]]:
        """Compute ``(loss_sum, items)`` of each term in each micro-batch, without gradients."""
        self._start(0)
        with torch.no_grad():
            return [
                {name: (float(loss), float(items)) for name, (loss, items) in terms.items()}
                for terms in (as_terms(self.loss_fn(self.model, part)) for part in self.split(microbatch))
            ]


def relative_difference(gradients: Gradients, reference: Gradients) -> float:
    """Compute ‖gradients − reference‖ / ‖reference‖ over all parameters; 0 if both are 0."""
    difference = [gradients[name] - tensor for name, tensor in reference.items()]
    return _ratio(_norm(difference), _norm(reference.values()))


def parameter_differences(gradients: Gradients, reference: Gradients) -> dict[str, float]:
    """Compute `relative_difference` separately for each parameter."""
    return {name: relative_difference({name: gradients[name]}, {name: reference[name]}) for name in reference}


def _ratio(difference: float, norm: float) -> float:
    if not norm:
        return 0.0 if not difference else float("inf")
    return difference / norm


def _norm(tensors: Any) -> float:
    real = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
    wide = [tensor.float() if tensor.device.type == "mps" else tensor.double() for tensor in real]
    return torch.nn.utils.get_total_norm(wide).item()


@contextmanager
def narrowest_dtype(model: nn.Module) -> Iterator[list[torch.dtype]]:
    """Yield a list whose last element is the narrowest floating dtype of parameters and module outputs so far."""
    inexact = {_real(p.dtype) for p in model.parameters() if p.is_floating_point() or p.is_complex()}
    narrowest = [max(inexact, key=_epsilon)]

    def record_dtype(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if (
            isinstance(output, Tensor)
            and output.is_floating_point()
            and _epsilon(output.dtype) > _epsilon(narrowest[-1])
        ):
            narrowest.append(output.dtype)

    handles = [module.register_forward_hook(record_dtype) for module in model.modules()]
    try:
        yield narrowest
    finally:
        for handle in handles:
            handle.remove()


def _real(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the real part of a complex dtype, and any other dtype unchanged."""
    return dtype.to_real() if dtype.is_complex else dtype


def _epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
