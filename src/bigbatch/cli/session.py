"""Training session shared by `train` and `resume`: display, signals and messages."""

import os
import platform
import shlex
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from bigbatch.cli import command_clock
from bigbatch.cli.console import OutputConsole, TrainingDisplay, duration
from bigbatch.cli.exit_codes import DONE, STOPPED
from bigbatch.cli.next_steps import lines_to_continue, same_job, suggested_commands
from bigbatch.cli.signals import stop_on_signals
from bigbatch.cli.torchrun import WatchdogCallback, watchdog
from bigbatch.errors import InputError
from bigbatch.lm.advice.batch_advice import one_line
from bigbatch.lm.advice.run_evidence import read_evidence
from bigbatch.lm.config.batch_schedule import read
from bigbatch.lm.config.optimizer_settings import TITLES
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.runs.file_names import ADAPTER, CHECKPOINTS, CONFIG, FINGERPRINTS, METRICS, MODEL
from bigbatch.lm.text import SAMPLE_NOUNS, plural
from bigbatch.lm.training.dashboards import with_dashboards
from bigbatch.lm.training.event_log import EventLog

if TYPE_CHECKING:
    from bigbatch.lm.training.setup import TrainingSetup
    from bigbatch.lm.training.trainer import Trainer, TrainResult


# A rank may receive one signal twice: from the scheduler, which signals every process, and from torchrun, which
# forwards it. A second signal within this time counts as the same one.
DUPLICATE_SIGNAL_S = 5.0

ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Environment variables that configure torch's allocators: the name since torch 2.9, and earlier ones."""

EXPANDABLE = "expandable_segments:True"


def train(trainer: "Trainer", directory: RunDirectory, console: OutputConsole, *, config: TrainConfig) -> int:
    """Run a trainer to its end or until a signal; return the exit code. ``config`` is the requested configuration."""
    from bigbatch.lm.data.dataset import TokenDataset
    from bigbatch.lm.training.best_checkpoint import early_stopping_reason

    setup, total_steps, ranks = trainer.setup, trainer.total_steps, trainer.ranks
    done = 0 if trainer.checkpoint is None else trainer.checkpoint.progress.step
    display = TrainingDisplay(
        console,
        total_steps=total_steps,
        validation_every=None if setup.validation is None else setup.config.validation_every_of(total_steps),
        entropy=setup.validation.unigram_entropy() if isinstance(setup.validation, TokenDataset) else None,
        prompt="" if trainer.text_sample is None else trainer.text_sample.prompt,
        done=done,
        has_perplexity=setup.has_perplexity,
        since_start_s=command_clock.elapsed_s,
    )
    with (
        watchdog(ranks, setup.config.timeout_s) as watch,
        _event_log(trainer, directory) as event_log,
        stop_on_signals(
            setup.config.grace_s, duplicate_s=DUPLICATE_SIGNAL_S if ranks.size > 1 else 0.0, quiet=not ranks.is_first
        ) as stop,
        with_dashboards(
            display,
            config.log if ranks.is_first else (),
            directory.path,
            done=done,
            settings=config.model_dump(mode="json"),
            has_perplexity=setup.has_perplexity,
        ) as displays,
        display,
    ):
        callback = WatchdogCallback(displays if ranks.is_first else None, watch)
        outcome = trainer.run(
            directory,
            callback=callback,
            should_stop=lambda: stop.requested,
            should_abandon=lambda: stop.grace_expired,
            on_note=console.print,
        )
        if event_log is not None:
            event_log.log_end(outcome, signal=stop.signal)
    if not outcome.finished:
        by = stop.signal or "a signal to another rank"
        console.print(f"stopped by {by} after update {outcome.step} of {total_steps}; the model is saved")
        console.print_unbroken(*lines_to_continue(directory.path))
    if outcome.stopped_early:
        reason = early_stopping_reason(setup.config)
        console.print(f"ended early after update {outcome.step} of {total_steps}: {reason}")
    if (why := trainer.engine.runner.disabled_reason) is not None:
        console.print(f"CUDA graphs are disabled: {why}")
    if ranks.is_first and (advice := _advice_line(directory)) is not None:
        console.print(advice)
    for line in final_lines(config, directory, outcome, is_best=setup.config.resolved_keep == "best"):
        console.print(line)
    console.print_unbroken(*next_lines(config, directory, setup, finished=outcome.finished))
    ranks.all_gather(None)  # torchrun ends all processes when the first one has exited
    return DONE if outcome.finished else STOPPED


def _event_log(trainer: "Trainer", directory: RunDirectory) -> "AbstractContextManager[EventLog | None]":
    """Return the event log on the first rank, a null context on the others."""
    return EventLog(trainer, directory.path) if trainer.ranks.is_first else nullcontext()


