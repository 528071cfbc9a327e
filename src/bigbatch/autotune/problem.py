"""The training step whose micro-batch is to be chosen: its batch, and the micro-batches that it can bring."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bigbatch.autotune.peak_prediction import state_of
from bigbatch.batching.plan import Cost
from bigbatch.batching.split import Split
from bigbatch.batching.token_groups import DEFAULT_COST, group_by_tokens, round_down_row, round_up_row
from bigbatch.gradients.gradient_sums import optimizer_parameters
from bigbatch.memory.allocation_tracker import tensors_in
from bigbatch.types import Layout

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from bigbatch.types import LossFunction

SMALLEST_SHARE = 16  # of the longest sample: the smallest size that is timed
FULL_ENOUGH = 0.99  # of the tokens of the fullest micro-batch: a longer sample is taken in its place


@dataclass(frozen=True)
class TuningProblem:
    """The training step whose micro-batch is to be chosen.

    Attributes:
        model: In training mode, on its device.
        optimizer: Over its parameters.
        loss_fn: As for `bigbatch.Engine`.
        batch: What micro-batches are taken of.
        lengths: Tokens of each sample, where the micro-batch is limited in tokens.
        uniform_length: Whether all samples are laid out alike, as in tensors, which keep the padding that they came
            with; otherwise micro-batches are collated, and padded to their longest sample.
        layout: ``"packed"`` where micro-batches are collated into one row, whose sizes are those of `round_up`.
        uses_cuda_graphs: Whether micro-batches will be launched from recordings, see `bigbatch.execution.cuda_graphs`.
        prediction_obstacle: Why the step cannot run without data, where that is known.
    """

    model: nn.Module
    optimizer: "Optimizer"
    loss_fn: "LossFunction"
    batch: Split
    lengths: Sequence[int] | None
    uniform_length: bool = False
    layout: Layout = "padded"
    uses_cuda_graphs: bool = False
    prediction_obstacle: str | None = None

    @property
    def num_samples(self) -> int:
        """Samples of the batch."""
        return self.batch.num_samples

    @property
    def parameters(self) -> list[Tensor]:
        """Those of the optimizer."""
        return optimizer_parameters(self.optimizer)

    def resident_tensors(self) -> list[Tensor]:
        """What is there already: parameters, buffers, and the optimizer's state."""
        return [*self.model.parameters(), *self.model.buffers(), *self.parameters, *state_of(self.optimizer)]

    def peek(self, rows: Sequence[int]) -> Any:
        """Give a micro-batch where the batch is, which may have more memory than the device."""
        return pytree.tree_unflatten(*self.batch.gather(rows))

    @property
    def longest_sample(self) -> int:
        """What has to fit: one sample, whichever it is."""
        return 1 if self.lengths is None else max(self.lengths)

    @property
    def first_size(self) -> int:
        """The smallest size that is timed: under it, samples that are longer run alone."""
        if self.lengths is None:
            return 1
        if self.layout == "packed":
            return round_up_row(max(self.lengths))
        middling = sorted(self.lengths, reverse=True)[self.num_samples // 2]
        return max(middling, max(self.lengths) // SMALLEST_SHARE)

    @property
    def unit(self) -> str:
        """What sizes count."""
        return "samples" if self.lengths is None else "tokens"

    def worst_cases(self, size: int) -> list[Sequence[int]]:
        """Samples of the fullest micro-batches that batches of such samples can bring, those of this one repeated.

        As many as fit of the longest sample, and of the longest of those that fill the size best. Of tensors, as many
        rows as this batch brings: how many tokens of them are no padding does not change what they take.

        Args:
            size: At least `least`.
        """
        if self.uniform_length:
            return [range(self._most_rows(size))]
        if self.lengths is None:
            return [[self._heaviest] * size]
        if self.layout == "packed":
            return [self._fill_row(size)]
        filled = FULL_ENOUGH * self.usable_size(size)
        fullest = max(length for length in self._where if size // length * length >= filled)
        return [[self._where[length]] * (size // length) for length in dict.fromkeys((self.longest_sample, fullest))]

    def _fill_row(self, size: int) -> list[int]:
        """Samples that fill a row of so many tokens, the longest first."""
        rows: list[int] = []
        for length in sorted(self._where, reverse=True):
            rows += [self._where[length]] * (size // length)
            size %= length
        return rows

    def usable_size(self, size: int) -> int:
        """Of a size, what a micro-batch of such samples can use: between it and the size, all cuts are the same."""
        if self.layout == "packed":
            return max(round_up_row(self.longest_sample), round_down_row(size))
        if self.lengths is None or self.uniform_length or size < self.longest_sample:
            return size
        return max(size // length * length for length in self._where)

    @cached_property
    def _where(self) -> dict[int, int]:
        """A sample of each length."""
        assert self.lengths is not None, "asked for only where tokens are counted"
        return {length: sample for sample, length in enumerate(self.lengths)}

    @cached_property
    def _heaviest(self) -> int:
        """The sample with the most bytes, where nobody tells lengths."""
        return max(range(self.num_samples), key=lambda sample: _num_bytes(self.peek([sample])))

    def _most_rows(self, size: int) -> int:
        if self.lengths is None:
            return size
        return max(min(size // length, rows) for rows, length in enumerate(sorted(self.lengths), start=1))

    def groups(self, size: int, cost: Cost = DEFAULT_COST) -> Sequence[Sequence[int]]:
        """The batch in micro-batches of at most that size."""
        if self.lengths is None:
            return [range(i, min(i + size, self.num_samples)) for i in range(0, self.num_samples, size)]
        return group_by_tokens(self.lengths, size, cost=cost, layout=self.layout)

    @property
    def whole_batch_size(self) -> int:
        """The size from which on the whole batch is one micro-batch, about."""
        if self.lengths is None:
            return self.num_samples
        return sum(self.lengths) if self.layout == "packed" else self.num_samples * max(self.lengths)

    def size_of(self, rows: Sequence[int]) -> int:
        """Tokens with padding, or samples, of a micro-batch."""
        if self.lengths is not None and self.layout == "packed":
            return round_up_row(sum(self.lengths[i] for i in rows))
        return len(rows) if self.lengths is None else len(rows) * max(self.lengths[i] for i in rows)

    @property
    def total(self) -> int:
        """Tokens without padding, or samples, of the batch."""
        return self.num_samples if self.lengths is None else sum(self.lengths)


def _num_bytes(microbatch: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(pytree.tree_leaves(microbatch)))
