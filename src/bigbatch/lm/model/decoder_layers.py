"""The layers that a model repeats: compiled once for all of them, and computed anew in backward to save memory.

    none         backward finds all activations
    selective    every second layer keeps its input alone, and computes the rest once more in backward
    full         every layer does

Compiling one layer serves all: they run the same code on other weights. It takes seconds, where a whole model takes
minutes.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from bigbatch.lm.config.field_types import CheckpointingMode


class DecoderLayers:
    """The repeated layers of one model, found by transformers' base class for them.

    Args:
        model: A transformers language model, or peft's wrapper of one.

    Attributes:
        mode: What is computed anew.

    Raises:
        ValueError: It has no such layers; the message is what transformers says to activation checkpointing.
    """

    def __init__(self, model: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that transformers will rename the method
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with suppress(AttributeError):  # where a release of transformers has not asked for them
            model.disable_input_require_grads()  # of embedded tokens, which only reentrant checkpoints need
        self._layers = _repeated(model)
        self._compiled: list[Any] = []
        self._draws = uses_randomness(model)
        self.mode: CheckpointingMode = "full"
        self.set_checkpointing("none")

    @property
    def is_compiled(self) -> bool:
        """Whether they are compiled."""
        return bool(self._compiled)

    def compile(self, backend: str = "inductor") -> None:
        """Compile them for rows of any length; done when the first micro-batch runs.

        Inductor is told to round where operations would that run one by one, and to draw the random numbers that they
        would, so that compiling changes no number but by the order of sums.
        """
        options: Any = None
        if backend == "inductor":
            options = {"emulate_precision_casts": True, "fallback_random": self._draws}
        self._compiled = [
            torch.compile(layer._call_impl, dynamic=True, backend=backend, options=options) for layer in self._layers
        ]
        self.set_checkpointing(self.mode)

    def decompile(self) -> None:
        """Run them operation by operation again."""
        self._compiled = []
        for layer in self._layers:
            layer._compiled_call_impl = None
        self.set_checkpointing(self.mode)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Run them operation by operation for a while: generation would be compiled for each of its lengths."""
        calls = [layer._compiled_call_impl for layer in self._layers]
        for layer in self._layers:
            layer._compiled_call_impl = None
        try:
            yield
        finally:
            for layer, call in zip(self._layers, calls, strict=True):
                layer._compiled_call_impl = call

    def set_checkpointing(self, mode: CheckpointingMode) -> None:
        """Choose what is computed anew in backward."""
        self.mode = mode
        for index, layer in enumerate(self._layers):
            anew = mode == "full" or (mode == "selective" and index % 2 == 0)
            layer.gradient_checkpointing = anew and not self._compiled
            if self._compiled:
                run = self._compiled[index]
                # the random state cannot be looked at while a graph is recorded
                again = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=self._draws)
                layer._compiled_call_impl = again if anew else run


def uses_randomness(model: nn.Module) -> bool:
    """Tell whether layers draw random numbers: by dropout modules, or by rates that modules keep as numbers."""
    for module in model.modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            return True
        for name, value in vars(module).items():
            if ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0:
                return True
    return False


def _repeated(model: Any) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError("it has no layers that transformers can checkpoint")
    return layers