def _advice_line(directory: RunDirectory) -> str | None:
    """Return one line that compares the batch with the noise scale; None if the noise scale is not known."""
    with suppress(InputError):
        line = one_line(read_evidence(directory.path))
        return line and f"{line} (bigbatch advise {shlex.quote(str(directory.path))})"
    return None


def enable_determinism(config: TrainConfig) -> None:
    """Configure cuBLAS for deterministic results if the run needs them; call it before torch is imported."""
    if config.deterministic or config.reproducible:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def enable_expandable_segments(config: TrainConfig) -> None:
    """Let torch extend the segments of CUDA memory with ``--offload``; call it before the first use of CUDA.

    Parts of the state of many sizes pass through little memory, which ends in pieces otherwise. Not on Windows, nor in
    Linux on it, whose drivers do not support it; an allocator that is configured by the environment stays as it is.
    """
    is_supported = sys.platform == "linux" and "microsoft" not in platform.release().lower()
    if config.offload != "none" and is_supported and not any(name in os.environ for name in ALLOCATORS):
        os.environ[ALLOCATORS[0]] = EXPANDABLE


def disable_unsupported_segments(device: str) -> None:
    """Let torch allocate as usual if the driver, such as that of a virtual machine, cannot extend segments.

    Args:
        device: As ``--device``.
    """
    if os.environ.get(ALLOCATORS[0]) != EXPANDABLE or not (device == "auto" or device.startswith("cuda")):
        return
    import torch

    if not torch.cuda.is_available():
        return
    try:
        torch.empty(1, device="cuda" if device == "auto" else device)
    except torch.OutOfMemoryError:
        return
    except RuntimeError as error:
        if "not supported" not in str(error):
            return  # reported where the device is looked for
        memory: Any = torch.cuda.memory
        memory._set_allocator_settings("expandable_segments:False")
        del os.environ[ALLOCATORS[0]]


def parameters_line(model: Any) -> str:
    """Return a line with the number of trained parameters."""
    from bigbatch.lm.model.quantization import count_parameters

    total, trained = count_parameters(model)
    if trained == total:
        return f"trained parameters: all {total:,}"
    return f"trained parameters: {trained:,} of {total:,} ({100 * trained / total:.2g} %)"


def summary_lines(trainer: "Trainer") -> tuple[str, str, str]:
    """Return three lines: the global batch, its micro-batches, and the number of updates with the learning rate."""
    config, setup = trainer.config, trainer.setup
    peak = trainer.scheduler.base_lrs[0]
    warmup = plural(trainer.warmup_steps, "warm-up update") if trainer.warmup_steps else "no warm-up"
    optimizer = "" if config.optimizer == "adamw" else f"{TITLES[config.optimizer]}, "
    ranks = trainer.ranks
    effect = _effect_of_split(setup.model, config)
    on_ranks = "" if ranks.size == 1 else f" on the first of {ranks.size} ranks ({ranks.parallel})"
    return (
        f"global batch per update: {_batch(setup)}",
        f"split into {_split(trainer)}{on_ranks}, on {setup.device_spec} ({effect})",
        f"{plural(trainer.total_steps, 'update')}, {_epochs(trainer)}; {optimizer}learning rate {peak:g}, "
        f"{_decay(trainer)}, {warmup}",
    )


def _epochs(trainer: "Trainer") -> str:
    """Return the epochs of the run and the length of one; of a mixture, an epoch has some samples repeatedly."""
    epochs = trainer.total_steps / trainer.schedule.updates_per_epoch()
    samples = plural(trainer.setup.order.samples_before(1), sample_noun(trainer.config))
    if trainer.config.data_weights is not None:
        return f"{epochs:.3g} {'epoch' if epochs == 1 else 'epochs'} of {samples}"
    return f"{epochs:.3g} {'pass' if epochs == 1 else 'passes'} over {samples}"


def _decay(trainer: "Trainer") -> str:
    config = trainer.config
    if config.schedule == "constant":
        return "constant"
    last = "" if config.min_lr is None else f" to {config.min_lr:g}"
    if config.schedule == "wsd":
        return f"linear decay{last} in the last {plural(config.decay_steps_of(trainer.total_steps), 'update')}"
    return f"{config.schedule} decay{last}"


def _effect_of_split(model: Any, config: TrainConfig) -> str:
    """Return what the split affects: memory alone, unless the model draws random numbers or computes in float8."""
    from bigbatch.lm.model.decoder_layers import uses_randomness

    if config.reproducible:
        return "the micro-batch affects neither memory nor the result"
    if uses_randomness(model):
        return "the model has dropout, whose random numbers, and so the result, depend on the split"
    if config.precision == "fp8":
        return "affects memory, and the rounding of products in fp8"
    return "affects memory only, not the result"


