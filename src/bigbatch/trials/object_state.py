"""Save the content of objects and of everything that hangs on them, and write it back in place.

    root → tensors, containers, arrays, generators, modules, plain Python objects, each once → restore() → as before

An object that is the value of two attributes is one object afterwards as well, and references from elsewhere see the
restored content.
"""

import array
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from enum import Enum
from functools import partial
from types import FunctionType, MemberDescriptorType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bigbatch.trials.tensor_state import TensorState, bytes_of

MAX_BYTES = 64 * 2**20
MAX_ELEMENTS = 10_000
_MISSING = object()
_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), range, slice, torch.dtype, torch.device})
# Written by the contexts that hold or remove them, which may be open: hooks and training modes.
_LEFT_AS_THEY_ARE = frozenset({"training", *(name for name in vars(nn.Module()) if "hook" in name)})
# Bases of plain objects. Objects with another base of the standard library, such as a lock, file, thread or logger, or
# with one of these packages, such as an optimizer, data set or trainer, are left as they are.
_PLAIN_BASES = frozenset({"abc", "builtins", "collections", "collections.abc", "types", "typing"})
_LEFT_PACKAGES = frozenset({"torch", "numpy", "pandas", "lightning", "pytorch_lightning", "accelerate", "datasets"})


class ObjectState:
    """The content of objects at the time when they were added.

    Restored are tensors; lists, dicts, sets, deques and arrays; NumPy arrays; generators of torch, NumPy and
    ``random``; the attributes of modules, of their classes, and of plain Python objects. Attributes that were created
    since are deleted, and deleted ones are created again. Left as they are: functions, hooks, training modes, and
    objects of the standard library and of other packages that are not data.

    Args:
        parameters: Whether the values of parameters are copied. If not, only ``parameter.data = ...`` is undone.
        left: Objects that are left as they are, with what hangs on them alone.
        is_limited: Whether tensors and arrays of more than `MAX_BYTES` are not copied, and the elements of containers
            with more than `MAX_ELEMENTS` are not looked into: both hold data.

    Attributes:
        modules: The modules that were found.
        tensors: The tensors that were found.
    """

    def __init__(self, *, parameters: bool = True, left: Iterable[Any] = (), is_limited: bool = False) -> None:
        self._parameters, self._is_limited = parameters, is_limited
        self._large: list[tuple[Tensor, int]] = []  # not copied, with their versions
        self._seen: dict[int, Any] = {
            id(value): value for value in left
        }  # also keeps the objects alive, so that no other one gets the same id
        self._steps: list[Callable[[], None]] = []
        self.modules: list[nn.Module] = []
        self.tensors: list[Tensor] = []

    def add(self, *roots: Any) -> None:
        """Save the content of objects and of everything that hangs on them."""
        pending = list(roots)
        while pending:
            value = pending.pop()
            if type(value) not in _ATOMS and id(value) not in self._seen:
                self._seen[id(value)] = value
                pending += self._save(value)

    def written(self) -> Tensor | None:
        """Return a tensor that was written to, and not copied before; None if there is none."""
        return next((tensor for tensor, version in self._large if tensor._version != version), None)

    def restore(self) -> None:
        """Write everything back; may be called several times. An error or interrupt is raised at the end."""
        pending, errors = list(self._steps), list[BaseException]()
        while pending:
            try:
                while pending:
                    pending[-1]()
                    pending.pop()
            except KeyboardInterrupt as error:
                errors.append(error)  # the step is run again: an interrupt may have left it half done
            except Exception as error:  # noqa: BLE001 - of any object's own methods: the others are still restored
                errors.append(error)
                pending.pop()
        if errors:
            raise errors[0]

    def _save(self, value: Any) -> Iterable[Any]:
        """Save the content of one object; return the values that hang on it."""
        if isinstance(value, Tensor):
            self.tensors.append(value)
            copied = self._parameters or not isinstance(value, nn.Parameter)
            if self._is_limited and copied and bytes_of(value) > MAX_BYTES:
                self._large += [] if value.is_inference() else [(value, value._version)]
                return ()
            self._steps.append(TensorState.of(value, copied=copied).restore)
            return ()
        if isinstance(value, nn.Module):
            self.modules.append(value)
            return self._save_module(value)
        if (set_state := _generator_state(value)) is not None:
            self._steps.append(set_state)
            return ()
        elements = list(self._save_elements(value))
        if self._is_limited and len(elements) > MAX_ELEMENTS:
            elements = []
        return [*elements, *self._save_attributes(value)]

    def _save_module(self, module: nn.Module) -> Iterator[Any]:
        if _is_communication_wrapper(module):
            for values in (module._parameters, module._buffers, module._modules):
                yield from values.values()
            return
        saved = {name: value for name, value in vars(module).items() if name not in _LEFT_AS_THEY_ARE}
        tensors = (*module._parameters.values(), *module._buffers.values())
        if any(tensor is not None and is_lazy(tensor) for tensor in tensors):
            yield from saved.values()
            return  # initialized by its first forward, for good
        if any(hasattr(parameter, "device_mesh") for parameter in module._parameters.values()):
            yield from saved.pop("_parameters").values()  # sharded: bound to other tensors while they are gathered
        self._steps.append(partial(_set_attributes, vars(module), saved, left=_LEFT_AS_THEY_ARE | {"_parameters"}))
        yield from saved.values()
        for kind in type(module).__mro__:
            if _root(kind) not in sys.stdlib_module_names | _LEFT_PACKAGES:
                yield from self._save_class(kind)

    def _save_class(self, kind: type) -> Iterator[Any]:
        """Save the data among the attributes of a class: a counter or list that its instances share."""
        saved = {name: value for name, value in vars(kind).items() if not name.startswith("__") and _is_data(value)}

        def restore() -> None:
            for name, value in saved.items():
                if vars(kind).get(name, _MISSING) is not value:
                    setattr(kind, name, value)

        if id(kind) not in self._seen:
            self._seen[id(kind)] = kind
            self._steps.append(restore)
            yield from saved.values()

    def _save_elements(self, value: Any) -> Iterable[Any]:
        """Save the elements of a container or array; return those that may have content of their own."""
        numpy = sys.modules.get("numpy")
        if isinstance(value, dict):
            self._steps.append(partial(_set_items, value, dict(value)))
            return list(dict.values(value))
        if isinstance(value, list | deque | array.array | bytearray):
            elements = list(value)
            self._steps.append(partial(_set_elements, value, elements))
            return elements if isinstance(value, list | deque) else ()
        if isinstance(value, set):
            self._steps.append(partial(_set_members, value, set(value)))
            return list(value)
        if isinstance(value, tuple | frozenset):
            return list(value)
        if numpy is not None and isinstance(value, numpy.ndarray):
            is_data = isinstance(value, numpy.memmap) or (self._is_limited and value.nbytes > MAX_BYTES)
            if value.flags.writeable and not is_data:
                self._steps.append(partial(_set_array, value, value.copy()))
            return list(value.flat) if value.dtype == object else ()
        return ()

    def _save_attributes(self, value: Any) -> Iterator[Any]:
        """Save ``__dict__`` and ``__slots__`` of a plain Python object."""
        if not _is_plain(value):
            return
        if isinstance(attributes := getattr(value, "__dict__", None), dict):
            saved = dict(attributes)
            self._steps.append(partial(_set_attributes, attributes, saved))
            yield from saved.values()
        for kind in type(value).__mro__:
            for slot in vars(kind).values():
                if isinstance(slot, MemberDescriptorType) and _root(kind) != "builtins":
                    content = _slot_content(slot, value)
                    self._steps.append(partial(_set_slot, slot, value, content))
                    yield content


