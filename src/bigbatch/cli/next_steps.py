"""Commands that suit a run: resume it, continue a text or chat, merge adapters, convert the model, train longer."""

import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from bigbatch.cli.torchrun import may_be_restarted
from bigbatch.errors import InputError
from bigbatch.lm.advice.batch_advice import advise
from bigbatch.lm.advice.run_evidence import read_evidence
from bigbatch.lm.config.field_groups import flag_of
from bigbatch.lm.config.objective_fields import OF_OBJECTIVE
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.report.guidance import Guidance
from bigbatch.lm.runs.file_names import ADAPTER, MODEL

if TYPE_CHECKING:
    from bigbatch.lm.report.run_reader import Run


def suggested_commands(config: TrainConfig, folder: Path, *, is_chat: bool, finished: bool) -> list[str]:
    """Return commands for the model of a run, to copy.

    Args:
        config: Of the run.
        folder: Of the run, with its model.
        is_chat: Whether the model was trained on chats; otherwise it continues texts.
        finished: Whether all updates are done.
    """
    path = shlex.quote(str(folder))
    prompt = quoted(config.prompt(is_chat=is_chat))
    what = f"--chat {prompt}" if is_chat else prompt
    commands = [f"bigbatch generate {path} {what}"] if config.generates_text else []
    whole = shlex.quote(str(folder / MODEL))
    if config.saves_adapters:
        whole = shlex.quote(f"{str(folder).rstrip(os.sep)}-merged")
        commands.append(f"bigbatch merge {path} --out {whole}   writes the model with its adapters")
    if finished and config.model != "tiny" and config.generates_text:
        commands.append(f"python convert_hf_to_gguf.py {whole}   of llama.cpp, writes a GGUF file")
    return commands


def commands_after(run: "Run") -> list[str]:
    """Return the commands that go on with a run of which the directory alone is known; none while it is running."""
    if run.state == "running":
        return []
    finished = run.state == "finished"
    commands = [] if finished else [resume_command(run.folder)]
    try:
        config = TrainConfig.model_validate(run.settings).resolved()
    except ValidationError:
        return commands
    if any((run.folder / name).is_dir() for name in (MODEL, ADAPTER)):
        is_chat = bool(run.last_event_value("chats"))
        commands += suggested_commands(config, run.folder, is_chat=is_chat, finished=finished)
    if finished and config.objective == "sft" and (run.folder / MODEL).is_dir():
        trained = {"model": str(run.folder / MODEL), "model_config_path": None, "tokenizer": None}
        length = f"--epochs {config.epochs}" if config.steps is None else f"--steps {config.steps}"
        again = same_job(config.model_copy(update=trained), more=_BATCH)
        commands.append(f"bigbatch train{again} {length}   trains the model for longer, as a new run")
    return commands


def guidance(run: "Run") -> Guidance:
    """Return the advice of ``bigbatch advise`` in a sentence, and the commands that go on with a run."""
    advice = None
    with suppress(InputError):
        advice = advise(read_evidence(run.folder)).sentences[0]
    return Guidance(advice, f"bigbatch advise {shlex.quote(str(run.folder))}", tuple(commands_after(run)))


def resume_command(folder: Path) -> str:
    """Return the command that continues a run."""
    return f"bigbatch resume {shlex.quote(str(folder))}"


def lines_to_continue(folder: Path) -> list[str]:
    """Return how a run that a signal has stopped goes on."""
    restarts = ["torchrun may start it again: to end the run, send the signal to torchrun itself"]
    return [f"to continue: {resume_command(folder)}", *(restarts if may_be_restarted() else [])]


def quoted(prompt: str) -> str:
    """Quote a prompt for a shell, with double quotes as in the documentation if they are sufficient."""
    return f'"{prompt}"' if prompt.isprintable() and not set(prompt) & set('"$`\\!') else shlex.quote(prompt)


_READING = ("text_column", "messages_column", "chat_template", "train_on")  # of records and conversations
_BATCH = ("global_batch", "global_batch_tokens", "global_batch_schedule")


def same_job(config: TrainConfig, *, more: tuple[str, ...] = ()) -> str:
    """Return the flags for a command on the same model and data; ``more`` settings if they are not the defaults."""
    default = TrainConfig()
    source = ("model",) if config.model_config_path is None else ("model_config_path", "tokenizer")
    of_model = (*source, "max_length", "lora_rank", "lora_targets", "lora_dropout", "rslora", "dora", "quantize")
    names = ("objective", *OF_OBJECTIVE, "data", "split", "subset", *of_model, "precision", *_READING, *more)
    given = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(default, name)}
    words = []
    for name, value in given.items():
        values = [] if value is True else value if isinstance(value, tuple) else [value]
        words.append(shlex.join([flag_of(name), *map(str, values)]))
    return "".join(f" {word}" for word in words)
