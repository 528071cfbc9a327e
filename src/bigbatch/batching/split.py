"""Split a batch into micro-batches: views of tensors, or collated lists of samples.

    batch → samples, leaves and structure → for each micro-batch: rows of every leaf → moved → the same structure

`batch_types` keeps the types of containers, `batch_checks` refuses what cannot be split, `row_cuts` cuts one tensor.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bigbatch.batching.batch_checks import MOST_FIELDS, check_batch_dim, samples_of
from bigbatch.batching.batch_types import Structure, flatten
from bigbatch.batching.checks import check_count
from bigbatch.batching.row_cuts import row_cuts
from bigbatch.types import Collate

_VERSION = attrgetter("_version")

Gather: TypeAlias = Callable[[Sequence[int]], tuple[list[Any], Structure]]


class BatchWrites:
    """The tensors of a batch or micro-batch with their versions; views, such as micro-batches, share them.

    Writes of other libraries to the same memory, such as NumPy, have no version and are not seen.

    Args:
        batch: Tensors in nested mappings, lists, tuples and dataclasses; anything else is ignored.
    """

    def __init__(self, batch: Any) -> None:
        # Tensors made under inference_mode have no version, and cannot be written to outside of it.
        self._tensors = [tensor for tensor in _tensors_in(batch) if not tensor.is_inference()]
        self._versions = list(map(_VERSION, self._tensors))

    @property
    def found(self) -> bool:
        """Whether any of them was written to since."""
        return list(map(_VERSION, self._tensors)) != self._versions


@dataclass(frozen=True)
class Split:
    """A batch split into micro-batches. Iterating yields them on ``device``.

    Attributes:
        num_samples: Samples of the batch.
        groups: The sample indices of each micro-batch.
        device: Device of the micro-batches.
        gather: Returns the micro-batch of some samples on the device of the batch, as its leaves and structure.
        views: The micro-batch of each group, if all are views on the device; each is returned once.
        copies: Whether tensors of micro-batches are copies also where they could be views of the batch.
        writes: In-place writes to the batch since it was split; None if micro-batches are collated.
    """

    num_samples: int
    groups: Sequence[Sequence[int]]
    device: torch.device
    gather: Gather
    views: dict[Sequence[int], Any] = field(default_factory=dict)
    copies: bool = False
    writes: BatchWrites | None = None

    def copied(self) -> "Split":
        """Return the same split with copies: what a loss writes to a micro-batch in place does not reach the batch."""
        return replace(self, views={}, copies=True)

    @property
    def was_written(self) -> bool:
        """Whether tensors of the batch were written to in place since it was split."""
        return self.writes is not None and self.writes.found

    def take(self, rows: Sequence[int]) -> Any:
        """Return the micro-batch of some samples, on the device."""
        if self.views and type(rows) is range and (view := self.views.pop(rows, None)) is not None:
            return view
        return self.assemble(*self.gather(rows))

    def assemble(self, leaves: Sequence[Any], structure: Structure, *, copied: Collection[int] = ()) -> Any:
        """Build a micro-batch from its leaves, moved to the device if necessary; those at ``copied`` are copies."""
        moved = (
            _move(leaf, self.device, copies=self.copies and index not in copied) for index, leaf in enumerate(leaves)
        )
        return structure.unflatten(list(moved))

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[Any]:
        return map(self.take, self.groups)


def split(
    batch: Any,
    microbatch: int,
    *,
    device: torch.device,
    collate: Collate | None = None,
    batch_dim: int | None = None,
    known_fields: set[tuple[str, int]] | None = None,
) -> Split:
    """Split a batch into micro-batches of ``microbatch`` samples; the last one may have fewer.

    Args:
        batch: A pytree (dicts, lists, tuples), mapping or dataclass of tensors ``[samples, ...]``, strided, sparse COO
            or jagged; micro-batches are of the same types. 0-d tensors and None are passed to every micro-batch
            unchanged. With ``collate``, a sequence of samples of any type.
        microbatch: Samples per micro-batch, at least 1. More than the batch has yields one micro-batch.
        device: Device to which each micro-batch is moved when it is used: its tensors, and other objects with ``to()``.
        collate: Builds a micro-batch from a list of samples.
        batch_dim: The dimension of tensors that is the sample, by default 0.
        known_fields: As for `bigbatch.batching.batch_checks.samples_of`, of earlier batches of the same form.

    Raises:
        TypeError: The batch contains something that cannot be split.
        ValueError: Tensors disagree on the number of samples, a list can be read as samples or as fields, or
            ``microbatch`` or ``batch_dim`` is out of range.
    """
    if type(microbatch) is not int or microbatch < 1:
        check_count("microbatch", microbatch, "the samples of one micro-batch")
    num_samples, gather = _gatherer(batch, collate, batch_dim, known_fields)
    groups = _ranges(num_samples, microbatch)
    views: dict[Sequence[int], Any] = {}
    if collate is None and not batch_dim:
        views.update(zip(groups, _views(batch, microbatch, device), strict=False))
    return Split(num_samples, groups, device, gather, views, writes=BatchWrites(batch) if collate is None else None)


def split_into(
    batch: Any,
    groups: Sequence[Sequence[int]],
    *,
    device: torch.device,
    collate: Collate | None = None,
    batch_dim: int | None = None,
    known_fields: set[tuple[str, int]] | None = None,
) -> Split:
    """Split a batch into the given groups of samples; other arguments and errors are those of `split`.

    Args:
        batch: As for `split`. Tensors keep their padding: pass a list with ``collate`` to pad less.
        groups: The sample indices of each micro-batch.
        device: As for `split`.
        collate: As for `split`.
        batch_dim: As for `split`.
        known_fields: As for `split`.
    """
    num_samples, gather = _gatherer(batch, collate, batch_dim, known_fields)
    return Split(num_samples, groups, device, gather, writes=BatchWrites(batch) if collate is None else None)


def split_options(device: torch.device, collate: Collate | None, batch_dim: int | None) -> dict[str, Any]:
    """Return the arguments of `split` and `split_into` for all batches of one run, which have the same form."""
    return {"device": device, "collate": collate, "batch_dim": batch_dim, "known_fields": set()}


def _ranges(num_samples: int, microbatch: int) -> list[range]:
    return [range(start, min(start + microbatch, num_samples)) for start in range(0, num_samples, microbatch)]


def _gatherer(
    batch: Any, collate: Collate | None, batch_dim: int | None, known_fields: set[tuple[str, int]] | None
) -> tuple[int, Gather]:
    """Return the number of samples of a batch, and the function that gathers a micro-batch of some of them."""
    if batch_dim is not None:
        check_batch_dim(batch_dim, collate)
    if collate is None:
        known_fields = set() if known_fields is None else known_fields
        return (None if batch_dim else _flat_gatherer(batch)) or _tree_gatherer(batch, batch_dim or 0, known_fields)
    if not isinstance(batch, Sequence) or isinstance(batch, str | bytes):
        raise TypeError(f"with collate= the batch must be a list of samples, not a {type(batch).__name__}.")

    def gather(rows: Sequence[int]) -> tuple[list[Any], Structure]:
        return flatten(collate([batch[i] for i in rows]))

    return len(batch), gather


def _flat_gatherer(batch: Any) -> tuple[int, Gather] | None:
    """Handle a tensor, or one tuple, dict or short list of tensors, without a look at each type; None for others."""
    num_samples = _count_flat(batch)
    if num_samples is None:
        return None
    made: list[Gather] = []

    def gather(rows: Sequence[int]) -> tuple[list[Any], Structure]:
        if not made:  # flattened when it is needed: not if the micro-batches are views
            made.append(_row_gather(*pytree.tree_flatten(batch)))
        return made[0](rows)

    return num_samples, gather


def _views(batch: Any, microbatch: int, device: torch.device) -> Iterable[Any]:
    """Return the micro-batches of a tensor, or of a tuple of tensors, on the device; nothing for other batches.

    One call for each tensor: `Split.take` needs 4 µs instead of 15 within a window of benchmarks/overhead.py.
    """
    leaves = batch if type(batch) is tuple else (batch,)
    for leaf in leaves:
        if type(leaf) is not Tensor or not leaf.ndim or leaf.device != device or leaf.layout is not torch.strided:
            return ()
    parts = [leaf.split(microbatch) for leaf in leaves]
    return zip(*parts, strict=True) if type(batch) is tuple else parts[0]


def _row_gather(leaves: Sequence[Any], structure: Structure) -> Gather:
    """Return the function that gathers rows along dimension 0 of strided tensors."""

    def gather(rows: Sequence[int]) -> tuple[list[Any], Structure]:
        index = slice(rows.start, rows.stop) if isinstance(rows, range) else list(rows)  # a view, or a copy
        return [leaf[index] if leaf is not None and leaf.ndim else leaf for leaf in leaves], structure

    return gather


def _count_flat(batch: Any) -> int | None:
    kind = type(batch)
    if kind is tuple or (kind is list and len(batch) <= MOST_FIELDS):
        values = batch
    else:
        values = batch.values() if kind is dict else (batch,)
    num_samples: int | None = None
    for value in values:
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_nested:
            return None
        if value.ndim:
            count = value.shape[0]
            if num_samples is None:
                num_samples = count
            elif count != num_samples:
                return None
    return num_samples


def _tree_gatherer(batch: Any, dim: int, known_fields: set[tuple[str, int]]) -> tuple[int, Gather]:
    num_samples = samples_of(batch, dim, known_fields)
    leaves, structure = flatten(batch, is_cut=True)
    if not dim and all(leaf is None or (leaf.layout is torch.strided and not leaf.is_nested) for leaf in leaves):
        return num_samples, _row_gather(leaves, structure)
    cuts = row_cuts(leaves, dim)

    def gather(rows: Sequence[int]) -> tuple[list[Any], Structure]:
        return [cut(rows) for cut in cuts], structure

    return num_samples, gather


def _move(leaf: Any, device: torch.device, *, copies: bool) -> Any:
    if isinstance(leaf, Tensor):
        if leaf.device != device:
            return leaf.to(device, non_blocking=True)
        return leaf.clone() if copies else leaf
    if leaf is None or isinstance(leaf, type) or not callable(to := getattr(leaf, "to", None)):
        return leaf
    moved = to(device)
    return leaf if moved is None else moved  # some move in place


def draw(microbatches: Iterable[Any]) -> list[Any]:
    """Draw the micro-batches of a window before the first one is used.

    Raises:
        ValueError: Drawing one has changed an earlier one.
    """
    drawn, writes = [], []
    for microbatch in microbatches:
        drawn.append(microbatch)
        writes.append(BatchWrites(microbatch))
    if any(each.found for each in writes):
        raise ValueError(
            f"the loader has written to tensors that it had yielded before, and the {len(drawn)} micro-batches of this "
            "window are drawn before the first one is used: they would all be the last one. Let it yield new tensors, "
            "for example by clone()."
        )
    return drawn


def _tensors_in(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
        return
    values: Any = ()
    if isinstance(batch, Mapping):
        values = batch.values()
    elif isinstance(batch, list | tuple):
        values = batch
    elif is_dataclass(batch) and not isinstance(batch, type):
        values = (getattr(batch, field.name, None) for field in fields(batch))
    for value in values:
        yield from _tensors_in(value)
