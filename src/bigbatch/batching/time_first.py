"""Detect a batch that is cut along time: recurrent and attention layers that read dimension 0 as time.

A layer with ``batch_first=False`` expects ``[time, batch, ...]``. Whether the model transposes its inputs for it is
known only inside the forward: the first micro-batch of b samples must not reach such a layer with dimension 0 of size
b.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bigbatch.compiled_modules import has_compiled


class TimeFirstCheck:
    """Checks the first micro-batch that reaches a model's layers: they may read dimension 0 as time.

        check = TimeFirstCheck(model)
        with check.watch(parts.take) as take:
            loss_fn(model, take(rows))

    Args:
        model: Its recurrent and attention layers are hooked in the first window. A compiled model is not checked, since
            hooks would be compiled with it.

    Attributes:
        is_done: Whether nothing remains to be checked.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        kinds = nn.RNNBase | nn.MultiheadAttention
        self._layers = {} if has_compiled(model) else {name: m for name, m in modules.items() if isinstance(m, kinds)}
        self.is_done = not self._layers
        self._was_reached = False
        # Of the micro-batch that a thread runs: with batch_norm="exact" several take turns.
        self._num_samples: dict[int, int] = {}

    @contextmanager
    def watch(self, take: Callable[[Sequence[int]], Any]) -> Iterator[Callable[[Sequence[int]], Any]]:
        """Yield a ``take`` for one window, which is checked unless a window before it was.

        Args:
            take: Returns the micro-batch of some samples.
        """
        if self.is_done:
            yield take
            return
        num_taken = 0
        self._was_reached = False  # a window that failed is checked again

        def watched(rows: Sequence[int]) -> Any:
            nonlocal num_taken
            num_taken += 1
            if self._was_reached:
                self._num_samples.pop(threading.get_ident(), None)
            else:
                self._num_samples[threading.get_ident()] = len(rows)
            return take(rows)

        hooks = [self._hook(name, module) for name, module in self._layers.items()]
        try:
            yield watched
            self.is_done = num_taken > 0
        finally:
            self._num_samples.clear()
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str, module: nn.Module) -> Any:
        def check(module: Any, inputs: Any, named_inputs: Any) -> None:
            first = inputs[0] if inputs else next(iter(named_inputs.values()), None)
            thread = threading.get_ident()
            num_samples = self._num_samples.get(thread)
            if num_samples is not None and isinstance(first, Tensor) and not first.is_nested:
                self._was_reached, self._num_samples = True, {thread: num_samples}
                self._check(name, module, first, num_samples)

        return module.register_forward_pre_hook(check, with_kwargs=True)

    def _check(self, name: str, layer: Any, first: Tensor, num_samples: int) -> None:
        is_unbatched = first.dim() == 2
        if first.shape[0] != num_samples or not (is_unbatched or not layer.batch_first):
            return
        layer_name = f"{type(layer).__name__} {name!r}" if name else type(layer).__name__
        why = "without a batch dimension" if is_unbatched else "with batch_first=False"
        raise ValueError(
            f"the {layer_name} reads dimension 0 as time ({why}), and its input of shape {list(first.shape)} has the "
            f"{num_samples} sample(s) of the micro-batch there. Pass batch_dim=1 for a batch [time, batch, ...], "
            "or batch_dim=0 if dimension 0 of the batch is the sample and the model is right."
        )
