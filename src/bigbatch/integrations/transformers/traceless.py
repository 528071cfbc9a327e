"""Run a trainer's loss without a trace on the trainer, its models, its collator and the random generators."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_map

from bigbatch.integrations.transformers.trainer_metrics import local_gathers
from bigbatch.integrations.transformers.trainer_state import trainer_preserved
from bigbatch.preserve import preserved
from bigbatch.trials.loss_modules import modules_used_by

_MISSING = object()


def bare_model(trainer: Any) -> nn.Module:
    """Return the model of a trainer without the wrappers of DDP and of `torch.compile`."""
    model: nn.Module = trainer.model
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def modules_of(trainer: Any, *functions: Callable[..., Any]) -> list[nn.Module]:
    """Return the modules that a trainer's loss may run: its attributes, and those of its loss function."""
    own = [value for value in vars(trainer).values() if isinstance(value, nn.Module)]
    function = getattr(trainer, "compute_loss_func", None)
    used = [module for each in (function, *functions) if callable(each) for module in modules_used_by(each)]
    return list(dict.fromkeys([bare_model(trainer), *own, *used]))


@contextmanager
def traceless(trainer: Any, *functions: Callable[..., Any]) -> Iterator[nn.Module]:
    """Restore everything on exit that a run of a trainer's loss changes, and communicate and log nothing inside.

    Restores gradients, buffers, training modes and attributes of the models, all random generators, and the trainer's
    own counters and metrics. Inside, the models run without autocast, in whole float32 precision, and the
    accelerator's ``gather``, ``gather_for_metrics``, ``reduce`` and ``pad_across_processes`` return their own values.

    Yields:
        The bare model.
    """
    model = bare_model(trainer)
    with ExitStack() as stack:
        stack.enter_context(trainer_preserved(trainer))
        stack.enter_context(preserved(*modules_of(trainer, *functions), parameters=False))
        stack.enter_context(_resharded(model))
        stack.enter_context(local_gathers(trainer.accelerator))
        stack.enter_context(_float32_matmul())
        if (handler := getattr(trainer, "callback_handler", None)) is not None:
            stack.enter_context(attribute(handler, "on_log", _log_nothing))
        yield model


@contextmanager
def _resharded(model: nn.Module) -> Iterator[None]:
    """Reshard on exit what a forward of FSDP2 without a backward leaves whole."""
    try:
        yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _log_nothing(_args: Any, _state: Any, control: Any, *_: Any, **__: Any) -> Any:
    return control


@contextmanager
def _float32_matmul() -> Iterator[None]:
    """Compute products of float32 matrices in float32: TF32 would differ between shapes by a thousandth."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Run a model by the forward that accelerate wrapped in autocast; call inside `traceless`."""
    original = vars(model).get("_original_forward")
    wrapped = vars(model).get("forward", _MISSING)
    if original is not None:
        model.forward = original
    devices = {parameter.device.type for parameter in model.parameters()} or {"cpu"}
    try:
        with ExitStack() as stack:
            for device in devices - {"meta"}:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        if original is not None:
            if wrapped is _MISSING:
                del model.forward
            else:
                model.forward = wrapped


def fresh(inputs: Any) -> Any:
    """Return a copy of a micro-batch, with its own containers and tensors: losses pop keys and write to labels."""
    if isinstance(inputs, Mapping):
        items = {key: tree_map(_clone, value) for key, value in inputs.items()}
        if type(inputs) is dict:
            return items
        try:
            copied = copy.copy(inputs)
            if isinstance(getattr(copied, "data", None), dict):
                copied.data = items  # type: ignore[attr-defined]  # UserDict: BatchEncoding, BatchFeature
                return copied
            return type(inputs)(items)  # type: ignore[call-arg]
        except TypeError:
            return items
    return tree_map(_clone, inputs)


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def class_of(trainer: Any, kind: type) -> Iterator[None]:
    """Give a trainer another class inside."""
    found = type(trainer)
    trainer.__class__ = kind
    try:
        yield
    finally:
        trainer.__class__ = found


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of an object inside."""
    attributes = vars(owner)
    found = {name: attributes[name]} if name in attributes else {}
    attributes[name] = value
    try:
        yield
    finally:
        attributes.pop(name, None)
        attributes.update(found)


@contextmanager
def collective(accelerator: Any) -> Iterator[None]:
    """Make ``gather`` and its relatives communicate again, inside `traceless`."""
    attributes = vars(accelerator)
    names = ("gather", "gather_for_metrics", "reduce", "pad_across_processes")
    found = {name: attributes.pop(name) for name in names if name in attributes}
    try:
        yield
    finally:
        attributes.update(found)
