"""``bigbatch train``: prepare, explain the batch, train, say where everything lies."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bigbatch.cli.console import TrainingDisplay, duration, make_console, quiet_libraries, warn
from bigbatch.lm.config import TrainConfig
from bigbatch.lm.rundir import RunDirectory, check_free, default_path

if TYPE_CHECKING:
    from bigbatch.lm.prepare import Prepared
    from bigbatch.lm.trainer import Trainer

DONE = 0
STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving


def run(config: TrainConfig) -> int:
    """Train one model; return 0, or 75 when a signal stopped it after saving."""
    path = config.out or default_path(config.model, config.data)
    check_free(path)
    console = make_console()

    from bigbatch.lm.prepare import prepare
    from bigbatch.lm.trainer import Trainer

    quiet_libraries()
    with console.status("") as status:
        prepared = prepare(config, say=lambda words: status.update(f"{words} …"))
    trainer = Trainer(prepared)
    for line in (*prepared.notes, *explain(trainer)):
        console.print(line)
    directory = RunDirectory.create(path, prepared.config.model_dump(mode="json"))
    entropy = None if prepared.validation is None else prepared.validation.unigram_entropy()
    display = TrainingDisplay(
        console, total_steps=trainer.total_steps, entropy=entropy, prompt=prepared.config.sample_prompt
    )
    with _stop_on_signals() as stop, display:
        outcome = trainer.run(directory, listener=display, should_stop=lambda: bool(stop))
    console.print(f"{outcome.step} updates in {duration(outcome.elapsed_s)}; everything is in {path}/")
    console.print("  model/         the model and its tokenizer, for AutoModelForCausalLM.from_pretrained")
    console.print("  metrics.jsonl  a line for each update")
    console.print("  config.json    every setting")
    if not outcome.finished:
        console.print(f"stopped by {stop[0]} after update {outcome.step} of {trainer.total_steps}; the model is saved.")
        return STOPPED
    console.print(f'next: bigbatch generate {path} "{prepared.config.sample_prompt}"')
    console.print("      bigbatch verify   proves that no cut of the batch changes the gradient")
    return DONE


def explain(trainer: "Trainer") -> tuple[str, str, str]:
    """Say in three lines what is behind one update, how it is computed, and how many there are."""
    config, prepared = trainer.config, trainer.prepared
    return (
        f"global batch: {_batch(prepared)}, behind every update",
        f"computed as {_cut(trainer)}, on {prepared.machine}: a matter of memory that does not change the update",
        f"{trainer.total_steps:,} updates, {_epochs(trainer):.2f} passes over {len(prepared.training):,} sequences; "
        f"learning rate {config.lr:g}, {trainer.warmup_steps} updates of warm-up, then {config.schedule}",
    )


def _batch(prepared: "Prepared") -> str:
    config, lengths = prepared.config, prepared.training.lengths
    mean = sum(lengths) / len(lengths)
    if config.global_batch is not None:
        sequences = min(config.global_batch, len(lengths))
        return f"{sequences:,} sequences, about {sequences * mean:,.0f} tokens"
    assert config.global_batch_tokens is not None, "resolved() gives one of the two"
    return (
        f"{config.global_batch_tokens:,} tokens, about {max(1, round(config.global_batch_tokens / mean)):,} sequences"
    )


def _cut(trainer: "Trainer") -> str:
    config, window = trainer.config, trainer.first_window()
    num_microbatches = -(-len(window) // config.microbatch)
    if num_microbatches == 1:
        return f"1 micro-batch of {len(window)} sequences"
    return f"{num_microbatches} micro-batches of up to {config.microbatch} sequences"


def _epochs(trainer: "Trainer") -> float:
    return trainer.total_steps / trainer.steps_per_epoch()


@contextmanager
def _stop_on_signals() -> Iterator[list[str]]:
    """Collect the name of the first SIGINT or SIGTERM; a second one interrupts at once."""
    names: list[str] = []

    def note(number: int, _frame: Any) -> None:
        if names:
            raise KeyboardInterrupt
        names.append("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
        warn("\nstopping after this update and saving; once more to stop at once")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield names
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
