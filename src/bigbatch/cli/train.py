"""``bigbatch train``: prepare, explain the batch, train, say where everything lies."""

import os
import shlex
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from bigbatch.cli.console import TrainingDisplay, duration, make_console, preparing, quiet_libraries
from bigbatch.cli.options import ResumeOptions
from bigbatch.cli.ranks import (
    WatchedListener,
    each_its_own_device,
    is_restarted,
    joined,
    may_be_restarted,
    speaking_for_all,
    watched,
)
from bigbatch.cli.signals import stop_on_signals
from bigbatch.errors import InputError
from bigbatch.lm.advice import gather, in_one_line
from bigbatch.lm.batch_schedule import read
from bigbatch.lm.config import TrainConfig
from bigbatch.lm.documents import count
from bigbatch.lm.lock import RunLock
from bigbatch.lm.report.journal import Journal
from bigbatch.lm.rescaling import rule_lines
from bigbatch.lm.rundir import ReadDirectory, RunDirectory, check_free, default_path
from bigbatch.lm.scalars import check_log, heard_by

if TYPE_CHECKING:
    from rich.console import Console

    from bigbatch.lm.prepare import Prepared
    from bigbatch.lm.ranks import Ranks
    from bigbatch.lm.trainer import Outcome, Trainer

DONE = 0
ECHO_S = 5.0  # in which a scheduler that signals every process, and torchrun, which passes it on, come to the same rank
STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving


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
            from bigbatch.cli.resume import go_on

            assert config.out is not None, "found there"
            return go_on(config, ResumeOptions(run=config.out), ranks)
        return _run(config, ranks)


def _has_begun(config: TrainConfig, ranks: "Ranks") -> bool:
    """Tell whether this is a run that was started again. Collective: torchrun counts restarts by machine."""
    again = any(ranks.everyone(is_restarted()))
    begun: bool = ranks.tell(config.out is not None and (config.out / "config.json").exists())
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
        from bigbatch.lm.prepare import prepare

        quiet_libraries()
        prepared = prepare(config.model_copy(update={"out": path}), say=say)
    with speaking_for_all(ranks, "train"), preparing(console) as say:
        from bigbatch.lm.trainer import Trainer

        trainer = Trainer(prepared, ranks=ranks)
        origin = None
        if trainer.config.microbatch == "auto":
            say("choosing the micro-batch")
            origin = trainer.tune(beside=path)
    for line in (*prepared.notes, *explain(trainer), *rule_lines(trainer.config), *_reasons(trainer, origin)):
        console.print(line)
    with ExitStack() as stack:
        directory: RunDirectory = ReadDirectory(path)
        with speaking_for_all(ranks, "train"):
            if ranks.is_first:
                directory = RunDirectory.create(path, prepared.config.model_dump(mode="json"))
                stack.enter_context(RunLock(path))
        return train(trainer, directory, console, config=config)


def train(trainer: "Trainer", directory: RunDirectory, console: "Console", *, config: TrainConfig) -> int:
    """Run a trainer to its end, or until a signal; ``config`` is what was asked for. Returns the exit code."""
    prepared, total_steps, ranks = trainer.prepared, trainer.total_steps, trainer.ranks
    done = 0 if trainer.saved is None else trainer.saved.progress.step
    display = TrainingDisplay(
        console,
        total_steps=total_steps,
        validation_every=None if prepared.validation is None else prepared.config.validation_every_of(total_steps),
        entropy=None if prepared.validation is None else prepared.validation.unigram_entropy(),
        prompt=prepared.config.sample_prompt,
        done=done,
    )
    with (
        watched(ranks, prepared.config.timeout_s) as watch,
        _journal(trainer, directory) as journal,
        stop_on_signals(
            prepared.config.grace_s, echo_s=ECHO_S if ranks.size > 1 else 0.0, quiet=not ranks.is_first
        ) as stop,
        heard_by(
            display,
            config.log if ranks.is_first else "none",
            directory.path,
            done=done,
            settings=config.model_dump(mode="json"),
        ) as heard,
        display,
    ):
        listener = WatchedListener(heard if ranks.is_first else None, watch)
        outcome = trainer.run(
            directory, listener=listener, should_stop=lambda: stop.asked, give_up=lambda: stop.overdue
        )
        if journal is not None:
            journal.ended(outcome, signal=stop.signal)
    if not outcome.finished:
        by = stop.signal or "a signal to another rank"
        console.print(f"stopped by {by} after update {outcome.step} of {total_steps}; the model is saved")
        console.print(f"to go on: bigbatch resume {shlex.quote(str(directory.path))}")
    if (recorder := trainer.engine.recorder) is not None and recorder.why_not is not None:
        console.print(f"without CUDA graphs: {recorder.why_not}")
    if ranks.is_first and (advice := _last_word(directory)) is not None:
        console.print(advice)
    for line in farewell(config, directory, outcome):
        console.print(line)
    return DONE if outcome.finished else STOPPED


def _journal(trainer: "Trainer", directory: RunDirectory) -> "AbstractContextManager[Journal | None]":
    """Give what notes when a run begins and ends, on the rank that writes."""
    return Journal(trainer, directory.path) if trainer.ranks.is_first else nullcontext()


