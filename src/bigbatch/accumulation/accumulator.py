"""Accumulation windows for a loop of one's own: whose gradients they take, and when each begins and ends."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bigbatch.accumulation.optimizer_update import NonFinite, OptimizerUpdate
from bigbatch.accumulation.pending_update import PendingUpdate
from bigbatch.accumulation.window import Window
from bigbatch.batching.checks import check_count
from bigbatch.distributed.detect import detect_sync
from bigbatch.distributed.gradient_sync import GradientSync, SyncPolicy
from bigbatch.distributed.window_start import WindowStart, agree_on_start, announce_failure
from bigbatch.errors import WindowStateError
from bigbatch.scaling.noise_scale import NoiseScaleEstimator
from bigbatch.types import CountItems, Items

if TYPE_CHECKING:
    from torch.amp import GradScaler
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


class Accumulator:
    """Exact accumulation windows in a loop of your own.

        accumulator = Accumulator(model, optimizer, max_grad_norm=1.0)
        for window in accumulator.windows(loader, num_microbatches=4):
            for inputs, labels in window:
                loss_sum = F.mse_loss(model(inputs), labels, reduction="sum")
                window.backward(loss_sum, items=labels.numel())
            report = window.step()

    Each window updates the optimizer's parameters with Σ_i ∇loss_sum_i / Σ_i items_i. Only these parameters receive a
    gradient, so accumulators over different parameters may share a graph and be open at the same time. Their ``.grad``
    is cleared when a window opens and when it ends.

    Under several ranks the sums run over all of them, which may have different micro-batches, items, or none; opening a
    window and its ``step`` are collective.

    Args:
        model: The module being trained: plain, in ``DistributedDataParallel``, or with `fully_shard` applied to it.
        optimizer: A ``torch.optim.Optimizer`` over its parameters, of any dtypes; bfloat16 parameters sum in float32.
        max_grad_norm: Largest 2-norm of the divided gradient over all parameters; None to not clip.
        scheduler: A learning-rate scheduler, stepped once after each update.
        scaler: A ``torch.amp.GradScaler`` for float16 autocast. Call neither its ``scale`` nor its ``step``.
        nonfinite: What a window does whose loss or gradient is not finite. ``"skip"``: nothing, no parameter, optimizer
            state or schedule changes, and its report says so; ``"raise"``: the same, and a `NonFiniteError`.
        sync: When the gradients of a sharded model cross ranks, a `SyncPolicy`; or a `Replicated` of a plain model that
            every rank holds. By default what the model is wrapped in decides.
        noise: Whether to measure the gradient noise scale, see `bigbatch.scaling.noise_scale`: of losses of one term,
            parameters on one device, without float16, and not of sharded models.

    Raises:
        TypeError: A wrapper, optimizer or scheduler of a kind that cannot work this way.
        ValueError: None of the optimizer's parameters belongs to the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: "Optimizer",
        *,
        max_grad_norm: float | None = None,
        scheduler: "LRScheduler | None" = None,
        scaler: "GradScaler | None" = None,
        nonfinite: NonFinite = "skip",
        sync: GradientSync | SyncPolicy | None = None,
        noise: bool = True,
    ) -> None:
        self._update = OptimizerUpdate(
            optimizer, scheduler=scheduler, scaler=scaler, max_grad_norm=max_grad_norm, nonfinite=nonfinite
        )
        _check_model(model, optimizer)
        self.sync = detect_sync(model, sync)
        _check_float16(self.sync, self._update)
        self.model = model
        self.optimizer = optimizer
        self._open: Window | None = None
        self.noise = NoiseScaleEstimator() if noise and self._can_measure() else None
        self.uses_cuda_graphs = (
            False  # whether micro-batches are launched from recordings, which measure or do not for good
        )
        self._squared_norm_sum: Tensor | None = None  # stays where it is: recorded micro-batches add to it
        self.padding_microbatch: Any = (
            None  # a micro-batch of before, to keep step with other ranks where this one has none
        )

    def _can_measure(self) -> bool:
        parameters = self._update.parameters()
        return not self.sync.runs_in_lockstep and len({parameter.device for parameter in parameters}) == 1

    @property
    def update(self) -> OptimizerUpdate:
        """How windows become updates, and what steps with them."""
        return self._update

    @property
    def num_steps(self) -> int:
        """Updates applied so far."""
        return self._update.num_steps

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return self._update.device

    def prepare(self) -> None:
        """Make the optimizer's state where it can be made ahead; the first window does it by itself.

        Raises:
            MemoryLimitError: It does not fit.
        """
        self._update.prepare()

    def windows(
        self, loader: Iterable[Any], *, num_microbatches: int, count_items: CountItems | None = None
    ) -> Iterator[Window]:
        """Group a loader's micro-batches into windows; the last one holds what is left.

        Under several ranks there are as many windows on each as on the one that has most: where a loader has ended,
        they hold nothing. Of a sharded model the ranks also run as many micro-batches: a window then gives some again,
        whose backward counts nothing. Beginning one is collective.

        Args:
            loader: Gives micro-batches, of any sizes. Drawn lazily, one at a time.
            num_microbatches: How many make a window, at least 1.
            count_items: For a loss of several terms, ``count_items(microbatch) → {term: items}``. The window's
                micro-batches are then drawn before its first backward.

        Raises:
            TypeError: ``num_microbatches`` is no int.
            ValueError: ``num_microbatches`` is below 1.
            WindowStateError: The previous window holds gradients and was neither stepped nor aborted.
        """
        check_count("num_microbatches", num_microbatches, "the micro-batches of one window")
        return self._windows(iter(loader), num_microbatches, count_items)

    def _windows(
        self, microbatches: Iterator[Any], num_microbatches: int, count_items: CountItems | None
    ) -> Iterator[Window]:
        window = None
        names: tuple[str, ...] = ()
        at_once = count_items is not None or self.sync.runs_in_lockstep
        try:
            while True:
                self._finish_previous()
                totals = None
                with self.failing_together():
                    self.prepare()
                    drawn = list(islice(microbatches, num_microbatches if at_once else 1))
                    if count_items is not None:
                        totals = {**dict.fromkeys(names, 0), **_total_items(map(count_items, drawn))}
                if self.sync.runs_in_lockstep and drawn:
                    self.padding_microbatch = drawn[-1]
                num_everywhere, totals_everywhere = self.agree_on_start(len(drawn), totals)
                if not num_everywhere:
                    break
                names = tuple(totals_everywhere or ())
                window, pending = self.open((), totals_everywhere)
                if self.sync.runs_in_lockstep:
                    window.set_microbatches(self.in_step(pending, drawn, self.padding_microbatch, num_everywhere))
                else:
                    window.set_microbatches(
                        drawn if at_once else chain(drawn, islice(microbatches, num_microbatches - 1))
                    )
                yield window
        finally:
            if window is not None:
                window.abort()

    def agree_on_start(
        self, num_microbatches: int, totals: Mapping[str, Items] | None = None
    ) -> tuple[int, Mapping[str, Items] | None]:
        """Give the most micro-batches that any rank has in the next window, and the items of each term over all.

        Collective under several ranks; arguments and errors are those of `bigbatch.distributed.window_start.agree`.
        """
        return agree_on_start(
            self.sync, WindowStart(False, self.padding_microbatch is not None, num_microbatches), totals
        )

    @contextmanager
    def failing_together(self, *, opens: bool = True) -> Iterator[None]:
        """Let what fails before a window end the window of the other ranks, too, who would wait for this one.

        Args:
            opens: Whether they wait in `agree`; else it is in the vote at the window's end.
        """
        try:
            yield
        except BaseException:
            if self.sync.size > 1:
                if opens:
                    announce_failure(self.sync)
                else:
                    PendingUpdate(self._update, None, sync=self.sync).discard()
            raise

    def in_step(
        self, pending: PendingUpdate, own: Sequence[Any], padding_microbatch: Any, num_everywhere: int
    ) -> Iterator[Any]:
        """Give this rank's micro-batches, and others after them that do not count, as many as on every other rank."""
        for index in range(num_everywhere):
            pending.counts = index < len(own)
            self.sync.before_microbatch(is_last=index == num_everywhere - 1)
            yield own[index] if pending.counts else padding_microbatch
        pending.is_complete = True

    def window(self, microbatches: Iterable[Any] = (), *, totals: Mapping[str, Items] | None = None) -> Window:
        """Open one window.

        Args:
            microbatches: What iterating over the window gives. May be left empty: ``window.backward`` takes any loss.
            totals: Items of the whole window on this rank, by term, for a loss of several terms. Opening it is then
                collective.

        Raises:
            WindowStateError: The previous window holds gradients and was neither stepped nor aborted.
        """
        self._finish_previous()
        totals_everywhere = totals
        if totals is not None:
            with self.failing_together():
                self.prepare()
            _, totals_everywhere = self.agree_on_start(0, totals)
        return self.open(microbatches, totals_everywhere)[0]

    def open(
        self,
        microbatches: Iterable[Any],
        totals: Mapping[str, Items] | None,
        *,
        static_buffers: Mapping[Tensor, Tensor] | None = None,
    ) -> "tuple[Window, PendingUpdate]":
        """Open one window and give its transaction with it, on sums that are kept. For `Engine`, not for loops.

        ``totals`` run over all ranks here.
        """
        self._finish_previous()
        self.prepare()
        if self.noise is not None and (self._squared_norm_sum is None or self._squared_norm_sum.device != self.device):
            wide = any(parameter.dtype == torch.float64 for parameter in self._update.parameters())
            self._squared_norm_sum = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=self.device)
        measures = self.noise is not None and (self.uses_cuda_graphs or self.noise.measures_next)
        squared_norm_sum = self._squared_norm_sum if measures else None
        pending = PendingUpdate(
            self._update,
            totals,
            static_buffers=static_buffers,
            sync=self.sync,
            noise=self.noise,
            squared_norm_sum=squared_norm_sum,
        )
        self._open = Window(iter(microbatches), pending)
        return self._open, pending

    def _finish_previous(self) -> None:
        if self._open is None or not self._open.is_open:
            return
        if self._open.num_microbatches:
            raise WindowStateError(
                f"a window is still open and holds the gradients of {self._open.num_microbatches} micro-batches. "
                "Call its step(), or its abort() to drop them, before going on."
            )
        self._open.abort()


def _total_items(counts: Iterable[Mapping[str, Items]]) -> dict[str, Items]:
    totals: dict[str, Items] = {}
    for count in counts:
        for name, items in count.items():
            totals[name] = totals.get(name, 0) + items
    return totals


def _check_model(model: nn.Module, optimizer: "Optimizer") -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass the torch.nn.Module that is being trained.")
    own = set(model.parameters())
    if own and not any(p in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "none of the optimizer's parameters belongs to the model: it would never change. Make the optimizer from "
            "model.parameters(), after the model has its final form and device."
        )


def _check_float16(sync: GradientSync, update: OptimizerUpdate) -> None:
    if sync.runs_in_lockstep and (
        update.scaler is not None or any(p.dtype == torch.float16 for p in update.parameters())
    ):
        raise TypeError(
            "a sharded model averages gradients over ranks before a window could scale them for float16: use bfloat16, "
            "and leave scaler= out."
        )
