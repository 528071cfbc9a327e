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
from typing import Any, Literal

import torch
import torch._dynamo
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from bigbatch.compiled_modules import FIXED_OPTIONS, MIX_REDUCTIONS, FixedCall, FixedCode, known_options
from bigbatch.lm.config.field_types import CheckpointingMode
from bigbatch.offload.layer_inputs import LayerInputs

KernelChoice = Literal["timed", "untimed", "fixed"]
"""How the compiler chooses kernels: by timing too; without timing; or as `FixedCode`, by the inputs of a warm-up."""


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
        self._fixed_code: FixedCode | None = None
        self._uses_randomness = uses_randomness(model)
        self.mode: CheckpointingMode = "full"
        self.set_checkpointing("none")

    @property
    def is_compiled(self) -> bool:
        """Whether the layers are compiled."""
        return bool(self._compiled)

    def compile(self, backend: str | Callable[..., Any] = "inductor", *, kernels: KernelChoice = "timed") -> None:
        """Compile the layers for rows of any length; compilation happens when the first micro-batch runs.

        Inductor is configured to round like eager mode and to draw the same random numbers, so that compilation changes
        results only by the order of sums. With ``"fixed"`` kernels, `fix` ends compilation.
        """
        options: Any = None
        if backend == "inductor":
            options = {"emulate_precision_casts": True, "fallback_random": self._uses_randomness}
            if kernels == "fixed":
                options |= FIXED_OPTIONS
            else:
                options |= known_options({MIX_REDUCTIONS: True})
                if kernels == "untimed":
                    options["deterministic"] = True
        if kernels == "fixed":
            self._fixed_code = FixedCode(backend, options)
            self._fixed_code.compile()
            self._compiled = [_with_fixed_code(self._fixed_code, layer) for layer in self._layers]
        else:
            self._fixed_code = None
            self._compiled = [
                _with_constant_numbers(torch.compile(layer._call_impl, dynamic=True, backend=backend, options=options))
                for layer in self._layers
            ]
        self.set_checkpointing(self.mode)

    def fix(self) -> None:
        """Compile nothing from now on: inputs for which nothing was compiled run eagerly. For ``"fixed"`` kernels."""
        assert self._fixed_code is not None, "layers with fixed kernels only"
        self._fixed_code.fix()

    def first_trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters with ``requires_grad`` of the first layer that has some; empty if none has."""
        for layer in self._layers:
            if found := [parameter for parameter in layer.parameters() if parameter.requires_grad]:
                return found
        return []

    @property
    def eager_calls(self) -> tuple[int, int] | None:
        """Calls in training that ran eagerly since `fix`, and all of them; None for other than ``"fixed"`` kernels."""
        code = self._fixed_code
        return None if code is None else (code.num_eager_calls, code.num_calls)

    def decompile(self) -> None:
        """Return to eager mode."""
        self._compiled, self._fixed_code = [], None
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
        compiled, code, mode = self._compiled, self._fixed_code, self.mode
        self.decompile()
        self.set_checkpointing("full")
        try:
            yield
        finally:
            self._compiled, self._fixed_code = compiled, code
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
                call = partial(self._placed(checkpointed, index), run) if recomputes else run
                layer._compiled_call_impl = call if self._fixed_code is None else FixedCall(self._fixed_code, call)
        if mode != "offload":
            self.inputs.release()

    def _placed(self, checkpointed: Callable[..., Any], index: int) -> Callable[..., Any]:
        """Return a checkpoint function of a layer; with offload, one that copies the layer's input to the host."""
        if self.mode != "offload":
            return checkpointed
        # by `partial`, which is no state of the model that a trial run restores
        return partial(self.inputs.run, checkpointed, index + 1 < len(self._layers))


def _with_fixed_code(code: FixedCode, layer: nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: code.run(layer, args, kwargs)


def _with_constant_numbers(run: Callable[..., Any]) -> Callable[..., Any]:
    """Make the compiler treat numbers that are no sizes of tensors as constants of the graph.

    With dynamic shapes they would be inputs. For floats, such as the scaling of adapters, Inductor compiles a kernel
    for the CPU each. Integers that layers of a sharded model have, such as the width of a head, divide the indices of
    its kernels: rotary positions took 14 times as long on an H200. The integers among the arguments of layers, such as
    the longest sequence, are the same for all rows of a run. Set around each call, because any call may compile; by
    hand, because ``torch._dynamo.config.patch`` takes twice as long.
    """
    config: Any = torch._dynamo.config

    @wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        before = config.specialize_float, config.specialize_int
        config.specialize_float = config.specialize_int = True
        try:
            return run(*args, **kwargs)
        finally:
            config.specialize_float, config.specialize_int = before

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
