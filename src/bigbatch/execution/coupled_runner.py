"""Run the windows of a `Coupled` loss: two passes over the micro-batches, and the loss on all features in between.

    run: encode a micro-batch without gradients
    end: the loss on all features → its gradient for each → encode again, and add their gradients to the sums

If memory runs out in the first pass, the micro-batch is encoded in halves. In the second pass it is differentiated in
halves if their features are the same; else, with dropout for example, the window starts again with halves.

Long because both passes can run out of memory, on ranks that wait for each other or do not.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.accumulation.pending_update import PendingUpdate
from bigbatch.coupled.coupled import Coupled
from bigbatch.coupled.features import Features
from bigbatch.coupled.rank_features import RankFeatures
from bigbatch.coupled.two_passes import EncodedPart, TwoPasses
from bigbatch.distributed.gradient_sync import GradientSync, Microbatch, MultiRankSync, never
from bigbatch.errors import MemoryLimitError, RankFailedError, first_line
from bigbatch.execution.oom_retry import OomRetry, halves, too_large
from bigbatch.execution.runner import MicrobatchRunner, WindowInputs, lockstep_memory_error
from bigbatch.gradients.discarded_backward import backward_and_discard
from bigbatch.gradients.leaf_backward import backward_with_leaves
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory

Rows = Sequence[int]


class CoupledRunner(MicrobatchRunner):
    """Runs windows whose loss is a `Coupled`.

    Args:
        model: As for `MicrobatchRunner`.
        coupled: The loss of the engine.
        sync: Of the model.
        device: Of its first parameter.
    """

    runs_again = True

    def __init__(self, model: nn.Module, coupled: Coupled, sync: GradientSync, device: torch.device) -> None:
        super().__init__(model)
        self._sync = sync
        self._passes = TwoPasses(model, coupled)
        self._retry = OomRetry(model, device)
        self._exchange: RankFeatures | None = None
        if coupled.gather == "all" and isinstance(sync, MultiRankSync) and sync.size > 1:
            self._exchange = RankFeatures(sync.ranks, sync.group, device)
        self.waits_for_ranks = self._exchange is not None
        self._only: Rows | None = None  # the first micro-batch, until there is another
        self._turns: list[tuple[Microbatch, EncodedPart]] = []  # in lockstep
        self._others_wait = False

    @property
    def _coupled(self) -> Coupled:
        coupled = self.inputs.loss_fn
        assert isinstance(coupled, Coupled), "the runner is that of a Coupled loss"
        return coupled

    def prepare(self) -> None:
        """Prepare for a window, before it opens."""
        self.retries = 0

    @contextmanager
    def window(self, inputs: WindowInputs) -> Iterator[None]:
        """Run one window. If it fails before all ranks have ended their second pass, they fail, too."""
        self._start()
        self._others_wait = self._exchange is not None
        try:
            with super().window(inputs):
                yield
        except BaseException as error:
            if self._others_wait and self._exchange is not None and not isinstance(error, RankFailedError):
                self._exchange.announce_failure()
            raise
        finally:
            self._start()

    def _start(self) -> None:
        self._passes.start()
        self._only, self._turns = None, []

    def run(self, microbatch: Microbatch, pending: PendingUpdate) -> None:
        """Encode one micro-batch without gradients; a window of a single one waits for `end`.

        Raises:
            MemoryLimitError: One sample does not fit in memory by itself; or memory ran out in lockstep.
        """
        if self._sync.runs_in_lockstep:
            self._encode_in_lockstep(microbatch)
        elif self._only is None and not self._passes.parts and self._exchange is None:
            self._only = microbatch.content
        else:
            self._encode_first()
            self._encode(microbatch.content)

    def end(self, pending: PendingUpdate, should_abandon: Callable[[], bool] = never) -> None:
        """Compute the loss, and run the second pass.

        Raises:
            InputError: ``encode`` returned other features than in the first pass, or of shapes that do not go together.
            MemoryLimitError: The loss, or one sample, does not fit in memory.
            RankFailedError: Another rank failed.
            WindowAbandonedError: ``should_abandon`` returned True, in a single process.
        """
        if self._only is not None and self._run_whole(self._only, pending):
            self._start()
            return
        self._encode_first()
        while True:
            self._differentiate_loss(pending)
            groups = self._second_pass(pending, should_abandon)
            again = groups is not None
            if self._exchange is not None:
                again = self._exchange.any_rank(again)
            if not again:
                break
            self._restart(pending, groups)
        self._others_wait = False
        self._passes.end()
        self._start()

    def _run_whole(self, rows: Rows, pending: PendingUpdate) -> bool:
        """Run a window of one micro-batch in one pass; return whether it fits in memory."""
        states = self._passes.save()
        try:
            pending.add(self._coupled.of_whole_batch(self._model, self.inputs.take(rows), len(rows)))
            return True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = first_line(error)
        self._recover(states, message, rows)
        pending.restart()
        self._only = None
        for half in halves(rows):
            self._encode(half)
        return False

    def _recover(self, states: Any, message: str, rows: Rows) -> None:
        """Undo an attempt that ran out of memory; call it outside of an except block, which holds tensors."""
        if len(rows) == 1:
            raise too_large(rows[0], message, self.inputs.lengths)
        self.retries += 1
        self._passes.rollback(states)
        free_cached_memory()

    def _encode_first(self) -> None:
        if self._only is not None:
            rows, self._only = self._only, None
            self._encode(rows)

    def _encode(self, rows: Rows) -> None:
        states = self._passes.save()
        try:
            self._passes.encode(self._coupled, rows, self.inputs.take)
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = first_line(error)
        self._recover(states, message, rows)
        for half in halves(rows):
            self._encode(half)

    def _encode_in_lockstep(self, microbatch: Microbatch) -> None:
        rows = microbatch.content if microbatch.counts else ()
        with self._errors_in_lockstep(rows):
            if microbatch.counts:
                self._passes.encode(self._coupled, rows, self.inputs.take)
                part = self._passes.parts[-1]
            else:
                part = self._passes.encoded(self._coupled, lambda: microbatch.content)
        self._turns.append((microbatch, part))

    @contextmanager
    def _errors_in_lockstep(self, rows: Rows) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise lockstep_memory_error(len(rows), first_line(error), is_sharded=self._sync.is_sharded) from None

    def _differentiate_loss(self, pending: PendingUpdate) -> None:
        """Add the gradient of the parameters that the loss uses, and keep those of the features."""
        try:
            self._loss_on_features(pending)
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = first_line(error)
        free_cached_memory()
        raise MemoryLimitError(
            f"the loss of Coupled on the features of {self._passes.num_samples:,} samples does not fit in memory "
            f"({message}), whatever the micro-batch: use a smaller batch, or compute the loss in blocks of rows with "
            "activation checkpointing."
        )

    def _loss_on_features(self, pending: PendingUpdate) -> None:
        passes, num_samples = self._passes, self._passes.num_samples
        padding = [part for microbatch, part in self._turns if not microbatch.counts]
        if self._exchange is not None:
            self._loss_of_all_ranks(pending, self._exchange, padding)
        elif num_samples:
            self._backward(passes.loss_sum(self._coupled), pending)
        elif padding:  # other ranks may wait in layers that the loss uses
            self._backward_of_padding(passes.loss_sum(self._coupled, parts=padding[:1]), pending)

    def _loss_of_all_ranks(self, pending: PendingUpdate, exchange: RankFeatures, padding: list[EncodedPart]) -> None:
        passes = self._passes
        if not passes.parts and not padding:
            counts = exchange.counts(None)
            if counts.num_samples:
                exchange.gather(None, counts)
            return
        num_ranks = self._sync.size

        def gather(own: Features) -> tuple[Features, float]:
            nonlocal num_ranks
            own = own if passes.parts else own.first(0)
            counts = exchange.counts(own)
            num_ranks = num_ranks if self._sync.runs_in_lockstep else counts.num_ranks
            gathered = exchange.gather(own, counts)
            assert gathered is not None, "this rank has features"
            return gathered, counts.num_samples / num_ranks  # parameters of the loss count once over all ranks

        loss_sum = passes.loss_sum(self._coupled, parts=None if passes.parts else padding[:1], gather=gather)
        self._backward(loss_sum, pending, num_ranks=num_ranks)

    def _backward(self, loss_sum: Tensor, pending: PendingUpdate, *, num_ranks: int = 1) -> None:
        factor = pending.factor_of_leaves(self._passes.num_samples)
        with self._sync.backward(counts=True):
            backward_with_leaves(loss_sum * factor, pending.sums, self._passes.leaves)
        self._passes.keep_gradients(num_ranks / factor)

    def _backward_of_padding(self, loss_sum: Tensor, pending: PendingUpdate) -> None:
        pending.factor_of_leaves(1)
        if not self._sync.is_sharded:
            backward_and_discard(loss_sum, pending.sums)
        elif loss_sum.requires_grad:
            with self._sync.backward(counts=True):
                backward_with_leaves(loss_sum * 0.0, pending.sums, self._passes.leaves)
        self._passes.keep_gradients()

    def _second_pass(self, pending: PendingUpdate, should_abandon: Callable[[], bool]) -> list[Rows] | None:
        """Encode again and add the gradients; return the micro-batches to start again with if memory ran out."""
        passes, take, coupled = self._passes, self.inputs.take, self._coupled
        if self._sync.runs_in_lockstep:
            for _, (microbatch, part) in zip(pending.microbatches(should_abandon), self._turns, strict=True):
                self._differentiate_in_lockstep(microbatch, part, pending)
            return None
        if not passes.parts:
            return None
        turns = pending.microbatches(should_abandon, again=passes.parts)
        if passes.can_be_cut_again:
            self._differentiate_in_pieces(turns, pending)
            return None
        for part in (turn.content for turn in turns):
            try:
                pending.add(passes.linear_loss(coupled, part.rows, take, part.state))
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                message = first_line(error)
            if len(part.rows) == 1:
                raise too_large(part.rows[0], message, self.inputs.lengths)
            self.retries += 1
            return _smaller([each.rows for each in passes.parts], than=len(part.rows))
        return None

    def _differentiate_in_pieces(self, turns: Iterator[Microbatch], pending: PendingUpdate) -> None:
        inputs, passes = self.inputs, self._passes

        def loss_fn(_model: Any, rows: Rows) -> tuple[Tensor, int]:
            return passes.linear_loss(self._coupled, rows, inputs.take, None)

        self._retry.prepare()
        with self._retry.window(WindowInputs(loss_fn, lambda rows: rows, inputs.lengths, inputs.parts)):
            for turn in turns:
                self._retry.run(Microbatch(turn.content.rows), pending)
        self.retries += self._retry.retries

    def _differentiate_in_lockstep(self, microbatch: Microbatch, part: EncodedPart, pending: PendingUpdate) -> None:
        rows = part.rows
        compute: Callable[[], tuple[Tensor, int]]
        if microbatch.counts:
            compute = lambda: self._passes.linear_loss(self._coupled, rows, self.inputs.take, part.state)  # noqa: E731
        else:
            compute = partial(self._passes.padding_loss, self._coupled, microbatch.content, part.state)
        with self._errors_in_lockstep(rows):
            pending.add(compute(), counts=microbatch.counts)

    def _restart(self, pending: PendingUpdate, groups: list[Rows] | None) -> None:
        """Run the first pass again, on this rank with smaller micro-batches if its memory ran out."""
        passes = self._passes
        groups = [part.rows for part in passes.parts] if groups is None else groups
        pending.restart()
        if passes.parts:
            passes.undo()
        passes.start()
        free_cached_memory()
        for rows in groups:
            self._encode(rows)


def _smaller(groups: Sequence[Rows], *, than: int) -> list[Rows]:
    """Cut micro-batches of at least a size into halves."""
    return [half for rows in groups for half in (halves(rows) if len(rows) >= than else [rows])]