def final_lines(
    config: TrainConfig, directory: RunDirectory, outcome: "TrainResult", *, is_best: bool = False
) -> list[str]:
    """Return the lines with the output files; with ``is_best``, also the update that the saved weights are of."""
    from bigbatch.lm.model.task_models import AUTO_CLASSES

    weights = []
    if is_best:
        has_best = outcome.best_loss is not None and outcome.saved_step == outcome.best_step
        loss = f", which has the lowest validation loss: {outcome.best_loss:.3f}" if has_best else ""
        weights = [f"  {'':<15}weights after update {outcome.saved_step}{loss}"]
    skipped = f", {outcome.skipped:,} of them skipped," if outcome.skipped else ""
    return [
        f"{plural(outcome.step, 'update')}{skipped} in {duration(outcome.elapsed_s)}; output is in "
        f"{directory.path}{os.sep}",
        f"  {MODEL + '/':<15}model and tokenizer, for {AUTO_CLASSES[config.objective]}.from_pretrained"
        if not directory.adapter.is_dir()
        else f"  {ADAPTER + '/':<15}LoRA adapters and tokenizer, for PeftModel.from_pretrained and bigbatch merge",
        *weights,
        f"  {METRICS:<15}one line per update",
        *([f"  {FINGERPRINTS}  for bigbatch diff"] if config.reproducible else []),
        f"  {CHECKPOINTS + '/':<15}for bigbatch resume",
        f"  {CONFIG:<15}all settings",
    ]


def next_lines(
    config: TrainConfig, directory: RunDirectory, setup: "TrainingSetup", *, finished: bool = True
) -> list[str]:
    """Return the next commands, to copy; ``config`` is the requested configuration."""
    from bigbatch.lm.training.chat_detection import trains_on_chats

    commands = suggested_commands(config, directory.path, is_chat=trains_on_chats(setup), finished=finished)
    if finished:
        same = same_job(config)
        checks = "checks that splitting the batch does not change the gradient"
        if setup.config.precision == "fp8":
            checks = "measures how far splitting the batch moves the gradient"
        commands.append(f"bigbatch verify{same}   {checks}")
    return [f"{'      ' if place else 'next: '}{command}" for place, command in enumerate(commands)]


def sample_noun(config: TrainConfig) -> str:
    """Return what a sample of the objective is."""
    return SAMPLE_NOUNS[config.objective]


def _batch(setup: "TrainingSetup") -> str:
    config, lengths = setup.config, setup.training.lengths
    noun = sample_noun(config)
    if config.global_batch_schedule is not None:
        schedule = read(config.global_batch_schedule)
        start = "" if schedule.first is not None else f"{plural(config.global_batch or 0, noun)}, "
        return f"{start}{schedule}"
    mean = setup.training.num_tokens / len(lengths)
    if config.global_batch is not None:
        sequences = min(config.global_batch, len(lengths))
        limited = f" (the whole data set; {config.global_batch:,} requested)"
        return (
            f"{plural(sequences, noun)}{limited if sequences < config.global_batch else ''}, "
            f"about {plural(round(sequences * mean), 'token')}"
        )
    assert config.global_batch_tokens is not None, "resolved() gives one of the two"
    sequences = min(len(lengths), max(1, round(config.global_batch_tokens / mean)))
    return f"{plural(config.global_batch_tokens, 'token')}, about {plural(sequences, noun)}"


def _split(trainer: "Trainer") -> str:
    lengths = [int(trainer.setup.training.lengths[i]) for i in trainer.shard_window(trainer.schedule.first_window())]
    if not lengths:
        return "no micro-batch"
    noun = sample_noun(trainer.config)
    groups = trainer.engine.groups(sorted(lengths, reverse=True))
    budget = trainer.engine.token_budget
    if trainer.config.reproducible:
        quantum = min(trainer.config.quantum_in_use or 1, len(lengths))
        return f"{len(groups):,} {'quantum' if len(groups) == 1 else 'quanta'} of {plural(quantum, noun)}"
    if len(groups) == 1:
        return f"1 micro-batch of {plural(len(lengths), noun)}"
    if budget is not None:
        return f"{plural(len(groups), 'micro-batch')} of up to {plural(budget, 'token')}"
    up_to = "" if len(lengths) % len(groups[0]) == 0 else "up to "
    return f"{plural(len(groups), 'micro-batch')} of {up_to}{plural(len(groups[0]), noun)}"
