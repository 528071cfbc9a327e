"""Process-group setup, rank-0 output and a watchdog for runs under torchrun.

environment of torchrun → process group → RankContext → train or resume on each rank → exit code for torchrun
"""

import faulthandler
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from bigbatch.cli.exit_codes import exit_for
from bigbatch.cli.output import print_error
from bigbatch.errors import BigbatchError, InputError, first_line
from bigbatch.lm.config.train_config import TrainConfig

if TYPE_CHECKING:
    from bigbatch.lm.distributed.ranks import RankContext
    from bigbatch.lm.training.callbacks import MetricsRow, TrainerCallback

COLLECTIVE_EXTRA_S = 30.0  # added to the timeout of collectives, so that the watchdog dumps the stacks first


def launched_size() -> int:
    """Return the number of processes that torchrun started for this run; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def sharding_note(config: TrainConfig, size: int) -> str | None:
    """Return that a single process has nothing to shard the model over; None if nothing was to be sharded."""
    if config.parallel == "ddp" or size > 1:
        return None
    return (
        f"--parallel {config.parallel} shards nothing in a single process, which holds the whole model. Several are "
        "started with torchrun --nproc-per-node N -m bigbatch train"
    )


def is_restarted() -> bool:
    """Return whether torchrun has restarted the processes after a failure."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def may_be_restarted() -> bool:
    """Return whether torchrun may restart the processes."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


@contextmanager
def process_group(config: TrainConfig) -> "Iterator[RankContext]":
    """Initialize the process group of the run and destroy it on exit. Without torchrun: one rank and no group.

    Raises:
        InputError: torchrun started more processes than there are devices, or another launcher started them.
        BigbatchError: The processes cannot connect to each other, or one was lost.
    """
    from bigbatch.lm.distributed.ranks import SINGLE_PROCESS, RankContext

    size = launched_size()
    if size == 1:
        _check_not_launched()
        yield SINGLE_PROCESS
        return
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    _init_process_group(rank, size, on_cuda=_set_local_device(config), timeout_s=config.timeout_s + COLLECTIVE_EXTRA_S)
    try:
        yield RankContext(size, rank, int(os.environ["LOCAL_WORLD_SIZE"]), config.parallel)
    except RuntimeError as error:
        if isinstance(error, BigbatchError) or not _is_collective_error(error):
            raise
        raise BigbatchError(
            f"rank {rank} has lost another rank ({_first_sentence(error)}): see the error of that rank. Resume the run "
            "from its last checkpoint with bigbatch resume; torchrun --max-restarts does so automatically."
        ) from error
    finally:
        faulthandler.cancel_dump_traceback_later()
        dist.destroy_process_group()


def _check_not_launched() -> None:
    """Refuse to be one of several processes that another launcher started: each would train by itself."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1" and "TORCHELASTIC_RUN_ID" not in os.environ:
        raise InputError(
            f"the environment sets WORLD_SIZE={size}, but torchrun did not start this process: start the processes of "
            "a run with torchrun, or unset WORLD_SIZE to train with one process."
        )


def _set_local_device(config: TrainConfig) -> bool:
    """Select the CUDA device of this process's local rank; return False if the run does not use CUDA."""
    import torch

    if not (config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())):
        return False
    local_rank, num_devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if not num_devices:
        return False  # refused where the device is looked for, once for all ranks
    if local_rank >= num_devices:
        raise InputError(
            f"torchrun started a process with local rank {local_rank}, but this machine has only {num_devices} CUDA "
            f"devices: pass --nproc-per-node {num_devices} to torchrun."
        )
    torch.cuda.set_device(local_rank)
    return True


def _init_process_group(rank: int, size: int, *, on_cuda: bool, timeout_s: float) -> None:
    """Initialize the process group over all processes of this launch."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from bigbatch.lm.distributed.rendezvous import fresh_store

    backend, timeout = "cpu:gloo,cuda:nccl" if on_cuda else "gloo", timedelta(seconds=timeout_s)
    try:
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        store = fresh_store(store, rank, size, timeout_s=timeout_s)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError, TimeoutError) as error:
        raise BigbatchError(
            f"the processes started by torchrun cannot connect to each other: {_first_sentence(error)}."
        ) from error


@contextmanager
def fail_together(ranks: "RankContext", command: str) -> Iterator[None]:
    """Make all ranks exit if the block fails on any of them; a message shared by several ranks is printed once.

    Every rank prints its message before any rank exits, because torchrun terminates the others after the first exit.
    Collective. Inside the block, code that can fail on one rank alone must come before any collective.

    Args:
        ranks: Ranks that enter the block.
        command: Name of the command, for the message.

    Raises:
        BigbatchError: On a single rank, the error of the block.
        SystemExit: On several ranks, if the block failed on any of them.
    """
    failure: tuple[str, int] | None = None
    try:
        yield
    except (BigbatchError, ModuleNotFoundError) as error:
        failure = exit_for(error)
        if ranks.size == 1 or failure is None:
            raise
    failures = [other and tuple(other) for other in ranks.all_gather(failure)]
    first = next((other for other in failures if other is not None), None)
    if first is None:
        return
    same = [rank for rank, other in enumerate(failures) if other == failure]
    if failure is not None and ranks.rank == same[0]:
        numbers = f"rank{'s' if len(same) > 1 else ''} {', '.join(map(str, same))}"
        prefix = "" if ranks.is_first else f"{numbers}: "  # no prefix for a message of the first rank
        print_error(f"bigbatch {command}", f"{prefix}{failure[0]}")
    ranks.all_gather(None)
    raise SystemExit(first[1])


@contextmanager
def reject_together(command: str) -> Iterator[None]:
    """Print an input error of the block once for all processes, before the process group exists.

    Raises:
        InputError: In a single process, the error of the block.
        SystemExit: In several processes, if the block failed.
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
    """Dump the stacks and exit with 1 if the watchdog is not reset for ``timeout_s`` seconds; None on one rank."""
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
    """Replace ``cuda:N`` by ``cuda`` on several ranks, so that each rank uses the device of its local rank."""
    if ranks.size == 1 or not config.device.startswith("cuda:"):
        return config
    return config.model_copy(update={"device": "cuda"})


class Watchdog:
    """Watchdog: dumps all stacks to stderr and exits with 1 if not reset within ``timeout_s``."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def reset(self) -> None:
        """Restart the timeout."""
        faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=2)


class WatchdogCallback:
    """Training callback that resets the watchdog and forwards to another callback.

    Args:
        callback: Callback to forward to; None on all ranks but the first.
        watch: Watchdog to reset; None on a single rank.
    """

    def __init__(self, callback: "TrainerCallback | None", watch: Watchdog | None) -> None:
        self._callback = callback
        self._watch = watch

    def on_update(self, row: "MetricsRow") -> None:
        """Forward an update."""
        self._forward("on_update", row)

    def on_validation(self, step: int, loss: float) -> None:
        """Forward a validation loss."""
        self._forward("on_validation", step, loss)

    def on_evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Forward the losses of named sets."""
        self._forward("on_evaluation", step, losses)

    def on_validation_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Forward the metrics of a validation of pairs."""
        self._forward("on_validation_metrics", step, metrics)

    def on_sample(self, step: int, text: str) -> None:
        """Forward a text sample."""
        self._forward("on_sample", step, text)

    def _forward(self, method: str, *arguments: Any) -> None:
        if self._watch is not None:
            self._watch.reset()
        if self._callback is not None:
            getattr(self._callback, method)(*arguments)


def _is_collective_error(error: RuntimeError) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "ProcessGroup"))


def _first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error of a library."""
    return first_line(error).partition(". ")[0]
