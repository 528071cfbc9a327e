"""The layers of a model that add the gradients of their weights to the sums of a window by themselves.

    find the layers → open a window: install them → micro-batches → close it: remove them

Two savings in each micro-batch:

    sums      linear layers: no product in a narrow dtype, no cast of it, no addition          one rounding fewer
              embeddings: no matrix of the whole vocabulary
    copies    no cast of the weights of linear layers to the dtype of autocast                 the same bits

A layer takes part if it is exactly an ``nn.Linear`` or ``nn.Embedding``, no hook waits for the gradient of its weight,
and a micro-batch uses the weight once; or a linear layer and an embedding share it, as in many language models.
`FusedGradients.reasons` names the others, which run as always.
"""

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from bigbatch.gradients.direct_sums import DirectSums, FusedLayer
from bigbatch.gradients.fusable_layers import find_fusable_layers
from bigbatch.gradients.fused_embedding import install_embedding
from bigbatch.gradients.fused_linear import install
from bigbatch.gradients.sum_store import SumStore
from bigbatch.gradients.weight_copies import WeightCopies

FusedParts: TypeAlias = Literal["both", "sums", "copies"]
_Take: TypeAlias = Callable[[Sequence[int]], Any]

_SEVERAL_USES = "a micro-batch uses its weight several times"


class FusableSums(Protocol):
    """The sums of a window, as `bigbatch.gradients.gradient_sums.GradientSums` has them."""

    parameters: tuple[Tensor, ...]
    store: SumStore

    def fuse(self, fused: "FusedGradients") -> None:
        """Report the backwards of the window."""


class FusedGradients:
    """Layers that add the gradients of their weights to the sums of windows.

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
        reasons: Why layers do not take part, by name.
        copies: The narrow copies of weights.
        sums: What layers add to.
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
        self.reasons: dict[str, str] = {}
        self.copies = WeightCopies()
        if parts == "sums":
            self.copies.forbid("they were not requested")
        self.sums = DirectSums()
        self._layers: list[FusedLayer] = []
        self._removers: list[Callable[[], None]] = []
        self._is_open = False
        self._find(parameters)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedGradients":
        model = copy.deepcopy(self._model, memo)  # layers of a copied model are found again
        return FusedGradients(model, list(model.parameters()), parts=self._parts, obstacle=self.obstacle)

    @property
    def num_layers(self) -> int:
        """Layers that take part."""
        return len(self._layers)

    @property
    def disabled_reason(self) -> str | None:
        """Why no layer takes part, in a few words; None if any does."""
        if self._layers or self.obstacle is not None:
            return self.obstacle
        found = Counter(self.reasons.values()).most_common(1)
        return found[0][0] if found else "the model has no linear layer and no embedding that is trained"

    @property
    def variant(self) -> Hashable:
        """What a captured CUDA graph of the current window contains; None for the ordinary layers."""
        return self.copies.num_allocations if self._is_open else None

    @property
    def expected_copies_bytes(self) -> int:
        """Memory of the copies of all weights that micro-batches cast, as far as that is known."""
        if self.copies.obstacle is not None:
            return 0
        return sum(w.numel() * dtype.itemsize for w, dtype in self._narrow_dtypes().items())

    def _narrow_dtypes(self) -> dict[Tensor, torch.dtype]:
        """Return the dtypes of copies; weights that are shared with an embedding follow all others."""
        found = {
            layer.weight: layer.narrow_dtype
            for layer in self._layers
            if layer.narrow_dtype is not None and layer.narrow_dtype != layer.weight.dtype
        }
        dtypes = set(found.values())
        if len(dtypes) == 1:
            tied = (each.weight for each in self._layers if each.is_tied and each.weight.dtype is torch.float32)
            found |= dict.fromkeys(tied, *dtypes)
        return found

    def _find(self, parameters: Sequence[Tensor]) -> None:
        if self.obstacle is not None:
            return
        known = {layer.fusable: layer for layer in self._layers}
        found, repeated = find_fusable_layers(self._model, parameters), self.sums.repeated
        self.reasons = found.reasons
        if repeated:
            names = {module: name for name, module in self._model.named_modules()}
            self.reasons |= {names[each.module]: _SEVERAL_USES for each in found.layers if each.weight in repeated}
        self._layers = [
            known.get(each) or FusedLayer(self.sums, each) for each in found.layers if each.weight not in repeated
        ]
        if self._parts == "copies":
            self._layers = [layer for layer in self._layers if isinstance(layer.module, nn.Linear)]

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
        self.sums.open(sums.store, self._layers)
        sums.fuse(self)
        self.copies.mark_stale()
        self._is_open = True
        self._install()

        def prepare_and_take(rows: Sequence[int]) -> Any:
            self._prepare_microbatch()
            return take(rows)

        try:
            yield prepare_and_take
        finally:
            self._remove()
            self._is_open = False
            self.sums.close()

    def _install(self) -> None:
        adds = self._parts != "copies"
        for layer in self._layers:
            module, is_tied = layer.module, layer.is_tied and adds
            if isinstance(module, nn.Linear):
                copied = self.copies.get(layer.weight)
                self._removers.append(install(module, layer.key, adds=adds, copy=copied, is_tied=is_tied))
            else:
                self._removers.append(install_embedding(module, layer.key))

    def _remove(self) -> None:
        while self._removers:
            self._removers.pop()()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let other code run the model and its backwards inside."""
        self._remove()
        self.sums.pause()
        try:
            yield
        finally:
            self.sums.resume()
            self._install()

    def _prepare_microbatch(self) -> None:
        """Make the copies that the last micro-batch has shown to be useful, and write those that are out of date."""
        dtypes = self._narrow_dtypes()
        if not self.copies.is_for(dtypes) and self.copies.obstacle is None:
            self._remove()
            self.copies.allocate(dtypes)
            self._install()
        self.copies.refresh()

    def begin_backward(self, loss: Tensor, only: Sequence[Tensor] | None, *, has_inner: bool) -> None:
        """Let layers add to the sums; arguments are those of `DirectSums.begin`."""
        if self._parts != "copies":
            self.sums.begin(loss, only, has_inner=has_inner)

    def end_backward(self, loss: Tensor, *, succeeded: bool) -> None:
        """Complete the sums."""
        if self._parts != "copies":
            self.sums.end(loss, succeeded=succeeded)

    def restart(self) -> None:
        """Drop what micro-batches have added."""
        self.copies.mark_stale()
        self.sums.restart()

    def adds_late(self, weight: Tensor) -> bool:
        """Return whether the gradient of a weight is added at the end of a backward."""
        return self._parts != "copies" and self.sums.is_collected(weight)

    def adds_to(self, weight: Tensor) -> bool:
        """Return whether a layer may add to the sum of a weight, which autograd then sees without a gradient."""
        return self._parts != "copies" and weight in self.sums.weights
