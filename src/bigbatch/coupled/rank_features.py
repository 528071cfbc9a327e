"""Exchange the features of ranks, so that every rank computes the loss of the global batch.

    rows, shapes and dtypes as JSON → all-gather of bytes, padded to the most rows → joined in rank order

Every message of a window has the same form, so that a rank that failed can answer whatever the others wait for.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bigbatch.coupled.features import Features, is_differentiable
from bigbatch.distributed.collective import RankGroup, list_ranks
from bigbatch.errors import InputError, RankFailedError


@dataclass(frozen=True)
class RankFeatures:
    """The messages of one rank about the features of a window.

    Args:
        ranks: All of them compute the loss.
        group: Their process group.
        device: Of the features.
    """

    ranks: RankGroup
    group: Any
    device: torch.device

    def announce_failure(self) -> None:
        """Report to the ranks in any other method that this one failed; errors are ignored. Collective."""
        with suppress(Exception):
            self.ranks.all_gather({"failed": True})

    def any_rank(self, flag: bool) -> bool:
        """Return whether a flag is set on any rank. Collective."""
        return any(answer["flag"] for answer in self._exchange({"failed": False, "flag": flag}))

    def counts(self, features: Features | None) -> "FeatureCounts":
        """Exchange how many features each rank has. Collective.

        Args:
            features: Of this rank; None without samples.

        Raises:
            InputError: The ranks have features of different shapes or dtypes.
        """
        tensors = [] if features is None else [leaf for leaf in features.leaves if isinstance(leaf, Tensor)]
        own = [[list(tensor.shape[1:]), str(tensor.dtype)] for tensor in tensors]
        num_samples = 0 if features is None else features.num_samples
        answers = self._exchange({"failed": False, "samples": num_samples, "tensors": own})
        found = {rank: answer["tensors"] for rank, answer in enumerate(answers) if answer["tensors"]}
        first: list[Any] = next(iter(found.values()), [])
        if different := [rank for rank, forms in found.items() if forms != first]:
            raise InputError(
                f"{list_ranks(different)} encoded features {_listed(found[different[0]])}, and rank "
                f'{next(iter(found))} {_listed(first)}: with gather="all" all ranks need the same shapes and dtypes.'
            )
        return FeatureCounts(tuple(answer["samples"] for answer in answers), first)

    def gather(self, features: Features | None, counts: "FeatureCounts") -> Features | None:
        """Return the features of all ranks; those of this one keep their graph. Collective.

        Args:
            features: Of this rank; None without samples.
            counts: Of all ranks.

        Returns:
            In rank order; None if this rank has no features, and so does not know their structure.
        """
        tensors = [] if features is None else [leaf for leaf in features.leaves if isinstance(leaf, Tensor)]
        columns = []
        for index, (shape, name) in enumerate(counts.forms):
            dtype = getattr(torch, name.removeprefix("torch."))
            own = tensors[index] if tensors else torch.zeros(0, *shape, dtype=dtype, device=self.device)
            columns.append(self._gathered(own, counts.samples))
        if features is None:
            return None
        joined = iter([torch.cat(column) for column in columns])
        leaves = [next(joined) if isinstance(leaf, Tensor) else leaf for leaf in features.leaves]
        return Features(leaves, features.structure, sum(counts.samples))

    def _gathered(self, own: Tensor, samples: Sequence[int]) -> list[Tensor]:
        """Return a feature of every rank; that of this one is the same object if it has a gradient."""
        rows = own.detach().contiguous()
        row_bytes = rows[:0].new_empty(1, *rows.shape[1:]).nbytes
        sent = torch.zeros(max(samples), row_bytes, dtype=torch.uint8, device=own.device)
        if len(rows):
            sent[: len(rows)] = rows.reshape(-1).view(torch.uint8).reshape(len(rows), row_bytes)
        received = [torch.empty_like(sent) for _ in samples]
        dist.all_gather(received, sent, group=self.group)
        parts = [
            data[:count].reshape(-1).view(rows.dtype).reshape(count, *rows.shape[1:])
            for data, count in zip(received, samples, strict=True)
        ]
        parts[self.ranks.rank] = own if is_differentiable(own) else rows
        return parts

    def _exchange(self, answer: dict[str, Any]) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = self.ranks.all_gather(answer)
        if failed := [rank for rank, each in enumerate(answers) if each["failed"]]:
            raise RankFailedError(
                f"{list_ranks(failed)} failed in the window, which therefore changes nothing on any rank: see the "
                "error there."
            )
        return answers


@dataclass(frozen=True)
class FeatureCounts:
    """What each rank has.

    Attributes:
        samples: Of each rank.
        forms: Shape of one sample and dtype of each tensor among the features.
    """

    samples: tuple[int, ...]
    forms: list[Any]

    @property
    def num_samples(self) -> int:
        """Samples of all ranks."""
        return sum(self.samples)

    @property
    def num_ranks(self) -> int:
        """Ranks with samples."""
        return sum(map(bool, self.samples))


def _listed(forms: Sequence[Any]) -> str:
    return " and ".join(f"[{', '.join(map(str, ['samples', *shape]))}] in {name}" for shape, name in forms)
