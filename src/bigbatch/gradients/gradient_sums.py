"""Gradient sums of a window: where they are stored and in which dtype.

Parameters in float32 or wider are summed in ``.grad``. Parameters in bfloat16 or float16 get a float32 sum each: adding
many small bfloat16 gradients to a large sum loses half of it at a thousand micro-batches that agree. A hook moves every
micro-batch gradient into its sum as soon as autograd has computed it: at most one exists in the narrow dtype.

Long because every rule about ``.grad`` is here: dtypes, hooks, retries, sparse gradients, the order of the checks.
"""

import math
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from types import TracebackType
from typing import Self
from weakref import finalize

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bigbatch.errors import WindowStateError
from bigbatch.gradients.backward_observer import BackwardObserver
from bigbatch.gradients.foreign_writes import ForeignWrites, SumVersions, WindowHook, on_accumulated, on_gradient
from bigbatch.gradients.fused_gradients import FusedGradients
from bigbatch.gradients.graph_leaves import HIDDEN_LATER, NO_GRADIENT, hides_leaves, run_backward
from bigbatch.gradients.sum_store import HALF_PRECISION_DTYPES as HALF_PRECISION_DTYPES
from bigbatch.gradients.sum_store import SumStore

_REQUIRES_GRAD = attrgetter("requires_grad")


