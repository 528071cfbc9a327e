"""``bigbatch resume``: resume a run from its newest checkpoint that verifies."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbatch.cli.console import make_console, progress_display, quiet_libraries
from bigbatch.cli.exit_codes import DONE
from bigbatch.cli.options import ResumeOptions
from bigbatch.cli.output import optional_output
from bigbatch.cli.run_lookup import check_run
from bigbatch.cli.session import (
    disable_unsupported_segments,
    enable_determinism,
    enable_expandable_segments,
    parameters_line,
    summary_lines,
    train,
)
from bigbatch.cli.torchrun import fail_together, process_group, reject_together, sharding_note, with_local_device
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.config.validation_sets import check_named_paths, sources_of
from bigbatch.lm.cpu_cores import cpu_cores, share_threads
from bigbatch.lm.data.sources import check_data_path
from bigbatch.lm.runs.directory import ReadOnlyRunDirectory, RunDirectory
from bigbatch.lm.runs.identity import read_identity
from bigbatch.lm.runs.lock import RunLock
from bigbatch.lm.training.dashboards import check_log

if TYPE_CHECKING:
    from bigbatch.lm.checkpoint.run_checkpoint import RunCheckpoint
    from bigbatch.lm.distributed.ranks import RankContext


def run(overrides: TrainConfig, options: ResumeOptions) -> int:
    """Resume one run; return 0, or 75 if a signal stopped it after saving."""
    with reject_together("resume"):
        check_run(options.run)  # before torch is imported
        data = overrides.data if "data" in overrides.model_fields_set else ()
        check_named_paths(overrides.validation_data or ())
        for name in (*data, *sources_of(overrides.validation_data or ())):
            check_data_path(name)
        from bigbatch.lm.training.resume import stored_config

        stored = stored_config(options.run)
    enable_expandable_segments(overrides if "offload" in overrides.model_fields_set else stored)
    names = overrides.model_fields_set & {"device", "parallel", "timeout_s"}
    changes: dict[str, Any] = {name: getattr(overrides, name) for name in names}
    with optional_output("bigbatch resume"), process_group(stored.model_copy(update=changes)) as ranks:
        return resume(overrides, options, ranks)


def resume(overrides: TrainConfig, options: ResumeOptions, ranks: "RankContext") -> int:
    """Resume one run on the ranks of a process group. Collective; returns the same codes as `run`."""
    from bigbatch.lm.training.resume import (
        check_facts,
        merge_config,
        stored_config,
        with_saved_changes,
    )

    path = options.run
    console = make_console(quiet=not ranks.is_first)
    with contextlib.ExitStack() as stack:
        with fail_together(ranks, "resume"):
            stored = stored_config(path)
            if ranks.is_first:
                stack.enter_context(RunLock(path))
        changes_kernels = "deterministic" in overrides.model_fields_set and not stored.reproducible
        enable_determinism(overrides if changes_kernels else stored)
        of_device = overrides if "device" in overrides.model_fields_set else stored
        disable_unsupported_segments(with_local_device(of_device, ranks).device)
        with fail_together(ranks, "resume"), progress_display(console) as progress:
            progress("looking for the newest checkpoint")
            from bigbatch.lm.checkpoint.run_checkpoint import load

            ranks = replace(
                ranks, parallel=(overrides if "parallel" in overrides.model_fields_set else stored).parallel
            )
            checkpoint, rejected = load(path, ranks)
        with fail_together(ranks, "resume"):
            check_same(None if checkpoint is None else checkpoint.path.name, path, ranks)
        with fail_together(ranks, "resume"), progress_display(console) as progress:
            stored = with_saved_changes(stored, None if checkpoint is None else checkpoint.facts)
            config = with_local_device(merge_config(stored, overrides, allowed=options.allowed), ranks)
            check_log(config.log)
            for folder, reason in rejected:
                console.print(f"skipping checkpoint {folder}: {reason}")
            directory = RunDirectory(path) if ranks.is_first else ReadOnlyRunDirectory(path)
            if checkpoint is not None and directory.has_model and (end := _end_of(checkpoint, config)) is not None:
                console.print(f"{path} is already finished: {end}, the model is saved")
                return DONE
            from bigbatch.lm.planning.offload_choice import with_chosen_offload
            from bigbatch.lm.planning.sharded_choice import with_chosen_microbatch
            from bigbatch.lm.training.setup import notes_of_new_model, set_up_training
            from bigbatch.lm.training.trainer import Trainer

            quiet_libraries()
            notes = [share_threads(cpu_cores(), ranks.local_size), sharding_note(config, ranks.size)]
            before = read_identity(path).facts if checkpoint is None else checkpoint.facts
            from bigbatch.lm.data.sampling_order import sampling_order_of

            order_version = sampling_order_of(path, before, has_checkpoint=checkpoint is not None)
            config, offload_note = with_chosen_offload(config, ranks, progress=progress)
            chosen = with_chosen_microbatch(config, ranks, progress=progress, folder=path)
            setup = set_up_training(chosen.config, ranks=ranks, progress=progress, order_version=order_version)
        with fail_together(ranks, "resume"):
            trainer = Trainer(setup, checkpoint=checkpoint, ranks=ranks)
            if checkpoint is not None:
                checkpoint.check_model(trainer.engine)
            if ranks.is_first:
                chosen.save(path)
            if before is not None:
                check_facts(config, before, trainer.initial_facts, allowed=options.allowed)
        where = (
            "from the beginning (no checkpoint)" if checkpoint is None else f"after update {checkpoint.progress.step}"
        )
        console.print(f"resuming {path} {where}")
        with fail_together(ranks, "resume"), progress_display(console) as progress:
            trainer.tune(cache=path, progress=progress)
            trainer.prepare(path, progress=progress)
        replaced = () if checkpoint is None else notes_of_new_model(setup.config)  # the weights are the checkpoint's
        for line in (
            *(note for note in (*notes, offload_note, chosen.sentence) if note is not None),
            *(note for note in setup.notes if note not in replaced),
            parameters_line(setup.model),
            *(summary_lines(trainer) if checkpoint is None else ()),
        ):
            console.print(line)
        return train(trainer, directory, console, config=config)


def _end_of(checkpoint: "RunCheckpoint", config: TrainConfig) -> str | None:
    """Return why a run has ended; None if it has not."""
    from bigbatch.lm.training.best_checkpoint import stops_early

    step, total_steps = checkpoint.progress.step, checkpoint.total_steps
    if step >= total_steps:
        return f"all {total_steps:,} updates are done"
    if stops_early(checkpoint.progress, config):
        return f"--early-stopping {config.early_stopping} ended it after update {step:,} of {total_steps:,}"
    return None


def check_same(checkpoint: str | None, path: Path, ranks: "RankContext") -> None:
    """Raise if the ranks would resume from different checkpoints. Collective.

    Raises:
        InputError: The checkpoints differ.
    """
    found = ranks.all_gather(checkpoint)
    other = next((rank for rank, name in enumerate(found) if name != found[0]), None)
    if other is not None:
        raise InputError(
            f"rank {other} finds {found[other] or 'no checkpoint'} in {path}, but rank 0 finds "
            f"{found[0] or 'no checkpoint'}: the run directory must be on a file system shared by all machines."
        )