def _last_word(directory: RunDirectory) -> str | None:
    """Give one line about the batch of a run that has ended, where it is known how large a batch pays."""
    with suppress(InputError):
        line = in_one_line(gather(directory.path))
        return line and f"{line} (bigbatch advise {shlex.quote(str(directory.path))})"
    return None


def repeat_exactly(config: TrainConfig) -> None:
    """Let CUDA's libraries compute in one order, where that is asked for; before they are loaded."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def explain(trainer: "Trainer") -> tuple[str, str, str]:
    """Say in three lines what is behind one update, how it is computed, and how many there are."""
    config, prepared = trainer.config, trainer.prepared
    passes = trainer.total_steps / trainer.course.updates_a_pass()
    peak = trainer.scheduler.base_lrs[0]
    warmup = f"{count(trainer.warmup_steps, 'update')} of warm-up" if trainer.warmup_steps else "no warm-up"
    ranks = trainer.ranks
    on_ranks = "" if ranks.size == 1 else f" on the first of {ranks.size} ranks ({ranks.parallel})"
    return (
        f"global batch: {_batch(prepared)}, behind every update",
        f"computed as {_cut(trainer)}{on_ranks}, on {prepared.machine}: a matter of memory that does not change the "
        "update",
        f"{count(trainer.total_steps, 'update')}, {passes:.3g} {'pass' if passes == 1 else 'passes'} over "
        f"{count(len(prepared.training), 'sequence')}; learning rate {peak:g}, {warmup}, then {config.schedule}",
    )


def farewell(config: TrainConfig, directory: RunDirectory, outcome: "Outcome") -> list[str]:
    """Say where everything lies, and what to run next; ``config`` is what was asked for."""
    skipped = f", {outcome.skipped:,} of them skipped," if outcome.skipped else ""
    path = shlex.quote(str(directory.path))
    return [
        f"{count(outcome.step, 'update')}{skipped} in {duration(outcome.elapsed_s)}; everything is in "
        f"{directory.path}{os.sep}",
        "  model/         the model and its tokenizer, for AutoModelForCausalLM.from_pretrained",
        "  metrics.jsonl  a line for each update",
        "  checkpoints/   where bigbatch resume goes on",
        "  config.json    every setting",
        f"next: bigbatch generate {path} {_quoted(config.sample_prompt)}",
        f"      bigbatch verify{_same_job(config)}   proves that no cut of the batch changes the gradient",
    ]


def _batch(prepared: "Prepared") -> str:
    config, lengths = prepared.config, prepared.training.lengths
    if config.global_batch_schedule is not None:
        schedule = read(config.global_batch_schedule)
        start = "" if schedule.first is not None else f"{count(config.global_batch or 0, 'sequence')}, "
        return f"{start}{schedule}"
    mean = sum(lengths) / len(lengths)
    if config.global_batch is not None:
        sequences = min(config.global_batch, len(lengths))
        all_there_are = f" (all there are, of the {config.global_batch:,} asked for)"
        return (
            f"{count(sequences, 'sequence')}{all_there_are if sequences < config.global_batch else ''}, "
            f"about {count(round(sequences * mean), 'token')}"
        )
    assert config.global_batch_tokens is not None, "resolved() gives one of the two"
    sequences = min(len(lengths), max(1, round(config.global_batch_tokens / mean)))
    return f"{count(config.global_batch_tokens, 'token')}, about {count(sequences, 'sequence')}"


def _reasons(trainer: "Trainer", origin: Path | None) -> list[str]:
    """Say why the micro-batch is what it is, where nobody gave it."""
    from bigbatch.lm.tuning import describe

    choice = trainer.engine.choice
    if choice is None:
        return []
    taken = "" if origin is None else f" (as {origin} found for the same model, device and settings)"
    unpredicted = "" if choice.unpredicted is None else f"; found by trying, since {choice.unpredicted}"
    return [f"{choice}{describe(trainer.level)}{taken}{unpredicted}"]


def _cut(trainer: "Trainer") -> str:
    lengths = [trainer.prepared.training.lengths[i] for i in trainer.share(trainer.course.first_window())]
    if not lengths:
        return "no micro-batch"
    groups = trainer.engine.groups(sorted(lengths, reverse=True))
    budget = trainer.engine.token_budget
    if len(groups) == 1:
        return f"1 micro-batch of {count(len(lengths), 'sequence')}"
    if budget is not None:
        return f"{count(len(groups), 'micro-batch')} of at most {count(budget, 'token')}"
    up_to = "" if len(lengths) % len(groups[0]) == 0 else "up to "
    return f"{count(len(groups), 'micro-batch')} of {up_to}{count(len(groups[0]), 'sequence')}"


def _quoted(prompt: str) -> str:
    """Write a prompt as a word of a shell, in the quotes of the documentation where they do."""
    return f'"{prompt}"' if prompt.isprintable() and not set(prompt) & set('"$`\\!') else shlex.quote(prompt)


def _same_job(config: TrainConfig) -> str:
    """Give the flags of a command that prepares the same model and data."""
    default = TrainConfig()
    names = [
        name
        for name in ("data", "model", "max_length", "lora_rank", "precision")
        if getattr(config, name) != getattr(default, name)
    ]
    return "".join(f" --{name.replace('_', '-')} {shlex.quote(str(getattr(config, name)))}" for name in names)
