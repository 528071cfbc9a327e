"""Checks of the paths named on the command line, with a suggestion for a misspelled name, before torch is imported."""

import difflib
import os
from contextlib import suppress
from pathlib import Path

from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.config.validation_sets import check_named_paths, sources_of
from bigbatch.lm.data.hub import check_model_path
from bigbatch.lm.data.model_files import check_model_config
from bigbatch.lm.data.named_templates import check_chat_template
from bigbatch.lm.data.sources import check_data_path
from bigbatch.lm.runs.file_names import CHECKPOINTS, CONFIG, IDENTITY

MOST_RUNS = 5  # of a folder that are named in a message


def check_run(run: Path) -> None:
    """Raise if a run directory does not exist.

    Raises:
        InputError: It does not exist; the message suggests the nearest name.
    """
    if run.is_dir():
        return
    siblings = run.parent.iterdir() if run.parent.is_dir() else ()
    runs = [path.name for path in siblings if (path / CONFIG).exists() or (path / CHECKPOINTS).exists()]
    near = difflib.get_close_matches(run.name, runs, n=1)
    hint = f"did you mean {run.parent / near[0]}?" if near else "create one with bigbatch train."
    raise InputError(f"run {run} does not exist: {hint}")


def check_run_files(run: Path) -> None:
    """Raise if a folder has neither the configuration nor checkpoints of a run.

    Raises:
        InputError: It has none of them; the message names runs in it.
    """
    if any(os.path.lexists(run / name) for name in (CONFIG, IDENTITY, CHECKPOINTS)):
        return
    inside: list[Path] = []
    with suppress(OSError):  # without CONFIG, which folders of models have, too
        inside = sorted(path for path in run.iterdir() if (path / IDENTITY).exists() or (path / CHECKPOINTS).exists())
    shown = ", ".join(map(str, inside[:MOST_RUNS]))
    more = f" and {len(inside) - MOST_RUNS:,} more" if len(inside) > MOST_RUNS else ""
    hint = f" Name one of the runs in it: {shown}{more}." if inside else ""
    raise InputError(f"{run} is no run: it has no {CONFIG}.{hint}")


def check_paths(config: TrainConfig) -> None:
    """Check the model and the data of a configuration, as far as that takes no library.

    Raises:
        InputError: One of them does not exist.
    """
    check_named_paths(config.validation_data or ())
    for name in (*config.data, *sources_of(config.validation_data or ())):
        check_data_path(name)
    if config.chat_template is not None:
        check_chat_template(config.chat_template)
    if config.model_config_path is not None:
        check_model_config(config.model_config_path, config.tokenizer)
    elif config.model != "tiny":
        check_model_path(config.model)