def _is_communication_wrapper(module: nn.Module) -> bool:
    """Return whether it is a wrapper such as DistributedDataParallel, which keeps the state of its communication.

    ``fully_shard`` does not wrap: it gives the module a class of its own, and its attributes stay those of the module.
    """
    kinds = type(module).__mro__
    return kinds[0].__module__.startswith(("torch.distributed", "torch.nn.parallel")) and not any(
        kind.__name__ == "FSDPModule" for kind in kinds
    )


def _root(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _is_plain(value: Any) -> bool:
    """Return whether an object is data of a class written in Python, whose attributes can be written."""
    kind = type(value)
    if kind is SimpleNamespace:
        return True
    if kind.__module__ == "builtins" or isinstance(value, type | Enum):
        return False
    roots = {base.__module__ for base in kind.__mro__} - _PLAIN_BASES
    return not any(root.partition(".")[0] in sys.stdlib_module_names | _LEFT_PACKAGES for root in roots)


def _is_data(value: Any) -> bool:
    """Return whether an attribute of a class is data, rather than a method, a property or a class."""
    return not isinstance(value, type | FunctionType) and not hasattr(type(value), "__get__")


def _generator_state(value: Any) -> Callable[[], None] | None:
    """Return a function that sets the state of a random generator to that of now; None if it is not a generator."""
    numpy_random = sys.modules.get("numpy.random")
    if isinstance(value, torch.Generator):
        return partial(_set_generator, value, value.get_state())
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return partial(value.setstate, value.getstate())
    if numpy_random is not None and isinstance(value, numpy_random.RandomState):
        return partial(value.set_state, value.get_state())
    if numpy_random is not None and isinstance(value, numpy_random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)  # a dict, made on each access
    return None


def _set_generator(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _set_attributes(attributes: dict[str, Any], saved: dict[str, Any], left: frozenset[str] = frozenset()) -> None:
    for name in attributes.keys() - saved.keys() - left:
        del attributes[name]
    for name, value in saved.items():
        if attributes.get(name, _MISSING) is not value:
            attributes[name] = value


def _set_items(mapping: dict[Any, Any], saved: dict[Any, Any]) -> None:
    """Restore the items of a dict and their order, past methods that its class may override."""
    kind: type[dict[Any, Any]] = OrderedDict if isinstance(mapping, OrderedDict) else dict
    if not _same(kind.keys(mapping), saved):
        kind.clear(mapping)
    for key, value in saved.items():
        if dict.get(mapping, key, _MISSING) is not value:
            kind.__setitem__(mapping, key, value)


def _set_elements(sequence: Any, saved: list[Any]) -> None:
    if _same(sequence, saved):
        return
    if isinstance(sequence, deque):
        deque.clear(sequence)
        deque.extend(sequence, saved)
    elif isinstance(sequence, array.array):
        sequence[:] = array.array(sequence.typecode, saved)
    elif isinstance(sequence, bytearray):
        sequence[:] = bytes(saved)
    else:
        list.__setitem__(sequence, slice(None), saved)


def _same(left: Collection[Any], right: Collection[Any]) -> bool:
    """Return whether two collections have the same objects in the same order."""
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


def _set_members(members: set[Any], saved: set[Any]) -> None:
    if {id(member) for member in members} != {id(member) for member in saved}:
        set.clear(members)
        set.update(members, saved)


def _set_array(target: Any, saved: Any) -> None:
    if target.shape != saved.shape:
        target.resize(saved.shape, refcheck=False)
    target[...] = saved


def _slot_content(slot: MemberDescriptorType, value: Any) -> Any:
    try:
        return slot.__get__(value, type(value))
    except AttributeError:  # the slot is empty
        return _MISSING


def _set_slot(slot: MemberDescriptorType, value: Any, saved: Any) -> None:
    if _slot_content(slot, value) is saved:
        return
    if saved is _MISSING:
        slot.__delete__(value)
    else:
        slot.__set__(value, saved)
