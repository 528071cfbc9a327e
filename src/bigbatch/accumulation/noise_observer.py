"""Measure the gradient noise scale while windows run, without a part in the update.

attach to a window's sums → squared norm of some micro-batch gradients → scalars, read with the norm → estimate
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bigbatch.distributed.collective import Number
from bigbatch.distributed.window_vote import NO_EXTRA
from bigbatch.gradients.gradient_hooks import GradientHooks
from bigbatch.gradients.gradient_sums import GradientSums
from bigbatch.gradients.loss_totals import LossTotals
from bigbatch.scaling.noise_scale import NoiseScale, NoiseScaleEstimator
from bigbatch.types import Items

NO_HOOKS: AbstractContextManager[None] = nullcontext()


class NoiseObserver:
    """Observes backwards of windows and updates a noise scale estimate after each window, see `bigbatch.NoiseScale`.

    The gradients of a measured micro-batch are read once, before they are added to their sums; nothing is stored, and
    nothing waits for the device. Parameters have hooks in the backwards of measured micro-batches only.

    Attributes:
        estimator: Averages over windows.
    """

    def __init__(self) -> None:
        self.estimator = NoiseScaleEstimator()
        self._measures_every_window = self._measures_whole_windows = False
        self._squared_norm_sum: Tensor | None = None  # stays in place: captured CUDA graphs add to it
        self._norms: list[Tensor] = []
        self._is_measuring = False
        self._positions: Sequence[int] = ()  # of the measured micro-batches; empty for all
        self._parameters: Sequence[Tensor] = ()
        self._last_num_microbatches = 0
        self._samples = 0.0

    def measure_every_window(self) -> None:
        """Measure all micro-batches of all windows: a captured CUDA graph contains the measurement, or never does."""
        self._measures_every_window = self._measures_whole_windows = True

    def measure_whole_windows(self) -> None:
        """Measure all micro-batches of a measured window: their CUDA graphs are others than those of other windows."""
        self._measures_whole_windows = True

    def attach(self, sums: GradientSums, microbatches: Iterable[Any], *, samples: int | None) -> None:
        """Start a window: observe its sums, unless this window is not to be measured.

        Args:
            sums: Of the parameters, on one device.
            microbatches: Of the window on this rank. If they are drawn lazily, as many as in the last window are
                expected.
            samples: Of the window on this rank; None if unknown.
        """
        self.skip_window()
        if not (self._measures_every_window or self.estimator.measures_next):
            return
        dtypes = {parameter.dtype for parameter in sums.parameters}
        device = sums.parameters[0].device
        dtype = torch.float64 if dtypes & {torch.float64, torch.complex128} else torch.float32
        total = self._squared_norm_sum
        if total is None or total.device != device or total.dtype != dtype:  # the model may have been converted
            total = self._squared_norm_sum = torch.zeros((), dtype=dtype, device=device)
        total.zero_()
        self._is_measuring, self._samples = True, float(samples or 0)
        if self._measures_whole_windows:
            sums.observe(self)
            return
        self._parameters = sums.parameters
        expected = len(microbatches) if isinstance(microbatches, Sequence) else self._last_num_microbatches
        self._positions = () if self.estimator.measures_all else self.estimator.positions(expected)

    @property
    def is_measuring(self) -> bool:
        """Whether the current window is measured."""
        return self._is_measuring

    def skip_window(self) -> None:
        """Do not measure the current window."""
        self._is_measuring = False
        self._positions, self._parameters = (), ()
        self._norms.clear()

    def microbatch(self, number: int) -> AbstractContextManager[None]:
        """Return the context for the backward of a micro-batch, by its number in the window, from 1."""
        if not self._parameters or (self._positions and number - 1 not in self._positions):
            return NO_HOOKS
        return self._measured()

    @contextmanager
    def _measured(self) -> Iterator[None]:
        hooks, succeeded = GradientHooks(self._parameters, self.on_gradient), False
        try:
            yield
            succeeded = True
        finally:
            hooks.remove()
            self.on_backward_end(succeeded=succeeded)

    def on_gradient(self, gradient: Tensor) -> None:
        """Compute the norm of one parameter's micro-batch gradient."""
        values = gradient.coalesce()._values() if gradient.is_sparse else gradient
        assert self._squared_norm_sum is not None, "only attached windows are observed"
        real = torch.view_as_real(values) if values.is_complex() else values
        dtype = self._squared_norm_sum.dtype
        wide = real if real.dtype.itemsize <= dtype.itemsize else real.to(dtype)  # converted within the window
        self._norms.append(torch.linalg.vector_norm(wide, dtype=dtype))

    def on_backward_end(self, *, succeeded: bool) -> None:
        """Add the squared norm of the whole micro-batch gradient."""
        if succeeded and self._squared_norm_sum is not None and self._norms:
            self._squared_norm_sum.add_(torch.stack(self._norms).square().sum())
        self._norms.clear()

    def scalars(self, sums: GradientSums, loss_totals: LossTotals, *, retries: int) -> tuple[Number, Number, Number]:
        """Return Σ |S_i|², Σ n_i² and the samples of this rank, on their devices; NaN if not measured.

        Args:
            sums: Of the window.
            loss_totals: Of the window.
            retries: Attempts that ran out of memory: what they added to the norms cannot be removed.
        """
        self._last_num_microbatches = loss_totals.num_recorded
        if not self._is_measuring or self._squared_norm_sum is None:
            return NO_EXTRA
        if retries or not sums.can_name_leaves:
            return math.nan, 0.0, self._samples
        items = [_as_float(count) for count in loss_totals.microbatch_items()]
        squares = [count * count for count in items]
        return self._total_of_squared_norms(self._squared_norm_sum, items, squares), sum(squares), self._samples

    def _total_of_squared_norms(self, measured: Tensor, items: list[Number], squares: list[Number]) -> Number:
        """Estimate Σ |S_i|² over all micro-batches of this rank from those that were measured."""
        if not self._positions or not items:
            return measured
        positions = [position for position in self._positions if position < len(items)]
        if not positions:
            return math.nan  # the window was shorter than expected
        weight = len(items) / len(positions)
        signal, noise = self.estimator.averages()
        expected = noise * (sum(items) - weight * sum(items[position] for position in positions))
        expected += signal * (sum(squares) - weight * sum(squares[position] for position in positions))
        return weight * measured + expected

    def finish(
        self, scalars: Iterable[Iterable[float]], *, grad_norm: float, items: float, skipped: bool
    ) -> NoiseScale | None:
        """End a window; return the estimate so far.

        Args:
            scalars: Those of every rank, read from their devices.
            grad_norm: 2-norm of the divided gradient, before clipping.
            items: Global items of the window.
            skipped: Whether the window was not applied.
        """
        if skipped or not self._is_measuring:
            self.estimator.skip_window(items)
        else:
            squared_norms, squared_items, samples = (sum(column) for column in zip(*scalars, strict=True))
            self.estimator.update(grad_norm**2, squared_norms, items, squared_items, samples=samples)
        self.skip_window()
        return self.estimator.estimate()

    def state_dict(self) -> dict[str, float]:
        """Return the averages as plain values."""
        return self.estimator.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the averages of `state_dict`.

        Raises:
            ValueError: They are not averages of such an observer; nothing is changed then.
        """
        self.estimator.load_state_dict(state)


def _as_float(count: Items) -> Number:
    return count.reshape(()).double() if isinstance(count, Tensor) else float(count)
