"""Split the batches of an engine, and open their windows.

batch → lengths → micro-batches of samples → agreement with the other ranks → open window, inputs of its runner
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from bigbatch.accumulation.accumulator import Accumulator
from bigbatch.accumulation.pending_update import PendingUpdate
from bigbatch.accumulation.window_content import WindowContent
from bigbatch.batching.prefetch import Prefetcher
from bigbatch.batching.split import Split, split, split_into, split_options
from bigbatch.batching.time_first import TimeFirstCheck
from bigbatch.engine.checks import check_num_lengths, check_switches
from bigbatch.engine.microbatch_size import MicrobatchSize
from bigbatch.engine.quanta import check_quanta
from bigbatch.engine.weight_probe import probe_weights
from bigbatch.execution.runner import MicrobatchRunner, WindowInputs
from bigbatch.gradients.fused_gradients import FusedGradients
from bigbatch.types import Collate, CountItems, Items, LossFunction
from bigbatch.verification.first_window import FirstWindowCheck


class BatchSplitter:
    """Splits batches into samples or micro-batches on the device of the model.

    Args:
        accumulator: Its model decides on which device micro-batches are.
        quantum: Samples that are always computed together; None if micro-batches are cut by their size.
        collate: As for `bigbatch.Engine`.
        batch_dim: As for `bigbatch.Engine`.
        lengths: As for `bigbatch.Engine`.

    Attributes:
        quantum: As passed.
        uniform_length: Whether samples are rows of tensors, which keep their padding.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        quantum: int | None = None,
        *,
        collate: Collate | None,
        batch_dim: int | None,
        lengths: Callable[[Any], Sequence[int]] | None,
    ) -> None:
        self._lengths, self.quantum, self.uniform_length = lengths, quantum, collate is None
        self._options = split_options(accumulator.device, collate, batch_dim)
        self.time_first = TimeFirstCheck(accumulator.model if collate is None and batch_dim is None else nn.Identity())

    def lengths_of(self, batch: Any) -> list[int] | None:
        """Return the length of each sample; None if lengths are unknown."""
        return None if self._lengths is None else [int(length) for length in self._lengths(batch)]

    def samples(self, batch: Any) -> Split:
        """Split a batch into its samples."""
        return split(batch, 1, **self._options)

    def groups(self, lengths: Sequence[int], size: MicrobatchSize) -> Sequence[Sequence[int]]:
        """Group samples of these lengths as `split` does."""
        if self.quantum is None:
            return size.groups(lengths)
        return [range(start, min(start + self.quantum, len(lengths))) for start in range(0, len(lengths), self.quantum)]

    def split(self, batch: Any, lengths: list[int] | None, size: MicrobatchSize) -> Split:
        """Split a batch into micro-batches of the current size.

        Raises:
            ValueError: Lengths and samples differ in number, or a length is not valid, or a quantum is above the
                micro-batch.
        """
        if self.quantum is not None:
            parts = split(batch, self.quantum, **self._options)
            if lengths is not None:
                check_num_lengths(lengths, parts.num_samples)
            check_quanta(parts.groups, lengths, size)
            return parts
        if lengths is None:
            return split(batch, size.current, **self._options)
        if size.token_budget is None:
            parts = split(batch, size.current, **self._options)
        else:
            parts = split_into(batch, size.groups(lengths), **self._options)
        check_num_lengths(lengths, parts.num_samples)
        return parts


def first_window_check(accumulator: Accumulator, *, enabled: bool, names_norms: bool) -> FirstWindowCheck:
    """Return the check of the first window of an engine: on the first rank only."""
    check_switches(check=enabled)
    sync = accumulator.sync
    return FirstWindowCheck(
        accumulator.model,
        enabled=enabled and not sync.rank,
        evaluates=sync.size == 1,
        names_norms=names_norms,
        names_dropout=accumulator.reproducible is None,
    )


def run_again(accumulator: Accumulator, runner: MicrobatchRunner) -> Callable[[PendingUpdate], None] | None:
    """Return what runs a window again within its update; None where ranks, CUDA graphs or a scaler depend on it."""
    is_alone = accumulator.sync.size == 1 and not runner.captures_graphs
    return runner.run_all_again if is_alone and accumulator.update.scaler is None else None


@contextmanager
def open_window(
    batch: Any,
    accumulator: Accumulator,
    runner: MicrobatchRunner,
    splitter: BatchSplitter,
    microbatch_size: MicrobatchSize,
    *,
    loss_fn: LossFunction,
    count_items: CountItems | None,
    first_window: FirstWindowCheck,
    fused: FusedGradients,
    should_stop: Callable[[], bool],
) -> Iterator[tuple[PendingUpdate, Split]]:
    """Split the batch, agree with the other ranks, and open a window; discard it if it does not end by itself.

    In windows that measure the noise scale, which needs the gradient of each micro-batch, no layer is fused.
    """
    sync = accumulator.sync
    needs_agreement = sync.runs_in_lockstep or count_items is not None or runner.waits_for_ranks
    with accumulator.fail_together(before_window=needs_agreement):
        accumulator.prepare()
        lengths = splitter.lengths_of(batch)
        parts = splitter.split(batch, lengths, microbatch_size)
        if accumulator.update.offload is not None:
            probe_weights(accumulator, loss_fn, parts)
        totals: Mapping[str, Items] | None = None if count_items is None else count_items(batch)
        runner.prepare()
        if runner.runs_again or accumulator.update.steps.require_closure:
            parts = parts.copied()
        if sync.needs_padding_microbatch and parts.groups:
            sync.set_padding_microbatch(parts.copied().take(parts.groups[-1][:1]))
    max_num_microbatches = len(parts.groups)
    if needs_agreement:
        max_num_microbatches, totals = accumulator.agree_on_start(max_num_microbatches, totals)
    runner.begin(parts.num_samples)
    tokens = None if lengths is None else sum(lengths)
    content = WindowContent(parts.groups, max_num_microbatches, totals, tokens, parts.num_samples)
    pending = accumulator.open(
        content, static_buffers=runner.static_buffers, should_stop=should_stop, overlaps=runner.overlaps
    )
    watched = loss_fn if first_window.is_done else first_window.watch(loss_fn, parts)
    # A collate may draw random numbers: those of its own quantum only if nothing is prefetched.
    looks_ahead = accumulator.reproducible is None
    source = Prefetcher(parts, looks_ahead=looks_ahead) if accumulator.device.type == "cuda" else nullcontext(parts)
    time_first = splitter.time_first
    measures = accumulator.noise is not None and accumulator.noise.is_measuring
    with (
        pending,
        source as taken_from,
        nullcontext(taken_from.take) if time_first.is_done else time_first.watch(taken_from.take) as watched_take,
        nullcontext(watched_take)
        if measures or fused.obstacle is not None
        else fused.window(pending.sums, watched_take) as take,
        runner.window(WindowInputs(watched, take, lengths, parts)),
    ):
        yield pending, parts
