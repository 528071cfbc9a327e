"""``bigbatch train``: prepare, explain the batch, train, say where everything lies."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from bigbatch.cli.console import make_console, preparing, quiet_libraries
from bigbatch.cli.options import ResumeOptions
from bigbatch.cli.session import explain, repeat_exactly, train
from bigbatch.cli.torchrun import (
    each_its_own_device,
    is_restarted,
    joined,
    may_be_restarted,
    speaking_for_all,
)
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.directory import ReadDirectory, RunDirectory, check_free, default_path
from bigbatch.lm.runs.file_names import CONFIG
from bigbatch.lm.runs.lock import RunLock
from bigbatch.lm.training.dashboards import check_log

if TYPE_CHECKING:
    from bigbatch.lm.distributed.ranks import Ranks
    from bigbatch.lm.training.trainer import Trainer


def run(config: TrainConfig) -> int:
    """Train one model; return 0, or 75 when a signal stopped it after saving.

    Where torchrun has started the processes again after one was lost, go on with the run that they had begun.
    """
    with joined(config) as ranks:
        with speaking_for_all(ranks, "train"):
            if config.out is None and may_be_restarted():
                raise InputError(
                    "torchrun may start this run again, which then has to find it: name its folder by --out."
                )
        if _has_begun(config, ranks):
            from bigbatch.cli.commands.resume import go_on

            assert config.out is not None, "found there"
            return go_on(config, ResumeOptions(run=config.out), ranks)
        return _run(config, ranks)


def _has_begun(config: TrainConfig, ranks: "Ranks") -> bool:
    """Tell whether this is a run that was started again. Collective: torchrun counts restarts by machine."""
    again = any(ranks.everyone(is_restarted()))
    begun: bool = ranks.tell(config.out is not None and (config.out / CONFIG).exists())
    return again and begun


def _run(config: TrainConfig, ranks: "Ranks") -> int:
    console = make_console(quiet=not ranks.is_first)
    config = each_its_own_device(config, ranks)
    repeat_exactly(config)
    path = ranks.tell(config.out or default_path(config.model, config.data))
    with speaking_for_all(ranks, "train"):
        check_log(config.log)
        if ranks.is_first:
            check_free(path)
    with speaking_for_all(ranks, "train"), preparing(console) as say:
        from bigbatch.lm.training.setup import prepare

        quiet_libraries()
        prepared = prepare(config.model_copy(update={"out": path}), say=say)
    with speaking_for_all(ranks, "train"), preparing(console) as say:
        from bigbatch.lm.training.trainer import Trainer

        trainer = Trainer(prepared, ranks=ranks)
        origin = None
        if trainer.config.microbatch == "auto":
            say("choosing the micro-batch")
            origin = trainer.tune(beside=path)
    for line in (
        *prepared.notes,
        *explain(trainer),
        *trainer.config.batch_scaling().lines(),
        *_reasons(trainer, origin),
    ):
        console.print(line)
    with ExitStack() as stack:
        directory: RunDirectory = ReadDirectory(path)
        with speaking_for_all(ranks, "train"):
            if ranks.is_first:
                directory = RunDirectory.create(path, prepared.config.model_dump(mode="json"))
                stack.enter_context(RunLock(path))
        return train(trainer, directory, console, config=config)


def _reasons(trainer: "Trainer", origin: Path | None) -> list[str]:
    """Say why the micro-batch is what it is, where nobody gave it."""
    from bigbatch.lm.training.autotune import describe

    choice = trainer.engine.choice
    if choice is None:
        return []
    taken = "" if origin is None else f" (as {origin} found for the same model, device and settings)"
    unpredicted = "" if choice.unpredicted is None else f"; found by trying, since {choice.unpredicted}"
    return [f"{choice}{describe(trainer.level)}{taken}{unpredicted}"]
