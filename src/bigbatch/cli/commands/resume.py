"""``bigbatch resume``: go on with a run from its newest checkpoint that can be trusted."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbatch.cli.console import make_console, progress_display, quiet_libraries
from bigbatch.cli.exit_codes import DONE
from bigbatch.cli.options import ResumeOptions
from bigbatch.cli.session import enable_determinism, summary_lines, train
from bigbatch.cli.torchrun import fail_together, process_group, reject_together, with_local_device
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.directory import ReadOnlyRunDirectory, RunDirectory
from bigbatch.lm.runs.lock import RunLock
from bigbatch.lm.training.dashboards import check_log
from bigbatch.lm.training.resume import check_facts, merge_config, stored_config, with_saved_changes

if TYPE_CHECKING:
    from bigbatch.lm.distributed.ranks import RankContext


def run(asked: TrainConfig, options: ResumeOptions) -> int:
    """Go on with one run; return 0, or 75 when a signal stopped it after saving."""
    with reject_together("resume"):
        stored = stored_config(options.run)
    given = asked.model_fields_set & {"device", "parallel", "timeout_s"}
    now: dict[str, Any] = {name: getattr(asked, name) for name in given}
    with process_group(stored.model_copy(update=now)) as ranks:
        return resume(asked, options, ranks)


def resume(asked: TrainConfig, options: ResumeOptions, ranks: "RankContext") -> int:
    """Go on with one run on ranks that have found one another. Collective; returns as `run` does."""
    path = options.run
    console = make_console(quiet=not ranks.is_first)
    with contextlib.ExitStack() as stack:
        with fail_together(ranks, "resume"):
            stored = stored_config(path)
            if ranks.is_first:
                stack.enter_context(RunLock(path))
        enable_determinism(asked if "deterministic" in asked.model_fields_set else stored)
        with fail_together(ranks, "resume"), progress_display(console) as progress:
            progress("looking for the newest checkpoint")
            from bigbatch.lm.checkpoint.manager import load

            checkpoint, rejected = load(path)
        with fail_together(ranks, "resume"):
            check_same(None if checkpoint is None else checkpoint.path.name, path, ranks)
        with fail_together(ranks, "resume"), progress_display(console) as progress:
            stored = with_saved_changes(stored, None if checkpoint is None else checkpoint.facts)
            config = with_local_device(merge_config(stored, asked, allowed=options.allowed), ranks)
            check_log(config.log)
            for folder, why in rejected:
                console.print(f"passed over {folder}: {why}")
            directory = RunDirectory(path) if ranks.is_first else ReadOnlyRunDirectory(path)
            if (
                checkpoint is not None
                and checkpoint.progress.step >= checkpoint.total_steps
                and directory.model.is_dir()
            ):
                console.print(
                    f"{path} is finished: all its {checkpoint.total_steps:,} updates are made, its model is saved"
                )
                return DONE
            from bigbatch.lm.training.setup import set_up_training
            from bigbatch.lm.training.trainer import Trainer

            quiet_libraries()
            setup = set_up_training(config, progress=progress)
        with fail_together(ranks, "resume"):
            trainer = Trainer(setup, checkpoint=checkpoint, ranks=replace(ranks, parallel=config.parallel))
            if checkpoint is not None:
                check_facts(path, config.data, checkpoint.facts, trainer.facts, allowed=options.allowed)
        where = (
            "there is no checkpoint, so it begins anew"
            if checkpoint is None
            else f"after update {checkpoint.progress.step}"
        )
        console.print(f"going on with {path}: {where}")
        with fail_together(ranks, "resume"), progress_display(console) as progress:
            trainer.tune(cache=path, progress=progress)
        for line in (*setup.notes, *(summary_lines(trainer) if checkpoint is None else ())):
            console.print(line)
        return train(trainer, directory, console, config=config)


def check_same(checkpoint: str | None, path: Path, ranks: "RankContext") -> None:
    """Refuse ranks that would go on from different checkpoints. Collective.

    Raises:
        InputError: They would.
    """
    found = ranks.all_gather(checkpoint)
    other = next((rank for rank, theirs in enumerate(found) if theirs != found[0]), None)
    if other is not None:
        raise InputError(
            f"rank {other} finds {found[other] or 'no checkpoint'} in {path}, and rank 0 {found[0] or 'none'}: the run "
            "directory has to be one folder that all machines see, with one content."
        )
