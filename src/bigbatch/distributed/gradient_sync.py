"""How gradients are synchronized over ranks: base classes. `detect_sync` chooses the class for a model.

    start a window → micro-batches → vote (one small all-gather) → reduce → update → end the window

Ranks may hold different samples, items and micro-batches, or none. Their sums are added, and the total is divided once
by the items of all ranks: no mean of means.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bigbatch.distributed.collective import DistributedRankGroup, Number, RankGroup
from bigbatch.distributed.overlap_choice import OverlapChoice
from bigbatch.errors import WindowAbandonedError
from bigbatch.types import Terms

if TYPE_CHECKING:
    from bigbatch.gradients.gradient_sums import GradientSums


_NO_CONTEXT = nullcontext()


def never() -> bool:
    """Return False."""
    return False


class SyncPolicy(Enum):
    """When gradients are reduced over ranks.

    Replicated models (DDP) support ``LAST`` only: their sums are reduced once, after all micro-batches.

    Attributes:
        LAST: With the last micro-batch of a window. Least communication; a sharded model holds whole gradients until
            then.
        EVERY: With every micro-batch. A sharded model then holds only its shards of the gradients.
        SHARD: For HSDP: between the ranks that shard the model with every micro-batch, between the replicas with the
            last one.
    """

    LAST = "last"
    EVERY = "every"
    SHARD = "shard"


class Microbatch(NamedTuple):
    """A micro-batch that a rank runs in a window.

    Attributes:
        content: The entry of the list that was passed to `GradientSync.turns`; or the padding micro-batch.
        counts: Whether its loss and items count. False for padding, which is run so that all ranks run equally many.
    """

    content: Any
    counts: bool = True


class GradientSync:
    """Single-process synchronization: nothing is communicated. Base class of the distributed ones.

    Attributes:
        model: As passed by the user.
        module: The model without its wrapper.
        ranks: The ranks that hold different data.
        gradient_divide_factor: What the gradients were divided by when they were reduced.
        is_sharded: Whether the ranks hold shards of the parameters.
        runs_in_lockstep: Whether all ranks must run the same number of micro-batches.
        parameters_are_wrapped: Whether graphs end in other tensors than the parameters.
        syncs_in_backward: Whether the next backward reduces gradients.
        overlap: Whether windows reduce gradients within their last backward; None if none does.
    """

    gradient_divide_factor = 1.0
    is_sharded = False
    runs_in_lockstep = False
    parameters_are_wrapped = False
    syncs_in_backward = False
    overlap: OverlapChoice | None = None

    def __init__(self, model: nn.Module, module: nn.Module | None = None, ranks: RankGroup | None = None) -> None:
        self.model = model
        self.module = model if module is None else module
        self.ranks = RankGroup() if ranks is None else ranks

    @property
    def size(self) -> int:
        """Number of ranks that hold different data."""
        return self.ranks.size

    @property
    def rank(self) -> int:
        """Rank of this process among them."""
        return self.ranks.rank

    @property
    def needs_padding_microbatch(self) -> bool:
        """Whether a micro-batch is needed to run in place of missing ones, and none was set."""
        return False

    @property
    def padding_microbatch(self) -> Any:
        """The micro-batch that is run in place of missing ones; None if none was set."""
        return None

    def run_in_lockstep(self) -> None:
        """Run the same number of micro-batches on all ranks from the next window on; no-op in a single process."""

    def start_window(self) -> None:
        """Defer every reduction that would happen by itself, for one window."""

    def end_window(self) -> None:
        """Restore what `start_window` changed."""

    def set_padding_microbatch(self, microbatch: Any) -> None:
        """Set the micro-batch that is run in place of missing ones, on the device."""

    def turns(
        self, own: Sequence[Any], max_num_microbatches: int, should_abandon: Callable[[], bool]
    ) -> Generator[Microbatch, None, bool]:
        """Yield the micro-batches that this rank runs in a window.

        Args:
            own: One entry for each micro-batch of this rank.
            max_num_microbatches: The largest number of them on any rank.
            should_abandon: Called before each micro-batch.

        Returns:
            Whether the window was abandoned; the ranks learn of it in their vote.

        Raises:
            WindowAbandonedError: It was, in a single process.
        """
        for number, content in enumerate(own):
            if should_abandon():
                if self.size == 1:
                    raise WindowAbandonedError(
                        f"the window was abandoned before its micro-batch {number + 1} of {len(own)}."
                    )
                return True
            yield Microbatch(content)
        return False

    def loss_to_differentiate(self, loss: Tensor | None, terms: Terms) -> Tensor | None:
        """Return the 0-d loss to run backward of; None for no backward.

        Args:
            loss: Of the terms with items; None if there are none.
            terms: All terms of the micro-batch.
        """
        return loss

    def backward(self, *, counts: bool) -> AbstractContextManager[None]:
        """Return a context for the backward of one micro-batch.

        Args:
            counts: False for padding: the gradient that enters the model is then zero.
        """
        return _NO_CONTEXT

    def all_gather(self, values: Sequence[Number]) -> list[list[float]]:
        """Return the values of every rank, equally many on each. Collective; waits for the device."""
        return self.ranks.all_gather_numbers(values)

    def reduce(self, sums: "GradientSums", has_gradient: Sequence[bool], *, has_items: bool = True) -> bool:
        """Add up the sums that backward did not reduce. Collective.

        Args:
            sums: Of this rank.
            has_gradient: For each parameter, whether it received a gradient on any rank.
            has_items: Whether any rank has items; without them, the sums will not be used.

        Returns:
            Whether there was anything to reduce.
        """
        return False

    def check_reduced(self) -> None:
        """Raise if another rank failed within `reduce`; called if the reduced sums are not finite. Collective.

        A rank that fails there continues with NaN in place of its sums, so that no other rank waits for it, and the
        ranks exchange a status only then.

        Raises:
            RankFailedError: A rank failed. The window has changed nothing on any rank.
        """

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the 2-norm of whole gradients, 0-d. Collective if they are sharded."""
        return torch.nn.utils.get_total_norm(gradients)


class MultiRankSync(GradientSync):
    """Base class for several ranks.

    Args:
        model: As for `GradientSync`.
        module: As for `GradientSync`.
        group: The ranks that hold different data; None for all.
    """

    def __init__(self, model: nn.Module, module: nn.Module | None, group: Any) -> None:
        device = next((p.device for p in (module or model).parameters()), torch.device("cpu"))
        ranks = DistributedRankGroup(group, device)
        super().__init__(model, module, ranks)
        self.group = group
        self._message_device = ranks.device
