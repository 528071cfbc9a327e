"""Commands that suit a run that has just ended: continue a text or chat, merge adapters, convert the model."""

import os
import shlex
from typing import TYPE_CHECKING

from bigbatch.lm.runs.directory import RunDirectory

if TYPE_CHECKING:
    from bigbatch.lm.training.setup import TrainingSetup

_PROBE = "zq7question"  # content that no template has in it
_SAMPLES = 8  # of the data, in which an answer is looked for


def suggested_commands(setup: "TrainingSetup", directory: RunDirectory, *, prompt: str, finished: bool) -> list[str]:
    """Return commands for the model of a run, to copy.

    Args:
        setup: Of the run.
        directory: Of the run, with its model.
        prompt: In quotes, for a model that continues texts.
        finished: Whether all updates are done.
    """
    path = shlex.quote(str(directory.path))
    what = '--chat "Hello"' if trains_on_chats(setup) else prompt
    commands = [f"bigbatch generate {path} {what}"] if setup.config.generates_text else []
    whole = shlex.quote(str(directory.model))
    if setup.config.saves_adapters:
        whole = shlex.quote(f"{str(directory.path).rstrip(os.sep)}-merged")
        commands.append(f"bigbatch merge {path} --out {whole}   writes the model with its adapters")
    if finished and setup.config.model != "tiny" and setup.config.generates_text:
        commands.append(f"python convert_hf_to_gguf.py {whole}   of llama.cpp, writes a GGUF file")
    return commands


def trains_on_chats(setup: "TrainingSetup") -> bool:
    """Return whether one of the first samples has an answer in the format of the chat template."""
    tokenizer = setup.tokenizer
    if not tokenizer.chat_template:
        return False
    try:
        question = [{"role": "user", "content": _PROBE}]
        text = str(tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False))
    except Exception:  # noqa: BLE001  a template is a program, and this is for a suggestion only
        return False
    from bigbatch.lm.data.pair_batches import sequences_of

    header = _without_spaces(text.partition(_PROBE)[2])
    samples = [row for i in range(min(_SAMPLES, len(setup.training))) for row in sequences_of(setup.training[i])]
    return bool(header) and any(header in _without_spaces(str(tokenizer.decode(tokens))) for tokens in samples)


def _without_spaces(text: str) -> str:
    return "".join(text.split())
