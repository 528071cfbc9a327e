"""The gradient noise scale, estimated from the micro-batch gradients of every window.

    norms of micro-batch gradients → signal and noise of one window → averages over windows → scale, with an interval

With S_i the summed gradient of micro-batch i over its n_i items, A = Σ S_i and N = Σ n_i (over all ranks), the squared
norm |G|² of the true gradient and the variance tr Σ of the gradient of one item (the trace of its covariance) are
estimated by

    |G|² = (|A|² − Σ |S_i|²) / (N² − Σ n_i²)        tr Σ = N (|A|² / N² − |G|²)        scale = tr Σ / |G|²

Both estimates are unbiased for micro-batches of any sizes if items are independent and identically distributed:
E|S_i|² = n_i² |G|² + n_i tr Σ and E|A|² = N² |G|² + N tr Σ. For micro-batches of equal size they are those of
McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, arXiv 1812.06162, appendix A.1, which compares a
large and a small batch; the scale is their B_simple. Items of one sample, such as the tokens of a sequence, are
correlated: tr Σ is then the variance per item at the given lengths, and ``scale_samples`` the more meaningful unit.
Micro-batches grouped by length underestimate |G|² if the mean gradient depends on the length.

After the first windows, Σ |S_i|² is estimated from m of the M micro-batches of a window, at evenly spaced positions
that start elsewhere in each window: with the averages so far, E_i = n_i² |G|² + n_i tr Σ,

    Σ |S_i|² ≈ Σ_i E_i + M / m · Σ_measured (|S_i|² − E_i)

It is unbiased whatever E_i is, also if the variance differs between micro-batches, such as those of long and of short
sequences; E_i only removes the variance that is due to their sizes (a difference estimator, Cochran, "Sampling
Techniques", 1977, section 7.1). The norm of the first micro-batch alone would cost less, and be biased by their order.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

HALF_LIFE_WINDOWS = 32  # default half-life of the averages, in windows with the items of the first one
MIN_WINDOWS = 4  # before an estimate is reported
MEASURE_FIRST = 8  # windows whose micro-batches are all measured
MEASURE_EVERY = 8  # afterwards one window in 8: sufficient for averages of this half-life
NUM_MEASURED = 2  # micro-batches of such a window
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, fill [0, 1) evenly
Z_95 = 1.96  # standard errors of a 95 % interval, for many windows


@dataclass(frozen=True)
class NoiseScale:
    """Estimate of the gradient noise scale tr Σ / |G|², from running averages over windows and all ranks.

    The scale approximates the critical batch size (McCandlish et al., "An Empirical Model of Large-Batch Training",
    2018, arXiv 1812.06162, B_simple of section 2.2, estimated as in appendix A.1): a global batch of that size needs
    about twice the minimum number of updates and twice the minimum number of samples. Far smaller batches need more
    updates, far larger ones more samples.

    Attributes:
        scale_items: The noise scale in items of the global batch; infinity if the estimate of |G|² is not positive.
        low_items: Lower bound of its 95 % interval, in items.
        high_items: Upper bound, in items; infinity if |G|² may be zero.
        signal: Estimate of |G|², the squared 2-norm of the true gradient of the mean loss.
        noise: Estimate of tr Σ, the variance of the gradient of one item, summed over all parameters.
        num_windows: Windows that were averaged.
        items_per_sample: Mean items per sample, if `bigbatch.Engine` counts samples; None otherwise.
    """

    scale_items: float
    low_items: float
    high_items: float
    signal: float
    noise: float
    num_windows: int
    items_per_sample: float | None = None

    @property
    def scale_samples(self) -> float | None:
        """The noise scale in samples of the global batch; None if samples are not counted."""
        return None if self.items_per_sample is None else self.scale_items / self.items_per_sample


@dataclass
class _Averages:
    """Weighted sums over windows of signal, noise and their products; the fields are keys of checkpoints."""

    weight: float = 0.0
    weight_squared: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    signal_squared: float = 0.0
    noise_squared: float = 0.0
    product: float = 0.0
    num_windows: int = 0
    half_life_items: float = 0.0
    items: float = 0.0
    samples: float = 0.0
    num_seen: int = 0
    items_unmeasured: float = 0.0


_NEW_AVERAGES = frozenset({"num_seen", "items_unmeasured"})  # that states of bigbatch 0.1.0 lack
_SIGNED_AVERAGES = frozenset({"signal", "noise", "signal_squared", "noise_squared", "product"})  # or not finite


def signal_and_noise(
    squared_grad_norm: float, squared_norm_sum: float, items: float, squared_items_sum: float
) -> tuple[float, float] | None:
    """Estimate signal and noise from one window, without bias.

    Args:
        squared_grad_norm: |A|² / N², the squared norm of the averaged gradient, over all ranks, before clipping.
        squared_norm_sum: Σ |S_i|², over the micro-batches of all ranks.
        items: N, over all ranks.
        squared_items_sum: Σ n_i², over the micro-batches of all ranks.

    Returns:
        ``(|G|², tr Σ)``, either of which may be negative; None with fewer than two micro-batches with items, or norms
        that are not finite.
    """
    divisor = items * items - squared_items_sum  # Σ n_i n_j over pairs i ≠ j
    if not divisor > 0 or not math.isfinite(squared_grad_norm) or not math.isfinite(squared_norm_sum):
        return None
    signal = (squared_grad_norm * items * items - squared_norm_sum) / divisor
    return signal, items * (squared_grad_norm - signal)


class NoiseScaleEstimator:
    """Exponential moving averages of signal and noise over windows; the noise scale is the ratio of the averages.

    The ratio of a single window is biased and often negative. A window is weighted by its items, and its weight halves
    every ``half_life_items`` items.

    Args:
        half_life_items: Half-life of the averages in items of the global batch; by default 32 times those of the first
            window.
    """

    def __init__(self, half_life_items: float | None = None) -> None:
        self._half_life_items = half_life_items
        self._sums = _Averages()
        self._estimate: tuple[int, NoiseScale | None] = (0, None)  # of so many measured windows

    @property
    def measures_next(self) -> bool:
        """Whether the next window should be measured: the first 8 and then one in 8."""
        return self._sums.num_seen < MEASURE_FIRST or self._sums.num_seen % MEASURE_EVERY == 0

    @property
    def measures_all(self) -> bool:
        """Whether all micro-batches of the next window should be measured: in the first 8 windows."""
        return self._sums.num_seen < MEASURE_FIRST

    def positions(self, num_microbatches: int) -> tuple[int, ...]:
        """Return which micro-batches of the next window should be measured: 2 that are half a window apart."""
        count = min(NUM_MEASURED, num_microbatches)
        start = self._sums.num_seen // MEASURE_EVERY * GOLDEN_RATIO % 1
        return tuple(int((start + part) * num_microbatches / count) for part in range(count))

    def averages(self) -> tuple[float, float]:
        """Return the averages of |G|² and tr Σ so far; zeros before the first measured window."""
        sums = self._sums
        return (sums.signal / sums.weight, sums.noise / sums.weight) if sums.weight else (0.0, 0.0)

    def skip_window(self, items: float) -> None:
        """Count a window that was not measured: its items reduce the weight of earlier windows."""
        self._sums.num_seen += 1
        self._sums.items_unmeasured += items

    def update(
        self,
        squared_grad_norm: float,
        squared_norm_sum: float,
        items: float,
        squared_items_sum: float,
        *,
        samples: float = 0.0,
    ) -> None:
        """Add one window to the averages; a window that cannot be measured is skipped.

        Args:
            squared_grad_norm: As for `signal_and_noise`.
            squared_norm_sum: As for `signal_and_noise`.
            items: As for `signal_and_noise`.
            squared_items_sum: As for `signal_and_noise`.
            samples: Samples of the window, over all ranks; 0 if unknown.
        """
        estimates = signal_and_noise(squared_grad_norm, squared_norm_sum, items, squared_items_sum)
        if estimates is None:
            self.skip_window(items)
            return
        sums = self._sums
        sums.num_seen += 1
        if not sums.half_life_items:
            sums.half_life_items = self._half_life_items or HALF_LIFE_WINDOWS * items
        decay = 0.5 ** ((items + sums.items_unmeasured) / sums.half_life_items)
        sums.items_unmeasured = 0.0
        signal, noise = estimates
        sums.weight = decay * sums.weight + items
        sums.weight_squared = decay * decay * sums.weight_squared + items * items
        sums.signal = decay * sums.signal + items * signal
        sums.noise = decay * sums.noise + items * noise
        sums.signal_squared = decay * sums.signal_squared + items * signal * signal
        sums.noise_squared = decay * sums.noise_squared + items * noise * noise
        sums.product = decay * sums.product + items * signal * noise
        sums.items = decay * sums.items + items
        sums.samples = decay * sums.samples + samples
        sums.num_windows += 1

    def estimate(self) -> NoiseScale | None:
        """Return the current estimate; None before 4 windows were measured."""
        if self._estimate[0] != self._sums.num_windows:
            self._estimate = self._sums.num_windows, self._compute_estimate()
        return self._estimate[1]

    def _compute_estimate(self) -> NoiseScale | None:
        sums = self._sums
        if sums.num_windows < MIN_WINDOWS:
            return None
        signal, noise = sums.signal / sums.weight, sums.noise / sums.weight
        scale = noise / signal if signal > 0 else math.inf
        low, high = self._interval(signal, noise)
        per_sample = sums.items / sums.samples if sums.samples else None
        return NoiseScale(
            scale_items=max(0.0, scale),
            low_items=low,
            high_items=high,
            signal=signal,
            noise=noise,
            num_windows=sums.num_windows,
            items_per_sample=per_sample,
        )

    def _interval(self, signal: float, noise: float) -> tuple[float, float]:
        """Return the 95 % interval of the ratio of the averages, from their variance over windows (Fieller's theorem).

        Fieller, "Some Problems in Interval Estimation", 1954.
        """
        sums = self._sums
        share = sums.weight_squared / (sums.weight * sums.weight)  # 1 / effective number of windows
        correction = share / (1 - share) if share < 1 else math.inf  # variance over windows → variance of their mean
        variance_signal = max(0.0, sums.signal_squared / sums.weight - signal * signal) * correction
        variance_noise = max(0.0, sums.noise_squared / sums.weight - noise * noise) * correction
        covariance = (sums.product / sums.weight - signal * noise) * correction
        a = signal * signal - Z_95 * Z_95 * variance_signal
        b = signal * noise - Z_95 * Z_95 * covariance
        c = noise * noise - Z_95 * Z_95 * variance_noise
        discriminant = b * b - a * c  # the bounds are the roots of a x² − 2 b x + c
        if not math.isfinite(discriminant):
            return 0.0, math.inf
        root = math.sqrt(max(0.0, discriminant))
        if a <= 0 or signal <= 0:  # the signal may be zero: the ratio has no upper bound
            low = c / (b + root) if discriminant >= 0 and b + root > 0 else 0.0
            return max(0.0, low), math.inf
        return max(0.0, (b - root) / a), max(0.0, (b + root) / a)

    def state_dict(self) -> dict[str, float]:
        """Return the averages as plain values."""
        return asdict(self._sums)

    @staticmethod
    def check_state_dict(state: object) -> None:
        """Check that `load_state_dict` accepts averages.

        Args:
            state: As returned by `state_dict`; those of bigbatch 0.1.0 lack ``num_seen`` and ``items_unmeasured``.

        Raises:
            ValueError: A name is missing or unknown, or a value is not a number, or cannot be one of such an average.
        """
        names = {field.name for field in fields(_Averages)}
        if not isinstance(state, Mapping):
            raise ValueError(f"the noise averages are {state!r:.40}, not a dictionary: use those of state_dict().")
        if wrong := (names - _NEW_AVERAGES - state.keys()) | {str(name) for name in state if name not in names}:
            raise ValueError(
                f"the noise averages lack or have in addition {', '.join(sorted(wrong))}: use those of state_dict()."
            )
        for name, value in state.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            is_valid = is_number and (name in _SIGNED_AVERAGES or 0 <= value < math.inf)
            is_valid = is_valid and not (name.endswith("_squared") and value < 0)
            if not is_valid or (name.startswith("num_") and not isinstance(value, int)):
                raise ValueError(f"the noise average {name} cannot be {value!r:.40}: use those of state_dict().")
        if state["num_windows"] and not (state["weight"] and state["half_life_items"]):
            raise ValueError(
                f"the noise averages are of {state['num_windows']} windows without weight: use those of state_dict()."
            )

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the averages from `state_dict`.

        Raises:
            ValueError: As for `check_state_dict`; nothing is changed then.
        """
        self.check_state_dict(state)
        self._sums = _Averages(**state)  # type: ignore[arg-type]
        self._estimate = (0, None)
