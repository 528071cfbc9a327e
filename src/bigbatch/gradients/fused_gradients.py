"""The linear layers of a model whose weight gradients are added to the sums of a window within their products.

    find the layers → open a window: install them → micro-batches → close it: remove them

Two savings in each micro-batch:

    sums      no product in a narrow dtype, no cast of it, no addition       one rounding fewer
    copies    no cast of the weights to the dtype of autocast                the same bits

A layer takes part if it is exactly an ``nn.Linear``, its weight belongs to no other module, no hook waits for the
gradient of the weight, and a micro-batch uses it once; `FusedGradients.reasons` names the others, which run as always.
"""

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from bigbatch.errors import WindowStateError
from bigbatch.gradients.fusable_layers import find_fusable_layers
from bigbatch.gradients.fused_linear import install, make_key
from bigbatch.gradients.sum_store import SumStore
from bigbatch.gradients.weight_copies import WeightCopies
from bigbatch.gradients.weight_products import add_weight_gradient_, weight_gradient
from bigbatch.gradients.weight_uses import count_uses

FusedParts: TypeAlias = Literal["both", "sums", "copies"]
_Take: TypeAlias = Callable[[Sequence[int]], Any]

_SEVERAL_USES = "a micro-batch uses its weight several times"


class FusableSums(Protocol):
    """The sums of a window, as `bigbatch.gradients.gradient_sums.GradientSums` has them."""

    parameters: tuple[Tensor, ...]
    store: SumStore

    def fuse(self, fused: "FusedGradients") -> None:
        """Report the backwards of the window."""


class _State(Enum):
    IDLE = auto()
    ADDING = auto()
    PAUSED = auto()


