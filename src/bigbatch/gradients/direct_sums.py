"""Sums of a window that layers add to within a backward, and which of them a backward that failed has completed.

    begin → layers add → end        no layer adds outside of it, and after a failure only to the sums that are named

A weight that is used once is complete when its layer has added. The gradient of a weight that a linear layer and an
embedding share is collected, and added when the backward has ended.
"""

from collections import Counter
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.errors import WindowStateError
from bigbatch.gradients.fusable_layers import FusableLayer
from bigbatch.gradients.fused_linear import make_key
from bigbatch.gradients.sum_store import SumStore
from bigbatch.gradients.weight_products import add_rows_, add_weight_gradient_, weight_gradient
from bigbatch.gradients.weight_uses import count_uses


class _State(Enum):
    IDLE = auto()
    ADDING = auto()
    PAUSED = auto()


class DirectSums:
    """The sums of one window after the other, as layers add to them.

    Attributes:
        weights: Those of the layers; set by `open`.
        repeated: Weights that micro-batches use several times, whose gradients autograd adds.
        is_partial: Whether a failed backward of this window may have added a part of the gradient of a weight.
    """

    def __init__(self) -> None:
        self.weights: set[Tensor] = set()
        self.repeated: set[Tensor] = set()
        self.is_partial = False
        self._tied: set[Tensor] = set()
        self._store: SumStore | None = None
        self._state = _State.IDLE
        self._knows_uses = False
        self._task: int | None = None  # of autograd, of the running backward; None if inner ones belong to it
        self._task_hook: Any = None
        self._once: set[Tensor] = set()  # weights that a whole backward has added to once
        self._only: set[int] | None = None  # ids of the parameters that receive the running backward; None for all
        self._num_added: Counter[Tensor] = Counter()  # in the running backward, without tied weights
        self._collected: dict[Tensor, Tensor] = {}  # gradients of tied weights in the running backward
        self._versions: dict[Tensor, int | None] = {}  # of the sums of tied weights before it

    def open(self, store: SumStore, layers: Sequence["FusedLayer"]) -> None:
        """Start a window, before its first backward."""
        self._store, self.is_partial = store, False
        self.weights = {layer.weight for layer in layers}
        self._tied = {layer.weight for layer in layers if layer.is_tied}

    def restart(self) -> None:
        """Start again with sums that are empty."""
        self.is_partial = False

    def is_collected(self, weight: Tensor) -> bool:
        """Return whether the gradient of a weight is added when a backward has ended."""
        return weight in self._tied

    def close(self) -> None:
        """End a window."""
        self._store, self._state = None, _State.IDLE
        self._collected.clear()

    def pause(self) -> None:
        """Ignore what compiled layers add, until `resume`."""
        self._state = _State.PAUSED

    def resume(self) -> None:
        """End `pause`."""
        self._state = _State.IDLE

    def begin(self, loss: Tensor, only: Sequence[Tensor] | None, *, has_inner: bool = False) -> None:
        """Let layers add.

        Args:
            loss: As for `GradientSums.backward`.
            only: As for `GradientSums.backward`.
            has_inner: Whether backwards that run within this one, as of reentrant checkpoints, belong to it; else they
                are those of hooks, and add nothing.
        """
        if not self._knows_uses:
            uses = count_uses(loss, self.weights - self._tied)
            self.repeated |= {weight for weight, found in uses.items() if found.number > 1}
            self._knows_uses = True
        self._only = None if only is None else set(map(id, only))
        self._num_added.clear()
        self._versions = {weight: self._version_of(weight) for weight in self._tied}
        self._state, self._task = _State.ADDING, None
        if not has_inner and loss.grad_fn is not None:
            self._task_hook = loss.grad_fn.register_prehook(self._note_task)

    def _note_task(self, _gradients: object) -> None:
        if self._task is None:
            self._task = torch._C._current_graph_task_id()

    @property
    def _is_inner(self) -> bool:
        """Whether a backward that does not belong to the loss runs within that of the loss."""
        return self._task is not None and self._task != torch._C._current_graph_task_id()

    def end(self, loss: Tensor, *, succeeded: bool) -> None:
        """Complete the sums; or note after a failure whether each is complete or unchanged."""
        self._state = _State.IDLE
        if self._task_hook is not None:
            self._task_hook.remove()
            self._task_hook = None
        collected, self._collected = self._collected, {}
        if not succeeded:
            self.is_partial = self.is_partial or self._may_be_partial(loss, collected)
            return
        for weight, gradient in collected.items():  # nothing is allocated
            self._add_or_set(weight, gradient)
        if len(self._once) < len(self.weights):
            self._once |= {weight for weight, number in self._num_added.items() if number == 1}
            self.repeated |= {weight for weight, number in self._num_added.items() if number > 1}

    def _may_be_partial(self, loss: Tensor, collected: dict[Tensor, Tensor]) -> bool:
        if any(self._version_of(weight) != self._versions[weight] for weight in collected):
            return True  # autograd has added another part
        uses = count_uses(loss, self._num_added)
        for weight in self._num_added:
            found = uses.get(weight)
            if found is None or found.number > 1 or (found.is_compiled and weight not in self._once):
                return True
        return False

    def accepts(self, layer: "FusedLayer") -> bool:
        """Return whether a layer that is not compiled adds to its sum, instead of returning its gradient."""
        return self._state is _State.ADDING and layer.weight not in self.repeated and not self._is_inner

    def add_product(self, layer: "FusedLayer", output_gradient: Tensor, inputs: Tensor) -> None:
        """Add the gradient of a linear layer, unless an attempt that ran out of memory has added it."""
        if not self._is_wanted(layer):
            return
        if (total := self._total(layer)) is None:
            with torch.autocast(inputs.device.type, enabled=False):  # one around the window would narrow the product
                gradient = weight_gradient(output_gradient, inputs, SumStore.dtype_of(layer.weight))
            self._start(layer, gradient)
        else:
            add_weight_gradient_(total, output_gradient, inputs)
        self._count(layer)

    def add_compiled_product(self, layer: "FusedLayer", output_gradient: Tensor, inputs: Tensor) -> None:
        """As `add_product`, for code that cannot return a gradient.

        Raises:
            WindowStateError: The backward is not that of the window.
        """
        if self._state is _State.IDLE or (self._state is _State.ADDING and self._is_inner):
            raise WindowStateError(
                "loss_fn differentiates compiled layers by itself, and the gradients of their weights would be added "
                "to those of the window: pass fuse_gradients=False."
            )
        if self._state is _State.ADDING:
            self.add_product(layer, output_gradient, inputs)

    def add_rows(self, layer: "FusedLayer", places: Tensor, rows: Tensor) -> None:
        """Add the gradient of an embedding, as `add_product` does."""
        if not self._is_wanted(layer):
            return
        if (total := self._total(layer)) is None:
            total = torch.zeros_like(layer.weight, dtype=SumStore.dtype_of(layer.weight), requires_grad=False)
            add_rows_(total, places, rows)
            self._start(layer, total)
        else:
            add_rows_(total, places, rows)
        self._count(layer)

    def add_whole(self, layer: "FusedLayer", gradient: Tensor) -> None:
        """Add the gradient of a tied weight by a use of it outside of its layers."""
        if not self._is_wanted(layer):
            return
        if (total := self._total(layer)) is None:
            # a copy: other nodes of the graph may refer to the same tensor
            self._start(layer, gradient.to(SumStore.dtype_of(layer.weight), copy=True))
        else:
            total.add_(gradient)

    def _count(self, layer: "FusedLayer") -> None:
        if not layer.is_tied:
            self._num_added[layer.weight] += 1

    def _is_wanted(self, layer: "FusedLayer") -> bool:
        return self._store is not None and (self._only is None or id(layer.weight) in self._only)

    def _total(self, layer: "FusedLayer") -> Tensor | None:
        """Return what a layer adds to: the sum of its weight, or what is collected for it."""
        assert self._store is not None, "inside a window"
        return self._collected.get(layer.weight) if layer.is_tied else self._store.get(layer.weight)

    def _start(self, layer: "FusedLayer", total: Tensor) -> None:
        if layer.is_tied:
            self._collected[layer.weight] = total
        else:
            self._add_or_set(layer.weight, total)

    def _add_or_set(self, weight: Tensor, gradient: Tensor) -> None:
        assert self._store is not None, "inside a window"
        if (total := self._store.get(weight)) is None:
            self._store.set(weight, gradient)
        else:
            total.add_(gradient)

    def _version_of(self, weight: Tensor) -> int | None:
        assert self._store is not None, "inside a window"
        total = self._store.get(weight)
        return None if total is None else total._version


