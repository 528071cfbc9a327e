"""The training step to tune: its batch, and the micro-batches that batches like it can contain."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from bigbatch.accumulation.optimizer_checks import as_optimizers
from bigbatch.accumulation.optimizer_update import trained_parameters
from bigbatch.autotune.peak_prediction import state_of
from bigbatch.batching.plan import Cost
from bigbatch.batching.split import Split
from bigbatch.batching.token_groups import DEFAULT_COST, group_by_tokens, round_down_row, round_up_row
from bigbatch.gradients.sum_store import SumStore
from bigbatch.memory.allocation_tracker import tensors_in
from bigbatch.types import Layout

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from bigbatch.types import LossFunction

SMALLEST_SHARE = 16  # the first size that is timed is at least the longest sample divided by this
FULL_ENOUGH = 0.99  # of the largest micro-batch in tokens: worst cases prefer longer samples above it


def _no_wait(_: float) -> float:
    return 0.0


@dataclass(frozen=True)
class TuningProblem:
    """The training step whose micro-batch size is tuned.

    Attributes:
        model: In training mode, on its device.
        optimizer: Over the parameters of ``model``; or several; None if other code updates the weights.
        loss_fn: As for `bigbatch.Engine`.
        batch: The batch of one window of this rank.
        lengths: Tokens of each sample, if the micro-batch is limited in tokens; None if limited in samples.
        uniform_length: Whether all samples have the same laid-out length, as rows of tensors, which keep their padding;
            otherwise micro-batches are collated and padded to their longest sample.
        layout: ``"packed"`` if micro-batches are collated into one row, with the sizes of `round_up_row`.
        uses_cuda_graphs: Whether micro-batches are replayed as CUDA graphs, see `bigbatch.execution.cuda_graphs`.
        prediction_obstacle: Why the step cannot run on fake tensors, if known in advance.
        copies_bytes: Copies of weights that windows hold in addition, which are not allocated yet.
        keeps_sums: Whether gradient sums are on the device; else ``copies_bytes`` includes what they pass through.
        waiting_s: Returns for how many seconds a micro-batch waits for gradient sums on their way between host and
            device, after a forward and backward of so many seconds.
    """

    model: nn.Module
    optimizer: "Optimizer | Sequence[Optimizer] | None"
    loss_fn: "LossFunction"
    batch: Split
    lengths: Sequence[int] | None
    uniform_length: bool = False
    layout: Layout = "padded"
    uses_cuda_graphs: bool = False
    prediction_obstacle: str | None = None
    copies_bytes: int = 0
    keeps_sums: bool = True
    waiting_s: Callable[[float], float] = _no_wait

    @property
    def num_samples(self) -> int:
        """Samples of the batch."""
        return self.batch.num_samples

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters of the optimizers; without one, those of the model that require a gradient."""
        return trained_parameters(self.model, as_optimizers(self.optimizer))

    def resident_tensors(self) -> list[Tensor]:
        """Return the tensors that are allocated already: parameters, buffers and optimizer state."""
        return [*self.model.parameters(), *self.model.buffers(), *self.parameters, *state_of(self.optimizer)]

    def static_bytes(self) -> int:
        """Return the memory that does not depend on the micro-batch: `resident_tensors` and the gradient sums."""
        tensors = {id(tensor): tensor for tensor in self.resident_tensors()}
        resident_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        return resident_bytes + (SumStore.bytes_of(self.parameters) if self.keeps_sums else 0)

    def peek(self, rows: Sequence[int]) -> Any:
        """Return a micro-batch on the device of the batch, which may have more memory than that of the model."""
        leaves, structure = self.batch.gather(rows)
        return structure.unflatten(leaves)

    @property
    def longest_sample(self) -> int:
        """Size of the longest sample, which has to fit: its tokens, or 1 if sizes are in samples."""
        return 1 if self.lengths is None else max(self.lengths)

    @property
    def first_size(self) -> int:
        """Smallest size to time: the median sample, at least 1/16 of the longest; if packed, a row of the longest."""
        if self.lengths is None:
            return 1
        if self.layout == "packed":
            return round_up_row(max(self.lengths))
        median = sorted(self.lengths, reverse=True)[self.num_samples // 2]
        return max(median, max(self.lengths) // SMALLEST_SHARE)

    @property
    def unit(self) -> str:
        """Unit of sizes: ``"samples"`` or ``"tokens"``."""
        return "samples" if self.lengths is None else "tokens"

    def worst_cases(self, size: int) -> list[Sequence[int]]:
        """Return the micro-batches of the largest memory that batches of such samples can contain, as sample indices.

        Samples are repeated: as many copies as fit of the longest sample, and of the longest of those that fill the
        size best. For tensors, as many rows as this batch can fill: their memory does not depend on padding.

        Args:
            size: At least `longest_sample`.
        """
        if self.uniform_length:
            return [range(self._max_rows(size))]
        if self.lengths is None:
            return [[self._largest_sample] * size]
        if self.layout == "packed":
            return [self._fill_row(size)]
        filled = FULL_ENOUGH * self.usable_size(size)
        best_filling = max(length for length in self._sample_of_length if size // length * length >= filled)
        lengths = dict.fromkeys((self.longest_sample, best_filling))
        return [[self._sample_of_length[length]] * (size // length) for length in lengths]

    def _fill_row(self, size: int) -> list[int]:
        """Return samples that fill a packed row of ``size`` tokens, the longest first."""
        rows: list[int] = []
        for length in sorted(self._sample_of_length, reverse=True):
            rows += [self._sample_of_length[length]] * (size // length)
            size %= length
        return rows

    def usable_size(self, size: int) -> int:
        """Return the part of a size that such samples can fill: sizes in between split the batch in the same way."""
        if self.layout == "packed":
            return max(round_up_row(self.longest_sample), round_down_row(size))
        if self.lengths is None or self.uniform_length or size < self.longest_sample:
            return size
        return max(size // length * length for length in self._sample_of_length)

    @cached_property
    def _sample_of_length(self) -> dict[int, int]:
        """Length → index of a sample with that length."""
        assert self.lengths is not None, "only used if sizes are in tokens"
        return {length: sample for sample, length in enumerate(self.lengths)}

    @cached_property
    def _largest_sample(self) -> int:
        """Index of the sample with the most bytes, if lengths are unknown."""
        return max(range(self.num_samples), key=lambda sample: _num_bytes(self.batch.gather([sample])[0]))

    def _max_rows(self, size: int) -> int:
        if self.lengths is None:
            return size
        return max(min(size // length, rows) for rows, length in enumerate(sorted(self.lengths), start=1))

    def groups(self, size: int, cost: Cost = DEFAULT_COST) -> Sequence[Sequence[int]]:
        """Return the batch in micro-batches of at most ``size``, as sample indices."""
        if self.lengths is None:
            return [range(i, min(i + size, self.num_samples)) for i in range(0, self.num_samples, size)]
        return group_by_tokens(self.lengths, size, cost=cost, layout=self.layout)

    @property
    def whole_batch_size(self) -> int:
        """Approximate size from which on the whole batch is one micro-batch."""
        if self.lengths is None:
            return self.num_samples
        return sum(self.lengths) if self.layout == "packed" else self.num_samples * max(self.lengths)

    def size_of(self, rows: Sequence[int]) -> int:
        """Return the size of a micro-batch: tokens with padding, or samples."""
        if self.lengths is not None and self.layout == "packed":
            return round_up_row(sum(self.lengths[i] for i in rows))
        return len(rows) if self.lengths is None else len(rows) * max(self.lengths[i] for i in rows)

    @property
    def total(self) -> int:
        """Size of the whole batch: tokens without padding, or samples."""
        return self.num_samples if self.lengths is None else sum(self.lengths)


def _num_bytes(leaves: Sequence[Any]) -> int:
    """Count the bytes of the tensors among leaves, and of those that other objects hold as attributes."""
    held = [leaf if isinstance(leaf, Tensor) else getattr(leaf, "__dict__", None) for leaf in leaves]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(held))
