"""The training session that `train` and `resume` share: display, signals, messages."""

import os
import shlex
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING

from bigbatch.cli.console import TrainingDisplay, duration
from bigbatch.cli.exit_codes import DONE
from bigbatch.cli.signals import stop_on_signals
from bigbatch.cli.torchrun import WatchedListener, watched
from bigbatch.errors import InputError
from bigbatch.lm.advice.batch_advice import gather, in_one_line
from bigbatch.lm.config.batch_schedule import read
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.text import count
from bigbatch.lm.training.dashboards import heard_by
from bigbatch.lm.training.event_log import Journal

if TYPE_CHECKING:
    from rich.console import Console

    from bigbatch.lm.training.setup import Prepared
    from bigbatch.lm.training.trainer import Outcome, Trainer


ECHO_S = 5.0  # in which a scheduler that signals every process, and torchrun, which passes it on, come to the same rank


STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving


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
