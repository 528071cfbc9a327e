"""Where gradient sums live and in which dtype.

Parameters in float32 or wider sum natively in ``.grad``. Parameters in bfloat16 or float16 get a float32 sum each:
adding many small bfloat16 gradients to a large one loses 1.1 % of the sum at 128 micro-batches and half of it at a
thousand that agree. A hook moves every micro-gradient into its sum as soon as autograd has made it, so that never more
than the one in flight exists in the narrow dtype.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from types import TracebackType
from typing import Any, Self, TypeAlias
from weakref import WeakMethod, finalize

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bigbatch.errors import WindowStateError

HALF_PRECISION_DTYPES = frozenset({torch.bfloat16, torch.float16})


# Each sum of a list of parameters, and the version it had; None where there was none yet.
_Versions: TypeAlias = tuple[list[Tensor | None], list[int | None]]


class GradientSums:
    """Gradient sums of some parameters from its entering to its leaving as a context.

        with GradientSums(parameters) as sums:
            for loss in losses:
                sums.backward(loss)             # sums += ∂loss/∂parameters, and nothing else gets a gradient
            sums.tensors()                      # one a parameter that received a gradient, undivided

    Whatever ``.grad`` held on entering is cleared, so that nothing from before leaks in.

    Args:
        parameters: Leaf tensors of any floating dtype, on any devices. Those that do not require a gradient are left
            alone for as long as they do not.
        static_buffers: Sums of windows before, by parameter, to begin with as zeros and to leave in place: whoever
            recorded where they are may add to them. Only of parameters that sum natively.
        parameters_are_wrapped: Whether graphs end in other tensors than these, which a wrapper of the model stands
            between.
        squared_norm_sum: 0-d, to which the squared norm of each micro-gradient is added, of all parameters together;
            None not to measure it. It is read once, before it is added to its sum; nothing is kept of it, and nothing
            waited for.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        static_buffers: Mapping[Tensor, Tensor] | None = None,
        parameters_are_wrapped: bool = False,
        squared_norm_sum: Tensor | None = None,
    ) -> None:
        self._squared_norm_sum = squared_norm_sum
        self._norms: list[Tensor] = []
        self.parameters = tuple(parameters)
        self._static_buffers = static_buffers or {}
        self._float32_sums: dict[Tensor, Tensor] = {}
        self._all_sums: list[Tensor | None] = []
        self._unhook: Callable[[], object] = lambda: None
        self._leaves: _GraphLeaves | None = _GraphLeaves.UNKNOWN if parameters_are_wrapped else None
        self._adding = False
        # The first gradient that is summed natively, as the last backward left it; tells whether others touched it.
        self._tamper_check: tuple[Tensor, Tensor, int] | None = None

    def __enter__(self) -> Self:
        self.clear()
        if self._static_buffers:
            torch._foreach_zero_(list(self._static_buffers.values()))
            for parameter, total in self._static_buffers.items():
                parameter.grad = total
        widen = WeakMethod(self._move_to_float32)
        narrow = (p for p in self.parameters if p.dtype in HALF_PRECISION_DTYPES and p.requires_grad)
        handles = [_on_accumulated(p, widen) for p in narrow]
        if self._squared_norm_sum is not None:
            measure = WeakMethod(self._measure)
            handles += [_on_gradient(p, measure) for p in self.parameters if p.requires_grad]
        self._unhook = finalize(self, _remove, handles)  # also for a window that was forgotten half-way
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._unhook()
        self._static_buffers = {}  # whoever keeps them decides how long
        self.clear()

    def _move_to_float32(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if not self._adding:  # the backward of somebody else: nothing of it belongs into these sums
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

    def _measure(self, gradient: Tensor) -> None:
        if self._adding:
            values = gradient.coalesce()._values() if gradient.is_sparse else gradient
            norm = torch.linalg.vector_norm(values, dtype=_norm_dtype(values.dtype))
            self._norms.append(norm if self._squared_norm_sum is None else norm.to(self._squared_norm_sum))

    def backward(self, loss: Tensor, *, only: Sequence[Tensor] | None = None) -> None:
        """Add ∂loss/∂parameters to the sums; no other leaf of the graph receives a gradient.

        Args:
            loss: 0-d, of one micro-batch.
            only: Some of the parameters, where the others have had their share of this micro-batch before an attempt
                ran out of memory.

        Naming the leaves costs a few per cent on small models, so it is done where the first graph reaches others:
        a discriminator behind a generator, say. Reentrant checkpointing cannot be told which leaves to differentiate;
        where the graph holds some, all its leaves receive their gradients, as they do from ``loss.backward()``.

        Raises:
            ValueError: The loss does not depend on anything that requires a gradient.
            WindowStateError: Somebody cleared the gradients since the last backward.
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
        self._adding = True
        try:
            torch.autograd.backward(loss, inputs=leaves)
            if self._squared_norm_sum is not None and self._norms:
                self._squared_norm_sum.add_(torch.stack(self._norms).square().sum())
        finally:
            self._norms.clear()
            self._adding = False
            self._tamper_check = self._make_tamper_check()

    @property
    def can_name_leaves(self) -> bool:
        """Whether ``only`` can be honoured: reentrant checkpoints hide their leaves."""
        return self._leaves is not _GraphLeaves.UNKNOWN

    def snapshot_versions(self) -> _Versions:
        """Remember every sum as it is now, for `unchanged_since`."""
        sums = self._all_sums
        if not sums:
            sums = [self._float32_sums.get(p, p.grad) for p in self.parameters]
            if all(total is not None and not total.is_sparse for total in sums):
                self._all_sums = sums  # from now on they are added to in place, and stay the same tensors
        return sums, [None if total is None else total._version for total in sums]

    def unchanged_since(self, versions: _Versions) -> list[Tensor]:
        """Give the parameters that require a gradient and to whose sums nothing was added since `versions`.

        Autograd adds to a parameter once in a backward, when all its shares are there: a sum is as it was, or complete.
        """
        unchanged = []
        for parameter, before, version in zip(self.parameters, *versions, strict=True):
            if parameter.dtype in HALF_PRECISION_DTYPES:
                parameter.grad = None  # what autograd wrote and the hook had no memory to move
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
        """The sums of the parameters that received a gradient: ``.grad`` itself, or its float32 stand-in.

        Sparse gradients come as the values of their coalesced form. Operations in place reach the sums.
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
        """Give the dense sums that parameters hold themselves, by parameter; None where there are others, too."""
        found = {p: p.grad for p in self.parameters if p.grad is not None}
        if self._float32_sums or any(total.is_sparse for total in found.values()):
            return None
        return found

    def named_by(self, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """The sums by the names given for the parameters, zeros for those that received no gradient."""
        return {
            names[p]: torch.zeros_like(p) if total is None else total.to_dense() if total.is_sparse else total
            for p in self.parameters
            if p.requires_grad
            for total in [self._float32_sums.get(p, p.grad)]
        }

    def has_gradient(self) -> list[bool]:
        """Tell of each parameter whether it has received a gradient."""
        return [self._float32_sums.get(parameter, parameter.grad) is not None for parameter in self.parameters]

    def mark_unmodified(self) -> None:
        """Take the sums as they are now, after they were summed over ranks."""
        self._tamper_check = self._make_tamper_check()

    def fill_missing_with_zeros(self, wanted: Iterable[bool] | None = None) -> None:
        """Make the sums that are not there, of zeros.

        Args:
            wanted: Of which parameters. By default of all that require a gradient: what a window holds after a
                micro-batch that reached every one.
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
        """Put the float32 sums into ``.grad`` in the parameters' own dtype, where optimizers expect them."""
        self._all_sums = []  # each sum is freed before the next is narrowed
        for parameter in list(self._float32_sums):
            parameter.grad = self._float32_sums.pop(parameter).to(parameter.dtype)

    def clear(self) -> None:
        """Drop the sums and the gradients."""
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
    """Call a hook with each whole gradient of a leaf, before it is added."""

    def call(gradient: Tensor) -> None:
        if (method := hook()) is not None:
            method(gradient)

    handle: RemovableHandle = parameter.register_hook(call)  # type: ignore[no-untyped-call]
    return handle


def _norm_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALF_PRECISION_DTYPES else dtype


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


class _GraphLeaves(Enum):
    """Where a graph ends."""

    ONLY_OURS = "in the parameters alone"
    INCLUDES_OTHERS = "in other leaves too, which backward can be told to leave out"
    UNKNOWN = "inside reentrant checkpoints or shards, where backward cannot be told anything"


def _find_leaves(loss: Tensor, own: set[Tensor]) -> _GraphLeaves:
    """Walk the graph once."""
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
