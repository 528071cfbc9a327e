"""CUDA graphs: forward and backward of a micro-batch, replayed with one launch instead of kernel by kernel.

    micro-batch → is a graph of its shapes captured? else capture it → copy it into the graph's inputs → replay
    → copies of loss and items

Launching a kernel takes some microseconds of the host, and a training step launches thousands of kernels: with small
models and busy hosts the device waits. A captured graph adds to the gradient sums in place, so windows must reuse them.
"""

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from bigbatch.accumulation.pending_update import PendingUpdate
from bigbatch.batching.batch_types import Structure, flatten
from bigbatch.distributed.gradient_sync import Microbatch, never
from bigbatch.errors import first_line
from bigbatch.execution.graph_capture import capture
from bigbatch.execution.oom_retry import OomRetry
from bigbatch.execution.runner import MicrobatchRunner, WindowInputs
from bigbatch.gradients.gradient_sums import GradientSums
from bigbatch.gradients.loss_totals import as_terms
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory

MAX_GRAPHS = 32  # of a variant, one for each shape of a micro-batch; that not used for longest is dropped first

# The variant of the backward, as `GradientSums.variant`; and what else a graph depends on.
_Key: TypeAlias = tuple[Hashable, ...]


@dataclass(frozen=True)
class _CapturedGraph:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    loss_sum: Tensor
    items: Tensor


