"""Count, mean and squared deviations of channels, combined over micro-batches and ranks, and what follows from them.

mean = Σ n_i mean_i / n        squares = Σ squares_i + n_i (mean_i − mean)²        (Chan, Golub and LeVeque, 1979)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Statistics of some values of each channel, in float32 or wider.

    Attributes:
        count: Values of each channel.
        values: ``[2, channels]``: their mean, and the sum of squared deviations from it.
    """

    count: int
    values: Tensor

    @classmethod
    def of(cls, inputs: Tensor) -> "Moments":
        """Return those of inputs ``[samples, channels, ...]``."""
        count = inputs.numel() // inputs.shape[1] if inputs.shape[1] else 0
        wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        if not count:
            return cls(0, wide.new_zeros(2, inputs.shape[1]))
        mean = wide.mean(reduced(inputs))  # two passes: torch.var_mean takes ten times as long over channels on the CPU
        squares = (wide - along_channels(mean, inputs)).square_().sum(reduced(inputs))
        return cls(count, torch.stack([mean, squares]))

    @classmethod
    def combined(cls, parts: Sequence["Moments"]) -> "Moments":
        """Return those of all values; the order of the parts changes rounding only."""
        count = sum(part.count for part in parts)
        if len(parts) == 1 or not count:
            return parts[0]
        means, squares = torch.stack([part.values for part in parts], dim=1)
        weights = means.new_tensor([part.count for part in parts])[:, None]
        mean = (weights * means).sum(0) / count
        return cls(count, torch.stack([mean, (squares + weights * (means - mean) ** 2).sum(0)]))

    @property
    def mean(self) -> Tensor:
        """Mean of each channel."""
        return self.values[0]

    @property
    def variance(self) -> Tensor:
        """Variance of each channel, divided by the count."""
        return self.values[1] / self.count

    def update(self, running: Tensor | None, running_variance: Tensor | None, momentum: float) -> None:
        """Move running statistics towards these by a factor, the variance divided by one less than the count."""
        unbiased = self.values[1] / max(self.count - 1, 1)
        for old, new in ((running, self.mean), (running_variance, unbiased)):
            if old is not None:
                old.copy_((1 - momentum) * old.to(new.dtype) + momentum * new)


def reduced(inputs: Tensor) -> list[int]:
    """Return the dimensions that statistics of channels run over."""
    return [0, *range(2, inputs.ndim)]


def along_channels(values: Tensor, inputs: Tensor) -> Tensor:
    """Return values of channels in a shape that broadcasts against inputs."""
    return values.view([1, -1, *[1] * (inputs.ndim - 2)])