class GradientSums:
    """Sum the gradients of parameters, from entering the context to leaving it.

        with GradientSums(parameters) as sums:
            for loss in losses:
                sums.backward(loss)             # sums += ∂loss/∂parameters, and nothing else gets a gradient
            sums.tensors()                      # one for each parameter that received a gradient, undivided

    Args:
        parameters: Leaf tensors of any floating dtype, on any devices. Those that do not require a gradient are left
            alone for as long as they do not.
        static_buffers: Sums of an earlier window by parameter: set to zero, and used again in place, so that captured
            CUDA graphs may add to them. Only of parameters that are summed in ``.grad``.
        parameters_are_wrapped: Whether graphs end in other tensors than these, as under FSDP.
        store: Where sums are; by default on the device. Layers that add by themselves use it.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        static_buffers: Mapping[Tensor, Tensor] | None = None,
        parameters_are_wrapped: bool = False,
        store: SumStore | None = None,
    ) -> None:
        self.parameters = tuple(parameters)
        self._static_buffers = static_buffers or {}
        self.store = SumStore() if store is None else store
        self._handles: list[RemovableHandle] = []
        self._unhook: Callable[[], object] = lambda: None
        self._observer: BackwardObserver | None = None
        self._fused: FusedGradients | None = None
        self._hides_leaves: bool | None = True if parameters_are_wrapped else None  # None until the first backward
        self._adding = self._is_paused = self._has_begun = self._is_shared = False
        self._trained: tuple[Tensor, ...] = ()  # parameters that required a gradient in the last backward
        self._frozen: tuple[Tensor, ...] = ()  # all others
        self._hooked: set[int] = set()  # their ids
        self._writes = ForeignWrites(self.parameters, parameters_are_wrapped=parameters_are_wrapped)

    def __enter__(self) -> Self:
        self.open()
        return self

    def open(self) -> None:
        """Clear all gradients, and start to sum."""
        self.clear()
        if self._static_buffers:
            torch._foreach_zero_(list(self._static_buffers.values()))
            for parameter, total in self._static_buffers.items():
                parameter.grad = total
            self.mark_unmodified()
        self._unhook = finalize(self, WindowHook.remove, self._handles)  # also of a window that is dropped

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self, *, keeps_gradients: bool = False) -> None:
        """Remove the hooks and drop all sums; gradients too, unless what is in ``.grad`` is to be kept."""
        self._unhook()
        self._static_buffers = {}  # their owner decides how long they live
        if not keeps_gradients:
            self.clear()

    def observe(self, observer: BackwardObserver) -> None:
        """Let an observer see every later backward; at most one, before the first backward."""
        self._observer = observer

    def fuse(self, fused: FusedGradients) -> None:
        """Let linear layers add to the sums by themselves, before the first backward."""
        self._fused = fused

    @property
    def variant(self) -> Hashable:
        """What a captured backward contains in addition to the gradients: an observation, or fused layers."""
        return self._observer is not None, None if self._fused is None else self._fused.variant

    def _pass_to_observer(self, gradient: Tensor) -> None:
        if self._adding and self._observer is not None:
            self._observer.on_gradient(gradient)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let other code run backwards inside, which restores every ``.grad`` before it ends."""
        self._is_paused = True
        try:
            with nullcontext() if self._fused is None else self._fused.paused():
                yield
        finally:
            self._is_paused = False

    def _move_to_store(self, parameter: Tensor) -> None:
        if self._is_paused:
            return
        if not self._adding:  # a backward that is not ours: nothing of it belongs into these sums
            parameter.grad = None
            self._writes.note_backward()
            return
        if (gradient := parameter.grad) is None and self._fused is not None and self._fused.adds_to(parameter):
            return
        if gradient is None:
            raise WindowStateError(
                "another window over the same parameters is open and took this one's gradient. End one of the two, by "
                "its step() or its abort(), before the other begins."
            )
        self.store.add(parameter, gradient)

    def backward(self, loss: Tensor, *, only: Sequence[Tensor] | None = None, retain_graph: bool = False) -> None:
        """Add ∂loss/∂parameters to the sums; no other leaf of the graph receives a gradient.

        Args:
            loss: 0-d, of one micro-batch.
            only: Some of the parameters, if the others already received the gradient of this micro-batch in an attempt
                that ran out of memory.
            retain_graph: Whether the graph can be differentiated again.

        If the first graph contains reentrant checkpoints, or a loss is a leaf whose hook runs a backward, all leaves
        receive their gradients from then on. That graph is walked, unless those of the window before showed all leaves.

        Raises:
            ValueError: The loss does not depend on any parameter that requires a gradient.
            WindowStateError: The gradients were changed since the last backward, or a parameter within this one.
        """
        self._writes.check()
        is_first = not self._has_begun
        if is_first or (self._frozen and any(map(_REQUIRES_GRAD, self._frozen))):
            self._hook_trained()
        walks = self._hides_leaves is None or loss.is_leaf
        if walks and loss.requires_grad:
            self._hides_leaves = self._hides_leaves or hides_leaves(loss, set(self.parameters))
        inputs = only if only is not None else () if self._hides_leaves else self._trained
        if not loss.requires_grad or not (inputs or self._hides_leaves):
            raise ValueError(NO_GRADIENT)
        self._adding, succeeded, was_frozen = True, False, False
        try:
            if self._fused is not None:
                self._fused.begin_backward(loss, only, has_inner=bool(self._hides_leaves))
            self._run_backward(loss, inputs, retain_graph=retain_graph)
            succeeded = True
        except RuntimeError:
            was_frozen = not all(map(_REQUIRES_GRAD, inputs))  # since the last backward: autograd did not start
            if not was_frozen:
                raise
        finally:
            self._adding = False
            if self._fused is not None:
                self._fused.end_backward(loss, succeeded=succeeded)
            if self._observer is not None:
                self._observer.on_backward_end(succeeded=succeeded)
            can_replace = self._hides_leaves or not succeeded
            num_added = self._writes.record_backward(self.store.float32, can_replace=can_replace)
        if is_first:
            self._writes.end_first_backward()
        if was_frozen:
            self._hook_trained()
            only = None if only is None else [p for p in only if p.requires_grad]
            self.backward(loss, only=only, retain_graph=retain_graph)
        elif num_added < len(inputs) and not walks and only is None and hides_leaves(loss, set(self.parameters)):
            self._hides_leaves = True
            if num_added:
                raise WindowStateError(HIDDEN_LATER)
            self.backward(loss, retain_graph=retain_graph)  # nothing of the graph was used

    def _run_backward(self, loss: Tensor, inputs: Sequence[Tensor], *, retain_graph: bool) -> None:
        copied = () if self._is_shared else self._trained
        run_backward(loss, inputs, retain_graph=retain_graph, parameters=copied)

    @contextmanager
    def adding(self) -> Iterator[tuple[Tensor, ...]]:
        """Let a backward inside add to the sums; yield the parameters that require a gradient."""
        self._writes.check()
        if not self._has_begun or (self._frozen and any(map(_REQUIRES_GRAD, self._frozen))):
            self._hook_trained()
        self._adding = True
        try:
            yield self._trained
        finally:
            self._adding = self._has_begun = False  # the first micro-batch is checked as the first backward
            self._writes.record_backward(self.store.float32, can_replace=True)

    def _hook_trained(self) -> None:
        """Hook the parameters that require a gradient since the last backward: their dtype is the one of now."""
        if not self._has_begun:
            self._has_begun = True
            self._writes.begin()
        self._trained, self._frozen = self.parameters, ()
        if not all(map(_REQUIRES_GRAD, self.parameters)):
            self._trained = tuple(p for p in self.parameters if p.requires_grad)
            self._frozen = tuple(p for p in self.parameters if not p.requires_grad)
        new = [p for p in self._trained if id(p) not in self._hooked] if self._hooked else self._trained
        self._hooked.update(map(id, new))
        self._handles += self._writes.guard_hooks(new)
        if self._observer is not None:
            self._handles += [on_gradient(p, WindowHook(self._pass_to_observer)) for p in new]
        moved = new if self.store.moves_all else [p for p in new if p.dtype in HALF_PRECISION_DTYPES]
        self._handles += [on_accumulated(p, WindowHook(self._move_to_store, p)) for p in moved]

    def share_memory(self) -> None:
        """Let another object refer to gradients within backwards, until `clear`; it copies those that share memory."""
        self._is_shared = True

    @property
    def shows_leaves(self) -> bool:
        """Whether the graphs of this window showed all their leaves; False before the first backward."""
        return self._hides_leaves is False

    def adds_late(self, parameter: Tensor) -> bool:
        """Return whether the gradient of a parameter is added when a backward has ended."""
        return self._fused is not None and self._fused.adds_late(parameter)

    def expect_shown_leaves(self) -> None:
        """Do not walk the first graph: those of the window before showed all their leaves."""
        self._hides_leaves = self._hides_leaves or False

    @property
    def can_name_leaves(self) -> bool:
        """Whether ``only`` is supported: reentrant checkpoints, hooks with a backward and FSDP hide their leaves."""
        return not self._hides_leaves and (self._fused is None or not self._fused.sums.is_partial)

    def snapshot_versions(self) -> SumVersions:
        """Return every sum with its version after the last backward, for `unchanged_since`."""
        return self._writes.sums, self._writes.versions

    def unchanged_since(self, versions: SumVersions) -> list[Tensor]:
        """Return the parameters that require a gradient and whose sums did not change since `snapshot_versions`.

        Autograd adds to a parameter once in a backward, when its gradient is complete: a sum is unchanged or complete.
        """
        unchanged = []
        for parameter, before, version in zip(self.parameters, *versions, strict=True):
            if self.store.moves_all or parameter.dtype in HALF_PRECISION_DTYPES:
                parameter.grad = None  # written by autograd, but the hook had no memory to move it
            total = self.store.get(parameter)
            same = total is before and (total is None or total._version == version)
            if same and parameter.requires_grad:
                unchanged.append(parameter)
        self._writes.record(self.store.float32, can_replace=True)
        return unchanged

    def tensors(self) -> list[Tensor]:
        """Return the sums of the parameters that received a gradient: ``.grad`` itself, or the float32 sum.

        Of a sparse gradient, the values of its coalesced form. In-place operations change the sums.
        """
        if self.store.moves_all:
            self.store.settle()
        self._writes.check_end()
        if self._fused is not None:
            self._fused.copies.check()
        return [
            self._sparse_values(parameter, total) if total.is_sparse else total
            for parameter, total in zip(self.parameters, self._writes.sums, strict=True)
            if total is not None
        ]

    def _sparse_values(self, parameter: Tensor, total: Tensor) -> Tensor:
        if not total.is_coalesced():
            total = total.coalesce()
            self.store.set(parameter, total)
            self.mark_unmodified()
        return total._values()

    def grads_in_place(self) -> dict[Tensor, Tensor] | None:
        """Return the dense sums in ``.grad`` by parameter; None if any sum is sparse or kept in float32."""
        found = {p: p.grad for p in self.parameters if p.grad is not None}
        if self.store.float32 or any(total.is_sparse for total in found.values()):
            return None
        return found

    def named_by(self, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """Return the sums by the names of the parameters, zeros for those that received no gradient."""
        return self.store.named(self.parameters, names)

    def has_gradient(self) -> list[bool]:
        """Return for each parameter whether it has received a gradient."""
        return [self.store.get(parameter) is not None for parameter in self.parameters]

    def mark_unmodified(self) -> None:
        """Accept the sums as they are now, after they were reduced over ranks or restored."""
        self._writes.record(self.store.float32, can_replace=True)

    def fill_missing_with_zeros(self, wanted: Iterable[bool] | None = None) -> None:
        """Create the missing sums, as zeros.

        Args:
            wanted: One flag for each parameter; by default whether it requires a gradient.
        """
        trained = [parameter.requires_grad for parameter in self.parameters]
        for parameter, is_wanted, has in zip(self.parameters, wanted or trained, self.has_gradient(), strict=True):
            if is_wanted and not has:
                self.store.set_zeros(parameter)
        self.mark_unmodified()

    def write_to_grad(self, keep: Container[Tensor] = ()) -> None:
        """Write the float32 sums, but for those to keep, to ``.grad`` in the dtype of the parameters."""
        self._writes.reset()
        if self.store.float32:
            self.store.write_to_grad(keep)

    def write_nan_to_grad(self) -> None:
        """Write NaN to the ``.grad`` of all parameters that received a gradient, and drop the sums."""
        self.mark_unmodified()
        torch._foreach_mul_(self.tensors(), math.nan)
        self.write_to_grad()

    def clear(self) -> None:
        """Drop all sums and gradients."""
        if self._fused is not None:
            self._fused.restart()
        if self.store.moves_all:
            self.store.settle(discards=True)
        self.store.float32.clear()
        self._writes.reset()
        self._is_shared = False
        for parameter in self.parameters:
            parameter.grad = None
