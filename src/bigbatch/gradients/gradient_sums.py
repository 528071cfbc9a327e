"""Gradient sums of a window: where they are stored and in which dtype.

Parameters in float32 or wider are summed in ``.grad``. Parameters in bfloat16 or float16 get a float32 sum each: adding
many small bfloat16 gradients to a large sum loses 1.1 % of it at 128 micro-batches and half of it at a thousand that
agree. A hook moves every micro-batch gradient into its sum as soon as autograd has computed it, so that at most one
gradient exists in the narrow dtype.

Long because every rule about ``.grad`` is here: dtypes, writes by other code, retries, sparse gradients, leaves.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias
from weakref import WeakMethod, finalize

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bigbatch.errors import WindowStateError

HALF_PRECISION_DTYPES = frozenset({torch.bfloat16, torch.float16})


# Each sum of a list of parameters and its version at that time; None where there was none yet.
_Versions: TypeAlias = tuple[list[Tensor | None], list[int | None]]


class BackwardObserver(Protocol):
    """Sees every backward of a `GradientSums` without changing it."""

    def on_gradient(self, gradient: Tensor) -> None:
        """Handle the whole gradient of one parameter, before it is added to its sum."""

    def on_backward_end(self, *, succeeded: bool) -> None:
        """Handle the end of a backward."""


class GradientSums:
    """Sum the gradients of parameters, from entering the context to leaving it.

        with GradientSums(parameters) as sums:
            for loss in losses:
                sums.backward(loss)             # sums += ∂loss/∂parameters, and nothing else gets a gradient
            sums.tensors()                      # one for each parameter that received a gradient, undivided

    Entering clears ``.grad``, so that no earlier gradient leaks in.

    Args:
        parameters: Leaf tensors of any floating dtype, on any devices. Those that do not require a gradient are left
            alone for as long as they do not.
        static_buffers: Sums of an earlier window by parameter: set to zero, and used again in place, so that captured
            CUDA graphs may add to them. Only of parameters that are summed in ``.grad``.
        parameters_are_wrapped: Whether graphs end in other tensors than these, as under FSDP.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        static_buffers: Mapping[Tensor, Tensor] | None = None,
        parameters_are_wrapped: bool = False,
    ) -> None:
        self.parameters = tuple(parameters)
        self._static_buffers = static_buffers or {}
        self._float32_sums: dict[Tensor, Tensor] = {}
        self._all_sums: list[Tensor | None] = []
        self._handles: list[RemovableHandle] = []
        self._unhook: Callable[[], object] = lambda: None
        self._observer: BackwardObserver | None = None
        self._leaves: _GraphLeaves | None = _GraphLeaves.UNKNOWN if parameters_are_wrapped else None
        self._adding = False
        # The first gradient that is summed in .grad, as the last backward left it; shows whether others changed it.
        self._tamper_check: tuple[Tensor, Tensor, int] | None = None

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
        move = WeakMethod(self._move_to_float32)
        half = (p for p in self.parameters if p.dtype in HALF_PRECISION_DTYPES and p.requires_grad)
        self._handles += [_on_accumulated(p, move) for p in half]
        self._unhook = finalize(self, _remove, self._handles)  # also of a window that is dropped without an end

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks and drop all sums and gradients."""
        self._unhook()
        self._static_buffers = {}  # their owner decides how long they live
        self.clear()

    def observe(self, observer: BackwardObserver) -> None:
        """Let an observer see every later backward; at most one."""
        self._observer = observer
        hook = WeakMethod(self._pass_to_observer)
        self._handles += [_on_gradient(p, hook) for p in self.parameters if p.requires_grad]

    def _pass_to_observer(self, gradient: Tensor) -> None:
        if self._adding and self._observer is not None:
            self._observer.on_gradient(gradient)

    def _move_to_float32(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if not self._adding:  # a backward that is not ours: nothing of it belongs into these sums
            parameter.grad = None
            return
        if gradient is None:
            raise WindowStateError(
                "another window over the same parameters is open and took this one's gradient. End one of the two, by "
                "its step() or its abort(), before the other begins."
            )
        if (total := self._float32_sums.get(parameter)) is None:
            self._float32_sums[parameter] = gradient.to(torch.float32)
        else:
            total.add_(gradient)
        parameter.grad = None

    def backward(self, loss: Tensor, *, only: Sequence[Tensor] | None = None) -> None:
        """Add ∂loss/∂parameters to the sums; no other leaf of the graph receives a gradient.

        Args:
            loss: 0-d, of one micro-batch.
            only: Some of the parameters, if the others already received the gradient of this micro-batch in an attempt
                that ran out of memory.

        Passing ``inputs=`` to autograd costs a few per cent on small models, so it is done only if the first graph
        reaches other leaves, such as a generator behind a discriminator. Reentrant checkpointing does not accept
        ``inputs=``: if the graph contains it, all its leaves receive their gradients, as in ``loss.backward()``.

        Raises:
            ValueError: The loss does not depend on anything that requires a gradient.
            WindowStateError: The gradients were changed since the last backward.
        """
        if self._tamper_check is not None:
            self._check_for_tampering()
        if not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on any parameter that requires a gradient: was it detached, or computed "
                "under torch.no_grad()?"
            )
        if self._leaves is None:
            self._leaves = _find_leaves(loss, set(self.parameters))
        leaves = only
        if only is None and self._leaves is _GraphLeaves.INCLUDES_OTHERS:
            leaves = [p for p in self.parameters if p.requires_grad]
        self._adding, succeeded = True, False
        try:
            torch.autograd.backward(loss, inputs=leaves)
            succeeded = True
        finally:
            self._adding = False
            if self._observer is not None:
                self._observer.on_backward_end(succeeded=succeeded)
            self._tamper_check = self._make_tamper_check()

    @property
    def can_name_leaves(self) -> bool:
        """Whether ``only`` is supported: reentrant checkpoints and FSDP hide their leaves."""
        return self._leaves is not _GraphLeaves.UNKNOWN

    def snapshot_versions(self) -> _Versions:
        """Return every sum with its version, for `unchanged_since`."""
        sums = self._all_sums
        if not sums:
            sums = [self._float32_sums.get(p, p.grad) for p in self.parameters]
            if all(total is not None and not total.is_sparse for total in sums):
                self._all_sums = sums  # from now on these tensors are added to in place
        return sums, [None if total is None else total._version for total in sums]

    def unchanged_since(self, versions: _Versions) -> list[Tensor]:
        """Return the parameters that require a gradient and whose sums did not change since `snapshot_versions`.

        Autograd adds to a parameter once in a backward, when its gradient is complete: a sum is unchanged or complete.
        """
        unchanged = []
        for parameter, before, version in zip(self.parameters, *versions, strict=True):
            if parameter.dtype in HALF_PRECISION_DTYPES:
                parameter.grad = None  # written by autograd, but the hook had no memory to move it
            total = self._float32_sums.get(parameter, parameter.grad)
            same = total is before and (total is None or total._version == version)
            if same and parameter.requires_grad:
                unchanged.append(parameter)
        self._tamper_check = self._make_tamper_check()
        return unchanged

    def _make_tamper_check(self) -> tuple[Tensor, Tensor, int] | None:
        for parameter in self.parameters:
            if (gradient := parameter.grad) is not None:
                return parameter, gradient, gradient._version
        return None

    def _check_for_tampering(self) -> None:
        if self._tamper_check is None:
            return
        parameter, gradient, version = self._tamper_check
        if parameter.grad is not gradient or gradient._version != version:
            raise WindowStateError(
                "the gradients of this window were changed since its last backward, by optimizer.zero_grad(), by a "
                "backward of your own or by another window over the same parameters. Remove it: a window clears the "
                "gradients when it opens and when it ends, and alone adds to them in between."
            )

    def tensors(self) -> list[Tensor]:
        """Return the sums of the parameters that received a gradient: ``.grad`` itself, or the float32 sum.

        Of a sparse gradient, the values of its coalesced form. In-place operations change the sums.
        """
        self._check_for_tampering()
        tensors = []
        for parameter in self.parameters:
            total = self._float32_sums.get(parameter, parameter.grad)
            if total is not None:
                tensors.append(self._sparse_values(parameter, total) if total.is_sparse else total)
        return tensors

    def _sparse_values(self, parameter: Tensor, total: Tensor) -> Tensor:
        if not total.is_coalesced():
            total = total.coalesce()
            if parameter in self._float32_sums:
                self._float32_sums[parameter] = total
            else:
                parameter.grad = total
        return total._values()

    def grads_in_place(self) -> dict[Tensor, Tensor] | None:
        """Return the dense sums in ``.grad`` by parameter; None if any sum is sparse or kept in float32."""
        found = {p: p.grad for p in self.parameters if p.grad is not None}
        if self._float32_sums or any(total.is_sparse for total in found.values()):
            return None
        return found

    def named_by(self, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """Return the sums by the names of the parameters, zeros for those that received no gradient."""
        return {
            names[p]: torch.zeros_like(p) if total is None else total.to_dense() if total.is_sparse else total
            for p in self.parameters
            if p.requires_grad
            for total in [self._float32_sums.get(p, p.grad)]
        }

    def has_gradient(self) -> list[bool]:
        """Return for each parameter whether it has received a gradient."""
        return [self._float32_sums.get(parameter, parameter.grad) is not None for parameter in self.parameters]

    def mark_unmodified(self) -> None:
        """Accept the sums as they are now, after they were reduced over ranks."""
        self._tamper_check = self._make_tamper_check()

    def fill_missing_with_zeros(self, wanted: Iterable[bool] | None = None) -> None:
        """Create the missing sums, as zeros.

        Args:
            wanted: One flag for each parameter; by default whether it requires a gradient.
        """
        trained = [parameter.requires_grad for parameter in self.parameters]
        for parameter, is_wanted, has in zip(self.parameters, wanted or trained, self.has_gradient(), strict=True):
            if has or not is_wanted:
                continue
            if parameter.dtype in HALF_PRECISION_DTYPES:
                self._float32_sums[parameter] = torch.zeros_like(parameter, dtype=torch.float32)
            else:
                parameter.grad = torch.zeros_like(parameter)

    def write_to_grad(self) -> None:
        """Write the float32 sums to ``.grad`` in the dtype of the parameters, where optimizers expect them."""
        self._all_sums = []  # each sum is freed before the next one is converted
        for parameter in list(self._float32_sums):
            parameter.grad = self._float32_sums.pop(parameter).to(parameter.dtype)

    def clear(self) -> None:
        """Drop all sums and gradients."""
        self._float32_sums.clear()
        self._all_sums = []
        self._tamper_check = None
        for parameter in self.parameters:
            parameter.grad = None


def _on_accumulated(parameter: Tensor, hook: "WeakMethod[Any]") -> RemovableHandle:
    def call(accumulated: Tensor) -> None:
        if (method := hook()) is not None:
            method(accumulated)

    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(call)  # type: ignore[no-untyped-call]
    return handle


def _on_gradient(parameter: Tensor, hook: "WeakMethod[Any]") -> RemovableHandle:
    """Call a hook with the whole gradient of a leaf, before it is added."""

    def call(gradient: Tensor) -> None:
        if (method := hook()) is not None:
            method(gradient)

    handle: RemovableHandle = parameter.register_hook(call)  # type: ignore[no-untyped-call]
    return handle


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


class _GraphLeaves(Enum):
    """Which leaves a graph reaches."""

    ONLY_OURS = "only the parameters"
    INCLUDES_OTHERS = "other leaves too, which backward(inputs=) leaves out"
    UNKNOWN = "inside reentrant checkpoints or shards, where backward(inputs=) is not supported"


def _find_leaves(loss: Tensor, own: set[Tensor]) -> _GraphLeaves:
    """Walk the graph of a loss once, and classify its leaves."""
    found = _GraphLeaves.ONLY_OURS
    seen = {loss.grad_fn}
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        assert node is not None, "only nodes are put on the list"
        kind = type(node).__name__
        if kind == "AccumulateGrad":
            if node.variable not in own:  # type: ignore[attr-defined]
                found = _GraphLeaves.INCLUDES_OTHERS
        elif kind == "CheckpointFunctionBackward":  # what checkpoint(use_reentrant=True) leaves in the graph
            return _GraphLeaves.UNKNOWN
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                todo.append(child)
    return found
