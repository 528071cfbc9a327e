"""The two passes over the micro-batches of one window, and the loss between them.

encode without gradients → join → loss on all features → gradient of each → encode again → linear loss
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bigbatch.coupled.coupled import Coupled
from bigbatch.coupled.features import Features, flatten_features, is_differentiable, join, select
from bigbatch.coupled.linear_loss import linear_loss
from bigbatch.coupled.replay import Replay, ReplayState
from bigbatch.errors import InputError
from bigbatch.trials.loss_modules import modules_used_by

# Largest relative difference of the features of both passes. Kernels may differ with and without gradients, and
# features in float32 be computed in 16 bits; other dropout masks make a difference of 0.3 and more.
MOST_DIFFERENT = {torch.float64: 1e-7, torch.complex128: 1e-7, torch.float32: 0.03, torch.complex64: 0.03}
HALF_DIFFERENT = 0.1

Take: TypeAlias = Callable[[Sequence[int]], Any]


@dataclass(frozen=True)
class EncodedPart:
    """One micro-batch of the first pass.

    Attributes:
        rows: Its samples.
        state: Before its forward.
        features: Without a graph; None once they are joined.
    """

    rows: Sequence[int]
    state: ReplayState
    features: Features


class TwoPasses:
    """The features of one window, from its first pass to the end of its second.

        passes.start()
        for rows in groups:
            passes.encode(coupled, rows, take)
        loss_sum = passes.loss_sum(coupled)     # its backward leaves gradients in the .grad of passes.leaves
        passes.keep_gradients()
        for part in passes.parts:
            loss_sum, items = passes.linear_loss(coupled, part.rows, take, part.state)     # for its backward
        passes.end()

    Args:
        model: As ``encode`` and ``loss`` receive it.
        coupled: Refers to the other modules that they use.

    Attributes:
        replay: What forwards of ``encode`` draw and write.
        parts: The micro-batches of the first pass.
        leaves: The features of this rank in the order of the batch, each with ``requires_grad``.
    """

    def __init__(self, model: nn.Module, coupled: Coupled) -> None:
        self._model = model
        modules = [model, *modules_used_by(coupled)]
        self.replay = Replay(modules)
        self._replay_of_loss = Replay(modules)
        self.start()

    def start(self) -> None:
        """Start a window without features."""
        self.replay.start()
        self._replay_of_loss.start()
        self.parts: list[EncodedPart] = []
        self.leaves: list[Tensor] = []
        self._before_loss: ReplayState | None = None
        self._after_loss: ReplayState | None = None
        self._gradients: list[Tensor | None] = []
        self._positions: dict[int, int] | None = None
        self._mean: Tensor | None = None
        self._difference: Tensor | None = None  # relative, between the passes, the largest so far

    @property
    def num_samples(self) -> int:
        """Samples that were encoded."""
        return sum(len(part.rows) for part in self.parts)

    @property
    def can_be_cut_again(self) -> bool:
        """Whether another cut has the same features: no forward drew random numbers or wrote buffers."""
        return not (self.replay.draws or self.replay.writes_buffers)

    def encode(self, coupled: Coupled, rows: Sequence[int], take: Take) -> None:
        """Encode a micro-batch without gradients.

        Args:
            coupled: The loss.
            rows: Its samples.
            take: Returns the micro-batch of some samples; may draw random numbers, as ``encode``.
        """
        self.parts.append(self.encoded(coupled, lambda: take(rows), rows))

    def encoded(self, coupled: Coupled, take: Callable[[], Any], rows: Sequence[int] | None = None) -> EncodedPart:
        """Return the features of a micro-batch that is not joined with the others; without ``rows`` it is padding."""
        state = self.replay.save()
        with torch.no_grad():
            features = flatten_features(coupled.encode(self._model, take()), None if rows is None else len(rows))
        self.replay.note_forward(state)
        rows = range(features.num_samples) if rows is None else rows
        return EncodedPart(rows, state, features.detached())

    def joined(self, parts: Sequence[EncodedPart] | None = None) -> Features:
        """Return the features in the order of the batch; those that can have a gradient require it, in `leaves`."""
        parts = self.parts if parts is None else parts
        rows = [row for part in parts for row in part.rows]
        features = join([part.features for part in parts], rows)
        self._positions = {row: position for position, row in enumerate(sorted(rows))}
        if all(row == position for row, position in self._positions.items()):
            self._positions = None
        self.leaves = [leaf.requires_grad_() for leaf in features.leaves if is_differentiable(leaf)]
        self.parts = [EncodedPart(part.rows, part.state, _WITHOUT) for part in self.parts]
        return features

    def loss_sum(
        self,
        coupled: Coupled,
        *,
        parts: Sequence[EncodedPart] | None = None,
        gather: Callable[[Features], tuple[Features, float]] | None = None,
    ) -> Tensor:
        """Return the loss of all features times their samples, with a graph that ends in `leaves` and in parameters.

        Args:
            coupled: The loss.
            parts: Micro-batches that replace those of the window.
            gather: Returns the features of all ranks, given those of this one, and the weight of the loss that
                replaces the number of samples.
        """
        torch.clear_autocast_cache()  # the casts of weights in it have no graph
        features = self.joined(parts)
        features, weight = (features.copied(), features.num_samples) if gather is None else gather(features)
        self._before_loss = self._replay_of_loss.save()
        loss_sum = coupled.loss_sum(self._model, features.value(), weight)
        self._replay_of_loss.note_forward(self._before_loss)
        self._mean = loss_sum.detach() / weight if weight else loss_sum.detach()
        return loss_sum

    def keep_gradients(self, factor: float | Tensor = 1.0) -> None:
        """Keep the gradients of the features, times a factor; those of 16 bits in float32 unless the factor is 1."""
        self._gradients = []
        for leaf in self.leaves:
            gradient, leaf.grad = leaf.grad, None
            leaf.requires_grad_(False)
            if gradient is not None and not (isinstance(factor, float) and factor == 1.0):
                gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32)) * factor
            self._gradients.append(gradient)
        self._after_loss = self.replay.save()

    def linear_loss(
        self, coupled: Coupled, rows: Sequence[int], take: Take, state: ReplayState | None
    ) -> tuple[Tensor, int]:
        """Encode a micro-batch again, and return a loss whose backward adds its part of the gradient, and its samples.

        The loss requires no gradient if none of its features does.

        Args:
            coupled: The loss.
            rows: Its samples.
            take: As for `encode`.
            state: Before its first forward; None to not restore it.
        """
        if state is not None:
            self.replay.replay(state)
        features = flatten_features(coupled.encode(self._model, take(rows)), len(rows))
        differentiable = [leaf for leaf in features.leaves if is_differentiable(leaf)]
        for leaf, first in zip(differentiable, self.leaves, strict=True):
            self._compare(leaf.detach(), select(first, rows, self._positions))
        pairs = [
            (leaf, select(gradient, rows, self._positions))
            for leaf, gradient in zip(differentiable, self._gradients, strict=True)
            if leaf.requires_grad and gradient is not None
        ]
        assert self._mean is not None, "the loss was computed"
        value = self._mean * len(rows)
        if pairs:
            value = linear_loss(value, *map(list, zip(*pairs, strict=True)))
        return value, len(rows)

    def padding_loss(self, coupled: Coupled, microbatch: Any, state: ReplayState) -> tuple[Tensor, int]:
        """Encode a micro-batch again that does not count, and return a loss whose gradient is zero."""
        self.replay.replay(state)
        features = flatten_features(coupled.encode(self._model, microbatch))
        used = [leaf for leaf in features.leaves if is_differentiable(leaf) and leaf.requires_grad]
        value = torch.zeros((), device=used[0].device) if used else torch.zeros(())
        return linear_loss(value, used, [torch.zeros_like(leaf) for leaf in used]) if used else value, 0

    def save(self) -> tuple[ReplayState, ReplayState]:
        """Return the present random states and buffers, for `rollback`."""
        return self.replay.save(), self._replay_of_loss.save()

    def rollback(self, states: tuple[ReplayState, ReplayState]) -> None:
        """Undo what forwards of ``encode`` and ``loss`` did since `save`."""
        self._replay_of_loss.rollback(states[1])
        self.replay.rollback(states[0])

    def undo(self) -> None:
        """Undo the forwards of this window."""
        if self._before_loss is not None:
            self._replay_of_loss.rollback(self._before_loss)
        self.replay.rollback(self.parts[0].state)

    def end(self) -> None:
        """End the second pass: random states and buffers are as after the loss. Waits for the device.

        Raises:
            InputError: ``encode`` returned other features than in the first pass.
        """
        if self._after_loss is not None:
            self.replay.replay(self._after_loss)
        dtypes = [leaf.dtype for leaf in self.leaves]
        difference = 0.0 if self._difference is None else self._difference.item()
        self.start()
        most = max((MOST_DIFFERENT.get(dtype, HALF_DIFFERENT) for dtype in dtypes), default=1.0)
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            most = HALF_DIFFERENT
        if difference > most:  # not for NaN: a window that is not finite is reported as such
            raise InputError(
                f"encode returned other features in its second pass (relative difference {difference:.1e}), so the "
                "gradient would be wrong: it depends on something else than the model, the micro-batch and the global "
                "random generators. Draw from those instead of a torch.Generator, and keep no state in attributes."
            )

    def _compare(self, again: Tensor, first: Tensor) -> None:
        if again.shape != first.shape:
            raise InputError(
                f"encode returned features of shape {tuple(again.shape)} in its second pass and {tuple(first.shape)} "
                "in its first: it must depend on the model and the micro-batch only."
            )
        if first.numel():
            wide = torch.promote_types(first.dtype, torch.float32)
            size = torch.linalg.vector_norm(first.to(wide))
            difference = torch.linalg.vector_norm(again.to(wide) - first) / torch.where(size > 0, size, 1.0)
            before = self._difference
            self._difference = difference if before is None else torch.maximum(before, difference.to(before))


_WITHOUT = Features([], torch.utils._pytree.tree_structure(None), 0)
