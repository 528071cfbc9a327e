"""The global batch, cut into micro-batches: views of tensors, or collated lists of samples."""

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
    """A global batch in micro-batches; iterates over these, on the device.

    Attributes:
        num_samples: Samples of the batch.
        groups: The indices of the samples of each micro-batch.
        device: Where micro-batches are wanted.
        gather: Gives the micro-batch of some samples where the batch is, as its leaves and their structure.
    """

    num_samples: int
    groups: Sequence[Sequence[int]]
    device: torch.device
    gather: Gather

    def take(self, rows: Sequence[int]) -> Any:
        """Give the micro-batch of some samples, on the device."""
        return self.assemble(*self.gather(rows))

    def assemble(self, leaves: Sequence[Any], structure: pytree.TreeSpec) -> Any:
        """Make a micro-batch of its leaves, moved to the device where they are not yet there."""
        return pytree.tree_unflatten([_move(leaf, self.device) for leaf in leaves], structure)

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[Any]:
        return map(self.take, self.groups)


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
    if type(microbatch) is not int or microbatch < 1:
        check_count("microbatch", microbatch, "the samples of one micro-batch")
    num_samples, gather = _gatherer(batch, collate)
    return Split(num_samples, _ranges(num_samples, microbatch), device, gather)


def split_into(
    batch: Any, groups: Sequence[Sequence[int]], *, device: torch.device, collate: Collate | None = None
) -> Split:
    """Cut a batch as a plan says; arguments and errors are those of `split`.

    Args:
        batch: As for `split`. Tensors keep the padding that they came with: pass a list with ``collate`` to pad less.
        groups: The indices of the samples of each micro-batch.
        device: As for `split`.
        collate: As for `split`.
    """
    num_samples, gather = _gatherer(batch, collate)
    return Split(num_samples, groups, device, gather)


def _ranges(num_samples: int, microbatch: int) -> list[range]:
    return [range(start, min(start + microbatch, num_samples)) for start in range(0, num_samples, microbatch)]


def _gatherer(batch: Any, collate: Collate | None) -> tuple[int, Gather]:
    """Count the samples of a batch; give what gathers a micro-batch of some of them."""
    if collate is None:
        return _tensor_gatherer(_plain(batch))
    if not isinstance(batch, Sequence) or isinstance(batch, str | bytes):
        raise TypeError(f"with collate= the batch must be a list of samples, and it is a {type(batch).__name__}.")

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