class CudaGraphRunner(MicrobatchRunner):
    """Replays micro-batches from CUDA graphs, one for each of their shapes; runs others by a fallback.

    The first window runs by the fallback, and shows which parameters receive a gradient. So does the first micro-batch
    of each variant of the backward, which compiles what the others need; the graphs of earlier variants are dropped
    before it, and captured again, because nothing else can use the memory of graphs. They are
    also dropped if memory runs out in a micro-batch that is not replayed.

    Args:
        model: As for `MicrobatchRunner`. Loss functions must have one term, whose items are a tensor on the device, and
            must not read values back to the host; what they use besides the micro-batch and the model must not change
            after capture.
        fallback: Runs the micro-batches that are not replayed.
    """

    captures_graphs = True

    def __init__(self, model: nn.Module, fallback: OomRetry) -> None:
        super().__init__(model)
        self._fallback = fallback
        self._graphs: dict[_Key, _CapturedGraph] = {}
        self._variants: set[Hashable] = set()  # of the backward, that have run
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._parameters_with_gradient: tuple[Tensor, ...] = ()
        self._required_gradient: dict[Tensor, bool] = {}  # of each parameter, when buffers were adopted
        self._buffers: dict[Tensor, Tensor] | None = None
        self._disabled_reason: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "CudaGraphRunner":
        return CudaGraphRunner(  # without the graphs, which contain addresses of this model's memory
            copy.deepcopy(self._model, memo), copy.deepcopy(self._fallback, memo)
        )

    @property
    def retries(self) -> int:  # type: ignore[override]
        """Attempts in this window that ran out of memory and were repeated."""
        return self._fallback.retries

    @property
    def disabled_reason(self) -> str | None:  # type: ignore[override]
        """Why nothing is captured any more, in a few words; None while it is."""
        return self._disabled_reason

    @property
    def static_buffers(self) -> Mapping[Tensor, Tensor] | None:  # type: ignore[override]
        """The gradient sums by parameter, once a window has shown which exist; in place until `release`."""
        return self._buffers

    @property
    def num_graphs(self) -> int:
        """Captured graphs."""
        return len(self._graphs)

    @property
    def is_ready(self) -> bool:
        """Whether a window has run by the fallback, and capture is possible."""
        return bool(self._buffers) and self._disabled_reason is None

    def prepare(self) -> None:
        """Before a window: release the graphs if other parameters are trained, or capture is disabled."""
        self._fallback.prepare()
        changed = any(parameter.requires_grad != before for parameter, before in self._required_gradient.items())
        if changed or self._disabled_reason is not None:
            self.release()
            self._parameters_with_gradient, self._required_gradient = (), {}
        if self._buffers is None and self._parameters_with_gradient:
            self._buffers = {parameter: torch.zeros_like(parameter) for parameter in self._parameters_with_gradient}

    @contextmanager
    def window(self, inputs: WindowInputs) -> Iterator[None]:
        """Run one window; its inputs are not referenced afterwards."""
        with super().window(inputs), self._fallback.window(inputs), self._fallback.freeing(self._drop_graphs):
            yield

    def run(self, microbatch: Microbatch, pending: PendingUpdate) -> None:
        """Add the gradient of one micro-batch by a graph if possible, else by the fallback."""
        if self.is_ready and self._replay(self.inputs.take(microbatch.content), pending):
            return
        if pending.sums.variant not in self._variants:
            self._drop_graphs()
        self._fallback.run(microbatch, pending)
        self._variants.add(pending.sums.variant)

    def end(self, pending: PendingUpdate, should_abandon: Callable[[], bool] = never) -> None:
        """Use the sums of this window for all later ones, if nothing ran out of memory."""
        if not self.retries:
            self._adopt_buffers(pending.sums)

    def release(self) -> None:
        """Free the memory of all graphs and of the sums, between two windows."""
        self._buffers = None
        self._drop_graphs()

    def _adopt_buffers(self, sums: GradientSums) -> None:
        if self._buffers is not None or self._disabled_reason is not None:
            return
        found = sums.grads_in_place()
        self._buffers = found or None
        if found is None:
            self._disabled_reason = "gradients are sparse, or of parameters in bfloat16 or float16"
        elif found:  # a rank without samples has no gradient
            self._parameters_with_gradient = tuple(found)
            self._required_gradient = {parameter: parameter.requires_grad for parameter in sums.parameters}

    def _replay(self, microbatch: Any, pending: PendingUpdate) -> bool:
        """Add a micro-batch by its graph; return whether that was possible."""
        if not pending.uses_plain_sums or pending.sums.variant not in self._variants:
            return False
        leaves, structure = flatten(microbatch)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        try:
            key = (pending.sums.variant, self.inputs.loss_fn, structure, self._model.training, *map(_describe, leaves))
            captured = self._graphs.get(key)
        except TypeError:
            self._disabled_reason = "a micro-batch contains more than dense tensors and plain values"
            return False
        if captured is None:
            captured = self._capture(key, leaves, structure, pending.sums)
            if captured is None:
                return False
        else:
            self._graphs[key] = self._graphs.pop(key)  # the last one used is dropped last
            torch._foreach_copy_(captured.inputs, tensors)
        captured.graph.replay()
        pending.record((captured.loss_sum.clone(), captured.items.clone()))
        return True

    def _drop_graphs(self) -> None:
        if self._pool is not None:
            torch.cuda.synchronize()
            self._graphs.clear()
            self._pool = None
            free_cached_memory()

    def _capture(self, key: _Key, leaves: list[Any], structure: Structure, sums: GradientSums) -> _CapturedGraph | None:
        same = [other for other in self._graphs if other[0] == key[0]]
        if len(same) >= MAX_GRAPHS:
            del self._graphs[same[0]]
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), cast("Any", torch.cuda.Stream)()
        inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        found: list[tuple[Tensor, Tensor]] = []

        def add() -> None:
            found.append(_only_term(self.inputs.loss_fn(self._model, structure.unflatten(inputs))))
            sums.backward(found[0][0])

        # The first graph finds what the eager window left in the cache. Later ones are captured while the device still
        # runs the micro-batches before, so that it never waits for the host.
        for frees_cache in (False, True) if self._graphs else (True,):
            versions = sums.snapshot_versions()
            try:
                graph = capture(add, self._pool, stream=self._stream, frees_cache=frees_cache)
                if not self._adds_to_same_buffers(sums, versions):
                    raise RuntimeError("micro-batches reach different parameters")
            except Exception as error:  # noqa: BLE001 - whatever cannot be captured runs by the fallback
                out_of_memory = is_out_of_memory(error)
                reason = "memory ran out" if out_of_memory else first_line(error)
            else:
                (loss_sum, items), tensors = found[0], [leaf for leaf in inputs if isinstance(leaf, Tensor)]
                self._graphs[key] = _CapturedGraph(graph, tensors, loss_sum.detach(), items)
                return self._graphs[key]
            found.clear()
            for parameter in sums.parameters:  # a new gradient would contain what was never written
                parameter.grad = (self._buffers or {}).get(parameter)
            sums.mark_unmodified()
            if not out_of_memory:
                break
        self._disabled_reason = reason
        self._drop_graphs()
        return None

    def _adds_to_same_buffers(self, sums: GradientSums, versions: Any) -> bool:
        """Return whether a capture adds to every adopted sum, and to no other."""
        found = sums.grads_in_place()
        if found is None or self._buffers is None or found.keys() != self._buffers.keys():
            return False
        return not any(parameter in self._buffers for parameter in sums.unchanged_since(versions))


def _describe(leaf: Any) -> Hashable:
    """Return what a graph depends on besides the values of tensors.

    Raises:
        TypeError: The leaf is a sparse or nested tensor or an object with tensors, which a replay would not replace.
    """
    if isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_nested:
        return leaf.shape, leaf.dtype, leaf.device
    if hasattr(leaf, "to"):
        raise TypeError(f"the memory of a {type(leaf).__name__} may move between micro-batches")
    return leaf  # type: ignore[no-any-return]


def _only_term(result: Any) -> tuple[Tensor, Tensor]:
    terms = as_terms(result)
    loss_sum, items = next(iter(terms.values()))
    if len(terms) > 1 or not isinstance(items, Tensor) or items.is_cpu:
        raise RuntimeError("the loss has several terms, or items that are no tensor on the device")
    return loss_sum, items
