"""The global batch, cut into micro-batches: views of tensors, or collated lists of samples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Collate: TypeAlias = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Split:
    """A global batch in micro-batches; iterates over these, on the device.

    Attributes:
        num_samples: Samples of the batch.
        num_microbatches: How many micro-batches they make; 0 for an empty batch.
        pick: Gives the micro-batch of an index.
    """

    num_samples: int
    num_microbatches: int
    pick: Callable[[int], Any]

    def __len__(self) -> int:
        return self.num_microbatches

    def __iter__(self) -> Iterator[Any]:
        return map(self.pick, range(self.num_microbatches))


def split(batch: Any, microbatch: int, *, device: torch.device, collate: Collate | None = None) -> Split:
    """Cut a batch into micro-batches of ``microbatch`` samples, the last of them shorter where it does not divide.

    Args:
        batch: A pytree (dicts, lists, tuples) of tensors ``[samples, ...]``; 0-d tensors and None are handed to every
            micro-batch as they are. With ``collate``, a sequence of samples of any kind.
        microbatch: Samples, at least 1. More than the batch has make one micro-batch of it.
        device: Where each micro-batch is moved when its turn comes.
        collate: Makes a micro-batch, a pytree, from a list of samples.

    Raises:
        TypeError: The batch holds something that cannot be cut.
        ValueError: Tensors disagree on the number of samples, or ``microbatch`` is below 1.
    """
    check_count("microbatch", microbatch, "the samples of one micro-batch")
    if collate is None:
        return _split_tensors(_plain(batch), microbatch, device)
    if not isinstance(batch, Sequence) or isinstance(batch, str | bytes):
        raise TypeError(f"with collate= the batch must be a list of samples, and it is a {type(batch).__name__}.")

    def pick(index: int) -> Any:
        stop = min((index + 1) * microbatch, len(batch))
        part = _plain(collate([batch[i] for i in range(index * microbatch, stop)]))
        return pytree.tree_map(lambda leaf: _move(leaf, device), part)

    return Split(len(batch), -(-len(batch) // microbatch), pick)


def _split_tensors(batch: Any, microbatch: int, device: torch.device) -> Split:
    num_samples = _count_samples(batch)
    num_microbatches = -(-num_samples // microbatch)
    leaves, structure = pytree.tree_flatten(batch)
    columns = [
        leaf.split(microbatch) if leaf is not None and leaf.ndim else [leaf] * num_microbatches for leaf in leaves
    ]

    def pick(index: int) -> Any:
        return pytree.tree_unflatten([_move(column[index], device) for column in columns], structure)

    return Split(num_samples, num_microbatches, pick)


def check_count(name: str, value: int, what: str) -> None:
    """Refuse what is no number of at least 1.

    Raises:
        TypeError: It is no int.
        ValueError: It is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}: it must be an int, {what}.")
    if value < 1:
        raise ValueError(f"{name} is {value}: it must be at least 1, {what}.")


def _plain(batch: Any) -> Any:
    """Turn mappings that torch cannot take apart, such as a tokenizer's output, into dicts."""
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
                f"{name} is a {type(leaf).__name__}, which cannot be cut into micro-batches. Pass tensors whose "
                "dimension 0 is the sample, or a list of samples with collate=."
            )
    if not counts:
        raise TypeError("the batch holds no tensor with a sample dimension: pass tensors, or a list with collate=.")
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ValueError(
            f"the tensors of the batch disagree on the number of samples: {told}. Dimension 0 must be the sample in "
            "every one of them."
        )
    return next(iter(counts.values()))
