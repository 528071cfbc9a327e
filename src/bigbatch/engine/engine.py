"""The engine: a batch of any size in, one exact update out.

    split → window (forward, backward, accumulate) → sync → update → report

Long because it documents every setting once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from bigbatch.accumulation.accumulator import Accumulator
from bigbatch.accumulation.pending_update import PendingUpdate
from bigbatch.accumulation.training_state import TrainingState
from bigbatch.accumulation.update_outcome import GradientHook, NonFinite
from bigbatch.autotune.choice import MicrobatchChoice
from bigbatch.batching.batch_checks import check_batch_dim
from bigbatch.batching.plan import TokenBudget
from bigbatch.distributed.gradient_sync import GradientSync, SyncPolicy, never
from bigbatch.engine.batch_windows import BatchSplitter, first_window_check, open_window, run_again
from bigbatch.engine.checks import SETTINGS, check_layout, check_loss, check_microbatch, check_quantum, check_ranks
from bigbatch.engine.fused_layers import FuseGradients, make_fused_gradients
from bigbatch.engine.hand_over import exact_loss
from bigbatch.engine.microbatch_size import MicrobatchSize
from bigbatch.engine.offload_level import OffloadLevel
from bigbatch.engine.progress import EngineProgress
from bigbatch.engine.tuning import choose_microbatch
from bigbatch.execution.runner_choice import make_runner
from bigbatch.offload.level_choice import OffloadChoice
from bigbatch.offload.levels import OffloadSetting
from bigbatch.read_only import read_only
from bigbatch.types import Collate, CountItems, Layout, LossFunction
from bigbatch.window_report import WindowReport

if TYPE_CHECKING:
    from torch.amp import GradScaler
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


@read_only("accumulator", "sync", "model", "collate", "lengths", "layout", "batch_dim", "quantum", settings=SETTINGS)
class Engine:
    """One exact update from one batch of any size.

        engine = Engine(model, optimizer, loss_fn, microbatch=8)
        for batch in loader:                        # on the CPU, as large as you like
            report = engine.step(batch)

    The gradient is Σ_i ∇loss_sum_i / Σ_i items_i over the micro-batches i of the batch: ``microbatch`` affects memory
    and time, never the result. ``.grad`` is None after each step.

    Args:
        model: The module being trained; micro-batches are moved to the device of its first parameter.
        optimizer: As for `Accumulator`; also one whose ``step`` needs a closure, such as SAM: the window is run again.
            None if other code updates the weights, for `backward` and `loss`.
        loss_fn: ``loss_fn(model, microbatch) → (loss_sum, items)``: the 0-d **sum** of the item losses and the number
            of items that it runs over; or ``{term: (loss_sum, items)}``, whose total is Σ_term sum / items. Or a
            `Coupled`, for a loss that couples samples.
        microbatch: Samples of one forward and backward; or a `TokenBudget`, which groups samples of similar length so
            that little is padded, the largest micro-batch first; or ``"auto"``, the smallest size within 2 % of the
            fastest that fits, in tokens if ``lengths`` is given, else in samples (see `tune`).
        memory: For ``"auto"``, also of ``offload``: the memory that may be used, such as ``"24GiB"``, ``"80%"`` or a
            number of bytes; by default what is free when the choice is made, less a margin of 2 %. On CUDA it limits
            what torch allocates for this process, on the CPU the whole process. 5 % are kept free for gaps.
        collate: For batches that are lists of samples: makes one micro-batch of a list, padded to its own longest.
        batch_dim: The dimension of tensors that is the sample: 1 for batches ``[time, batch, ...]``. By default 0, and
            the first micro-batch raises if a recurrent or attention layer then reads samples as time.
        lengths: ``lengths(batch) → one length per sample``, in tokens, for a `TokenBudget` and ``report.tokens``.
        layout: ``"padded"``; or ``"packed"`` if ``collate`` makes one row of a list of samples, without padding, and
            the loss keeps the samples apart: a micro-batch is then limited by the sum of its ``lengths``.
        cuda_graphs: Whether micro-batches of known shapes are replayed as one CUDA graph, with less work for the host:
            for a ``loss_fn`` of one term that depends on micro-batch and model only, and never reads a value back.
        fuse_gradients: Whether linear layers and embeddings add gradients of weights to the sums by themselves, one
            rounding fewer, and float32 weights are cast once a window under autocast: True; or ``"auto"``, on CUDA; or
            ``"sums"`` or ``"copies"``, one of the two. Windows that measure the noise scale run without it.
        count_items: ``count_items(batch) → {term: items}``, needed for a loss of several terms.
        batch_norm: ``"exact"`` for batch norm over the whole batch, all ranks included, whose running statistics move
            once. Micro-batches wait for each other at each norm, each in a thread, and activations of the whole batch
            are kept: on CUDA in host memory, so that the device holds those of one micro-batch, and of the whole batch
            its inputs and what the forward holds at one norm. Not with compiled or sharded models, ``"auto"``,
            `Coupled`, ``cuda_graphs``. By default micro-batches normalize by themselves.
        max_grad_norm, gradient_hook, scheduler, scaler, nonfinite, noise: As for `Accumulator`.
        offload: As for `Accumulator`; or ``"auto"``, chosen for the first batch: of the levels that are supported and
            fit in ``memory``, the lowest within 2 % of the fastest; for a fixed ``microbatch`` the lowest.
        reproducible: Whether updates are the same bits for any micro-batch and number of ranks, see `Accumulator`: each
            ``quantum`` of consecutive samples of the global batch is then computed by itself, seeded by its position.
        quantum: Samples; ``microbatch`` is a multiple, and changes neither memory nor time.
        sync: As for `Accumulator`. Over several ranks the batch is this rank's part of the global batch, and may be
            empty; `step` is collective, and so is `tune`, which measures on the first rank.
        lockstep: Whether all ranks run the same number of micro-batches, for a ``loss_fn`` that calls collectives, such
            as an all-reduce of metrics. A rank with fewer repeats a sample, whose loss and gradient do not count. Ranks
            in lockstep cannot retry after out-of-memory. Sharded models always run so; no-op in a single process.
        check: Whether the first window warns, once, of what `verify` would name: a mean as loss, dropout, batch norm...
            A few samples run once more for it; over several ranks and for compiled models it looks at modules only.

    Attributes:
        accumulator: Its windows.
        sync: Synchronizes gradients over ranks.
        microbatch_size: The size of micro-batches at the moment.
        runner: Runs micro-batches.
        fused: The fused layers, and why others are not.

    Raises:
        TypeError: The wrapper, optimizer or scheduler is of a kind that is not supported.
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: "Optimizer | Sequence[Optimizer] | None",
        loss_fn: LossFunction,
        *,
        microbatch: int | TokenBudget | Literal["auto"] = "auto",
        memory: str | int | None = None,
        collate: Collate | None = None,
        batch_dim: int | None = None,
        lengths: Callable[[Any], Sequence[int]] | None = None,
        layout: Layout = "padded",
        cuda_graphs: bool = False,
        fuse_gradients: FuseGradients = False,
        count_items: CountItems | None = None,
        batch_norm: Literal["exact"] | None = None,
        max_grad_norm: float | None = None,
        gradient_hook: GradientHook | None = None,
        scheduler: "LRScheduler | Sequence[LRScheduler] | None" = None,
        scaler: "GradScaler | None" = None,
        nonfinite: NonFinite = "skip",
        offload: OffloadSetting = "none",
        reproducible: bool = False,
        quantum: int | None = None,
        sync: GradientSync | SyncPolicy | None = None,
        lockstep: bool = False,
        noise: bool = True,
        check: bool = True,
    ) -> None:
        check_microbatch(microbatch, memory, lengths, offload=offload)
        check_batch_dim(batch_dim, collate)
        is_additive = check_loss(loss_fn, microbatch, batch_norm, cuda_graphs=cuda_graphs, count_items=count_items)
        check_quantum(quantum, microbatch, reproducible=reproducible)
        self.accumulator = Accumulator(
            model,
            optimizer,
            max_grad_norm=max_grad_norm,
            gradient_hook=gradient_hook,
            scheduler=scheduler,
            scaler=scaler,
            nonfinite=nonfinite,
            offload="none" if offload == "auto" else offload,
            sync=sync,
            noise=noise and is_additive,
            reproducible=reproducible,
        )
        self.sync = self.accumulator.sync
        if lockstep:
            self.sync.run_in_lockstep()
        check_ranks(self.accumulator, microbatch, batch_norm, cuda_graphs=cuda_graphs)
        self.model, self.loss_fn, self.memory, self.batch_dim, self.quantum = model, loss_fn, memory, batch_dim, quantum
        self.collate, self.lengths, self.count_items = collate, lengths, count_items
        self.layout = check_layout(layout, lengths, collate)
        self.microbatch_size = MicrobatchSize(microbatch, has_lengths=lengths is not None, layout=self.layout)
        self._splitter = BatchSplitter(self.accumulator, quantum, collate=collate, batch_dim=batch_dim, lengths=lengths)
        self._make_fused = partial(make_fused_gradients, fuse_gradients, self.accumulator, is_additive=is_additive)
        self.fused = self._make_fused()
        made = self.accumulator, self.fused, quantum, loss_fn
        self.runner = make_runner(*made, cuda_graphs=cuda_graphs, batch_norm=batch_norm)
        self._offload = OffloadLevel(offload, self.accumulator, cuda_graphs, fuse_gradients, batch_norm)
        self._progress = EngineProgress(self.microbatch_size, self.accumulator, quantum)
        self._training_state = TrainingState(self.sync.module, self.accumulator.update, loss_fn=loss_fn)
        self._first_window = first_window_check(self.accumulator, enabled=check, names_norms=batch_norm is None)

    @property
    def microbatch(self) -> int | TokenBudget | Literal["auto"]:
        """As passed."""
        return self.microbatch_size.requested

    @property
    def choice(self) -> MicrobatchChoice | None:
        """The choice of ``microbatch="auto"``; None before it, and for other settings."""
        return self.microbatch_size.choice

    @property
    def token_budget(self) -> int | None:
        """Tokens that no micro-batch exceeds at the moment; None if samples are the limit, or none is chosen yet."""
        return self.microbatch_size.token_budget

    @property
    def offload(self) -> OffloadSetting:
        """The level of offload; ``"auto"`` until it is chosen, before the first window."""
        return self._offload.level

    @property
    def offload_choice(self) -> OffloadChoice | None:
        """The choice of ``offload="auto"``, one line as text; None before it, and for other settings."""
        return self._offload.choice

    def tune(self, batch: Any) -> MicrobatchChoice:
        """Choose the micro-batch for batches like this one, as the first `step` does for ``microbatch="auto"``.

        The peak is predicted by running the step on tensors without data, and corrected by the memory of a real
        micro-batch; then some sizes are timed, for at most half a minute. If the step cannot run without data, sizes
        are tried until one does not fit. Pass the longest sample that will occur. Restores random states and all that
        hangs on the model and on other modules that ``loss_fn`` uses, which is called about 100 times for 256 samples;
        `is_trial` is True inside.

        Raises:
            MemoryLimitError: A single sample does not fit, or does at no level of offload that was left to choose.
            RankFailedError: Another error was raised on the first rank.
            ValueError: The batch is empty, ``memory`` or the number of lengths is invalid, or the micro-batch is fixed.
        """
        if self.microbatch != "auto":
            raise ValueError(f'microbatch={self.microbatch!r} is fixed: pass microbatch="auto" to have it chosen.')
        self._choose_offload(batch)
        parts = batch, self.accumulator, self.runner, self._splitter, self.fused
        choice = choose_microbatch(*parts, loss_fn=self.loss_fn, memory=self.memory, layout=self.layout)
        self.microbatch_size.set(choice)
        return choice

    def _choose_offload(self, batch: Any, *, leaves_grad: bool = False) -> None:
        if self.accumulator.update.deferred is not None:
            parts = batch, self._splitter, self.microbatch_size
            self._offload.choose(*parts, loss_fn=self.loss_fn, memory=self.memory, leaves_grad=leaves_grad)
            self.fused = self._make_fused()

    def set_microbatch(self, choice: MicrobatchChoice) -> None:
        """Use an earlier choice of `tune`; a ValueError if the micro-batch is fixed, or the choice in another unit."""
        self.microbatch_size.set(choice)

    def step(
        self, batch: Any, *, should_abandon: Callable[[], bool] = never, should_stop: Callable[[], bool] = never
    ) -> WindowReport:
        """Apply the gradient of the whole batch, once.

        Args:
            batch: A pytree, mapping or dataclass of tensors ``[samples, ...]`` on any device, whose type micro-batches
                keep; 0-d tensors are passed to each unchanged. With ``collate`` a list of samples.
            should_abandon: Called before each micro-batch: whether to drop the window. It then ends and changes
                nothing; over several ranks on all of them, for a sharded model after all micro-batches.
            should_stop: Called at the end: whether to stop after this update; ``report.ranks`` says if any rank is to.

        If memory runs out inside the window, the micro-batch that failed is run again, then in halves, and every sample
        still counts once; the next windows use micro-batches that are 7 % smaller (packed: the next smaller row size),
        and after 20 windows without out-of-memory larger ones again. Any other error of ``loss_fn`` is raised, with the
        window aborted and the gradients cleared. An empty batch is a window without items.

        Raises:
            MemoryLimitError: A single sample does not fit in memory; or memory ran out in a micro-batch that
                ``loss_fn`` has written to in place, so that it cannot be run again.
            NonFiniteError: The loss or the gradient is not finite, and ``nonfinite`` is ``"raise"``.
            RankFailedError: Another rank failed in this window, which changed nothing.
            TypeError: The batch cannot be split, or ``loss_fn`` returned something else than sums and items.
            ValueError: A loss or a count is invalid, or the batch can be read in two ways; the message says which.
            WindowAbandonedError: ``should_abandon`` returned True. Random numbers that were drawn stay drawn.
        """
        self.accumulator.update.require_optimizer()
        with self._filled_window(batch, should_abandon, should_stop) as pending:
            report = pending.apply(retries=self.runner.retries, run_again=run_again(self.accumulator, self.runner))
        self.microbatch_size.observe(report.retries)
        return report

    def backward(self, batch: Any, *, should_abandon: Callable[[], bool] = never) -> WindowReport:
        """Leave the gradient of the whole batch in ``.grad``, as `Window.finish`; arguments and errors as of `step`."""
        self._choose_offload(batch, leaves_grad=True)
        with self._filled_window(batch, should_abandon, never) as pending:
            report = pending.finish(retries=self.runner.retries)
        self.microbatch_size.observe(report.retries)
        return report

    def loss(self, batch: Any) -> Tensor:
        """Return the loss of the whole batch, 0-d, whose backward is the gradient of `backward`, for other trainers.

            loss = engine.loss(batch)       # all micro-batches run here
            scaler.scale(loss).backward()   # .grad += factor · gradient: the factor of whatever was done with the loss

        ``.backward()`` adds to ``.grad``, as that of any loss, and can be called once. Over several ranks the gradient
        is that of all of them, and is not reduced again. The value is NaN, and the gradient too, if one of them is not
        finite: a GradScaler then skips the update. For a batch without items both are 0. The dtype is float64 if that
        of any parameter is, else float32. With ``cuda_graphs``, `torch.autograd.grad` does not return the gradient.

        Errors are those of `step`; those of ``.backward()`` are `WindowStateError`.
        """
        return exact_loss(self.accumulator.update.parameters(), lambda: self.backward(batch), self.runner)[0]

    @contextmanager
    def _filled_window(
        self, batch: Any, should_abandon: Callable[[], bool], should_stop: Callable[[], bool]
    ) -> Iterator[PendingUpdate]:
        """Open a window and run the micro-batches of a batch; discard it if it is not ended."""
        self._choose_offload(batch)
        if not self.microbatch_size.is_chosen:
            self.tune(batch)
        with open_window(
            batch,
            self.accumulator,
            self.runner,
            self._splitter,
            self.microbatch_size,
            loss_fn=self.loss_fn,
            count_items=self.count_items,
            first_window=self._first_window,
            fused=self.fused,
            should_stop=should_stop,
        ) as (pending, parts):
            self.runner.run_all(pending, should_abandon)
            if not self._first_window.is_done:
                with pending.sums.paused():
                    self._first_window.run(self.loss_fn, parts, may_join=self.lengths is None)
            yield pending

    def release_cuda_graphs(self) -> None:
        """Free the memory of CUDA graphs and copied weights, for work between updates; windows make them again."""
        self.runner.release()
        self.fused.copies.free()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that was trained and everything that the next windows depend on, except their data.

        Tensors are those in use: save them, or copy them, before the next `step`. State can be saved only between
        windows.

        Parameters that are or were in the optimizer belong to it, frozen or outside of the model, by names such as
        ``layer.weight``, ``loss_fn.weight`` (``loss_fn`` is a module or a method of one) or
        ``optimizer.group0.param3``. Buffers outside of the model and of such a ``loss_fn`` are not known.
        """
        return self._training_state.capture(self._progress, self.accumulator.device)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict`; the next updates are the same to the last bit.

        Settings such as ``lr`` become those of the state. Everything is checked before the first value is written; if
        writing fails nevertheless, for example because memory runs out, the old values are put back.

        Raises a ValueError if it is of another model, optimizer, scheduler or scaler, of a newer version of bigbatch,
        or damaged; nothing is changed then.
        """
        self._training_state.restore(state, self._progress, self.accumulator.device)

    def whole_weights(self) -> AbstractContextManager[None]:
        """Let parameters that ``offload`` keeps narrow be their float32 values inside, in host memory, to save them."""
        return self.accumulator.update.whole_weights()

    def groups(self, lengths: Sequence[int]) -> Sequence[Sequence[int]]:
        """Group samples of these lengths as the micro-batches of `step` would be at the moment.

        Raises a RuntimeError if no micro-batch is chosen yet, and a ValueError if a length is above the token budget.
        """
        return self._splitter.groups(lengths, self.microbatch_size)