class FusedLayer:
    """A layer that adds to a sum; its key refers to it weakly.

    Args:
        sums: What it adds to.
        fusable: The layer.

    Attributes:
        fusable: As passed; ``module``, ``weight`` and ``is_tied`` are its fields.
        key: As for `make_key`.
    """

    def __init__(self, sums: DirectSums, fusable: FusableLayer) -> None:
        self._sums = sums
        self.fusable = fusable
        self.module, self.weight, self.is_tied = fusable
        self.key = make_key(self)
        self._noted: tuple[torch.dtype | None] | None = None

    @property
    def narrow_dtype(self) -> torch.dtype | None:
        """To which micro-batches cast the weight; None to none. Expected to be bfloat16 on CUDA, until a backward."""
        if self._noted is not None:
            return self._noted[0]
        is_wide = self.weight.dtype is torch.float32 and self.weight.is_cuda
        is_cast = is_wide and isinstance(self.module, nn.Linear) and not self.is_tied
        return torch.bfloat16 if is_cast else None

    def accepts_gradient(self, inputs: Tensor | None) -> bool:
        """Return whether the running backward is to add to the sum, instead of returning the gradient to autograd."""
        if inputs is not None:
            self._note(inputs)
        return self._sums.accepts(self)

    def add(self, output_gradient: Tensor, inputs: Tensor) -> None:
        """Add a gradient, ``output_gradientᵀ · inputs``."""
        self._sums.add_product(self, output_gradient, inputs)

    def add_compiled(self, output_gradient: Tensor, inputs: Tensor) -> None:
        """Add a gradient in compiled code, which cannot return it to autograd."""
        self._note(inputs)
        self._sums.add_compiled_product(self, output_gradient, inputs)

    def add_rows(self, places: Tensor, rows: Tensor) -> None:
        """Add rows of a gradient at their places."""
        self._sums.add_rows(self, places, rows)

    def add_whole(self, gradient: Tensor) -> None:
        """Add a gradient of the weight; it is not written to."""
        self._sums.add_whole(self, gradient)

    def _note(self, inputs: Tensor) -> None:
        self._noted = (inputs.dtype if inputs.dtype != self.weight.dtype else None,)
