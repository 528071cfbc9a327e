"""The processes that torchrun starts for one run: they find one another, one speaks, and none waits for ever.

environment of torchrun → process group → Ranks → train or resume on each → a code that torchrun understands
"""

import faulthandler
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from bigbatch.errors import BigbatchError, InputError
from bigbatch.lm.config import TrainConfig

if TYPE_CHECKING:
    from bigbatch.lm.ranks import Ranks
    from bigbatch.lm.telling import Listener, Row

SPARE_S = 30.0  # that collectives wait longer than a rank watches itself, so that the stacks are written first


def launched_size() -> int:
    """Tell how many processes torchrun has started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_restarted() -> bool:
    """Tell whether torchrun has started the processes again after one was lost."""
    return launched_size() > 1 and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def may_be_restarted() -> bool:
    """Tell whether torchrun would start the processes again."""
    return launched_size() > 1 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


@contextmanager
def joined(config: TrainConfig) -> "Iterator[Ranks]":
    """Join the process group of the run, and leave it in the end. Without torchrun, there is one rank and no group.

    Raises:
        InputError: The processes do not find one another, or torchrun started more of them than there are devices.
    """
    from bigbatch.lm.ranks import ALONE, Ranks

    size = launched_size()
    if size == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    local = int(os.environ["LOCAL_RANK"])
    on_cuda = config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())
    if on_cuda:
        if local >= torch.cuda.device_count():
            raise InputError(
                f"torchrun started process {local} of this machine, which has {torch.cuda.device_count()} CUDA "
                "devices: pass it that many as --nproc-per-node."
            )
        torch.cuda.set_device(local)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timedelta(seconds=config.timeout_s + SPARE_S)
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes that torchrun started do not find one another: {_first(error)}.") from error
    try:
        yield Ranks(size, dist.get_rank(), int(os.environ["LOCAL_WORLD_SIZE"]), config.parallel)
    finally:
        faulthandler.cancel_dump_traceback_later()
        dist.destroy_process_group()


@contextmanager
def speaking_for_all(ranks: "Ranks") -> Iterator[None]:
    """Let the ranks fail together while they get ready: one says what is wrong with the same input, not all of them.

    Collective.

    Raises:
        BigbatchError: It is what was raised here, or another rank could not begin.
    """
    problem: BaseException | None = None
    try:
        yield
    except (BigbatchError, ModuleNotFoundError) as error:
        if ranks.size == 1:
            raise
        problem = error
    said = ranks.everyone(None if problem is None else str(problem))
    if not any(said):
        return
    first = next(rank for rank, sentence in enumerate(said) if sentence is not None)
    if problem is not None and (ranks.rank == first or said[ranks.rank] != said[first]):
        raise problem
    raise SystemExit(2 if isinstance(problem, InputError) or problem is None else 1)


@contextmanager
def watched(ranks: "Ranks", timeout_s: float) -> "Iterator[Watch | None]":
    """End this process, with its stacks on stderr, when the run has not moved for so many seconds."""
    if ranks.size == 1:
        yield None
        return
    watch = Watch(timeout_s)
    watch.moved()
    try:
        yield watch
    except RuntimeError as error:
        if isinstance(error, BigbatchError) or not _is_of_a_collective(error):
            raise
        raise BigbatchError(
            f"rank {ranks.rank} has lost another rank ({_first(error)}): see what that one said. bigbatch resume goes "
            "on from the last checkpoint, and so does torchrun with --max-restarts."
        ) from error
    finally:
        faulthandler.cancel_dump_traceback_later()


def each_its_own_device(config: TrainConfig, ranks: "Ranks") -> TrainConfig:
    """Let every rank take the CUDA device that it was given, whatever the number of the one that was asked for."""
    if ranks.size == 1 or not config.device.startswith("cuda:"):
        return config
    return config.model_copy(update={"device": "cuda"})


class Watch:
    """Wound up whenever the run moves; when it runs down, the process writes its stacks to stderr and ends with 1."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def moved(self) -> None:
        """Begin to count anew."""
        faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=2)


class WatchedListener:
    """A listener that winds up the watch; of all ranks but the first, it says nothing.

    Args:
        listener: Who is told as well; None for nobody.
        watch: None for none.
    """

    def __init__(self, listener: "Listener | None", watch: Watch | None) -> None:
        self._listener = listener
        self._watch = watch

    def updated(self, row: "Row") -> None:
        """Hear of an update."""
        self._tell("updated", row)

    def validated(self, step: int, loss: float) -> None:
        """Hear of a validation."""
        self._tell("validated", step, loss)

    def sampled(self, step: int, text: str) -> None:
        """Hear what the model writes."""
        self._tell("sampled", step, text)

    def _tell(self, what: str, *arguments: Any) -> None:
        if self._watch is not None:
            self._watch.moved()
        if self._listener is not None:
            getattr(self._listener, what)(*arguments)


def _is_of_a_collective(error: RuntimeError) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "ProcessGroup"))


def _first(error: BaseException) -> str:
    """Give the first sentence of an error of a library."""
    return str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
