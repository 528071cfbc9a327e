"""Report of one window: a frozen record whose device values are read on access only."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from bigbatch.scaling.noise_scale import NoiseScale


@dataclass(frozen=True)
class TermReport:
    """One term of the loss in a window, over all ranks.

    Attributes:
        loss: Sum of the item losses divided by ``items``; NaN if there are none.
        items: Items of the term in the window, over all ranks.
    """

    loss: float
    items: float


@dataclass(frozen=True)
class RanksReport:
    """Statistics of the data-parallel ranks in a window; identical on all ranks.

    Attributes:
        size: Number of ranks that hold different data.
        num_microbatches: Micro-batches of each rank, by rank.
        slowest: The rank that took the longest time t until its gradient was ready.
        slowest_share: ``1 − mean(t) / max(t)`` over the ranks, the mean waiting time as a fraction of the slowest
            rank's time; 0 if all are equally fast.
        stopping: Whether any rank has requested a stop after this update.
        overlapped: Whether gradients were reduced while the last backward ran, see `bigbatch.Replicated`.
    """

    size: int
    num_microbatches: tuple[int, ...]
    slowest: int
    slowest_share: float
    stopping: bool = False
    overlapped: bool = False


@dataclass(frozen=True)
class WindowReport:
    """Report of one window: counts, gradient norm, memory, time and, on access, losses.

    Attributes:
        step: Optimizer updates so far, this one included. Windows that are skipped, or end with `finish`, do not count.
        items: Items of the window, over all ranks; with several terms, those of the first (see ``terms``).
        grad_norm: 2-norm of the averaged gradient, over all ranks and parameters, before clipping; NaN for a window
            without items.
        num_microbatches: Micro-batches of this rank in this window.
        tokens: Tokens of the window without padding, over all ranks; None without ``Engine(lengths=...)``.
        peak_bytes: Peak memory of the process so far, in bytes: allocated by torch on the CUDA device, or the resident
            set on the CPU. The maximum over ranks; None if the platform does not report it.
        elapsed_s: Host time from the start of the window to the end of the update, in seconds.
        syncs: Number of gradient synchronizations over ranks; 0 in a single process.
        skipped: Why no update was applied ("no items", "non-finite gradient"); None if it was.
        retries: Micro-batch attempts of this rank that ran out of memory and were retried in smaller pieces.
        ranks: Statistics of the ranks; None in a single process.
        noise: The gradient noise scale, averaged so far; None if it is not measured or too few windows were.
    """

    step: int
    items: float
    grad_norm: float
    num_microbatches: int
    tokens: int | None
    peak_bytes: int | None
    elapsed_s: float
    syncs: int = 0
    skipped: str | None = None
    retries: int = 0
    ranks: RanksReport | None = None
    noise: NoiseScale | None = None
    _read_terms: Callable[[], dict[str, TermReport]] = field(default=dict, repr=False, compare=False)

    @property
    def terms(self) -> dict[str, TermReport]:
        """The terms of the loss, by name. Waits for the device."""
        return self._read_terms()

    @property
    def loss(self) -> float:
        """Σ over the terms of (sum of item losses) / (items), over the window and all ranks. Waits for the device.

        Terms without items are omitted; NaN if no term has any.
        """
        losses = [term.loss for term in self.terms.values() if term.items]
        return sum(losses) if losses else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """Return all fields, ``loss`` and ``terms`` as plain values, for a log. Waits for the device."""
        names = [each.name for each in fields(self) if not each.name.startswith("_")]
        plain = {name: _plain(getattr(self, name)) for name in names}
        return {"loss": self.loss, **plain, "terms": {name: asdict(term) for name, term in self.terms.items()}}


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
