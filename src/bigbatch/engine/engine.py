"""The conductor: a batch goes in, one update comes out.

split → window (forward, backward, accumulate) → sync → update → report

It is long because every setting is explained here once, for those who have no other page open.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from bigbatch.accumulation.accumulator import Accumulator as Accumulator
from bigbatch.accumulation.optimizer_update import NonFinite
from bigbatch.accumulation.pending_update import Wishes
from bigbatch.accumulation.training_state import capture, restore
from bigbatch.autotune.choice import MicrobatchChoice, TuningProblem, choose
from bigbatch.autotune.peak_prediction import prediction_obstacle
from bigbatch.batching.plan import Cost, TokenBudget, plan
from bigbatch.batching.prefetch import Prefetcher
from bigbatch.batching.split import Split, split, split_into
from bigbatch.batching.token_groups import group_by_tokens, round_down_row, round_up_row
from bigbatch.distributed.gradient_sync import GradientSync, SyncPolicy
from bigbatch.engine.checks import (
    check_graphs,
    check_layout,
    check_lengths,
    check_microbatch,
    check_sharded,
    initial_size,
)
from bigbatch.errors import MemoryLimitError, RankFailedError, WindowAbandonedError
from bigbatch.execution.cuda_graphs import CudaGraphRunner
from bigbatch.execution.oom_retry import OomRetry, add_sharded
from bigbatch.memory.usage import resolve_memory_budget
from bigbatch.types import Collate, Layout, LossFunction
from bigbatch.types import CountItems as CountItems
from bigbatch.window_report import WindowReport

if TYPE_CHECKING:
    from torch.amp import GradScaler
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


SHRINK_FACTOR = 0.93  # of the micro-batch, after a window that ran out of memory
WINDOWS_BEFORE_GROWTH = 20  # windows without running out, before the micro-batch grows back by a step


class Engine:
    """One exact update from one batch of any size.

        engine = Engine(model, optimizer, loss_fn, microbatch=8)
        for batch in loader:                        # on the CPU, as large as you like
            report = engine.step(batch)

    The gradient is Σ_i ∇loss_sum_i / Σ_i items_i over the micro-batches i of the batch: ``microbatch`` decides about
    memory and time, never about the result. No state outlives a step.

    Args:
        model: The module being trained; micro-batches are moved to the device of its first parameter.
        optimizer: As for `Accumulator`.
        loss_fn: ``loss_fn(model, microbatch) → (loss_sum, items)``: the 0-d **sum** of the item losses and how many
            items it runs over; or ``{term: (loss_sum, items)}``, whose total is Σ_term sum / items.
        microbatch: Samples of one forward and backward; or a `TokenBudget`, under which samples of like length come
            together so that little is padded, the largest micro-batch first; or ``"auto"``, the smallest within 2 % of
            the fastest that fits, in tokens where there are ``lengths`` and else in samples (see `tune`).
        memory: For ``"auto"``: what may be used, such as ``"24GiB"``, ``"80%"`` or a number of bytes; by default what
            is free when the micro-batch is chosen, less a margin of 2 %. On CUDA it counts what torch allocates there
            for this process, on the CPU the whole process. 5 % of it are kept free for gaps between allocations.
        collate: For batches that are lists of samples: makes one micro-batch of a list. Padding is then that of the
            micro-batch.
        lengths: ``lengths(batch) → one length per sample``, in tokens, for a `TokenBudget` and ``report.tokens``.
        layout: ``"padded"``, or ``"packed"`` where ``collate`` makes one row of a list of samples, none of them padded,
            and the loss keeps them apart: a micro-batch is then limited by the sum of its ``lengths``.
        cuda_graphs: Whether micro-batches of shapes that were seen before are launched as one, see
            `bigbatch.execution.cuda_graphs`: the same gradients, with the host out of the way. Only for a ``loss_fn``
            of one term that depends on the micro-batch and the model alone, and never reads a value back.
        count_items: ``count_items(batch) → {term: items}``, needed for a loss of several terms.
        max_grad_norm: As for `Accumulator`.
        scheduler: As for `Accumulator`.
        scaler: As for `Accumulator`.
        nonfinite: As for `Accumulator`.
        sync: As for `Accumulator`. Under several ranks the batch is this rank's share of it, and may be empty; `step`
            is collective, and so is `tune`, which measures on the first rank.
        noise: As for `Accumulator`.

    Raises:
        TypeError: A wrapper, optimizer or scheduler of a kind that cannot work this way.
        ValueError: A setting out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: "Optimizer",
        loss_fn: LossFunction,
        *,
        microbatch: int | TokenBudget | Literal["auto"] = "auto",
        memory: str | int | None = None,
        collate: Collate | None = None,
        lengths: Callable[[Any], Sequence[int]] | None = None,
        layout: Layout = "padded",
        cuda_graphs: bool = False,
        count_items: CountItems | None = None,
        max_grad_norm: float | None = None,
        scheduler: "LRScheduler | None" = None,
        scaler: "GradScaler | None" = None,
        nonfinite: NonFinite = "skip",
        sync: GradientSync | SyncPolicy | None = None,
        noise: bool = True,
    ) -> None:
        check_microbatch(microbatch, memory, lengths)
        self.accumulator = Accumulator(
            model,
            optimizer,
            max_grad_norm=max_grad_norm,
            scheduler=scheduler,
            scaler=scaler,
            nonfinite=nonfinite,
            sync=sync,
            noise=noise,
        )
        self.sync = self.accumulator.sync
        check_sharded(self.sync, microbatch, cuda_graphs)
        self.model = model
        self.loss_fn = loss_fn
        self.microbatch = microbatch
        self.memory = memory
        self.layout = check_layout(layout, lengths, collate)
        self.graph_runner = (
            CudaGraphRunner(model, loss_fn) if check_graphs(cuda_graphs, self.accumulator.device) else None
        )
        self.accumulator.uses_cuda_graphs = self.graph_runner is not None
        self.choice: MicrobatchChoice | None = None
        self._size = self._size_in_use = initial_size(microbatch)
        self._cost = Cost()
        self._good_windows = 0
        self._oom_retry = OomRetry(model, self.accumulator.device)
        self.collate = collate
        self.lengths = lengths
        self.count_items = count_items

    @property
    def token_budget(self) -> int | None:
        """Tokens that no micro-batch exceeds at the moment; None where samples are the limit, or none is chosen yet."""
        return None if self.lengths is None or isinstance(self.microbatch, int) else self._size_in_use or None

    def tune(self, batch: Any) -> MicrobatchChoice:
        """Choose the micro-batch for batches like this one, as the first `step` does under ``microbatch="auto"``.

        The peak is predicted by running the step on tensors without data, and corrected by what a real micro-batch
        takes; then some sizes are timed, for at most half a minute. Nothing is learned, no random number is drawn, and
        gradients are thrown away. Where the step cannot run without data, sizes are tried until one does not fit.

        Args:
            batch: As for `step`, with the longest sample that will come.

        Raises:
            MemoryLimitError: A single sample does not fit.
            RankFailedError: Measuring raised something else on the first rank.
            ValueError: The batch is empty, ``memory`` is no amount, there is not one length for each sample, or the
                micro-batch is decided.
        """
        if self.microbatch != "auto":
            raise ValueError(f'microbatch={self.microbatch!r} is decided: pass microbatch="auto" to have it chosen.')
        if self.sync.size == 1:
            return self._measure(batch)
        if self.sync.rank == 0:
            try:
                choice = self._measure(batch)
            except BaseException as error:
                self.sync.broadcast_text(
                    json.dumps({"problem": str(error), "memory": isinstance(error, MemoryLimitError)})
                )
                raise
            self.sync.broadcast_text(json.dumps({"choice": asdict(choice)}))
            return choice
        told = json.loads(self.sync.broadcast_text(""))
        if "problem" in told:
            if told["memory"]:
                raise MemoryLimitError(told["problem"])
            raise RankFailedError(f"rank 0 failed while it chose the micro-batch for all ranks: {told['problem']}")
        choice = MicrobatchChoice.from_dict(told["choice"])
        self.set_microbatch(choice)
        return choice

    def _measure(self, batch: Any) -> MicrobatchChoice:
        lengths = self._lengths_of(batch)
        everything = split(batch, 1, device=self.accumulator.device, collate=self.collate)
        if lengths is not None:
            check_lengths(lengths, everything.num_samples)
        self.accumulator.prepare()
        self.release_cuda_graphs()
        step = TuningProblem(
            self.sync.module,
            self.accumulator.optimizer,
            self.loss_fn,
            everything,
            lengths,
            uniform_length=self.collate is None,
            layout=self.layout,
            uses_cuda_graphs=self.graph_runner is not None,
            prediction_obstacle=prediction_obstacle(self.sync.module),
        )
        budget = resolve_memory_budget(self.memory, self.accumulator.device, step.resident_tensors())
        self.set_microbatch(choose(step, budget))
        assert self.choice is not None, "just taken"
        return self.choice

    def set_microbatch(self, choice: MicrobatchChoice) -> None:
        """Take a choice that `tune` made before, for the same model and settings, instead of making it again.

        Raises:
            ValueError: The micro-batch of this engine is decided, or is not limited in what the choice counts.
        """
        unit = "samples" if self.lengths is None else "tokens"
        if self.microbatch != "auto":
            raise ValueError(f'microbatch={self.microbatch!r} is decided: pass microbatch="auto" to take a choice.')
        if choice.unit != unit:
            change = "leave lengths= out" if self.lengths is not None else "pass lengths="
            raise ValueError(f"the choice is in {choice.unit}, and this engine counts {unit}: {change}, or tune anew.")
        self.choice = choice
        self._size = self._size_in_use = choice.size
        self._cost = choice.timing.cost(choice.size)
        self._good_windows = 0

    def step(
        self,
        batch: Any,
        *,
        should_abandon: Callable[[], bool] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> WindowReport:
        """Apply the gradient of the whole batch, once.

        Args:
            batch: A pytree of tensors ``[samples, ...]`` on any device, or with ``collate`` a list of samples.
            should_abandon: Asked before each micro-batch; once it says True, the window ends there and changes nothing.
                Under several ranks it ends on all once they have told one another; of a sharded model, after all
                micro-batches.
            should_stop: Asked at the end: whether to stop after this update. What any rank says is in ``report.ranks``.

        Where memory runs out in mid-window, the micro-batch that failed is run again, then in halves, and every sample
        still counts once; the next windows use micro-batches smaller by 7 % (packed rows: by one of their sizes), which
        grow back after 20 good windows.
        Whatever else ``loss_fn`` raises passes through, with the window aborted and the gradients cleared. An empty
        batch is a window without items.

        Raises:
            MemoryLimitError: A single sample does not fit in memory.
            NonFiniteError: The loss or the gradient is not finite, and that is to be an error.
            RankFailedError: Another rank failed in this window, which changed nothing.
            TypeError: The batch cannot be cut, or ``loss_fn`` returned something else than sums and items.
            ValueError: A loss or a count is not what it must be; the message says which.
            WindowAbandonedError: ``should_abandon`` said so. Random numbers that were drawn are drawn.
        """
        if not self._size:
            self.tune(batch)
        graph_runner, oom_retry, sync = self.graph_runner, self._oom_retry, self.sync
        opens = sync.runs_in_lockstep or self.count_items is not None
        with self.accumulator.failing_together(opens=opens):
            self.accumulator.prepare()
            lengths = self._lengths_of(batch)
            parts = self._split(batch, lengths)
            totals = None if self.count_items is None else self.count_items(batch)
            if graph_runner is not None:
                graph_runner.prepare()
            if sync.runs_in_lockstep and self.accumulator.padding_microbatch is None and parts.groups:
                self.accumulator.padding_microbatch = parts.take(parts.groups[-1][:1])
        num_to_run = len(parts.groups)
        if opens:
            num_everywhere, totals = self.accumulator.agree_on_start(num_to_run, totals)
            num_to_run = num_everywhere if sync.runs_in_lockstep else num_to_run
        window, pending = self.accumulator.open(
            (), totals, static_buffers=None if graph_runner is None else graph_runner.static_buffers
        )
        pending.wishes = wishes = Wishes(
            tokens=None if lengths is None else sum(lengths),
            samples=parts.num_samples,
            stopping=should_stop or (lambda: False),
        )
        oom_retry.begin(pending, lengths)
        prefetcher = Prefetcher(parts)

        def forward(rows: Sequence[int]) -> Any:
            return self.loss_fn(
                self.model, prefetcher.take(rows) if pending.counts else self.accumulator.padding_microbatch
            )

        def add(rows: Sequence[int]) -> None:
            if sync.runs_in_lockstep:
                add_sharded(pending, forward, rows)
            elif (
                graph_runner is None
                or not graph_runner.is_ready
                or not graph_runner.run(prefetcher.take(rows), pending)
            ):
                oom_retry.add(forward, rows)

        try:
            with prefetcher:
                for rows in self.accumulator.in_step(pending, parts.groups, (), num_to_run):
                    if should_abandon is not None and should_abandon():
                        wishes.abandoned = True
                        if sync.size == 1:
                            raise WindowAbandonedError(
                                f"the window was given up before its micro-batch of {len(rows)} samples."
                            )
                        if not sync.runs_in_lockstep:
                            break
                    window.run(add, rows)
            wishes.measures = not oom_retry.num_failures
            if graph_runner is not None and not oom_retry.num_failures:
                graph_runner.adopt_buffers(pending.sums)
            report = window.step()
        finally:
            window.abort()
        self._adapt(oom_retry.num_failures)
        return replace(report, retries=oom_retry.num_failures)

    def release_cuda_graphs(self) -> None:
        """Give back the memory of recorded micro-batches, for work between updates; they are recorded again."""
        if self.graph_runner is not None:
            self.graph_runner.release()

    @property
    def progress(self) -> dict[str, Any]:
        """What the micro-batches of the next windows depend on, as plain values."""
        return {
            "size": self._size,
            "size_in_use": self._size_in_use,
            "good_windows": self._good_windows,
            "choice": None if self.choice is None else asdict(self.choice),
            "noise": None if self.accumulator.noise is None else self.accumulator.noise.state_dict(),
        }

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Go on with micro-batches as an engine left them; where this one's are limited otherwise, keep to its own."""
        if self.microbatch == "auto" and progress["choice"] is not None:
            self.set_microbatch(MicrobatchChoice.from_dict(progress["choice"]))
        if self.accumulator.noise is not None and progress.get("noise") is not None:
            self.accumulator.noise.load_state_dict(progress["noise"])
        if self._size == progress["size"]:
            self._size_in_use, self._good_windows = progress["size_in_use"], progress["good_windows"]

    def state_dict(self) -> dict[str, Any]:
        """Collect everything that the next windows depend on, but their data.

        Tensors are those in use: save them, or copy them, before the next `step`. State exists between windows alone.
        """
        return capture(self.sync.module, self.accumulator.update, self.progress, self.accumulator.device)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, to the last bit: `bigbatch.accumulation.training_state.restore`.

        Raises:
            ValueError: It is of another model, optimizer, scheduler or scaler; nothing is changed then.
        """
        self.resume(restore(self.sync.module, self.accumulator.update, state, self.accumulator.device))

    def _lengths_of(self, batch: Any) -> list[int] | None:
        return None if self.lengths is None else [int(length) for length in self.lengths(batch)]

    def _split(self, batch: Any, lengths: list[int] | None) -> Split:
        device = self.accumulator.device
        if lengths is None or isinstance(self.microbatch, int):
            return split(batch, self._size_in_use, device=device, collate=self.collate)
        return split_into(batch, self.groups(lengths), device=device, collate=self.collate)

    def groups(self, lengths: Sequence[int]) -> Sequence[Sequence[int]]:
        """Group samples of some lengths as the micro-batches of `step` would, those in use at the moment.

        Raises:
            RuntimeError: No micro-batch is chosen yet.
            ValueError: A length is above the token budget.
        """
        if not self._size_in_use:
            raise RuntimeError("no micro-batch is chosen yet: call tune(batch) first, or step(batch), which does it.")
        if self.token_budget is None:
            size = self._size_in_use
            return [range(start, min(start + size, len(lengths))) for start in range(0, len(lengths), size)]
        if isinstance(self.microbatch, TokenBudget) and max(lengths, default=1) > self.microbatch.tokens:
            plan(lengths, token_budget=self.microbatch.tokens)  # names the sample: this budget was asked for
        return group_by_tokens(lengths, self._size_in_use, cost=self._cost, layout=self.layout)

    def _adapt(self, num_failures: int) -> None:
        """Take smaller micro-batches after a window that ran out of memory, and larger ones again after many good."""
        self._good_windows = 0 if num_failures else self._good_windows + 1
        now = self._size_in_use
        if num_failures:
            smaller = max(1, min(now - 1, int(now * SHRINK_FACTOR)))
            self._size_in_use = smaller if self.layout == "padded" else round_down_row(smaller)
        elif self._good_windows % WINDOWS_BEFORE_GROWTH == 0 and now < self._size:
            larger = math.ceil(now / SHRINK_FACTOR) if self.layout == "padded" else round_up_row(now + 1)
            self._size_in_use = min(self._size, larger)
