"""Split a batch into micro-batches: views of tensors, or collated lists of samples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bigbatch.batching.checks import check_count
from bigbatch.types import Collate

Gather: TypeAlias = Callable[[Sequence[int]], tuple[list[Any], pytree.TreeSpec]]


@dataclass(frozen=True)
class Split:
    """A batch split into micro-batches. Iterating yields them on ``device``.

    Attributes:
        num_samples: Samples of the batch.
        groups: The sample indices of each micro-batch.
        device: Device of the micro-batches.
        gather: Returns the micro-batch of some samples on the device of the batch, as pytree leaves and structure.
    """

    num_samples: int
    groups: Sequence[Sequence[int]]
    device: torch.device
    gather: Gather

    def take(self, rows: Sequence[int]) -> Any:
        """Return the micro-batch of some samples, on the device."""
        return self.assemble(*self.gather(rows))

    def assemble(self, leaves: Sequence[Any], structure: pytree.TreeSpec) -> Any:
        """Build a micro-batch from its leaves, moved to the device if necessary."""
        return pytree.tree_unflatten([_move(leaf, self.device) for leaf in leaves], structure)

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[Any]:
        return map(self.take, self.groups)


def split(batch: Any, microbatch: int, *, device: torch.device, collate: Collate | None = None) -> Split:
    """Split a batch into micro-batches of ``microbatch`` samples; the last one may have fewer.

    Args:
        batch: A pytree (dicts, lists, tuples) of tensors ``[samples, ...]``; 0-d tensors and None are passed to every
            micro-batch unchanged. With ``collate``, a sequence of samples of any type.
        microbatch: Samples per micro-batch, at least 1. More than the batch has yields one micro-batch.
        device: Device to which each micro-batch is moved when it is used.
        collate: Builds a micro-batch, a pytree, from a list of samples.

    Raises:
        TypeError: The batch contains something that cannot be split.
        ValueError: Tensors disagree on the number of samples, or ``microbatch`` is below 1.
    """
    if type(microbatch) is not int or microbatch < 1:
        check_count("microbatch", microbatch, "the samples of one micro-batch")
    num_samples, gather = _gatherer(batch, collate)
    return Split(num_samples, _ranges(num_samples, microbatch), device, gather)


def split_into(
    batch: Any, groups: Sequence[Sequence[int]], *, device: torch.device, collate: Collate | None = None
) -> Split:
    """Split a batch into the given groups of samples; other arguments and errors are those of `split`.

    Args:
        batch: As for `split`. Tensors keep their padding: pass a list with ``collate`` to pad less.
        groups: The sample indices of each micro-batch.
        device: As for `split`.
        collate: As for `split`.
    """
    num_samples, gather = _gatherer(batch, collate)
    return Split(num_samples, groups, device, gather)


def _ranges(num_samples: int, microbatch: int) -> list[range]:
    return [range(start, min(start + microbatch, num_samples)) for start in range(0, num_samples, microbatch)]


def _gatherer(batch: Any, collate: Collate | None) -> tuple[int, Gather]:
    """Return the number of samples of a batch, and the function that gathers a micro-batch of some of them."""
    if collate is None:
        return _tensor_gatherer(_plain(batch))
    if not isinstance(batch, Sequence) or isinstance(batch, str | bytes):
        raise TypeError(f"with collate= the batch must be a list of samples, not a {type(batch).__name__}.")

    def gather(rows: Sequence[int]) -> tuple[list[Any], pytree.TreeSpec]:
        return pytree.tree_flatten(_plain(collate([batch[i] for i in rows])))

    return len(batch), gather


def _tensor_gatherer(batch: Any) -> tuple[int, Gather]:
    num_samples = _count_samples(batch)
    leaves, structure = pytree.tree_flatten(batch)

    def gather(rows: Sequence[int]) -> tuple[list[Any], pytree.TreeSpec]:
        index = slice(rows.start, rows.stop) if isinstance(rows, range) else list(rows)  # a view, or a copy
        return [leaf[index] if leaf is not None and leaf.ndim else leaf for leaf in leaves], structure

    return num_samples, gather


def _plain(batch: Any) -> Any:
    """Convert mappings that are not pytree nodes, such as a tokenizer's output, to dicts."""
    return pytree.tree_map(lambda leaf: dict(leaf) if isinstance(leaf, Mapping) else leaf, batch)


def _move(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, Tensor) or leaf.device == device:
        return leaf
    return leaf.to(device, non_blocking=True)


def _count_samples(batch: Any) -> int:
    counts: dict[str, int] = {}
    for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
        name = "batch" + pytree.keystr(path)
        if isinstance(leaf, Tensor):
            if leaf.ndim:
                counts[name] = leaf.shape[0]
        elif leaf is not None:
            raise TypeError(
                f"{name} is a {type(leaf).__name__}, which cannot be split into micro-batches. Pass tensors whose "
                "dimension 0 is the sample, or a list of samples with collate=."
            )
    if not counts:
        raise TypeError("the batch contains no tensor with a sample dimension: pass tensors, or a list with collate=.")
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ValueError(
            f"the tensors of the batch disagree on the number of samples: {listed}. Dimension 0 must be the sample in "
            "every one of them."
        )
    return next(iter(counts.values()))
