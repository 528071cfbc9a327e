"""Compare the gradient of samples together with those of their parts, to see what a loss is averaged over.

    n12 · g12 = n1 · g1 + n2 · g2  for the unit in which the n are counted, and for no other

Losses alone do not show it: those of DPO at its start are ln 2 for every pair, whatever is counted.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bigbatch.integrations.transformers.traceless import fresh
from bigbatch.integrations.transformers.unit_counts import Candidate
from bigbatch.rng import random_states, seed_everything
from bigbatch.verification.causes.modules import active_dropouts, training_batch_norms
from bigbatch.verification.tolerances import TOLERANCES, coarser_dtype

ComputeLoss: TypeAlias = Callable[[nn.Module, Any, Any], Tensor]
"""``compute_loss(model, inputs, num_items_in_batch) → 0-d loss``: that of the trainer."""

SEED = 0
MAX_ELEMENTS = 50_000_000  # of the gradients that are compared: three of them are kept, 600 MB in float32
CHUNK = 2**22  # elements that are multiplied at a time, in float64
# Of the part of a difference that lies in the span of the compared gradients, of which the weights are a part. Rounding
# is spread over all directions: 6e-3 of 3e-2 were measured for a model of 5,000 parameters in bfloat16.
SPAN_TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Evaluation:
    """A loss and its gradient for one micro-batch.

    Attributes:
        loss: Its value.
        gradient: One tensor for each compared parameter; None for one that the loss does not depend on.
    """

    loss: float
    gradient: Sequence[Tensor | None]

    @property
    def is_finite(self) -> bool:
        """Whether the loss is finite."""
        return math.isfinite(self.loss)


class LossProbe:
    """Evaluates a trainer's loss and gradient. Call inside `traceless`.

    Args:
        trainer: Moves inputs to its device.
        model: Its bare model.
        compute_loss: Its loss.

    Attributes:
        tolerance: Largest relative difference of gradients that is rounding.
        value_tolerance: The same of losses of other shapes.
        span_tolerance: The same for the part of it that lies in the span of the compared gradients.
        loss_tolerance: Largest relative difference of losses of the same inputs that is rounding.
        is_random: Whether the loss draws random numbers even in eval mode.
        runs_as_in_training: Whether the model runs in training mode, in which it draws no random numbers.
    """

    def __init__(self, trainer: Any, model: nn.Module, compute_loss: ComputeLoss, *, autocast: bool = False) -> None:
        self._trainer, self._model, self._compute_loss = trainer, model, compute_loss
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._parameters = _smallest(trainable)
        self.is_sharded = any(hasattr(parameter, "device_mesh") for parameter in trainable)
        self._devices = list({parameter.device for parameter in trainable if parameter.is_cuda})
        floating = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
        dtype = coarser_dtype(torch.float32, *floating)  # losses of transformers are float32 for float64 models too
        if autocast or _sharded_in_half_precision(model):
            dtype = torch.bfloat16
        self.tolerance = TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])
        self.span_tolerance = SPAN_TOLERANCES.get(dtype, self.tolerance)
        self.loss_tolerance = TOLERANCES[torch.float32] if dtype is torch.float32 else self.tolerance
        self.value_tolerance = self.tolerance
        self.is_random = False
        self.runs_as_in_training = True

    def choose_mode(self, inputs: Any) -> None:
        """Run in training mode without dropout and batch norm, or in eval mode if that draws random numbers."""
        self._set_training()
        self.runs_as_in_training = not self._draws(inputs)
        if not self.runs_as_in_training:
            self._model.eval()
            self.is_random = self._draws(inputs)

    def _set_training(self) -> None:
        self._model.train()
        for module in [*active_dropouts(self._model).values(), *training_batch_norms(self._model).values()]:
            module.eval()

    def _draws(self, inputs: Any) -> bool:
        seed_everything(SEED)
        before = random_states(self._devices)
        with torch.no_grad():
            self._loss(inputs, 1)
        return not _same_states(before, random_states(self._devices))

    def loss_in_training(self, inputs: Any, num_items: int | None) -> float:
        """Return the loss in training mode with all its random numbers, from a fixed seed."""
        modes = [(module, module.training) for module in self._model.modules()]
        self._model.train()
        try:
            seed_everything(SEED)
            with torch.no_grad():
                return float(self._loss(inputs, num_items))
        finally:
            for module, training in modes:
                module.training = training

    def evaluate(self, inputs: Any, num_items: int | None = None) -> Evaluation:
        """Return the loss and its gradient, from a fixed seed."""
        seed_everything(SEED)
        loss = self._loss(inputs, num_items)
        if not loss.requires_grad:
            return Evaluation(float(loss), [None] * len(self._parameters))
        return Evaluation(float(loss.detach()), self._gradient(loss, inputs, num_items))

    def value(self, inputs: Any, num_items: int | None = None) -> float:
        """Return the loss without a gradient, from a fixed seed."""
        seed_everything(SEED)
        with torch.no_grad():
            return float(self._loss(inputs, num_items))

    def _loss(self, inputs: Any, num_items: int | None) -> Tensor:
        inputs = self._trainer._prepare_inputs(fresh(inputs))
        count = None if num_items is None else torch.tensor(num_items, device=self._trainer.args.device)
        with warnings.catch_warnings(action="ignore"):  # the training itself shows those of the trainer and the model
            loss = self._compute_loss(self._model, inputs, count)
        if loss.dtype in SPAN_TOLERANCES:  # rounded, whatever its gradient is
            self.value_tolerance = max(self.value_tolerance, TOLERANCES[loss.dtype])
            self.loss_tolerance = max(self.loss_tolerance, TOLERANCES[loss.dtype])
        return loss

    def _gradient(self, loss: Tensor, inputs: Any, num_items: int | None) -> list[Tensor | None]:
        if not self.is_sharded:
            with suppress(RuntimeError) if self._checkpoints() else _nothing():
                return list(torch.autograd.grad(loss, self._parameters, allow_unused=True))
            seed_everything(SEED)
            loss = self._loss(inputs, num_items)  # reentrant checkpointing does not support autograd.grad
        loss.backward()  # type: ignore[no-untyped-call]
        gradient = [parameter.grad for parameter in self._parameters]
        for parameter in self._model.parameters():
            parameter.grad = None
        return gradient

    def _checkpoints(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self._model.modules())

    def products(self, evaluations: Sequence[Evaluation]) -> Tensor:
        """Return the dot products of gradients, float64 ``[evaluations, evaluations]``.

        Collective for a sharded model.
        """
        size = len(evaluations)
        products = torch.zeros(size, size, dtype=torch.float64)
        for row in range(size):
            for column in range(row + 1):
                value = _dot(evaluations[row].gradient, evaluations[column].gradient)
                products[row, column] = products[column, row] = value
        if self.is_sharded:
            device = self._trainer.args.device
            total = products.to(device)
            torch.distributed.all_reduce(total)
            products = total.cpu()
        return products

    def is_sum_of(self, evaluations: Sequence[Evaluation], weights: Sequence[float], products: Tensor) -> bool:
        """Return whether Σ_k weight_k · evaluation_k is 0, in losses and gradients, within rounding."""
        used = [index for index, weight in enumerate(weights) if weight]
        if not all(evaluations[index].is_finite and bool(products[index, index].isfinite()) for index in used):
            return False
        losses = [weights[index] * evaluations[index].loss for index in used]
        if abs(sum(losses)) > self.value_tolerance * sum(map(abs, losses)):
            return False
        outside, inside = relative_residual([weights[index] for index in used], products[used][:, used])
        return outside <= self.tolerance and inside <= self.span_tolerance


def relative_residual(weights: Sequence[float], products: Tensor) -> tuple[float, float]:
    """Compute ‖Σ_k weight_k · g_k‖ relative to the largest term, outside and inside of the span of the others.

    Args:
        weights: One for each gradient.
        products: Their dot products, float64 ``[gradients, gradients]``, finite.
    """
    factors = torch.tensor(weights, dtype=torch.float64)
    scale = (factors.square() * products.diagonal()).max().sqrt().item()
    if not scale:
        return 0.0, 0.0
    whole = max(0.0, (factors @ products @ factors).item())
    span = products[1:, 1:]
    norms = span.diagonal().sqrt().clamp(min=1e-300)
    projections = (products[1:] @ factors) / norms
    correlation = span / norms.outer(norms)
    inside = max(0.0, (projections @ torch.linalg.pinv(correlation, rtol=1e-10, hermitian=True) @ projections).item())
    return math.sqrt(max(0.0, whole - inside)) / scale, math.sqrt(inside) / scale


def weights_of(candidate: Candidate, whole: Any, parts: Sequence[Any]) -> list[float] | None:
    """Return the weights with which the gradients of a whole and its parts add up to 0; None without items."""
    total = float(candidate.count(whole))
    if not total:
        return None
    return [1.0, *(-float(candidate.count(part)) / total for part in parts)]


def _smallest(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Return parameters up to a total size, the smallest first: those of every layer, and routers, are among them."""
    chosen: list[nn.Parameter] = []
    total = 0
    for parameter in sorted(parameters, key=lambda each: each.numel()):
        total += parameter.numel()
        if chosen and total > MAX_ELEMENTS:
            break
        chosen.append(parameter)
    return chosen


def _dot(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> float:
    total = 0.0
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    sums = [
        (x.double() * y.double()).sum()
        for a, b in pairs
        for x, y in zip(torch.split(_local(a), CHUNK), torch.split(_local(b), CHUNK), strict=True)
    ]
    for device in {each.device for each in sums}:
        total += float(torch.stack([each for each in sums if each.device == device]).sum())
    return total


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return (local.to_dense() if local.is_sparse else local).flatten()


def _same_states(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return (
        torch.equal(before["cpu"], after["cpu"])
        and all(map(torch.equal, before["devices"], after["devices"]))
        and before["python"] == after["python"]
        and before["numpy"] == after["numpy"]
    )


def _sharded_in_half_precision(model: nn.Module) -> bool:
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", None)
        if state is not None and getattr(getattr(state(), "_mp_policy", None), "param_dtype", None) in (
            torch.bfloat16,
            torch.float16,
        ):
            return True
    return False


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()
