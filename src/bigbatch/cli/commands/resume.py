"""``bigbatch resume``: go on with a run from its newest checkpoint that can be trusted."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbatch.cli.console import make_console, preparing, quiet_libraries
from bigbatch.cli.exit_codes import DONE
from bigbatch.cli.options import ResumeOptions
from bigbatch.cli.session import explain, repeat_exactly, train
from bigbatch.cli.torchrun import each_its_own_device, joined, refusing_together, speaking_for_all
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.directory import ReadDirectory, RunDirectory
from bigbatch.lm.runs.lock import RunLock
from bigbatch.lm.training.dashboards import check_log
from bigbatch.lm.training.resume import as_changed, check_facts, continued, stored_config

if TYPE_CHECKING:
    from bigbatch.lm.distributed.ranks import Ranks


def run(asked: TrainConfig, options: ResumeOptions) -> int:
    """Go on with one run; return 0, or 75 when a signal stopped it after saving."""
    with refusing_together("resume"):
        stored = stored_config(options.run)
    given = asked.model_fields_set & {"device", "parallel", "timeout_s"}
    now: dict[str, Any] = {name: getattr(asked, name) for name in given}
    with joined(stored.model_copy(update=now)) as ranks:
        return go_on(asked, options, ranks)


def go_on(asked: TrainConfig, options: ResumeOptions, ranks: "Ranks") -> int:
    """Go on with one run on ranks that have found one another. Collective; returns as `run` does."""
    path = options.run
    console = make_console(quiet=not ranks.is_first)
    with contextlib.ExitStack() as stack:
        with speaking_for_all(ranks, "resume"):
            stored = stored_config(path)
            if ranks.is_first:
                stack.enter_context(RunLock(path))
        repeat_exactly(asked if "deterministic" in asked.model_fields_set else stored)
        with speaking_for_all(ranks, "resume"), preparing(console) as say:
            say("looking for the newest checkpoint")
            from bigbatch.lm.checkpoint.manager import load

            saved, rejected = load(path)
        with speaking_for_all(ranks, "resume"):
            check_same(None if saved is None else saved.path.name, path, ranks)
        with speaking_for_all(ranks, "resume"), preparing(console) as say:
            stored = as_changed(stored, None if saved is None else saved.facts)
            config = each_its_own_device(continued(stored, asked, allowed=options.allowed), ranks)
            check_log(config.log)
            for folder, why in rejected:
                console.print(f"passed over {folder}: {why}")
            directory = RunDirectory(path) if ranks.is_first else ReadDirectory(path)
            if saved is not None and saved.progress.step >= saved.total_steps and directory.model.is_dir():
                console.print(f"{path} is finished: all its {saved.total_steps:,} updates are made, its model is saved")
                return DONE
            from bigbatch.lm.training.setup import prepare
            from bigbatch.lm.training.trainer import Trainer

            quiet_libraries()
            prepared = prepare(config, say=say)
        with speaking_for_all(ranks, "resume"):
            trainer = Trainer(prepared, saved=saved, ranks=replace(ranks, parallel=config.parallel))
            if saved is not None:
                check_facts(path, config.data, saved.facts, trainer.facts, allowed=options.allowed)
        where = "there is no checkpoint, so it begins anew" if saved is None else f"after update {saved.progress.step}"
        console.print(f"going on with {path}: {where}")
        if saved is None and trainer.config.microbatch == "auto":
            trainer.tune(beside=path)
        for line in (*prepared.notes, *(explain(trainer) if saved is None else ())):
            console.print(line)
        return train(trainer, directory, console, config=config)


def check_same(checkpoint: str | None, path: Path, ranks: "Ranks") -> None:
    """Refuse ranks that would go on from different checkpoints. Collective.

    Raises:
        InputError: They would.
    """
    found = ranks.everyone(checkpoint)
    other = next((rank for rank, theirs in enumerate(found) if theirs != found[0]), None)
    if other is not None:
        raise InputError(
            f"rank {other} finds {found[other] or 'no checkpoint'} in {path}, and rank 0 {found[0] or 'none'}: the run "
            "directory has to be one folder that all machines see, with one content."
        )
