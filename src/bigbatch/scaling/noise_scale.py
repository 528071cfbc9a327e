"""The gradient noise scale, from the micro-batches of every window: how large a batch is still worth its samples.

norms of the micro-gradients → signal and noise of one window → averaged over windows → scale, with an interval

With S_i the summed gradient of micro-batch i and n_i its items, A = Σ S_i and N = Σ n_i, two sums tell the squared
length of the true gradient, |G|², and the variance of one item's gradient, tr Σ:

    |G|² = (|A|² − Σ |S_i|²) / (N² − Σ n_i²)        tr Σ = N (|A|² / N² − |G|²)        scale = tr Σ / |G|²

Both are unbiased for micro-batches of any sizes, if items are drawn alike. Source: McCandlish et al., "An Empirical
Model of Large-Batch Training", 2018, appendix A.1, which compares two sizes; here each micro-batch counts by its items.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

HALF_LIFE_WINDOWS = 32  # of the average, counted in the items of the first window
MIN_WINDOWS = 4  # before anything is said
FIRST, EVERY = 8, 4  # the first eight windows are measured, then one in four: the average moves no faster
WIDTH = 1.96  # standard errors on either side: 95 % where many windows have been averaged


@dataclass(frozen=True)
class NoiseScale:
    """What is known of the gradient noise by now.

    Attributes:
        scale_items: The noise scale tr Σ / |G|², in items, as averaged so far: a batch far below it wastes updates, one
            far above it wastes samples. Infinite where no signal can be told from the noise.
        low_items: Lower end of its 95 % interval.
        high_items: Upper end; infinite where the signal may be zero.
        signal: |G|², the squared 2-norm of the true gradient.
        noise: tr Σ, the variance of the gradient of one item, summed over all parameters.
        num_windows: Windows that were averaged.
        items_per_sample: Of the batch, where `bigbatch.Engine` counts its samples; None elsewhere.
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
        """The noise scale in samples of the batch, where they are counted."""
        return None if self.items_per_sample is None else self.scale_items / self.items_per_sample


@dataclass
class _Averages:
    """Weighted sums over windows: of the weights and their squares, of signal and noise, and of their products."""

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


def signal_and_noise(
    square_of_mean: float, squares: float, items: float, items_squared: float
) -> tuple[float, float] | None:
    """Estimate signal and noise from one window, without bias.

    Args:
        square_of_mean: |A|² / N², of the window's gradient, before clipping.
        squares: Σ |S_i|².
        items: N.
        items_squared: Σ n_i².

    Returns:
        ``(|G|², tr Σ)``; None where there is nothing to compare: fewer than two micro-batches with items.
    """
    pairs = items * items - items_squared
    if not pairs > 0 or not math.isfinite(square_of_mean) or not math.isfinite(squares):
        return None
    signal = (square_of_mean * items * items - squares) / pairs
    return signal, items * (square_of_mean - signal)


class NoiseScaleEstimator:
    """Averages signal and noise over windows, each apart: the ratio of the averages is the scale.

    A window's own ratio would be biased, and is often negative. Weights halve with every so many items.

    Args:
        half_life_items: Items after which a window counts half; by default 32 times those of the first window.
    """

    def __init__(self, half_life_items: float | None = None) -> None:
        self._half_life_items = half_life_items
        self._sums = _Averages()

    @property
    def measures_next(self) -> bool:
        """Whether the next window is to be measured."""
        return self._sums.num_seen < FIRST or self._sums.num_seen % EVERY == 0

    def skip_window(self, items: float) -> None:
        """Take note of a window that was not measured: what came before it counts less."""
        self._sums.num_seen += 1
        self._sums.items_unmeasured += items

    def update(
        self, square_of_mean: float, squares: float, items: float, items_squared: float, *, samples: float = 0.0
    ) -> None:
        """Take in one window; the arguments are those of `signal_and_noise`, and samples where they are known."""
        found = signal_and_noise(square_of_mean, squares, items, items_squared)
        if found is None:
            self.skip_window(items)
            return
        sums = self._sums
        sums.num_seen += 1
        if not sums.half_life_items:
            sums.half_life_items = self._half_life_items or HALF_LIFE_WINDOWS * items
        keep = 0.5 ** ((items + sums.items_unmeasured) / sums.half_life_items)
        sums.items_unmeasured = 0.0
        signal, noise = found
        sums.weight = keep * sums.weight + items
        sums.weight_squared = keep * keep * sums.weight_squared + items * items
        sums.signal = keep * sums.signal + items * signal
        sums.noise = keep * sums.noise + items * noise
        sums.signal_squared = keep * sums.signal_squared + items * signal * signal
        sums.noise_squared = keep * sums.noise_squared + items * noise * noise
        sums.product = keep * sums.product + items * signal * noise
        sums.items = keep * sums.items + items
        sums.samples = keep * sums.samples + samples
        sums.num_windows += 1

    def estimate(self) -> NoiseScale | None:
        """Give what is known; None before the fourth window."""
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
        """Bound the ratio of two averages by their scatter over the windows: Fieller's theorem."""
        sums = self._sums
        share = sums.weight_squared / (sums.weight * sums.weight)  # one over the number of windows that count
        scatter = share / (1 - share) if share < 1 else math.inf
        variance_signal = max(0.0, sums.signal_squared / sums.weight - signal * signal) * scatter
        variance_noise = max(0.0, sums.noise_squared / sums.weight - noise * noise) * scatter
        covariance = (sums.product / sums.weight - signal * noise) * scatter
        a = signal * signal - WIDTH * WIDTH * variance_signal
        b = signal * noise - WIDTH * WIDTH * covariance
        c = noise * noise - WIDTH * WIDTH * variance_noise
        root = b * b - a * c
        if not math.isfinite(root):
            return 0.0, math.inf
        if a <= 0 or signal <= 0:  # the signal may be zero, and the ratio anything above what follows
            low = c / (b + math.sqrt(root)) if root >= 0 and b + math.sqrt(max(0.0, root)) > 0 else 0.0
            return max(0.0, low), math.inf
        half = math.sqrt(max(0.0, root))
        return max(0.0, (b - half) / a), max(0.0, (b + half) / a)

    def state_dict(self) -> dict[str, float]:
        """Give what it has taken in, as plain values."""
        return asdict(self._sums)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from what `state` gave."""
        self._sums = _Averages(**state)  # type: ignore[arg-type]
