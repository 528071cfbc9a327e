"""Choose whether gradients are reduced within the last backward of windows: the same choice on all ranks.

windows without overlap: measure their reduction → first rank: does overlap pay? in which order are gradients complete?
→ broadcast → windows with overlap, but for some after one that had to be run again
"""

import statistics
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from bigbatch.distributed.buckets import grouped
from bigbatch.distributed.collective import RankGroup
from bigbatch.gradients.sum_store import SumStore

OverlapSetting: TypeAlias = Literal["auto"] | bool

MIN_SHARE = 0.05  # of the time of a window that its reduction takes: from there on, overlap is used
NUM_MEASURED = 3  # windows; the one before them sets up communication, and is not counted
FIRST_REST = 20  # windows without overlap after one that was run again; twice as many after each later one

_KIND = attrgetter("shape", "dtype", "device", "requires_grad")


class OverlapChoice:
    """Whether windows of one model overlap. Its state changes with votes that succeeded, and is the same on all ranks.

    Args:
        setting: True; or ``"auto"``, if the reduction takes at least 5 % of the time of a window.

    Attributes:
        share: The share of a window that its reduction took on the first rank, a median; None if not measured.
        order: Indices of the parameters in the order in which their gradients are complete; None if not known.
    """

    def __init__(self, setting: OverlapSetting) -> None:
        self.setting = setting
        self.share: float | None = None
        self.order: list[int] | None = None
        self._kinds: list[Any] = []  # of the parameters, when the order was learned
        self._is_rejected = False
        self._num_windows = 0
        self._shares: list[float] = []
        self._rest, self._next_rest = 0, FIRST_REST

    @property
    def is_on(self) -> bool:
        """Whether the ranks vote before their last micro-batch, to overlap it."""
        return self.order is not None and not self._rest and self._is_allowed

    @property
    def is_learning(self) -> bool:
        """Whether the order is needed."""
        return self.order is None and not self._is_rejected and self._is_allowed

    @property
    def _is_allowed(self) -> bool:
        return self.setting is True or not torch.are_deterministic_algorithms_enabled()

    def suits(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether the order is that of these parameters: none was frozen, converted or added since."""
        return list(map(_KIND, parameters)) == self._kinds

    def note(self, reduction_s: float, window_s: float) -> None:
        """Note the time of a reduction, and of the window from its start to the end of the reduction."""
        if self.measures:
            self._shares.append(reduction_s / window_s)

    @property
    def measures(self) -> bool:
        """Whether the reduction of the current window is to be measured."""
        return self.is_learning and self.setting == "auto" and self._num_windows > 1

    def end_window(self, ranks: RankGroup, parameters: Sequence[Tensor], completed: Iterable[Tensor] | None) -> None:
        """Count a window after its vote and before its reduction; learn the order if it is needed. Collective.

        Args:
            ranks: All ranks.
            parameters: Of the window.
            completed: Those whose gradient was complete within the last backward of this rank, in order; None on all
                ranks if that was not watched.
        """
        self._num_windows += 1
        self._rest = max(0, self._rest - 1)
        if completed is None or not self.is_learning or not self._is_ready(parameters):
            return
        share = statistics.median(self._shares) if self._shares else 0.0
        self.share, order = ranks.broadcast([share, _order(parameters, completed)])
        if self.setting == "auto" and self.share < MIN_SHARE:
            self._is_rejected = True
        else:
            self.order, self._kinds = order, list(map(_KIND, parameters))

    def _is_ready(self, parameters: Sequence[Tensor]) -> bool:
        is_chosen = self.setting == "auto"
        if is_chosen and len(grouped(sizes_of(parameters))) < 2:
            self._is_rejected = True  # nothing can be sent before the backward has ended
        if len({parameter.device for parameter in parameters}) > 1:
            self._is_rejected = True  # backward runs in a thread for each device, and buckets would have no order
        return not self._is_rejected and (not is_chosen or self._num_windows > NUM_MEASURED + 1)

    def forget(self) -> None:
        """Learn the order again, of other parameters."""
        self.order = None

    def rest(self) -> None:
        """Use no overlap for some windows: one with overlap had to be run again."""
        self._rest, self._next_rest = self._next_rest, 2 * self._next_rest


def make_overlap_choice(setting: OverlapSetting, module: nn.Module, num_ranks: int) -> OverlapChoice | None:
    """Return the choice of a model; None if its windows never overlap.

    Synchronized batch norm communicates within backward, in an order that may differ between ranks.

    Raises:
        ValueError: The setting is not one of ``"auto"``, True and False.
    """
    if setting not in ("auto", True, False):
        raise ValueError(f'overlap is {setting!r}: pass "auto", True or False.')
    communicates = any(isinstance(each, nn.SyncBatchNorm) for each in module.modules())
    return None if not setting or num_ranks == 1 or communicates else OverlapChoice(setting)


def sizes_of(parameters: Sequence[Tensor]) -> list[tuple[tuple[torch.device, torch.dtype], int]]:
    """Return kind and bytes of the sum of each parameter, as for `grouped`."""
    dtypes = map(SumStore.dtype_of, parameters)
    return [((p.device, dtype), p.numel() * dtype.itemsize) for p, dtype in zip(parameters, dtypes, strict=True)]


def _order(parameters: Sequence[Tensor], completed: Iterable[Tensor]) -> list[int]:
    """Return the indices of trained parameters: the completed ones, and then the others, the last first."""
    index_of = {id(parameter): index for index, parameter in enumerate(parameters)}
    found = [index_of[id(parameter)] for parameter in completed]
    others = [index for index, parameter in enumerate(parameters) if parameter.requires_grad]
    return list(dict.fromkeys(index for index in [*found, *reversed(others)] if parameters[index].requires_grad))
