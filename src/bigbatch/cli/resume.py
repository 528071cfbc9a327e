"""``bigbatch resume``: go on with a run from its newest checkpoint that can be trusted."""

import contextlib
from typing import TYPE_CHECKING, Any

from bigbatch.cli.console import make_console, preparing, quiet_libraries
from bigbatch.cli.options import ResumeOptions
from bigbatch.cli.ranks import each_its_own_device, joined, speaking_for_all
from bigbatch.cli.train import DONE, check_alike, explain, repeat_exactly, train
from bigbatch.lm.config import TrainConfig
from bigbatch.lm.lock import RunLock
from bigbatch.lm.resumption import as_changed, check_facts, continued, stored_config
from bigbatch.lm.rundir import ReadDirectory, RunDirectory
from bigbatch.lm.scalars import check_log

if TYPE_CHECKING:
    from bigbatch.lm.ranks import Ranks


def run(asked: TrainConfig, options: ResumeOptions) -> int:
    """Go on with one run; return 0, or 75 when a signal stopped it after saving."""
    stored = stored_config(options.run)
    given = asked.model_fields_set & {"device", "parallel", "timeout_s"}
    now: dict[str, Any] = {name: getattr(asked, name) for name in given}
    with joined(stored.model_copy(update=now)) as ranks:
        return _run(asked, options, stored, ranks)


def _run(asked: TrainConfig, options: ResumeOptions, stored: TrainConfig, ranks: "Ranks") -> int:
    path = options.run
    console = make_console(quiet=not ranks.is_first)
    repeat_exactly(asked if "deterministic" in asked.model_fields_set else stored)
    with contextlib.ExitStack() as stack:
        with speaking_for_all(ranks):
            if ranks.is_first:
                stack.enter_context(RunLock(path))
        with speaking_for_all(ranks), preparing(console) as say:
            say("looking for the newest checkpoint")
            from bigbatch.lm.keeper import load

            saved, rejected = load(path)
            stored = as_changed(stored, None if saved is None else saved.facts)
            config = each_its_own_device(continued(stored, asked, allowed=options.allowed), ranks)
            check_log(config.log)
            for folder, why in rejected:
                console.print(f"passed over {folder}: {why}")
            directory = RunDirectory(path) if ranks.is_first else ReadDirectory(path)
            if saved is not None and saved.progress.step >= saved.total_steps and directory.model.is_dir():
                console.print(f"{path} is finished: all its {saved.total_steps:,} updates are made, its model is saved")
                return DONE
            from bigbatch.lm.prepare import prepare
            from bigbatch.lm.trainer import Trainer

            quiet_libraries()
            prepared = prepare(config, say=say)
        with speaking_for_all(ranks):
            trainer = Trainer(prepared, saved=saved, ranks=ranks)
            check_alike(trainer.facts, ranks)
            if saved is not None:
                check_facts(path, config.data, saved.facts, trainer.facts, allowed=options.allowed)
        where = "there is no checkpoint, so it begins anew" if saved is None else f"after update {saved.progress.step}"
        console.print(f"going on with {path}: {where}")
        if saved is None and trainer.config.microbatch == "auto":
            trainer.tune(beside=path)
        for line in (*prepared.notes, *(explain(trainer) if saved is None else ())):
            console.print(line)
        return train(trainer, directory, console, config=config)
