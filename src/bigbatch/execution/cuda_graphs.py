"""CUDA graphs: forward and backward of a micro-batch, launched as one instead of kernel by kernel.

    micro-batch → recorded one of its shapes before? else record it → copy it into the recorded inputs → replay
    → copies of loss and items

A kernel takes some microseconds of the host to launch, and a training step thousands of kernels: small models and busy
hosts leave the device waiting. What is recorded adds to the gradient sums where they are, so windows keep theirs in one
place.
"""

import warnings
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bigbatch.gradients.loss_totals import as_terms
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory

if TYPE_CHECKING:
    from bigbatch.accumulation.pending_update import PendingUpdate
    from bigbatch.gradients.gradient_sums import GradientSums
    from bigbatch.types import LossFunction

MAX_GRAPHS = 32  # one for each shape of a micro-batch; the oldest goes


@dataclass(frozen=True)
class _CapturedGraph:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    loss_sum: Tensor
    items: Tensor


class CudaGraphRunner:
    """Run the micro-batches of windows from recordings, one for each of their shapes.

        recorder.keep(transaction.sums)                             # at the end of a window that ran without
        recorder.run(microbatch, transaction)                       # in later ones; False: run it without

    Args:
        model: In the mode that it is run in.
        loss_fn: As for `bigbatch.Engine`: with one term, whose items are a tensor on the device. It must not read
            values back to the host, and whatever it takes from elsewhere than the micro-batch and the model stays as it
            was when it was recorded.

    Attributes:
        static_buffers: The gradient sums by parameter, once a window has shown which there are; they stay where they
            are until they are released.
        disabled_reason: Why nothing is recorded any more, in a few words; None while it is.
    """

    def __init__(self, model: nn.Module, loss_fn: "LossFunction") -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._graphs: dict[Hashable, _CapturedGraph] = {}
        self._pool: Any = None
        self._parameters_with_gradient: tuple[Tensor, ...] = ()  # parameters that received a gradient
        self._trained: dict[Tensor, bool] = {}  # which were to receive one then
        self.static_buffers: dict[Tensor, Tensor] | None = None
        self.disabled_reason: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "CudaGraphRunner":
        return CudaGraphRunner(
            memo.get(id(self._model), self._model), self._loss_fn
        )  # recordings are of this model's memory

    @property
    def num_graphs(self) -> int:
        """Shapes of micro-batches that are recorded."""
        return len(self._graphs)

    def adopt_buffers(self, sums: "GradientSums") -> None:
        """Take over the sums of a window that is about to end, for all later ones."""
        if self.static_buffers is not None or self.disabled_reason is not None:
            return
        found = sums.grads_in_place()
        self.static_buffers = found or None
        if found is None:
            self.disabled_reason = "gradients are sparse, or of parameters in bfloat16 or float16"
        elif found:  # a rank without samples has reached none
            self._parameters_with_gradient = tuple(found)
            self._trained = {parameter: parameter.requires_grad for parameter in sums.parameters}

    def prepare(self) -> None:
        """Begin a window: let go of what was recorded if other parameters are trained than before, or for good."""
        changed = any(parameter.requires_grad != before for parameter, before in self._trained.items())
        if changed or self.disabled_reason is not None:
            self.release()
            self._parameters_with_gradient, self._trained = (), {}
        if self.static_buffers is None and self._parameters_with_gradient:
            self.static_buffers = {
                parameter: torch.zeros_like(parameter) for parameter in self._parameters_with_gradient
            }

    @property
    def is_ready(self) -> bool:
        """Whether a window has run without, and nothing speaks against recording."""
        return bool(self.static_buffers) and self.disabled_reason is None

    def run(self, microbatch: Any, pending: "PendingUpdate") -> bool:
        """Add a micro-batch to a window; tell whether that was done."""
        if not self.is_ready or not pending.uses_plain_sums:
            return False
        leaves, structure = pytree.tree_flatten(microbatch)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (structure, self._model.training, *map(_describe, leaves))
        try:
            recording = self._graphs.get(key)
        except TypeError:
            self.disabled_reason = "a micro-batch holds more than tensors and plain values"
            return False
        if recording is None:
            recording = self._capture(key, leaves, structure, pending.sums)
            if recording is None:
                return False
        else:
            torch._foreach_copy_(recording.inputs, tensors)
        recording.graph.replay()
        pending.add_recorded(recording.loss_sum.clone(), recording.items.clone())
        return True

    def release(self) -> None:
        """Give back, between two windows, the memory of all recordings and of the sums."""
        self.static_buffers = None
        self._drop()

    def _drop(self) -> None:
        if self._pool is not None:
            torch.cuda.synchronize()
            self._graphs.clear()
            self._pool = None
            free_cached_memory()

    def _capture(
        self, key: Hashable, leaves: list[Any], structure: pytree.TreeSpec, sums: "GradientSums"
    ) -> _CapturedGraph | None:
        while len(self._graphs) >= MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        found: list[tuple[Tensor, Tensor]] = []

        def add() -> None:
            found.append(_only_term(self._loss_fn(self._model, pytree.tree_unflatten(inputs, structure))))
            sums.backward(found[0][0])

        versions = sums.snapshot_versions()
        try:
            graph = capture(add, self._pool)
            if not self._adds_to_same_buffers(sums, versions):
                raise RuntimeError("micro-batches reach different parameters")
        except Exception as error:  # noqa: BLE001 - whatever cannot be recorded is run as it is
            out_of_memory = is_out_of_memory(error)
            self.disabled_reason = "memory ran out" if out_of_memory else str(error).strip().partition("\n")[0]
        else:
            (loss_sum, items), recorded = found[0], [leaf for leaf in inputs if isinstance(leaf, Tensor)]
            self._graphs[key] = _CapturedGraph(graph, recorded, loss_sum.detach(), items)
            return self._graphs[key]
        found.clear()
        for parameter in sums.parameters:  # one that was new would keep what was never written
            parameter.grad = (self.static_buffers or {}).get(parameter)
        self._drop()
        return None

    def _adds_to_same_buffers(self, sums: "GradientSums", versions: Any) -> bool:
        """Tell whether a recording adds to every sum that is kept, and to no other."""
        reached = sums.grads_in_place()
        if reached is None or self.static_buffers is None or reached.keys() != self.static_buffers.keys():
            return False
        return not any(parameter in self.static_buffers for parameter in sums.unchanged_since(versions))


def _describe(leaf: Any) -> Hashable:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _only_term(result: Any) -> tuple[Tensor, Tensor]:
    terms = as_terms(result)
    loss_sum, items = next(iter(terms.values()))
    if len(terms) > 1 or not isinstance(items, Tensor) or items.is_cpu:
        raise RuntimeError("the loss has several terms, or items that are no tensor on the device")
    return loss_sum, items


def capture(run: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph:
    """Record what a function launches on the current CUDA device, which does not run it.

    Args:
        run: Works on tensors that stay where they are. What it allocates stays with the recording.
        pool: Memory that recordings share which never run at the same time; their own by default.

    Raises:
        RuntimeError: It does what cannot be recorded, such as to wait for the device.
    """
    graph = torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")  # beside the error that made it so
            with torch.cuda.graph(graph, pool=pool):
                run()
    except BaseException:
        _end_capture(pool)
        raise
    return graph


def _end_capture(pool: Any) -> None:
    """Tell the allocator that a recording is over which failed: until then it gives no memory back, of any pool."""
    with suppress(RuntimeError):  # it knows
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
