"""``bigbatch train``: prepare, explain the batch, train, say where everything lies."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from bigbatch.cli.console import make_console, progress_display, quiet_libraries
from bigbatch.cli.options import ResumeOptions
from bigbatch.cli.session import enable_determinism, summary_lines, train
from bigbatch.cli.torchrun import (
    fail_together,
    is_restarted,
    may_be_restarted,
    process_group,
    with_local_device,
)
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.directory import ReadOnlyRunDirectory, RunDirectory, check_free, default_path
from bigbatch.lm.runs.file_names import CONFIG
from bigbatch.lm.runs.lock import RunLock
from bigbatch.lm.training.dashboards import check_log

if TYPE_CHECKING:
    from bigbatch.lm.distributed.ranks import RankContext
    from bigbatch.lm.training.trainer import Trainer


def run(config: TrainConfig) -> int:
    """Train one model; return 0, or 75 when a signal stopped it after saving.

    Where torchrun has started the processes again after one was lost, go on with the run that they had begun.
    """
    with process_group(config) as ranks:
        with fail_together(ranks, "train"):
            if config.out is None and may_be_restarted():
                raise InputError(
                    "torchrun may start this run again, which then has to find it: name its folder by --out."
                )
        if _has_begun(config, ranks):
            from bigbatch.cli.commands.resume import resume

            assert config.out is not None, "found there"
            return resume(config, ResumeOptions(run=config.out), ranks)
        return _run(config, ranks)


def _has_begun(config: TrainConfig, ranks: "RankContext") -> bool:
    """Tell whether this is a run that was started again. Collective: torchrun counts restarts by machine."""
    again = any(ranks.all_gather(is_restarted()))
    begun: bool = ranks.broadcast(config.out is not None and (config.out / CONFIG).exists())
    return again and begun


def _run(config: TrainConfig, ranks: "RankContext") -> int:
    console = make_console(quiet=not ranks.is_first)
    config = with_local_device(config, ranks)
    enable_determinism(config)
    path = ranks.broadcast(config.out or default_path(config.model, config.data))
    with fail_together(ranks, "train"):
        check_log(config.log)
        if ranks.is_first:
            check_free(path)
    with fail_together(ranks, "train"), progress_display(console) as progress:
        from bigbatch.lm.training.setup import set_up_training

        quiet_libraries()
        setup = set_up_training(config.model_copy(update={"out": path}), progress=progress)
    with fail_together(ranks, "train"), progress_display(console) as progress:
        from bigbatch.lm.training.trainer import Trainer

        trainer = Trainer(setup, ranks=ranks)
        origin = trainer.tune(cache=path, progress=progress)
    for line in (
        *setup.notes,
        *summary_lines(trainer),
        *trainer.config.batch_scaling().lines(),
        *_reasons(trainer, origin),
    ):
        console.print(line)
    with ExitStack() as stack:
        directory: RunDirectory = ReadOnlyRunDirectory(path)
        with fail_together(ranks, "train"):
            if ranks.is_first:
                directory = RunDirectory.create(path, setup.config.model_dump(mode="json"))
                stack.enter_context(RunLock(path))
        return train(trainer, directory, console, config=config)


def _reasons(trainer: "Trainer", origin: Path | None) -> list[str]:
    """Say why the micro-batch is what it is, where nobody gave it."""
    from bigbatch.lm.training.autotune import describe

    choice = trainer.engine.choice
    if choice is None:
        return []
    taken = "" if origin is None else f" (as {origin} found for the same model, device and settings)"
    unpredicted = "" if choice.prediction_failure is None else f"; found by trying, since {choice.prediction_failure}"
    return [f"{choice}{describe(trainer.model_setup.checkpointing_mode)}{taken}{unpredicted}"]
