"""The engine: a batch of any size in, one exact update out.

    split → window (forward, backward, accumulate) → sync → update → report

Long because it documents every setting once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from bigbatch.accumulation.accumulator import Accumulator
from bigbatch.accumulation.optimizer_update import GradientHook, NonFinite
from bigbatch.accumulation.pending_update import PendingUpdate, WindowContent, never
from bigbatch.accumulation.training_state import TrainingState
from bigbatch.autotune.choice import MicrobatchChoice, TuningProblem, choose
from bigbatch.autotune.peak_prediction import prediction_obstacle
from bigbatch.batching.batch_checks import check_batch_dim
from bigbatch.batching.plan import TokenBudget
from bigbatch.batching.prefetch import Prefetcher
from bigbatch.batching.split import Split, split, split_into, split_options
from bigbatch.batching.time_first import TimeFirstCheck
from bigbatch.distributed.collective import run_on_first_rank
from bigbatch.distributed.gradient_sync import GradientSync, SyncPolicy
from bigbatch.engine.checks import check_graphs, check_layout, check_lengths, check_microbatch, check_sharded
from bigbatch.engine.microbatch_size import MicrobatchSize
from bigbatch.engine.progress import EngineProgress
from bigbatch.execution.cuda_graphs import CudaGraphRunner
from bigbatch.execution.runner import WindowInputs
from bigbatch.execution.runner_choice import make_runner
from bigbatch.memory.usage import resolve_memory_budget
from bigbatch.types import Collate, CountItems, Items, Layout, LossFunction
from bigbatch.verification.first_window import FirstWindowCheck
from bigbatch.window_report import WindowReport

if TYPE_CHECKING:
    from torch.amp import GradScaler
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


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
        loss_fn: ``loss_fn(model, microbatch) → (loss_sum, items)``: the 0-d **sum** of the item losses and the number
            of items that it runs over; or ``{term: (loss_sum, items)}``, whose total is Σ_term sum / items.
        microbatch: Samples of one forward and backward; or a `TokenBudget`, which groups samples of similar length so
            that little is padded, the largest micro-batch first; or ``"auto"``, the smallest size within 2 % of the
            fastest that fits, in tokens if ``lengths`` is given, else in samples (see `tune`).
        memory: For ``"auto"``: the memory that may be used, such as ``"24GiB"``, ``"80%"`` or a number of bytes; by
            default what is free when the micro-batch is chosen, less a margin of 2 %. On CUDA it limits what torch
            allocates for this process, on the CPU the whole process. 5 % are kept free for gaps between allocations.
        collate: For batches that are lists of samples: makes one micro-batch of a list, padded to its own longest.
        batch_dim: The dimension of tensors that is the sample: 1 for batches ``[time, batch, ...]``. By default 0, and
            the first micro-batch raises if a recurrent or attention layer then reads samples as time.
        lengths: ``lengths(batch) → one length per sample``, in tokens, for a `TokenBudget` and ``report.tokens``.
        layout: ``"padded"``; or ``"packed"`` if ``collate`` makes one row of a list of samples, without padding, and
            the loss keeps the samples apart: a micro-batch is then limited by the sum of its ``lengths``.
        cuda_graphs: Whether micro-batches of shapes that were run before are replayed as one CUDA graph: the same
            gradients with less work for the host. Only for a ``loss_fn`` of one term that depends on the micro-batch
            and the model only, and never reads a value back to the host.
        count_items: ``count_items(batch) → {term: items}``, needed for a loss of several terms.
        max_grad_norm: As for `Accumulator`.
        gradient_hook: As for `Accumulator`.
        scheduler: As for `Accumulator`.
        scaler: As for `Accumulator`.
        nonfinite: As for `Accumulator`.
        sync: As for `Accumulator`. Over several ranks the batch is this rank's part of the global batch, and may be
            empty; `step` is collective, and so is `tune`, which measures on the first rank.
        noise: As for `Accumulator`.
        check: Whether the first window warns, once, of what `verify` would name: a mean as loss, dropout, batch norm...
            A few samples run once more for it; over several ranks and for compiled models only modules are looked at.

    Attributes:
        accumulator: Its windows.
        sync: Synchronizes gradients over ranks.
        microbatch_size: The size of micro-batches at the moment.
        runner: Runs micro-batches.

    Raises:
        TypeError: The wrapper, optimizer or scheduler is of a kind that is not supported.
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: "Optimizer | Sequence[Optimizer]",
        loss_fn: LossFunction,
        *,
        microbatch: int | TokenBudget | Literal["auto"] = "auto",
        memory: str | int | None = None,
        collate: Collate | None = None,
        batch_dim: int | None = None,
        lengths: Callable[[Any], Sequence[int]] | None = None,
        layout: Layout = "padded",
        cuda_graphs: bool = False,
        count_items: CountItems | None = None,
        max_grad_norm: float | None = None,
        gradient_hook: GradientHook | None = None,
        scheduler: "LRScheduler | Sequence[LRScheduler] | None" = None,
        scaler: "GradScaler | None" = None,
        nonfinite: NonFinite = "skip",
        sync: GradientSync | SyncPolicy | None = None,
        noise: bool = True,
        check: bool = True,
    ) -> None:
        check_microbatch(microbatch, memory, lengths)
        check_batch_dim(batch_dim, collate)
        self.accumulator = Accumulator(
            model,
            optimizer,
            max_grad_norm=max_grad_norm,
            gradient_hook=gradient_hook,
            scheduler=scheduler,
            scaler=scaler,
            nonfinite=nonfinite,
            sync=sync,
            noise=noise,
        )
        self.sync = self.accumulator.sync
        check_sharded(self.sync, microbatch, cuda_graphs)
        check_graphs(cuda_graphs, self.accumulator.device)
        self.model = model
        self.loss_fn = loss_fn
        self.memory = memory
        self.collate = collate
        device = self.accumulator.device
        self._split_options = split_options(device, collate, batch_dim)
        self._time_first = TimeFirstCheck(model if collate is None and batch_dim is None else nn.Identity())
        self.lengths = lengths
        self.count_items = count_items
        self.layout = check_layout(layout, lengths, collate)
        self.microbatch_size = MicrobatchSize(microbatch, has_lengths=lengths is not None, layout=self.layout)
        self.runner = make_runner(model, self.sync, device, cuda_graphs=cuda_graphs, noise=self.accumulator.noise)
        self._progress = EngineProgress(self.microbatch_size, self.accumulator.noise)
        self._training_state = TrainingState(self.sync.module, self.accumulator.update, loss_fn=loss_fn)
        self._first_window = FirstWindowCheck(
            model, enabled=check and not self.sync.rank, evaluates=self.sync.size == 1
        )

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

    def tune(self, batch: Any) -> MicrobatchChoice:
        """Choose the micro-batch for batches like this one, as the first `step` does for ``microbatch="auto"``.

        The peak is predicted by running the step on tensors without data, and corrected by the memory of a real
        micro-batch; then some sizes are timed, for at most half a minute. If the step cannot run without data, sizes
        are tried until one does not fit. Restores random states and all that hangs on the model and on other modules
        that ``loss_fn`` uses. ``loss_fn`` is called once for each prediction and 3 to 12 times for each size that is
        tried, about 100 times in all for 256 samples; `is_trial` is True inside.

        Args:
            batch: As for `step`, with the longest sample that will occur.

        Raises:
            MemoryLimitError: A single sample does not fit.
            RankFailedError: Another error was raised on the first rank.
            ValueError: The batch is empty, ``memory`` is not an amount, the number of lengths is not that of the
                samples, or the micro-batch is fixed.
        """
        if self.microbatch != "auto":
            raise ValueError(f'microbatch={self.microbatch!r} is fixed: pass microbatch="auto" to have it chosen.')
        choice = MicrobatchChoice.from_dict(run_on_first_rank(self.sync.ranks, lambda: asdict(self._measure(batch))))
        self.microbatch_size.set(choice)
        return choice

    def _measure(self, batch: Any) -> MicrobatchChoice:
        lengths = self._lengths_of(batch)
        samples = split(batch, 1, **self._split_options)
        if lengths is not None:
            check_lengths(lengths, samples.num_samples)
        self.accumulator.prepare()
        self.runner.release()
        problem = TuningProblem(
            self.sync.module,
            self.accumulator.optimizer,
            self.loss_fn,
            samples,
            lengths,
            uniform_length=self.collate is None,
            layout=self.layout,
            uses_cuda_graphs=isinstance(self.runner, CudaGraphRunner),
            prediction_obstacle=prediction_obstacle(self.sync.module),
        )
        budget = resolve_memory_budget(self.memory, self.accumulator.device, problem.resident_tensors())
        return choose(problem, budget)

    def set_microbatch(self, choice: MicrobatchChoice) -> None:
        """Use a choice that `tune` made before, for the same model and settings, instead of tuning again.

        Raises:
            ValueError: The micro-batch of this engine is fixed, or the choice is in another unit.
        """
        self.microbatch_size.set(choice)

    def step(
        self,
        batch: Any,
        *,
        should_abandon: Callable[[], bool] = never,
        should_stop: Callable[[], bool] = never,
    ) -> WindowReport:
        """Apply the gradient of the whole batch, once.

        Args:
            batch: A pytree, mapping or dataclass of tensors ``[samples, ...]`` on any device, whose type micro-batches
                keep; 0-d tensors are passed to each unchanged. With ``collate`` a list of samples.
            should_abandon: Called before each micro-batch: whether to drop the window. It then ends and changes
                nothing; over several ranks on all of them, for a sharded model after all micro-batches.
            should_stop: Called at the end: whether to stop after this update. ``report.ranks`` has the answer of any
                rank.

        If memory runs out inside the window, the micro-batch that failed is run again, then in halves, and every sample
        still counts once; the next windows use micro-batches that are 7 % smaller (packed: the next smaller row size),
        and after 20 windows without out-of-memory larger ones again. Any other error of ``loss_fn`` is raised, with the
        window aborted and the gradients cleared. An empty batch is a window without items.

        Raises:
            MemoryLimitError: A single sample does not fit in memory.
            NonFiniteError: The loss or the gradient is not finite, and ``nonfinite`` is ``"raise"``.
            RankFailedError: Another rank failed in this window, which changed nothing.
            TypeError: The batch cannot be split, or ``loss_fn`` returned something else than sums and items.
            ValueError: A loss or a count is invalid, or the batch can be read in two ways; the message says which.
            WindowAbandonedError: ``should_abandon`` returned True. Random numbers that were drawn stay drawn.
        """
        if not self.microbatch_size.is_chosen:
            self.tune(batch)
        with self._open_window(batch, should_stop) as (pending, parts):
            self._run_microbatches(pending, should_abandon)
            if not self._first_window.is_done:
                self._check_first_window(pending, parts)
            report = pending.apply(retries=self.runner.retries, run_again=self._run_again)
        self.microbatch_size.observe(report.retries)
        return report

    def _run_microbatches(self, pending: PendingUpdate, should_abandon: Callable[[], bool] = never) -> None:
        for microbatch in pending.microbatches(should_abandon):
            self.runner.run(microbatch, pending)
        self.runner.end(pending)

    def _check_first_window(self, pending: PendingUpdate, parts: Split) -> None:
        with pending.sums.paused():
            self._first_window.run(self.loss_fn, parts, may_join=self.lengths is None)

    @property
    def _run_again(self) -> Callable[[PendingUpdate], None] | None:
        """Runs a window again within its update; None where other ranks, CUDA graphs or a scaler depend on it."""
        is_alone = self.sync.size == 1 and not isinstance(self.runner, CudaGraphRunner)
        return self._run_microbatches if is_alone and self.accumulator.update.scaler is None else None

    @contextmanager
    def _open_window(self, batch: Any, should_stop: Callable[[], bool]) -> Iterator[tuple[PendingUpdate, Split]]:
        """Split the batch, agree with the other ranks, and open a window; discard it if it is not applied."""
        needs_agreement = self.sync.runs_in_lockstep or self.count_items is not None
        with self.accumulator.fail_together(before_window=needs_agreement):
            self.accumulator.prepare()
            lengths = self._lengths_of(batch)
            parts = self._split(batch, lengths)
            totals: Mapping[str, Items] | None = None if self.count_items is None else self.count_items(batch)
            self.runner.prepare()
            if self.sync.needs_padding_microbatch and parts.groups:
                self.sync.set_padding_microbatch(parts.take(parts.groups[-1][:1]))
        max_num_microbatches = len(parts.groups)
        if needs_agreement:
            max_num_microbatches, totals = self.accumulator.agree_on_start(max_num_microbatches, totals)
        tokens = None if lengths is None else sum(lengths)
        content = WindowContent(parts.groups, max_num_microbatches, totals, tokens, parts.num_samples)
        pending = self.accumulator.open(content, static_buffers=self.runner.static_buffers, should_stop=should_stop)
        loss_fn = self.loss_fn if self._first_window.is_done else self._first_window.watch(self.loss_fn, parts)
        source = Prefetcher(parts) if self.accumulator.device.type == "cuda" else nullcontext(parts)
        with (
            pending,
            source as taken_from,
            self._time_first.watch(taken_from.take) as take,
            self.runner.window(WindowInputs(loss_fn, take, lengths)),
        ):
            yield pending, parts

    def release_cuda_graphs(self) -> None:
        """Free the memory of CUDA graphs, for work between updates; they are captured again when needed."""
        self.runner.release()

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

        Raises:
            ValueError: It is of another model, optimizer, scheduler or scaler, of a newer version of bigbatch, or
                damaged; nothing is changed then.
        """
        self._training_state.restore(state, self._progress, self.accumulator.device)

    def groups(self, lengths: Sequence[int]) -> Sequence[Sequence[int]]:
        """Group samples of these lengths as the micro-batches of `step` would be at the moment.

        Raises:
            RuntimeError: No micro-batch is chosen yet.
            ValueError: A length is above the token budget.
        """
        return self.microbatch_size.groups(lengths)

    def _lengths_of(self, batch: Any) -> list[int] | None:
        return None if self.lengths is None else [int(length) for length in self.lengths(batch)]

    def _split(self, batch: Any, lengths: list[int] | None) -> Split:
        if lengths is None or self.token_budget is None:
            return split(batch, self.microbatch_size.current, **self._split_options)
        return split_into(batch, self.microbatch_size.groups(lengths), **self._split_options)
