"""Exact accumulation windows for a user's own training loop.

Long because it documents every setting, and windows of every kind open here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bigbatch.accumulation.noise_observer import NoiseObserver
from bigbatch.accumulation.optimizer_update import OptimizerUpdate
from bigbatch.accumulation.overlapped_update import OverlappedUpdate, can_overlap
from bigbatch.accumulation.pending_update import PendingUpdate
from bigbatch.accumulation.reproducible_checks import check_reproducible
from bigbatch.accumulation.reproducible_state import ReproducibleState
from bigbatch.accumulation.reproducible_update import ReproducibleUpdate
from bigbatch.accumulation.update_outcome import GradientHook, NonFinite
from bigbatch.accumulation.window import EarlyEnds, Window
from bigbatch.accumulation.window_content import WindowContent, WindowState
from bigbatch.batching.checks import check_count
from bigbatch.batching.split import draw
from bigbatch.distributed.collective import fail_together
from bigbatch.distributed.detect import detect_sync
from bigbatch.distributed.gradient_sync import GradientSync, SyncPolicy, never
from bigbatch.distributed.window_start import agree_on_start, announce_failure
from bigbatch.distributed.window_vote import announce_failed_window
from bigbatch.errors import InputError, WindowStateError
from bigbatch.gradients.loss_checks import as_count, as_totals
from bigbatch.offload.levels import Offload, check_master, refuse_auto
from bigbatch.read_only import read_only
from bigbatch.types import CountItems, Items

if TYPE_CHECKING:
    from torch.amp import GradScaler
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


@read_only(
    *("model", "optimizer", "sync", "update"),
    settings=("max_grad_norm", "gradient_hook", "scheduler", "scaler", "nonfinite", "offload"),
)
class Accumulator:
    """Exact accumulation windows in your own loop.

        accumulator = Accumulator(model, optimizer, max_grad_norm=1.0)
        for window in accumulator.windows(loader, num_microbatches=4):
            for inputs, labels in window:
                loss_sum = F.mse_loss(model(inputs), labels, reduction="sum")
                window.backward(loss_sum, items=labels.numel())
            report = window.step()

    Each window updates the optimizer's parameters with Σ_i ∇loss_sum_i / Σ_i items_i. Only these parameters receive a
    gradient, so accumulators over different parameters may share a graph and be open at the same time (to differentiate
    one loss in two windows, pass ``retain_graph=True`` to the first; for several optimizers of one model, pass all of
    them here). Their ``.grad`` is cleared when a window opens and when it ends, except by `Window.finish`.

    Over several ranks the sums run over all of them; ranks may have different micro-batches and items, or none. Opening
    a window and its ``step`` are collective.

    Args:
        model: The module being trained: plain, in ``DistributedDataParallel``, or with `fully_shard` applied to it.
        optimizer: A ``torch.optim.Optimizer`` over its parameters, of any dtypes; bfloat16 parameters sum in float32.
            Or several over different parameters, such as ``[muon, adamw]``: one update steps all of them. None if other
            code updates the weights: windows then end with `Window.finish`, and have the parameters of the model that
            require a gradient when they open, without those of other modules, such as a loss.
        max_grad_norm: Largest 2-norm of the divided gradient over all parameters; None to not clip.
        gradient_hook: ``gradient_hook(parameters)``, called once per update before the optimizer's step with the
            parameters that have a gradient. Their ``.grad`` is divided and clipped to ``max_grad_norm``, and may be
            changed in place: ``lambda parameters: torch.nn.utils.clip_grad_value_(parameters, 0.1)``.
        scheduler: A learning-rate scheduler, stepped once after each update; or several.
        scaler: A ``torch.amp.GradScaler`` for float16 autocast. Call neither its ``scale`` nor its ``step``. Without an
            optimizer its scale is only read, for the backward of micro-batches: its owner unscales, steps and updates.
        nonfinite: What a window does if its loss or gradient is not finite. ``"skip"``: no parameter, optimizer state
            or schedule changes, and the report says so; ``"raise"``: the same, and `NonFiniteError` is raised.
        sync: When the gradients of a sharded model are reduced, a `SyncPolicy`; or a `Replicated` of a plain model that
            every rank holds. By default it follows from the wrapper of the model.
        noise: Whether to measure the gradient noise scale, see `bigbatch.NoiseScale`. Supported for losses of one term
            and parameters on one device; not with float16, not for sharded models, and not if ``reproducible``.
        offload: What lives in host memory between updates, with the same bits: ``"optimizer"`` for the state of the
            optimizer, which passes through the device in each update while the parts before it are computed, for
            optimizers that update each parameter from its own gradient and state, and models that are not sharded.
            ``"master"``, for `Engine` and losses under autocast to bfloat16, also for the float32 values of weights of
            linear layers: the device holds them in bfloat16, as the parameters of the model. ``"gradients"``, also for
            the gradient sums: during backward, parts of them are copied to the device, where gradients are added to
            them, and back; in other loops than that of `Engine`, and without autocast, weights stay in float32 on the
            device.
        reproducible: Whether updates are the same bits for any order of the micro-batches and any distribution over
            ranks. Gradients are added as integers, 8 bytes for each element; if the scales of the window before do not
            suit them, as in the first window, iterating over the window yields its micro-batches once more. What is
            random in a micro-batch is up to the loop. Not for sharded or compiled models, float16 and running
            statistics.

    Attributes:
        model: As passed; cannot be replaced.
        optimizer: As passed; cannot be replaced.
        sync: Synchronizes gradients over ranks.
        update: Applies the gradient of a window.
        noise: Measures the gradient noise scale; None if it is not measured.
        reproducible: State of the scales, with ``state_dict`` and ``load_state_dict``; None without ``reproducible``.

    Raises:
        InputError: ``offload`` or ``reproducible`` is not supported here.
        TypeError: The wrapper, optimizer or scheduler is of a kind that is not supported.
        ValueError: None of the optimizer's parameters belongs to the model, two optimizers have the same parameter, or
            there is no optimizer and no parameter of the model requires a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: "Optimizer | Sequence[Optimizer] | None",
        *,
        max_grad_norm: float | None = None,
        gradient_hook: GradientHook | None = None,
        scheduler: "LRScheduler | Sequence[LRScheduler] | None" = None,
        scaler: "GradScaler | None" = None,
        nonfinite: NonFinite = "skip",
        sync: GradientSync | SyncPolicy | None = None,
        noise: bool = True,
        offload: Offload = "none",
        reproducible: bool = False,
    ) -> None:
        refuse_auto(offload)
        self.update = OptimizerUpdate(
            optimizer,
            model=model,
            scheduler=scheduler,
            scaler=scaler,
            max_grad_norm=max_grad_norm,
            gradient_hook=gradient_hook,
            nonfinite=nonfinite,
            offload=offload,
        )
        _check_model(model, self.update.parameters())
        self.sync = detect_sync(model, sync)
        _check_float16(self.sync, self.update)
        self.model = model
        self.optimizer = optimizer
        on_one_device = len({parameter.device for parameter in self.update.parameters()}) == 1
        can_measure = noise and on_one_device and not self.sync.is_sharded and not reproducible
        self.noise = NoiseObserver() if can_measure else None
        check_master(offload, {"reproducible=True": reproducible})
        if reproducible:
            check_reproducible(self.sync.module, self.update, self.sync)
        self.reproducible = ReproducibleState(self.update.device) if reproducible else None
        self._open: PendingUpdate | None = None

    @property
    def num_steps(self) -> int:
        """Updates applied so far."""
        return self.update.num_steps

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return self.update.device

    def prepare(self) -> None:
        """Create the optimizer state ahead of the first update, if the optimizer supports it; windows call it.

        Raises:
            MemoryLimitError: The state does not fit in memory.
            TornUpdateError: The last update is torn.
            WindowStateError: ``torch.inference_mode`` is on.
        """
        self.update.prepare()

    def windows(
        self, loader: Iterable[Any], *, num_microbatches: int, count_items: CountItems | None = None
    ) -> Iterator[Window]:
        """Group a loader's micro-batches into windows; the last one holds the rest.

        Over several ranks, every rank gets as many windows as the one with the most; after the end of its loader they
        are empty. For a sharded model every rank also runs as many micro-batches: a window then repeats one, whose
        backward counts nothing. Starting a window is collective.

        Args:
            loader: Yields micro-batches of any sizes. Drawn lazily, one at a time.
            num_microbatches: Of one window, at least 1.
            count_items: For a loss of several terms, ``count_items(microbatch) → {term: items}``. The window's
                micro-batches are then drawn before its first backward.

        Raises:
            TypeError: ``num_microbatches`` is not an int.
            ValueError: ``num_microbatches`` is below 1; or the loader yields tensors that it writes to later, and the
                micro-batches are drawn ahead.
            WindowStateError: The previous window holds gradients and was neither stepped nor aborted.
        """
        check_count("num_microbatches", num_microbatches, "the micro-batches of one window")
        return self._windows(iter(loader), num_microbatches, count_items)

    def _windows(
        self, microbatches: Iterator[Any], num_microbatches: int, count_items: CountItems | None
    ) -> Iterator[Window]:
        self._require_engine()
        window, early_ends = None, EarlyEnds(num_microbatches)
        names: tuple[str, ...] = ()
        draws_ahead = count_items is not None or self.sync.runs_in_lockstep
        try:
            while True:
                self._finish_previous()
                totals: Mapping[str, Items] | None = None
                with self.fail_together(before_window=True):
                    self.prepare()
                    drawn = draw(islice(microbatches, num_microbatches if draws_ahead else 1))
                    if count_items is not None:
                        totals = {**dict.fromkeys(names, 0), **_total_items(map(count_items, drawn))}
                if drawn:
                    self.sync.set_padding_microbatch(drawn[-1])
                    early_ends.warn()
                max_num_microbatches, totals = self.agree_on_start(len(drawn), totals)
                if not max_num_microbatches:
                    break
                names = tuple(totals or ())
                own = drawn if draws_ahead else chain(drawn, islice(microbatches, num_microbatches - 1))
                window = Window(self.open(WindowContent(own, max_num_microbatches, totals)))
                yield window
                early_ends.note(window)
        finally:
            if window is not None:
                window.abort()

    def window(self, microbatches: Iterable[Any] = (), *, totals: Mapping[str, Items] | None = None) -> Window:
        """Open one window.

        Args:
            microbatches: What iterating over the window yields. May be left empty: ``window.backward`` accepts any
                loss.
            totals: Local items of the whole window by term, for a loss of several terms. Opening the window is then
                collective.

        Raises:
            WindowStateError: The previous window holds gradients and was neither stepped nor aborted.
        """
        self._require_engine()
        self._finish_previous()
        with self.fail_together(before_window=totals is not None):
            self.prepare()
        if totals is not None:
            _, totals = self.agree_on_start(0, totals)
        return Window(self.open(WindowContent(iter(microbatches), totals=totals)))

    def agree_on_start(
        self, num_microbatches: int, totals: Mapping[str, Items] | None = None
    ) -> tuple[int, Mapping[str, Items] | None]:
        """Return the most micro-batches of any rank in the next window, and the global items of each term. Collective.

        Arguments and errors are those of `bigbatch.distributed.window_start.agree_on_start`.
        """
        return agree_on_start(self.sync, num_microbatches, totals)

    def fail_together(self, *, before_window: bool) -> AbstractContextManager[None]:
        """If the block raises on this rank, end the next window of the other ranks, which would wait for this one.

        Args:
            before_window: Whether the other ranks wait in `agree_on_start`; else in the vote at the end of the window.
        """
        if self.sync.size == 1:
            return nullcontext()
        if before_window:
            return fail_together(partial(announce_failure, self.sync))
        num_parameters, num_steps = len(self.update.parameters()), self.update.known_num_steps
        return fail_together(partial(announce_failed_window, self.sync, num_parameters, num_steps))

    def open(
        self,
        content: WindowContent,
        *,
        static_buffers: Mapping[Tensor, Tensor] | None = None,
        should_stop: Callable[[], bool] = never,
        overlaps: bool = False,
    ) -> PendingUpdate:
        """Open one window and return its pending update. For `Engine`, not for loops; ``overlaps`` if it may overlap.

        Raises:
            WindowStateError: The previous window holds gradients and was neither stepped nor aborted.
        """
        self._finish_previous()
        self.prepare()
        previous = self._open
        made = self.update, self.sync, content
        if self.reproducible is not None:
            self._open = ReproducibleUpdate(*made, self.reproducible, should_stop=should_stop)
        else:
            kind = OverlappedUpdate if overlaps and can_overlap(self.update, self.sync) else PendingUpdate
            self._open = kind(*made, static_buffers=static_buffers, observer=self.noise, should_stop=should_stop)
        if previous is not None and previous.state is WindowState.CLOSED and previous.sums.shows_leaves:
            self._open.sums.expect_shown_leaves()
        return self._open

    def _require_engine(self) -> None:
        if self.update.deferred is not None:
            raise WindowStateError(
                'the engine has offload="auto", which its first step(batch) chooses: call it, or tune(batch) with '
                'microbatch="auto", before windows of your own; or pass a level.'
            )
        offload = self.update.offload
        if offload is not None and offload.wants_probe and not offload.keep_all_wide():
            raise InputError(
                'offload="master" looks at the loss before the first window, which an Accumulator does not know: use '
                'bigbatch.Engine, or pass offload="optimizer".'
            )

    def _finish_previous(self) -> None:
        if self._open is None:
            return
        if self._open.state is WindowState.ACCUMULATING:
            raise WindowStateError(
                f"a window is still open and holds the gradients of {self._open.num_microbatches} micro-batches. "
                "Call its step(), or its abort() to drop them, before the next one."
            )
        self._open.discard()


def _total_items(counts: Iterable[Mapping[str, Items]]) -> dict[str, Items]:
    totals: dict[str, Items] = {}
    for count in counts:
        for name, items in as_totals(count).items():
            totals[name] = totals.get(name, 0) + as_count(name, items)
    return totals


def _check_model(model: nn.Module, parameters: Sequence[Tensor]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass the torch.nn.Module that is being trained.")
    if not parameters:
        raise ValueError(
            f"no parameter of the {type(model).__name__} requires a gradient, and there is no optimizer: pass a model "
            "that is to be trained, or call requires_grad_() on the layers that are."
        )
    own = set(model.parameters())
    if own and not own.intersection(parameters):
        raise ValueError(
            "none of the optimizer's parameters belongs to the model: it would never change. Make the optimizer from "
            "model.parameters(), after the model has its final form and device."
        )


def _check_float16(sync: GradientSync, update: OptimizerUpdate) -> None:
    if sync.is_sharded and (update.scaler is not None or any(p.dtype == torch.float16 for p in update.parameters())):
        raise TypeError(
            "a sharded model averages gradients over ranks before a window could scale them for float16: use bfloat16, "
            "and leave scaler= out."
        )