class FusedGradients:
    """Linear layers that add the gradients of their weights to the sums of windows.

        fused = FusedGradients(model, parameters)
        with fused.window(sums, take) as take:
            for rows in microbatches:
                sums.backward(loss_fn(model, take(rows)))

    Args:
        model: Its layers are changed inside windows only.
        parameters: Those that windows sum.
        parts: Which of the two savings.
        obstacle: Why no layer takes part, in a few words; None if any may.

    Attributes:
        obstacle: As passed.
        reasons: Why linear layers do not take part, by name.
        copies: The narrow copies of weights.
        is_partial: Whether a failed backward of this window may have added one of several gradients of a weight.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[Tensor],
        *,
        parts: FusedParts = "both",
        obstacle: str | None = None,
    ) -> None:
        self._model = model
        self._parts = parts
        self.obstacle = obstacle
        self._layers: list[_Layer] = []
        self._weights: set[Tensor] = set()
        self.reasons: dict[str, str] = {}
        self.copies = WeightCopies()
        if parts == "sums":
            self.copies.forbid("they were not requested")
        self._knows_uses = False
        self._repeated: set[Tensor] = set()  # weights that a micro-batch uses several times
        self._once: set[Tensor] = set()  # weights that a whole backward has added to once
        self._store: SumStore | None = None
        self._removers: list[Callable[[], None]] = []
        self._state = _State.IDLE
        self._only: set[int] | None = None  # ids of the parameters that receive the running backward; None for all
        self._num_added: Counter[Tensor] = Counter()  # in the running backward
        self.is_partial = False
        self._find(parameters)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedGradients":
        model = copy.deepcopy(self._model, memo)  # layers of a copied model are found again
        return FusedGradients(model, list(model.parameters()), parts=self._parts, obstacle=self.obstacle)

    @property
    def num_layers(self) -> int:
        """Linear layers that take part."""
        return len(self._layers)

    @property
    def disabled_reason(self) -> str | None:
        """Why no layer takes part, in a few words; None if any does."""
        if self._layers or self.obstacle is not None:
            return self.obstacle
        found = Counter(self.reasons.values()).most_common(1)
        return found[0][0] if found else "the model has no linear layer whose weight is trained"

    @property
    def expected_copies_bytes(self) -> int:
        """Memory of the copies of all weights that micro-batches cast, as far as that is known."""
        if self.copies.obstacle is not None:
            return 0
        return sum(w.numel() * dtype.itemsize for w, dtype in self._narrow_dtypes().items())

    def _narrow_dtypes(self) -> dict[Tensor, torch.dtype]:
        return {layer.weight: layer.narrow_dtype for layer in self._layers if layer.narrow_dtype is not None}

    @property
    def variant(self) -> Hashable:
        """What a captured CUDA graph of the current window contains; None for the ordinary layers."""
        return None if self._store is None else self.copies.num_allocations

    def _find(self, parameters: Sequence[Tensor]) -> None:
        if self.obstacle is not None:
            return
        known = {layer.module: layer for layer in self._layers}
        found = find_fusable_layers(self._model, parameters)
        self.reasons = found.reasons
        if self._repeated:
            names = {module: name for name, module in self._model.named_modules()}
            self.reasons |= {names[module]: _SEVERAL_USES for module, w in found.layers if w in self._repeated}
        self._layers = [
            known[module] if module in known and known[module].weight is weight else _Layer(self, module, weight)
            for module, weight in found.layers
            if weight not in self._repeated
        ]
        self._weights = {layer.weight for layer in self._layers}

    @contextmanager
    def window(self, sums: FusableSums, take: _Take) -> Iterator[_Take]:
        """Install the layers for the micro-batches of a window.

        Args:
            sums: Of the window, before its first backward.
            take: Returns the inputs of a micro-batch.

        Yields:
            ``take``, to be called before each forward: it updates the copies of the weights.
        """
        self._find(sums.parameters)
        if not self._layers:
            yield take
            return
        self._store, self.is_partial = sums.store, False
        sums.fuse(self)
        self.copies.mark_stale()
        self._install()

        def prepare_and_take(rows: Sequence[int]) -> Any:
            self._prepare_microbatch()
            return take(rows)

        try:
            yield prepare_and_take
        finally:
            self._remove()
            self._store, self._state = None, _State.IDLE

    def _install(self) -> None:
        adds = self._parts != "copies"
        self._removers += [
            install(layer.module, layer.key, adds=adds, copy=self.copies.get(layer.weight)) for layer in self._layers
        ]

    def _remove(self) -> None:
        while self._removers:
            self._removers.pop()()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let other code run the model and its backwards inside."""
        self._remove()
        self._state = _State.PAUSED
        try:
            yield
        finally:
            self._state = _State.IDLE
            self._install()

    def _prepare_microbatch(self) -> None:
        """Make the copies that the last micro-batch has shown to be useful, and write those that are out of date."""
        dtypes = self._narrow_dtypes()
        if not self.copies.is_for(dtypes) and self.copies.obstacle is None:
            self._remove()
            self.copies.allocate(dtypes)
            self._install()
        self.copies.refresh()

    def begin_backward(self, loss: Tensor, only: Sequence[Tensor] | None) -> None:
        """Let layers add to the sums; arguments are those of `GradientSums.backward`."""
        if not self._knows_uses:
            uses = count_uses(loss, self._weights)
            self._repeated |= {weight for weight, found in uses.items() if found.number > 1}
            self._knows_uses = True
        self._only = None if only is None else set(map(id, only))
        self._num_added.clear()
        self._state = _State.ADDING

    def end_backward(self, loss: Tensor, *, succeeded: bool) -> None:
        """Note which weights have received a gradient."""
        self._state = _State.IDLE
        if not succeeded:
            self.is_partial = self.is_partial or self._may_be_partial(loss)
        elif len(self._once) < len(self._layers):
            self._once |= {weight for weight, number in self._num_added.items() if number == 1}
            self._repeated |= {weight for weight, number in self._num_added.items() if number > 1}

    def _may_be_partial(self, loss: Tensor) -> bool:
        """Return whether a weight received a part of its gradient in a backward that failed."""
        uses = count_uses(loss, self._num_added)
        for weight in self._num_added:
            found = uses.get(weight)
            if found is None or found.number > 1 or (found.is_compiled and weight not in self._once):
                return True
        return False

    def adds_to(self, weight: Tensor) -> bool:
        """Return whether a layer may add to the sum of a weight, which autograd then sees without a gradient."""
        return self._parts != "copies" and weight in self._weights

    def accepts_gradient(self, layer: "_Layer") -> bool:
        """Return whether a layer that is not compiled adds to its sum, instead of returning its gradient."""
        return self._state is _State.ADDING and self._parts != "copies" and layer.weight not in self._repeated

    def add(self, layer: "_Layer", output_gradient: Tensor, inputs: Tensor) -> None:
        """Add a gradient to the sum of a weight, unless an attempt that ran out of memory has added it."""
        weight, store = layer.weight, self._store
        if store is None or (self._only is not None and id(weight) not in self._only):
            return
        if (total := store.get(weight)) is None:
            store.set(weight, weight_gradient(output_gradient, inputs, store.dtype_of(weight)))
        else:
            add_weight_gradient_(total, output_gradient, inputs)
        self._num_added[weight] += 1

    def add_compiled(self, layer: "_Layer", output_gradient: Tensor, inputs: Tensor) -> None:
        """As `add`, for code that cannot return a gradient.

        Raises:
            WindowStateError: The backward is not that of the window.
        """
        if self._state is _State.IDLE:
            raise WindowStateError(
                "loss_fn differentiates compiled layers by itself, and the gradients of their weights would be added "
                "to those of the window: pass fuse_gradients=False."
            )
        if self._state is _State.ADDING:
            self.add(layer, output_gradient, inputs)


class _Layer:
    """A linear layer that takes part; its key refers to it weakly.

    Attributes:
        narrow_dtype: To which micro-batches cast the weight; None to none. Expected to be bfloat16 on CUDA, until the
            first backward.
    """

    def __init__(self, owner: FusedGradients, module: nn.Linear, weight: Tensor) -> None:
        self._owner = owner
        self.module = module
        self.weight = weight
        self.key = make_key(self)
        is_wide = weight.dtype is torch.float32 and weight.is_cuda
        self.narrow_dtype: torch.dtype | None = torch.bfloat16 if is_wide else None

    def accepts_gradient(self, inputs: Tensor) -> bool:
        self._note(inputs)
        return self._owner.accepts_gradient(self)

    def add(self, output_gradient: Tensor, inputs: Tensor) -> None:
        self._owner.add(self, output_gradient, inputs)

    def add_compiled(self, output_gradient: Tensor, inputs: Tensor) -> None:
        self._note(inputs)
        self._owner.add_compiled(self, output_gradient, inputs)

    def _note(self, inputs: Tensor) -> None:
        self.narrow_dtype = inputs.dtype if inputs.dtype != self.weight.dtype else None
