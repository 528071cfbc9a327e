"""The processes that torchrun starts for one run: they find one another, one speaks, and none waits for ever.

environment of torchrun → process group → Ranks → train or resume on each → a code that torchrun understands
"""

import faulthandler
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from bigbatch.cli.exit_codes import exit_for
from bigbatch.errors import BigbatchError, InputError, first_line
from bigbatch.lm.config.train_config import TrainConfig

if TYPE_CHECKING:
    from bigbatch.lm.distributed.ranks import RankContext
    from bigbatch.lm.training.callbacks import MetricsRow, TrainerCallback

COLLECTIVE_EXTRA_S = (
    30.0  # that collectives wait longer than a rank watches itself, so that the stacks are written first
)


def launched_size() -> int:
    """Tell how many processes torchrun has started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_restarted() -> bool:
    """Tell whether torchrun has started the processes again after one was lost."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def may_be_restarted() -> bool:
    """Tell whether torchrun would start the processes again."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


@contextmanager
def process_group(config: TrainConfig) -> "Iterator[RankContext]":
    """Join the process group of the run, and leave it in the end. Without torchrun, there is one rank and no group.

    Raises:
        InputError: torchrun started more processes than there are devices.
        BigbatchError: The processes do not find one another, or one was lost.
    """
    from bigbatch.lm.distributed.ranks import SINGLE_PROCESS, RankContext

    size = launched_size()
    if size == 1:
        yield SINGLE_PROCESS
        return
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    _init_process_group(rank, size, on_cuda=_set_local_device(config), patience_s=config.timeout_s + COLLECTIVE_EXTRA_S)
    try:
        yield RankContext(size, rank, int(os.environ["LOCAL_WORLD_SIZE"]), config.parallel)
    except RuntimeError as error:
        if isinstance(error, BigbatchError) or not _is_of_a_collective(error):
            raise
        raise BigbatchError(
            f"rank {rank} has lost another rank ({_sentence_of(error)}): see what that one said. A run that had begun "
            "goes on from its last checkpoint by bigbatch resume, and by itself under torchrun with --max-restarts."
        ) from error
    finally:
        faulthandler.cancel_dump_traceback_later()
        dist.destroy_process_group()


def _set_local_device(config: TrainConfig) -> bool:
    """Let this process use the CUDA device of its number, where the run is on such; tell whether it is."""
    import torch

    if not (config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())):
        return False
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= there:
        raise InputError(
            f"torchrun started process {local} of this machine, which has {there} CUDA devices: pass it that many as "
            "--nproc-per-node."
        )
    torch.cuda.set_device(local)
    return True


def _init_process_group(rank: int, size: int, *, on_cuda: bool, patience_s: float) -> None:
    """Make the process group, of the processes that were started with this one."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from bigbatch.lm.distributed.rendezvous import fresh_store

    backend, waits = "cpu:gloo,cuda:nccl" if on_cuda else "gloo", timedelta(seconds=patience_s)
    try:
        store, _, _ = next(rendezvous("env://", timeout=waits))
        store = fresh_store(store, rank, size, timeout_s=patience_s)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=waits)
    except (RuntimeError, ValueError, TimeoutError) as error:
        raise BigbatchError(
            f"the processes that torchrun started do not find one another: {_sentence_of(error)}."
        ) from error


@contextmanager
def fail_together(ranks: "RankContext", command: str) -> Iterator[None]:
    """Let the ranks fail together while they get ready, with what is the same for several of them said by one.

    Whoever has something to say has said it before any of them ends: torchrun ends all others when the first one does.
    Collective; what is within and may fail on one rank alone comes before what is collective.

    Args:
        ranks: That get ready.
        command: Which they run, for the message.

    Raises:
        BigbatchError: Without other ranks, what was raised.
        SystemExit: Of several ranks, one could not begin.
    """
    ending: tuple[str, int] | None = None
    try:
        yield
    except (BigbatchError, ModuleNotFoundError) as error:
        ending = exit_for(error)
        if ranks.size == 1 or ending is None:
            raise
    endings = ranks.all_gather(ending)
    first = next((theirs for theirs in endings if theirs is not None), None)
    if first is None:
        return
    alike = [rank for rank, theirs in enumerate(endings) if theirs == ending]
    if ending is not None and ranks.rank == alike[0]:
        numbers = f"rank{'s' if len(alike) > 1 else ''} {', '.join(map(str, alike))}"
        where = "" if ranks.is_first else f"{numbers}: "  # the first one speaks for all
        print(f"bigbatch {command}: {where}{ending[0]}", file=sys.stderr, flush=True)
    ranks.all_gather(None)
    raise SystemExit(first[1])


@contextmanager
def reject_together(command: str) -> Iterator[None]:
    """Let the processes say once what all of them refuse before they have found one another.

    Raises:
        InputError: Without other ranks, what was raised.
        SystemExit: Of several.
    """
    try:
        yield
    except InputError:
        if launched_size() == 1:
            raise
        with process_group(TrainConfig()) as ranks, fail_together(ranks, command):
            raise


@contextmanager
def watchdog(ranks: "RankContext", timeout_s: float) -> "Iterator[Watchdog | None]":
    """End this process, with its stacks on stderr, when the run has not moved for so many seconds."""
    if ranks.size == 1:
        yield None
        return
    watch = Watchdog(timeout_s)
    watch.reset()
    try:
        yield watch
    finally:
        faulthandler.cancel_dump_traceback_later()


def with_local_device(config: TrainConfig, ranks: "RankContext") -> TrainConfig:
    """Let every rank take the CUDA device that it was given, whatever the number of the one that was asked for."""
    if ranks.size == 1 or not config.device.startswith("cuda:"):
        return config
    return config.model_copy(update={"device": "cuda"})


class Watchdog:
    """Wound up whenever the run moves; when it runs down, the process writes its stacks to stderr and ends with 1."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def reset(self) -> None:
        """Begin to count anew."""
        faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=2)


class WatchdogCallback:
    """A listener that winds up the watch; of all ranks but the first, it says nothing.

    Args:
        callback: Who is told as well; None for nobody.
        watch: None for none.
    """

    def __init__(self, callback: "TrainerCallback | None", watch: Watchdog | None) -> None:
        self._callback = callback
        self._watch = watch

    def on_update(self, row: "MetricsRow") -> None:
        """Hear of an update."""
        self._forward("on_update", row)

    def on_validation(self, step: int, loss: float) -> None:
        """Hear of a validation."""
        self._forward("on_validation", step, loss)

    def on_sample(self, step: int, text: str) -> None:
        """Hear what the model writes."""
        self._forward("on_sample", step, text)

    def _forward(self, what: str, *arguments: Any) -> None:
        if self._watch is not None:
            self._watch.reset()
        if self._callback is not None:
            getattr(self._callback, what)(*arguments)


def _is_of_a_collective(error: RuntimeError) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "ProcessGroup"))


def _sentence_of(error: BaseException) -> str:
    """Return the first sentence of an error of a library."""
    return first_line(error).partition(". ")[0]
