"""Metrics of the samples of a window, each counted once, however the window was cut or retried.

micro-batch → (index of each sample, values) → the last values of each sample → sums over the ranks → means
"""

import torch
from torch import Tensor

from bigbatch.distributed.gradient_sync import GradientSync
from bigbatch.lm.data.pair_batches import NO_INDEX
from bigbatch.trials.trial import is_trial


class PairMetrics:
    """Values of samples, recorded by a loss function and read once for each window.

        metrics.clear()
        engine.step(samples)             # the loss function calls metrics.record(index, accuracy=..., margin=...)
        metrics.means(engine.sync)       # {"accuracy": 0.75, "margin": 0.1}

    A micro-batch that ran out of memory and is run again replaces what it recorded. Trials record nothing.

    Args:
        names: Of the values.
    """

    def __init__(self, *names: str) -> None:
        self._names = names
        self._parts: list[tuple[Tensor, Tensor]] = []

    def clear(self) -> None:
        """Forget what was recorded."""
        self._parts = []

    def record(self, index: Tensor, **values: Tensor) -> None:
        """Keep values of the samples of a micro-batch; does not wait for the device.

        Args:
            index: int64 ``[samples]``; those below 0 do not count.
            values: ``[samples]`` each.
        """
        if not is_trial():
            columns = [values[name].detach().to(torch.float32) for name in self._names]
            self._parts.append((index.detach(), torch.stack(columns, dim=1)))

    def discard_last(self) -> None:
        """Forget what was recorded last: of a micro-batch that does not count."""
        self._parts = self._parts[:-1]

    def means(self, sync: GradientSync) -> dict[str, float]:
        """Return the mean of each value over the samples of all ranks since `clear`. Collective.

        Empty without any sample. Waits for the device.
        """
        latest: dict[int, list[float]] = {}
        for index, columns in self._parts:
            latest.update(zip(index.tolist(), columns.tolist(), strict=True))
        latest.pop(NO_INDEX, None)
        self.clear()
        sums = [float(sum(column)) for column in zip(*latest.values(), strict=True)] or [0.0] * len(self._names)
        number, *totals = (sum(column) for column in zip(*sync.all_gather([len(latest), *sums]), strict=True))
        return {name: total / number for name, total in zip(self._names, totals, strict=True)} if number else {}
