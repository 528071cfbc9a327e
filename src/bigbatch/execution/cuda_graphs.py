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
from bigbatch.memory.usage import is_out_of_memory, release_memory

if TYPE_CHECKING:
    from bigbatch.accumulation.pending_update import Transaction
    from bigbatch.gradients.gradient_sums import GradientSums
    from bigbatch.types import LossFunction

MOST_RECORDINGS = 32  # one for each shape of a micro-batch; the oldest goes


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    loss_sum: Tensor
    items: Tensor


class Recorder:
    """Run the micro-batches of windows from recordings, one for each of their shapes.

        recorder.keep(transaction.sums)                             # at the end of a window that ran without
        recorder.run(microbatch, transaction)                       # in later ones; False: run it without

    Args:
        model: In the mode that it is run in.
        loss_fn: As for `bigbatch.Engine`: with one term, whose items are a tensor on the device. It must not read
            values back to the host, and whatever it takes from elsewhere than the micro-batch and the model stays as it
            was when it was recorded.

    Attributes:
        kept: The gradient sums by parameter, once a window has shown which there are; they stay where they are until
            they are released.
        why_not: Why nothing is recorded any more, in a few words; None while it is.
    """

    def __init__(self, model: nn.Module, loss_fn: "LossFunction") -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._recordings: dict[Hashable, _Recording] = {}
        self._pool: Any = None
        self._reached: tuple[Tensor, ...] = ()  # parameters that received a gradient
        self._trained: dict[Tensor, bool] = {}  # which were to receive one then
        self.kept: dict[Tensor, Tensor] | None = None
        self.why_not: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recorder":
        return Recorder(memo.get(id(self._model), self._model), self._loss_fn)  # recordings are of this model's memory

    @property
    def num_recordings(self) -> int:
        """Shapes of micro-batches that are recorded."""
        return len(self._recordings)

    def keep(self, sums: "GradientSums") -> None:
        """Take over the sums of a window that is about to end, for all later ones."""
        if self.kept is not None or self.why_not is not None:
            return
        found = sums.native()
        self.kept = found or None
        if found is None:
            self.why_not = "gradients are sparse, or of parameters in bfloat16 or float16"
        elif found:  # a rank without samples has reached none
            self._reached = tuple(found)
            self._trained = {parameter: parameter.requires_grad for parameter in sums.parameters}

    def prepare(self) -> None:
        """Begin a window: let go of what was recorded if other parameters are trained than before, or for good."""
        changed = any(parameter.requires_grad != before for parameter, before in self._trained.items())
        if changed or self.why_not is not None:
            self.release()
            self._reached, self._trained = (), {}
        if self.kept is None and self._reached:
            self.kept = {parameter: torch.zeros_like(parameter) for parameter in self._reached}

    @property
    def is_ready(self) -> bool:
        """Whether a window has run without, and nothing speaks against recording."""
        return bool(self.kept) and self.why_not is None

    def run(self, microbatch: Any, transaction: "Transaction") -> bool:
        """Add a micro-batch to a window; tell whether that was done."""
        if not self.is_ready or not transaction.differentiates_sums:
            return False
        leaves, structure = pytree.tree_flatten(microbatch)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (structure, self._model.training, *map(_describe, leaves))
        try:
            recording = self._recordings.get(key)
        except TypeError:
            self.why_not = "a micro-batch holds more than tensors and plain values"
            return False
        if recording is None:
            recording = self._record(key, leaves, structure, transaction.sums)
            if recording is None:
                return False
        else:
            torch._foreach_copy_(recording.inputs, tensors)
        recording.graph.replay()
        transaction.note(recording.loss_sum.clone(), recording.items.clone())
        return True

    def release(self) -> None:
        """Give back, between two windows, the memory of all recordings and of the sums."""
        self.kept = None
        self._drop()

    def _drop(self) -> None:
        if self._pool is not None:
            torch.cuda.synchronize()
            self._recordings.clear()
            self._pool = None
            release_memory()

    def _record(
        self, key: Hashable, leaves: list[Any], structure: pytree.TreeSpec, sums: "GradientSums"
    ) -> _Recording | None:
        while len(self._recordings) >= MOST_RECORDINGS:
            del self._recordings[next(iter(self._recordings))]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        found: list[tuple[Tensor, Tensor]] = []

        def add() -> None:
            found.append(_only_term(self._loss_fn(self._model, pytree.tree_unflatten(inputs, structure))))
            sums.backward(found[0][0])

        versions = sums.versions()
        try:
            graph = record(add, self._pool)
            if not self._reaches_the_same(sums, versions):
                raise RuntimeError("micro-batches reach different parameters")
        except Exception as error:  # noqa: BLE001 - whatever cannot be recorded is run as it is
            out_of_memory = is_out_of_memory(error)
            self.why_not = "memory ran out" if out_of_memory else str(error).strip().partition("\n")[0]
        else:
            (loss_sum, items), recorded = found[0], [leaf for leaf in inputs if isinstance(leaf, Tensor)]
            self._recordings[key] = _Recording(graph, recorded, loss_sum.detach(), items)
            return self._recordings[key]
        found.clear()
        for parameter in sums.parameters:  # one that was new would keep what was never written
            parameter.grad = (self.kept or {}).get(parameter)
        self._drop()
        return None

    def _reaches_the_same(self, sums: "GradientSums", versions: Any) -> bool:
        """Tell whether a recording adds to every sum that is kept, and to no other."""
        reached = sums.native()
        if reached is None or self.kept is None or reached.keys() != self.kept.keys():
            return False
        return not any(parameter in self.kept for parameter in sums.unchanged_since(versions))


def _describe(leaf: Any) -> Hashable:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _only_term(result: Any) -> tuple[Tensor, Tensor]:
    terms = as_terms(result)
    loss_sum, items = next(iter(terms.values()))
    if len(terms) > 1 or not isinstance(items, Tensor) or items.is_cpu:
        raise RuntimeError("the loss has several terms, or items that are no tensor on the device")
    return loss_sum, items


def record(run: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph:
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
        _end(pool)
        raise
    return graph


def _end(pool: Any) -> None:
    """Tell the allocator that a recording is over which failed: until then it gives no memory back, of any pool."""
    with suppress(RuntimeError):  # it knows
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
