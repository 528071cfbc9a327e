"""The level of offload of an engine: as passed, or ``"auto"``, which is chosen for the first batch.

batch → on every rank: levels that are supported → memory and time of each → the same choice on all ranks → in use
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import torch

from bigbatch.accumulation.accumulator import Accumulator
from bigbatch.autotune.peak_prediction import state_of
from bigbatch.distributed.collective import RankGroup, error_of
from bigbatch.distributed.collective import describe as describe_error
from bigbatch.engine import card_target
from bigbatch.engine.batch_windows import BatchSplitter
from bigbatch.engine.card_target import CardTarget
from bigbatch.engine.fused_layers import FuseGradients
from bigbatch.engine.level_cases import predicted_cases, requested_size
from bigbatch.engine.microbatch_size import MicrobatchSize
from bigbatch.engine.tuning import level_problem
from bigbatch.errors import InputError, RankFailedError, first_line
from bigbatch.offload.cards import Card
from bigbatch.offload.level_choice import LevelCase, LevelLimits, OffloadChoice, choose_level, least_limits, over_ranks
from bigbatch.offload.levels import LEVELS, Offload, OffloadSetting, check_master
from bigbatch.offload.optimizer_offload import offload_optimizers
from bigbatch.types import LossFunction

T = TypeVar("T")


class OffloadLevel:
    """The level of an engine.

    Args:
        requested: A level, or ``"auto"``.
        accumulator: Of the engine, made with ``offload="none"`` for ``"auto"``; creates no optimizer state before the
            choice.
        cuda_graphs: As for `bigbatch.Engine`.
        fuse_gradients: As for `bigbatch.Engine`.
        batch_norm: As for `bigbatch.Engine`.

    Attributes:
        requested: As passed.
        choice: The choice; None before it, and for a level that was passed.

    Raises:
        InputError: ``"auto"`` is not supported with other settings.
    """

    def __init__(
        self,
        requested: OffloadSetting,
        accumulator: Accumulator,
        cuda_graphs: bool,
        fuse_gradients: FuseGradients,
        batch_norm: str | None,
    ) -> None:
        self.requested = requested
        self.choice: OffloadChoice | None = None
        self._accumulator = accumulator
        self._excluded = _excluded_by_settings(accumulator, cuda_graphs, fuse_gradients)
        if requested != "auto":
            return
        device = accumulator.device
        if not card_target.is_card(device):
            self.choice = OffloadChoice("none", f"the model is on {device}, whose memory is that of the host")
            return
        _check_predictable(accumulator, batch_norm)
        accumulator.update.defer_offload()

    @property
    def level(self) -> OffloadSetting:
        """The level in use; ``"auto"`` before the choice."""
        return self.requested if self.choice is None else self.choice.level

    def choose(
        self,
        batch: Any,
        splitter: BatchSplitter,
        size: MicrobatchSize,
        *,
        loss_fn: LossFunction,
        memory: str | int | None,
        leaves_grad: bool,
    ) -> None:
        """Choose the level for batches like this one, and use it. Collective.

        Args:
            batch: As for `bigbatch.Engine.step`.
            splitter: Of the engine.
            size: Of micro-batches: fixed, or not chosen yet.
            loss_fn: As for `bigbatch.Engine`.
            memory: As for `bigbatch.Engine`.
            leaves_grad: Whether the window leaves its gradient in ``.grad``, for other code.

        Raises:
            InputError: The memory cannot be predicted.
            MemoryLimitError: No level fits.
            RankFailedError: Another rank failed.
            ValueError: No rank has a sample, or ``memory`` is not an amount.
        """
        accumulator = self._accumulator
        excluded = dict(self._excluded)
        if leaves_grad:
            excluded |= dict.fromkeys(LEVELS[2:], "backward() and loss() leave gradients in .grad, for other code")
        narrow, unsupported = supported_levels(accumulator, excluded)
        levels: list[Offload] = [level for level in LEVELS if level not in unsupported]

        def own_cases(target: CardTarget) -> list[dict[str, Any]]:
            problem = level_problem(batch, accumulator, splitter, size, loss_fn)
            names = next((names for names in narrow.values() if names), ())
            fixed = requested_size(problem, size, splitter.quantum)
            integer_sums = accumulator.reproducible is not None
            return list(map(asdict, predicted_cases(problem, target, levels, names, fixed, integer_sums=integer_sums)))

        if levels == ["none"]:
            choice = OffloadChoice("none", "no other level is supported", unsupported=unsupported)
        else:
            target = self._target(memory)
            of_ranks = _on_every_rank(accumulator.sync.ranks, partial(own_cases, target))
            cases = [[LevelCase(**case) for case in own] for own in of_ranks if own]
            choice = _choose_together(cases, target.limits, unsupported)
        accumulator.update.set_offload(choice.level)
        self.choice = choice

    def _target(self, memory: str | int | None) -> CardTarget:
        """Return the card of this rank, with the memory that every rank may use. Collective."""
        update, module = self._accumulator.update, self._accumulator.sync.module
        resident = [*module.parameters(), *module.buffers(), *update.parameters(), *state_of(update.optimizers)]

        def own() -> dict[str, Any]:
            target = card_target.describe_card(self._accumulator.device, memory, resident)
            return {"device": str(target.device), "card": asdict(target.card), "limits": asdict(target.limits)}

        ranks = self._accumulator.sync.ranks
        of_ranks = _on_every_rank(ranks, own)
        limits = least_limits([LevelLimits(**each["limits"]) for each in of_ranks])
        found = of_ranks[ranks.rank]
        return CardTarget(torch.device(found["device"]), Card(**found["card"]), limits)


def _excluded_by_settings(
    accumulator: Accumulator, cuda_graphs: bool, fuse_gradients: FuseGradients
) -> dict[Offload, str]:
    """Return the levels that settings exclude, and why."""
    if cuda_graphs:
        return {"gradients": "cuda_graphs=True: gradient sums are copied from and to host memory in each micro-batch"}
    if fuse_gradients not in (False, "auto"):
        return {"gradients": f"fuse_gradients={fuse_gradients!r}: gradients are summed in host memory"}
    if any(getattr(module, "sparse", False) is True for module in accumulator.sync.module.modules()):
        return {"gradients": "a layer has sparse gradients, and whole tensors are summed in host memory"}
    return {}


def _check_predictable(accumulator: Accumulator, batch_norm: str | None) -> None:
    """Refuse what no prediction of a single micro-batch is for.

    Raises:
        InputError: It is one of these.
    """
    if batch_norm is not None:
        raise InputError(
            'offload="auto" predicts the memory of one micro-batch, and with batch_norm="exact" it depends on the '
            'whole batch: pass a level, such as offload="optimizer".'
        )
    if accumulator.sync.runs_in_lockstep and not accumulator.sync.is_sharded:
        raise InputError(
            'offload="auto" predicts the memory by calling loss_fn on tensors without data, and with lockstep=True it '
            'calls collectives: pass a level, such as offload="optimizer".'
        )


def supported_levels(
    accumulator: Accumulator, excluded: Mapping[Offload, str]
) -> tuple[dict[Offload, list[str]], dict[Offload, str]]:
    """Return the names of the weights that may be narrow at each level that is supported, and why others are not."""
    update = accumulator.update
    used = {
        "gradient_hook=": update.gradient_hook is not None,
        "a GradScaler": update.scaler is not None,
        "reproducible=True": accumulator.reproducible is not None,
    }
    narrow: dict[Offload, list[str]] = {}
    unsupported: dict[Offload, str] = {}
    for level in LEVELS[1:]:
        try:
            if level in excluded:
                raise InputError(excluded[level])
            check_master(level, used)
            offload = offload_optimizers(update.optimizers, level, accumulator.model)
            narrow[level] = [] if offload is None else list(offload.weights.names.values())
        except InputError as error:
            unsupported[level] = first_line(error)
    return narrow, unsupported


def _choose_together(
    cases_of_ranks: Sequence[Sequence[LevelCase]], limits: LevelLimits, unsupported: Mapping[Offload, str]
) -> OffloadChoice:
    """Choose for what all ranks have found: the same on each, as all have the same values."""
    if not cases_of_ranks:
        raise ValueError('the batch is empty: offload="auto" predicts the memory of some of its samples.')
    found = over_ranks(cases_of_ranks)
    if "master" not in unsupported and all(case.level != "master" for case in found):
        unsupported = {**unsupported, "master": "the loss reads no weight in a linear layer under autocast to bfloat16"}
    return choose_level(found, limits, unsupported=unsupported)


def _on_every_rank(ranks: RankGroup, function: Callable[[], T]) -> list[T]:
    """Call a function on every rank; return the JSON values of all, or raise on all. Collective."""
    result, failure, error = None, None, None
    try:
        result = function()
    except BaseException as raised:  # noqa: BLE001, the other ranks wait for the result; raised below
        failure, error = describe_error(raised), raised
    outcomes = ranks.all_gather([result, failure])
    if error is not None:
        raise error
    for rank, (_, failed) in enumerate(outcomes):
        if failed is not None:
            raise error_of(failed, otherwise=RankFailedError, prefix=f"rank {rank} failed: ")
    return [result for result, _ in outcomes]
