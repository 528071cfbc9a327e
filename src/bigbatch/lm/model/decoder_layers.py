"""Compilation and activation checkpointing of a model's repeated decoder layers.

    none         all activations are stored for backward
    selective    every second layer stores only its input and recomputes its activations in backward
    full         every layer does
    offload      every layer does, and its input is in host memory between forward and backward

The layers run the same code on different weights, so they share one compiled graph: compilation takes seconds, instead
of minutes for a whole model.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from bigbatch.lm.config.field_types import CheckpointingMode
from bigbatch.offload.layer_inputs import LayerInputs


class DecoderLayers:
    """The repeated layers of a model: the instances of transformers' ``GradientCheckpointingLayer``.

    Args:
        model: A transformers language model, or peft's wrapper of one.

    Attributes:
        mode: Which layers recompute their activations.
        inputs: Inputs of layers in host memory, in the mode ``"offload"``.

    Raises:
        ValueError: The model has no such layers; the message is that of transformers.
    """

    def __init__(self, model: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about a future name of the method
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with suppress(AttributeError):  # in releases of transformers that do not enable them
            model.disable_input_require_grads()  # only reentrant checkpoints need them
        self._layers = repeated_layers(model)
        self._checkpoints = [layer._gradient_checkpointing_func for layer in self._layers]
        self.inputs = LayerInputs()
        self._compiled: list[Any] = []
        self._uses_randomness = uses_randomness(model)
        self.mode: CheckpointingMode = "full"
        self.set_checkpointing("none")

    @property
    def is_compiled(self) -> bool:
        """Whether the layers are compiled."""
        return bool(self._compiled)

    def compile(self, backend: str | Callable[..., Any] = "inductor", *, deterministic: bool = False) -> None:
        """Compile the layers for rows of any length; compilation happens when the first micro-batch runs.

        Inductor is configured to round like eager mode and to draw the same random numbers, so that compilation changes
        results only by the order of sums. With ``deterministic`` it does not choose that order by timing.
        """
        options: Any = None
        if backend == "inductor":
            options = {"emulate_precision_casts": True, "fallback_random": self._uses_randomness}
            if deterministic:
                options["deterministic"] = True
        self._compiled = [
            _with_constant_floats(torch.compile(layer._call_impl, dynamic=True, backend=backend, options=options))
            for layer in self._layers
        ]
        self.set_checkpointing(self.mode)

    def decompile(self) -> None:
        """Return to eager mode."""
        self._compiled = []
        for layer in self._layers:
            layer._compiled_call_impl = None
        self.set_checkpointing(self.mode)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Run the layers eagerly within the context: generation would recompile them for each length."""
        calls = [layer._compiled_call_impl for layer in self._layers]
        for layer in self._layers:
            layer._compiled_call_impl = None
        try:
            yield
        finally:
            for layer, call in zip(self._layers, calls, strict=True):
                layer._compiled_call_impl = call

    @contextmanager
    def eager_recomputing(self) -> Iterator[None]:
        """Run the layers eagerly within the context, and recompute the activations of every one: least memory."""
        compiled, mode = self._compiled, self.mode
        self.decompile()
        self.set_checkpointing("full")
        try:
            yield
        finally:
            self._compiled = compiled
            self.set_checkpointing(mode)

    def set_checkpointing(self, mode: CheckpointingMode) -> None:
        """Select the layers that recompute their activations in backward."""
        self.mode = mode
        for index, layer in enumerate(self._layers):
            recomputes = mode in ("full", "offload") or (mode == "selective" and index % 2 == 0)
            layer.gradient_checkpointing = recomputes and not self._compiled
            layer._gradient_checkpointing_func = self._placed(self._checkpoints[index], index)
            if self._compiled:
                run = self._compiled[index]
                # the random state cannot be read while a CUDA graph is captured
                checkpointed = partial(checkpoint, use_reentrant=False, preserve_rng_state=self._uses_randomness)
                layer._compiled_call_impl = partial(self._placed(checkpointed, index), run) if recomputes else run
        if mode != "offload":
            self.inputs.release()

    def _placed(self, checkpointed: Callable[..., Any], index: int) -> Callable[..., Any]:
        """Return a checkpoint function of a layer; with offload, one that copies the layer's input to the host."""
        if self.mode != "offload":
            return checkpointed
        # by `partial`, which is no state of the model that a trial run restores
        return partial(self.inputs.run, checkpointed, index + 1 < len(self._layers))


def _with_constant_floats(run: Callable[..., Any]) -> Callable[..., Any]:
    """Make the compiler treat floats, such as the scaling of adapters, as constants of the graph.

    With dynamic shapes they would be inputs, for each of which Inductor compiles a kernel for the CPU. Set around each
    call, because any call may compile; by hand, because ``torch._dynamo.config.patch`` takes twice as long.
    """
    config: Any = torch._dynamo.config

    @wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        before = config.specialize_float
        config.specialize_float = True
        try:
            return run(*args, **kwargs)
        finally:
            config.specialize_float = before

    return call


def offload_notes(mode: str, device: torch.device, *, captures: bool) -> list[str]:
    """Return what a user would not expect of a checkpointing mode.

    Args:
        mode: As configured.
        device: Of the model.
        captures: Whether micro-batches would be captured as CUDA graphs in another mode.
    """
    if mode != "offload":
        return []
    if device.type != "cuda":
        return [f"--gradient-checkpointing offload saves no memory on {device}, which has none but that of the host"]
    return ["micro-batches are not captured as CUDA graphs: inputs of layers are copied to the host"] * captures


def uses_randomness(model: nn.Module) -> bool:
    """Return whether a model draws random numbers, by its dropout modules or the dropout rates in its attributes."""
    for module in model.modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            return True
        for name, value in vars(module).items():
            if ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0:
                return True
    return False


def repeated_layers(model: Any) -> list[Any]:
    """Return the repeated layers of a model.

    Raises:
        ValueError: There are none.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError("it has no layers that transformers can checkpoint")
    return layers
