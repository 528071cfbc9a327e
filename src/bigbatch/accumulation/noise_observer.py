"""Measure the gradient noise scale while windows run, without a part in the update.

attach to a window's sums → squared norm of each micro-batch gradient → scalars, read with the norm → estimate
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bigbatch.distributed.collective import Number
from bigbatch.distributed.window_vote import NO_EXTRA
from bigbatch.gradients.gradient_sums import HALF_PRECISION_DTYPES, GradientSums
from bigbatch.gradients.loss_totals import LossTotals
from bigbatch.scaling.noise_scale import NoiseScale, NoiseScaleEstimator


class NoiseObserver:
    """Observes the backwards of windows and updates a noise scale estimate after each, see `bigbatch.NoiseScale`.

    Each gradient is read once, before it is added to its sum; nothing is stored, and nothing waits for the device.

    Attributes:
        estimator: Averages over windows.
    """

    def __init__(self) -> None:
        self.estimator = NoiseScaleEstimator()
        self._measures_every_window = False
        self._squared_norm_sum: Tensor | None = None  # stays in place: captured CUDA graphs add to it
        self._norms: list[Tensor] = []
        self._is_measuring = False
        self._samples = 0.0

    def measure_every_window(self) -> None:
        """Measure all windows: a captured CUDA graph contains the measurement, or never does."""
        self._measures_every_window = True

    def attach(self, sums: GradientSums, *, samples: int | None) -> None:
        """Start a window: observe its sums, unless this window is not to be measured.

        Args:
            sums: Of the parameters, on one device.
            samples: Of the window on this rank; None if unknown.
        """
        self.skip_window()
        if not (self._measures_every_window or self.estimator.measures_next):
            return
        dtypes = {parameter.dtype for parameter in sums.parameters}
        device = sums.parameters[0].device
        if self._squared_norm_sum is None or self._squared_norm_sum.device != device:
            dtype = torch.float64 if torch.float64 in dtypes else torch.float32
            self._squared_norm_sum = torch.zeros((), dtype=dtype, device=device)
        self._squared_norm_sum.zero_()
        self._is_measuring, self._samples = True, float(samples or 0)
        sums.observe(self)

    def skip_window(self) -> None:
        """Do not measure the current window."""
        self._is_measuring = False
        self._norms.clear()

    def on_gradient(self, gradient: Tensor) -> None:
        """Compute the norm of one parameter's micro-batch gradient."""
        values = gradient.coalesce()._values() if gradient.is_sparse else gradient
        dtype = torch.float32 if values.dtype in HALF_PRECISION_DTYPES else values.dtype
        norm = torch.linalg.vector_norm(values, dtype=dtype)
        self._norms.append(norm if self._squared_norm_sum is None else norm.to(self._squared_norm_sum))

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
        if not self._is_measuring or self._squared_norm_sum is None:
            return NO_EXTRA
        if retries or not sums.can_name_leaves:
            return math.nan, 0.0, self._samples
        return self._squared_norm_sum, loss_totals.items_squared(), self._samples

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
