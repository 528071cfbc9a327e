"""Restore what a run of a trainer's loss or of its collator changes of these two.

attributes of the trainer, what its loss counts in them → run → as before
"""

import sys
import sysconfig
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from bigbatch.errors import InputError
from bigbatch.integrations.transformers.unit_refusals import class_name
from bigbatch.memory.limit import describe_bytes
from bigbatch.preserve import preserved
from bigbatch.trials.object_state import MAX_ELEMENTS, ObjectState
from bigbatch.trials.tensor_state import bytes_of

_MISSING = object()
# Large, or restored with the model, or not data.
_LEFT_AS_THEY_ARE = frozenset(
    {"train_dataset", "eval_dataset", "model", "model_wrapped", "ref_model", "optimizer", "lr_scheduler", "args"}
)
_OBJECTS = frozenset({"state", "control"})
_PACKAGES = frozenset(
    {"bigbatch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "torch", "numpy"}
)


@contextmanager
def trainer_preserved(trainer: Any) -> Iterator[None]:
    """Restore the attributes of a trainer on exit, and the content of its data.

    Covers metrics, counters, ``state`` and ``control``: lists, dicts, sets, tensors and arrays, random generators, and
    objects of classes that are not of an installed package, as well as such a ``compute_loss_func``. Datasets, models
    and the optimizer are left as they are, and so are arrays of more than 64 MiB, and the elements of containers with
    more than 10,000.

    Raises:
        InputError: On exit, if a tensor of more than 64 MiB was written to, which is not copied.
    """
    attributes = dict(vars(trainer))
    left = [trainer, *(value for name, value in attributes.items() if name in _LEFT_AS_THEY_ARE)]
    content = ObjectState(parameters=False, left=left, is_limited=True)
    function = attributes.get("compute_loss_func")
    owner = getattr(function, "__self__", getattr(function, "func", None))  # of a method, or of a partial
    own = [
        value
        for name, value in attributes.items()
        if name in _OBJECTS or (name not in _LEFT_AS_THEY_ARE and _is_own_state(value))
    ]
    with unset_fake_temporarily():
        content.add(*own, *(each for each in (owner,) if is_own_object(each)))
    try:
        yield
    finally:
        now = vars(trainer)
        for name in now.keys() - attributes.keys():
            del now[name]
        now.update(attributes)
        with unset_fake_temporarily():
            content.restore()
    if (written := content.written()) is not None:
        names = [f"the attribute {name}" for name, value in attributes.items() if value is written]
        raise InputError(
            f"the loss of {class_name(trainer)} writes to a tensor of {describe_bytes(bytes_of(written))} in "
            f"{', '.join(names) or 'an object'}, which is too large to be restored after a trial: keep what it counts "
            "in smaller tensors."
        )


def _is_own_state(value: Any) -> bool:
    """Return whether an attribute of a trainer may hold what its loss counts."""
    if isinstance(value, nn.Module):
        return False  # saved with the models
    return isinstance(value, dict | list | set | deque | Tensor | np.ndarray) or (
        is_random_generator(value) or is_own_object(value)
    )


def is_own_object(value: Any) -> bool:
    """Return whether an object is of a class of the user: one that is neither of Python nor of an installed package."""
    module = sys.modules.get(type(value).__module__)
    root = type(value).__module__.partition(".")[0]
    if root in sys.stdlib_module_names or root in _PACKAGES:
        return False
    file = getattr(module, "__file__", None)
    return file is None or not any(folder in Path(file).parents for folder in _installed())


@cache
def _installed() -> frozenset[Path]:
    """Return the folders of installed packages."""
    return frozenset(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))


@contextmanager
def collator_state(owner: Any) -> Iterator[None]:
    """Restore the random generators of this process and the attributes of a collator on exit."""
    with preserved(), _container_state(owner):
        yield


@contextmanager
def _container_state(owner: Any) -> Iterator[None]:
    """Restore the attributes of an object, and the content of those that are small containers, tensors, generators."""
    attributes: dict[str, Any] | None = getattr(owner, "__dict__", None)
    if attributes is None:
        yield
        return
    saved = dict(attributes)
    state = ObjectState(parameters=False)
    for value in saved.values():
        if _is_small_state(value):
            state.add(value)
    try:
        yield
    finally:
        state.restore()
        for name in attributes.keys() - saved.keys():
            del attributes[name]
        for name, value in saved.items():
            if attributes.get(name, _MISSING) is not value:
                attributes[name] = value


def _is_small_state(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return False  # saved with the models
    if isinstance(value, dict | list | set | deque):
        return len(value) <= MAX_ELEMENTS and not any(_is_library_object(each) for each in _elements(value))
    return isinstance(value, Tensor) or is_random_generator(value)


def is_random_generator(value: Any) -> bool:
    """Return whether it is a random generator of torch, NumPy or Python."""
    return type(value).__name__ in ("Generator", "RandomState", "Random")


def _elements(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value


def _is_library_object(value: Any) -> bool:
    """Return whether a value is neither data nor a container, so that its attributes are not looked into."""
    plain = (bool, int, float, complex, str, bytes, type(None), Tensor, dict, list, tuple, set, deque)
    return not isinstance(value, plain) and type(value).__module__.partition(".")[0] != "numpy"
