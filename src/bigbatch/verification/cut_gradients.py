"""Gradients of one batch under different splits (cuts), each from the same state and the same random seed."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from bigbatch.batch_norm.joint_window import JointWindow
from bigbatch.batching.split import Split
from bigbatch.coupled.coupled import Coupled
from bigbatch.coupled.two_passes import TwoPasses
from bigbatch.gradients.gradient_sums import GradientSums
from bigbatch.gradients.leaf_backward import backward_inside, backward_with_leaves
from bigbatch.gradients.loss_totals import SINGLE, LossTotals, as_terms
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory
from bigbatch.rng import seed_everything
from bigbatch.trials.loss_modules import modules_used_by
from bigbatch.types import Items
from bigbatch.verification.activation_hooks import ActivationHooks

if TYPE_CHECKING:
    from bigbatch.types import LossFunction

CUT_ERRORS = (ArithmeticError, IndexError, RuntimeError, ValueError)  # raised by models for unsupported shapes

Result = TypeVar("Result")
Gradients: TypeAlias = dict[str, Tensor]
Cut: TypeAlias = int | Sequence[Sequence[int]]  # samples per micro-batch, or the samples of each micro-batch
TermValues: TypeAlias = dict[str, tuple[float, float]]  # (loss_sum, items) of each term


@dataclass(frozen=True)
class CutGradients:
    """A model, a loss and samples whose gradients are compared. Call inside `preserve.preserved`.

    Attributes:
        model: On its device, in the mode to verify.
        loss_fn: As for `bigbatch.Engine`.
        samples: The batch, split in any way; defines how a micro-batch of some samples is made.
        totals: Items of each term in the whole batch, for a loss of several terms.
        outside: Parameters that the loss reaches outside of the model, with their names.
        restore: Restores the buffers and attributes of all modules; called before each cut.
        reset: Restores state after every micro-batch; None to let it move on, as in training.
        batch_norm: As for `bigbatch.Engine`; ``reset`` has no effect with ``"exact"``.
    """

    model: nn.Module
    loss_fn: "LossFunction"
    samples: Split
    totals: Mapping[str, Items] | None = None
    outside: Mapping[Tensor, str] = field(default_factory=dict)
    restore: Callable[[], None] = lambda: None
    reset: Callable[[], None] | None = None
    batch_norm: Literal["exact"] | None = None

    def names(self) -> dict[Tensor, str]:
        """Return the parameters that require a gradient, with their names; those outside of the model come last."""
        own = {p: name for name, p in self.model.named_parameters() if p.requires_grad}
        return own | {p: name for p, name in self.outside.items() if p not in own}

    def split(self, cut: Cut) -> Split:
        """Split the samples into micro-batches of one size, or of the given samples."""
        if isinstance(cut, int):
            num_samples = self.samples.num_samples
            cut = [range(start, min(start + cut, num_samples)) for start in range(0, num_samples, cut)]
        return replace(self.samples.copied(), groups=cut)  # the loss may write to micro-batches in place

    def _start(self, seed: int) -> None:
        """Set the state from which every cut starts."""
        self.restore()
        seed_everything(seed)

    def gradient(self, cut: Cut, *, seed: int = 0, scale: float = 1.0) -> Gradients:
        """Compute Σ_i ∇s_i / Σ_i n_i over the micro-batches, by parameter name.

        Args:
            cut: Samples per micro-batch, or the samples of each.
            seed: Seed of all random generators before the first micro-batch.
            scale: Factor of each loss before it is differentiated.

        Raises:
            ValueError: The batch has no items.
        """
        loss_totals = LossTotals(self.totals)
        names = self.names()
        self._start(seed)
        with GradientSums(names) as sums:
            if isinstance(self.loss_fn, Coupled):
                num_samples = self._add_coupled(self.loss_fn, cut, sums, scale)
                return {name: gradient / num_samples for name, gradient in sums.named_by(names).items()}
            split = self.split(cut)
            if self.batch_norm is not None and len(split) > 1:
                self._add_jointly(split, sums, loss_totals, scale)
                split = replace(split, groups=[])
            for part in split:
                if (loss := loss_totals.record(as_terms(self.loss_fn(self.model, part)))) is not None:
                    sums.backward(loss if scale == 1 else loss * scale)
                self._reset_state()
            if not (divisor := loss_totals.divisor()):
                raise ValueError(
                    "the batch has no items, so the gradient of the mean loss is undefined. Pass samples with items."
                )
            return {name: gradient / divisor for name, gradient in sums.named_by(names).items()}

    def _add_jointly(self, split: Split, sums: GradientSums, loss_totals: LossTotals, scale: float) -> None:
        """Add the gradients of micro-batches that wait for each other at batch norms."""

        def differentiate(rows: Sequence[int]) -> None:
            loss = loss_totals.record(as_terms(self.loss_fn(self.model, split.take(rows))))
            if loss is not None:
                backward_inside(loss * scale, sums, trained)

        with sums.adding() as trained:
            self._run_jointly(partial(differentiate, rows) for rows in split.groups)

    def _run_jointly(self, functions: Iterable[Callable[[], None]]) -> None:
        window = JointWindow([self.model, *modules_used_by(self.loss_fn)], self.samples.device)
        try:
            with window.open():
                failure = window.run(functions)
        finally:
            window.stop()
        if failure is not None:
            raise torch.OutOfMemoryError(failure.message)

    def _add_coupled(self, coupled: Coupled, cut: Cut, sums: GradientSums, scale: float) -> int:
        """Add the gradient of a loss that couples samples to sums; return the number of samples."""
        split, passes = self.split(cut), TwoPasses(self.model, coupled)
        self._encode(coupled, split, passes)
        backward_with_leaves(passes.loss_sum(coupled) * scale, sums, passes.leaves)
        passes.keep_gradients()
        for part in passes.parts:
            loss_sum, _ = passes.linear_loss(coupled, part.rows, split.take, part.state)
            if loss_sum.requires_grad:
                sums.backward(loss_sum)
            self._reset_state()
        num_samples = passes.num_samples
        passes.end()
        return num_samples

    def _encode(self, coupled: Coupled, split: Split, passes: TwoPasses) -> None:
        for rows in split.groups:
            passes.encode(coupled, rows, split.take)
            self._reset_state()

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

    def terms(self, cut: Cut, *, seed: int = 0) -> list[TermValues]:
        """Compute ``(loss_sum, items)`` of each term in each micro-batch, without gradients."""
        self._start(seed)
        values: list[TermValues] = []
        with torch.no_grad(), ActivationHooks():
            if isinstance(self.loss_fn, Coupled):
                return self._terms_of_coupled(self.loss_fn, cut)
            split = self.split(cut)

            def run(rows: Sequence[int]) -> None:
                terms = as_terms(self.loss_fn(self.model, split.take(rows)))
                values.append({name: _numbers(loss, items) for name, (loss, items) in terms.items()})
                self._reset_state()

            if self.batch_norm is not None and len(split) > 1:
                self._run_jointly(partial(run, rows) for rows in split.groups)
                return values
            for rows in split.groups:
                run(rows)
        return values

    def _terms_of_coupled(self, coupled: Coupled, cut: Cut) -> list[TermValues]:
        """Return the loss of the whole batch, in parts by their samples."""
        split, passes = self.split(cut), TwoPasses(self.model, coupled)
        self._encode(coupled, split, passes)
        total, num_samples = float(passes.loss_sum(coupled)), passes.num_samples
        return [{SINGLE: (total * len(rows) / num_samples, len(rows))} for rows in split.groups]

    def _reset_state(self) -> None:
        if self.reset is not None:
            self.reset()


def _numbers(loss_sum: Tensor, items: Items) -> tuple[float, float]:
    loss, count = float(loss_sum), float(items)
    return loss if count or math.isfinite(loss) else 0.0, count  # 0/0, a mean over nothing, adds nothing


def largest_that_fits(cut_gradients: CutGradients, run: Callable[[int], Result]) -> tuple[int, Result]:
    """Run a function with the whole batch as one micro-batch, or halves of it until it fits in memory."""
    size = cut_gradients.samples.num_samples
    while True:
        try:
            return size, run(size)
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # Outside the except block, whose traceback references tensors.
        size = -(-size // 2)
        free_cached_memory()


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
def narrowest_dtype(model: nn.Module, outside: Iterable[Tensor] = ()) -> Iterator[list[torch.dtype]]:
    """Yield a list whose last element is the narrowest floating dtype of parameters and module outputs so far."""
    parameters = [*model.parameters(), *outside]
    inexact = {_real(p.dtype) for p in parameters if p.is_floating_point() or p.is_complex()}
    narrowest = [max(inexact, key=_epsilon, default=torch.float64)]

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
