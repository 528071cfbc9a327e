"""What one window did: a frozen record whose device values are read only when asked for."""

from collections.abc import Callable
from dataclasses import dataclass, field

from bigbatch.scaling.noise_scale import NoiseScale


@dataclass(frozen=True)
class TermReport:
    """One term of the loss over a window.

    Attributes:
        loss: Sum of the item losses divided by ``items``; NaN without items.
        items: Number of items the term averages over, in the whole window.
    """

    loss: float
    items: float


@dataclass(frozen=True)
class RanksReport:
    """What the ranks of a window did.

    Attributes:
        size: Ranks that hold different data.
        num_microbatches: Of each rank.
        slowest: The rank whose gradients were there last.
        slowest_share: What of its time until then the others waited for it, on average: 0 where all were as fast.
        stopping: Whether any rank was told to stop after this update.
    """

    size: int
    num_microbatches: tuple[int, ...]
    slowest: int
    slowest_share: float
    stopping: bool = False


@dataclass(frozen=True)
class WindowReport:
    """What one window did.

    Attributes:
        step: Optimizer updates done so far, this one included. A skipped window does not count.
        items: Items of the window, over all ranks: of the only term, or of the first where there are several (see
            ``terms``).
        grad_norm: 2-norm of the divided gradient before clipping; NaN for a window without items.
        num_microbatches: Micro-batches of this rank in this window.
        tokens: Tokens of the window without padding, over all ranks, where ``Engine(lengths=...)`` can tell; None
            elsewhere.
        peak_bytes: Highest memory in bytes so far in this process: what torch allocated on the device for CUDA,
            the resident set on the CPU. Of the rank that took most; None where the platform does not tell.
        elapsed_s: Seconds on the host's clock from the opening of the window to the end of the update.
        syncs: How often gradients crossed ranks; 0 in one process.
        skipped: Why the window changed nothing ("no items", "non-finite gradient"), or None if it was applied.
        retries: Attempts at micro-batches of this rank that ran out of memory and were made again in pieces.
        ranks: What the ranks did; None in one process.
        noise: The gradient noise scale, as averaged so far; None before it is known, and where it is not measured.
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
        """Each term of the loss by its name. Waits for the device."""
        return self._read_terms()

    @property
    def loss(self) -> float:
        """Σ over the terms of (sum of item losses) / (items), over the window. Waits for the device.

        Terms without an item are left out; NaN where no term has any.
        """
        losses = [term.loss for term in self.terms.values() if term.items]
        return sum(losses) if losses else float("nan")
