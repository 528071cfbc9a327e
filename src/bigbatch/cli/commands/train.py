"""``bigbatch train``: set up, print the split of the batch, train, print the output files."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from bigbatch.cli.console import duration, make_console, progress_display, quiet_libraries
from bigbatch.cli.options import ResumeOptions
from bigbatch.cli.output import optional_output
from bigbatch.cli.run_lookup import check_paths
from bigbatch.cli.session import (
    disable_unsupported_segments,
    enable_determinism,
    enable_expandable_segments,
    parameters_line,
    summary_lines,
    train,
)
from bigbatch.cli.shared_output import shared_path
from bigbatch.cli.torchrun import (
    fail_together,
    is_restarted,
    may_be_restarted,
    process_group,
    reject_together,
    sharding_note,
    with_local_device,
)
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.cpu_cores import cpu_cores, share_threads
from bigbatch.lm.runs.directory import ReadOnlyRunDirectory, RunDirectory, check_free, default_path
from bigbatch.lm.runs.file_names import CONFIG
from bigbatch.lm.runs.lock import RunLock
from bigbatch.lm.text import plural
from bigbatch.lm.training.dashboards import check_log

if TYPE_CHECKING:
    from bigbatch.lm.distributed.ranks import RankContext
    from bigbatch.lm.training.trainer import Trainer


def run(config: TrainConfig) -> int:
    """Train one model; return 0, or 75 if a signal stopped it after saving.

    After a restart by torchrun, resume the run that the previous processes started.
    """
    with reject_together("train"):
        check_paths(config)
    enable_expandable_segments(config)
    with optional_output("bigbatch train"), process_group(config) as ranks:
        with fail_together(ranks, "train"):
            if config.out is None and may_be_restarted():
                raise InputError(
                    "torchrun may restart this run, and a restart must find the same directory: pass --out."
                )
        path = shared_path(config.out, str(default_path(config.model, config.data)), ranks)
        if _must_resume(path, ranks):
            from bigbatch.cli.commands.resume import resume

            return resume(config, ResumeOptions(run=path), ranks)
        return _run(config, path, ranks)


def _must_resume(path: Path, ranks: "RankContext") -> bool:
    """Return whether this is a restart of an existing run. Collective: torchrun counts restarts per machine."""
    restarted = any(ranks.all_gather(is_restarted()))
    exists: bool = ranks.broadcast((path / CONFIG).exists())
    return restarted and exists


def _run(config: TrainConfig, path: Path, ranks: "RankContext") -> int:
    console = make_console(quiet=not ranks.is_first)
    config = with_local_device(config, ranks)
    enable_determinism(config)
    disable_unsupported_segments(config.device)
    with fail_together(ranks, "train"):
        check_log(config.log)
        if ranks.is_first:
            check_free(path)
    with fail_together(ranks, "train"), progress_display(console) as progress:
        from bigbatch.lm.planning.offload_choice import with_chosen_offload
        from bigbatch.lm.planning.sharded_choice import with_chosen_microbatch
        from bigbatch.lm.training.setup import set_up_training, with_fp8_gradient

        quiet_libraries()
        notes = [share_threads(cpu_cores(), ranks.local_size), sharding_note(config, ranks.size)]
        config, offload_note = with_chosen_offload(config, ranks, progress=progress)
        chosen = with_chosen_microbatch(config, ranks, progress=progress)
        setup = set_up_training(chosen.config.model_copy(update={"out": path}), ranks=ranks, progress=progress)
        setup = with_fp8_gradient(setup, progress=progress)
    with fail_together(ranks, "train"), progress_display(console) as progress:
        from bigbatch.lm.training.optimizer import optimizer_notes
        from bigbatch.lm.training.trainer import Trainer

        trainer = Trainer(setup, ranks=ranks)
        origin = trainer.tune(cache=path, progress=progress)
        trainer.prepare(path, progress=progress)
    for line in (
        *(note for note in (*notes, offload_note, chosen.sentence) if note is not None),
        *setup.notes,
        parameters_line(setup.model),
        *optimizer_notes(setup.model, setup.config),
        *summary_lines(trainer),
        *trainer.config.batch_scaling().lines(),
        *_choice_lines(trainer, origin),
    ):
        console.print(line)
    with ExitStack() as stack:
        directory: RunDirectory = ReadOnlyRunDirectory(path)
        with fail_together(ranks, "train"):
            if ranks.is_first:
                if config.out is None and path.exists():
                    raise InputError(f"{path} was free when this run started, and is not any more: pass --out.")
                directory = RunDirectory.create(path, setup.config.model_dump(mode="json") | chosen.asked)
                chosen.save(path)
                directory.record_facts(trainer.initial_facts)
                stack.enter_context(RunLock(path))
        return train(trainer, directory, console, config=config)


def _choice_lines(trainer: "Trainer", origin: Path | None) -> list[str]:
    """Return the lines that explain an automatically chosen micro-batch and its time; empty if the user set it."""
    from bigbatch.lm.training.autotune import describe
    from bigbatch.lm.training.predicted_update import predict_update

    choice = trainer.engine.choice
    if choice is None:
        return []
    cached = "" if origin is None else f" (cached by {origin}: same model, device and settings)"
    failure = choice.prediction_failure
    unpredicted = "" if failure is None else f"; measured without a memory prediction: {failure}"
    lines = [f"{choice}{describe(trainer.model_setup.checkpointing_mode)}{cached}{unpredicted}"]
    if choice.unit == "tokens" and trainer.ranks.size == 1:
        tokens = trainer.setup.order.tokens_before(1) / trainer.schedule.updates_per_epoch()
        updates = plural(trainer.total_steps, "update")
        update = predict_update(trainer.engine, tokens, trainer.model_setup.checkpointing_mode)
        if update is None:
            seconds = trainer.total_steps * tokens / choice.per_s
            lines.append(f"about {duration(seconds)} of forward and backward for {updates}")
        else:
            lines.append(f"{update}; about {duration(trainer.total_steps * update.total_s)} for {updates}")
    return lines
