"""Containers of tensors that torch's pytree does not know: mappings of other types, dataclasses, objects with ``to()``.

    flatten: container → leaves, structure        structure.unflatten: leaves → a container of the same type

A container is passed as a whole if it holds nothing that moves. A mapping is rebuilt as a copy of the original with
other values, or by its constructor from a dict; a dataclass by its constructor. Both are tried once when a container is
flattened, so a type that cannot be rebuilt is refused by name.
"""

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class TypedStructure:
    """Structure of leaves, some of which belong to containers; compares equal if it rebuilds the same types.

    Attributes:
        spec: Structure of the outermost values, in which a container is one leaf.
        containers: Position among those leaves, and container.
    """

    spec: pytree.TreeSpec
    containers: tuple[tuple[int, "_Container"], ...]

    def unflatten(self, leaves: Iterable[Any]) -> Any:
        """Build the tree from its leaves."""
        remaining = iter(leaves)
        containers = dict(self.containers)
        outer = [
            containers[position].build([next(remaining) for _ in range(containers[position].num_leaves)])
            if position in containers
            else next(remaining)
            for position in range(self.spec.num_leaves)
        ]
        return self.spec.unflatten(outer)


Structure: TypeAlias = pytree.TreeSpec | TypedStructure


@dataclass(frozen=True)
class _Container:
    """A mapping or a dataclass; ``prototype`` is None if it is built by its constructor.

    ``attributes`` are those of a mapping besides its items, which its copies share.
    """

    kind: type
    names: tuple[Any, ...]
    structure: Structure
    num_leaves: int
    attributes: tuple[tuple[str, Any], ...] = ()
    prototype: Any = field(default=None, compare=False)

    def build(self, leaves: list[Any]) -> Any:
        values = self.structure.unflatten(leaves)
        if self.prototype is not None:
            copied = copy.copy(self.prototype)
            for name, value in values.items():
                copied[name] = value
            return copied
        return self.kind(**values) if dataclasses.is_dataclass(self.kind) else self.kind(values)


def is_packed(value: Any) -> bool:
    """Return whether a value is a PackedSequence, which pytree would split like any namedtuple."""
    return isinstance(value, PackedSequence)


def is_dataclass(value: Any) -> bool:
    """Return whether a value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def flatten(tree: Any, *, is_cut: bool = False) -> tuple[list[Any], Structure]:
    """Return the leaves and the structure of a tree; `Structure.unflatten` builds a tree of the same types.

    Args:
        tree: A pytree, whose leaves may be mappings of any type and dataclasses.
        is_cut: Whether the leaves will be cut. A tokenizer's output then loses its offsets of characters and words,
            which belong to the samples of the whole batch.

    Raises:
        TypeError: A mapping or a dataclass cannot be rebuilt from its values.
    """
    leaves, spec = pytree.tree_flatten(tree, is_leaf=is_packed)
    containers: list[tuple[int, _Container]] = []
    flat: list[Any] = []
    for position, leaf in enumerate(leaves):
        container = _container(leaf, is_cut) if isinstance(leaf, Mapping) or is_dataclass(leaf) else None
        if container is None:
            flat.append(leaf)
        else:
            containers.append((position, container[0]))
            flat += container[1]
    return flat, TypedStructure(spec, tuple(containers)) if containers else spec


def _container(original: Any, is_cut: bool) -> tuple[_Container, list[Any]] | None:
    """Return the first way to rebuild a container that works, and its leaves; None if it is passed as a whole."""
    values = _values_of(original)
    leaves, structure = flatten(values, is_cut=is_cut)
    if not is_cut and not any(hasattr(leaf, "to") for leaf in leaves):
        return None
    for prototype in _prototypes(original, values, is_cut):
        attributes = () if prototype is None else _attributes_of(prototype, values)
        container = _Container(type(original), tuple(values), structure, len(leaves), attributes, prototype)
        if _rebuilds(container, original, values, leaves):
            return container, leaves
    if not is_cut and callable(getattr(original, "to", None)):
        return None
    raise TypeError(_why_not_rebuilt(original))


def _why_not_rebuilt(original: Any) -> str:
    kind = type(original).__name__
    if not isinstance(original, Mapping):
        for each in dataclasses.fields(original):
            if not each.init:
                return (
                    f"the field {each.name!r} of {kind} has init=False, so a micro-batch cannot be built with it. Make "
                    "it a property, or pass a dict."
                )
    return (
        f"a {kind} in the batch cannot be built again from its values, so no micro-batch of that type can be made. "
        "Pass a dict, or a list of samples with a collate= that returns a dict."
    )


def _values_of(container: Any) -> dict[Any, Any]:
    if isinstance(container, Mapping):
        return dict(container)
    return {each.name: getattr(container, each.name) for each in dataclasses.fields(container)}


def _prototypes(original: Any, values: dict[Any, Any], is_cut: bool) -> Iterator[Any]:
    """Yield an original without its values, to be copied; then None, for the constructor."""
    if isinstance(original, Mapping):
        try:
            prototype = copy.copy(original)
            for name in values:
                prototype[name] = None  # type: ignore[index] # raises for mappings that cannot be written
        except Exception:  # noqa: BLE001 - any error of a user's type: its constructor is tried next
            prototype = None
        if prototype is not None and _is_unchanged(original, values):
            if is_cut and getattr(prototype, "_encodings", None) is not None:
                vars(prototype)["_encodings"] = None  # of a BatchEncoding, by sample
            yield prototype
    yield None


def _is_unchanged(original: Any, values: dict[Any, Any]) -> bool:
    """Return whether a write to the copy left the original as it was; write its values back if not."""
    if all(original[name] is value for name, value in values.items()):
        return True
    for name, value in values.items():
        original[name] = value
    return False


def _attributes_of(prototype: Any, values: dict[Any, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (name, value)
        for name, value in getattr(prototype, "__dict__", {}).items()
        if not (isinstance(value, Mapping) and value.keys() == values.keys())
    )


def _rebuilds(container: _Container, original: Any, values: dict[Any, Any], leaves: list[Any]) -> bool:
    """Build from other tensors: return whether the result has them, and nowhere a tensor of the original."""
    others = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    try:
        built = container.build(others)
        found = _values_of(built)
        leaves_found, _ = flatten(found)
    except Exception:  # noqa: BLE001 - any error of a user's type
        return False
    old = {id(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
    return (
        type(built) is type(original)
        and found.keys() == values.keys()
        and [id(leaf) for leaf in leaves_found] == [id(leaf) for leaf in others]
        and not any(id(value) in old for value in getattr(built, "__dict__", {}).values())
    )


def children(value: Any) -> list[tuple[str, Any]] | None:
    """Return the values in a container with the text that selects each, such as ``['x']``; None for a leaf."""
    if is_packed(value) or isinstance(value, Tensor | str | bytes) or value is None:
        return None
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", child) for key, child in value.items()]
    if is_dataclass(value):
        return [(f".{each.name}", getattr(value, each.name)) for each in dataclasses.fields(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{name}", child) for name, child in zip(value._fields, value, strict=True)]
    if isinstance(value, list | tuple):
        return [(f"[{index}]", child) for index, child in enumerate(value)]
    leaves = pytree.tree_leaves(value)
    is_leaf = len(leaves) == 1 and leaves[0] is value
    return None if is_leaf else [(f" (leaf {index})", leaf) for index, leaf in enumerate(leaves)]
