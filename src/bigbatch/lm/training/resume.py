"""Resuming a run: its stored configuration, the settings that may change, and the facts that may not.

config.json and flags → merged configuration → set-up → facts compared with those of the checkpoint
"""

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from bigbatch import __version__
from bigbatch.errors import InputError, first_line, os_reason
from bigbatch.lm.checkpoint.manager import frozen_fingerprint
from bigbatch.lm.config.field_groups import CHANGEABLE, EXCLUSIVE, NEEDS_PERMISSION
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.file_names import CONFIG
from bigbatch.lm.training.setup import TrainingSetup


def stored_config(folder: Path) -> TrainConfig:
    """Read the configuration of a run.

    Raises:
        InputError: The folder is not a run, or its configuration is invalid.
    """
    path = folder / CONFIG
    try:
        return TrainConfig.model_validate(json.loads(path.read_text(encoding="utf-8"))).model_copy(
            update={"out": folder}
        )
    except OSError as error:
        raise InputError(f"{folder} is no run: {path} cannot be read ({os_reason(error)}).") from error
    except (ValueError, ValidationError) as error:
        raise InputError(f"{path} is not the configuration of a run: {first_line(error)}.") from error


def with_saved_changes(stored: TrainConfig, facts: Mapping[str, Any] | None) -> TrainConfig:
    """Return the configuration at the time of a checkpoint, which an earlier resume may have changed."""
    return stored if facts is None else stored.model_copy(update=facts["settings"])


def merge_config(stored: TrainConfig, asked: TrainConfig, *, allowed: Iterable[str]) -> TrainConfig:
    """Merge the stored settings of a run with those given now.

    Args:
        stored: The configuration of the run.
        asked: The new configuration; only fields that were set explicitly count.
        allowed: Which of ``batch``, ``seed`` and ``data`` may change.

    Raises:
        InputError: A setting that must not change is different.
    """
    allowed = set(allowed)
    changes: dict[str, Any] = {}
    for name in asked.model_fields_set - {"out"}:
        now, before = getattr(asked, name), getattr(stored, name)
        if name in CHANGEABLE or (name in NEEDS_PERMISSION and NEEDS_PERMISSION[name] in allowed):
            changes[name] = now
        elif now != before:
            raise InputError(_refusal(stored.out, name, before, now))
    if changes.get("token_budget") is not None or changes.get("microbatch", "auto") != "auto":
        changes = dict.fromkeys(("memory", "gpu")) | changes  # limits of auto, which is replaced
    for first, second in EXCLUSIVE:
        for one, other in ((first, second), (second, first)):
            if changes.get(one) is not None and other not in changes:
                changes[other] = None
    return stored.model_copy(update=changes)


def _refusal(folder: Path | None, name: str, before: Any, now: Any) -> str:
    flag = "--" + name.replace("_", "-")
    if name not in NEEDS_PERMISSION:
        return (
            f"{folder} was started with {flag} {before} and cannot be resumed with {flag} {now}. Leave the flag out, "
            "or start a new run."
        )
    changed = {"batch": "the schedule and the order of the data", "seed": "the order of the data", "data": "the data"}
    kind = NEEDS_PERMISSION[name]
    return (
        f"{folder} was started with {flag} {before}, and {flag} {now} would change {changed[kind]}. Leave the flag "
        f"out, or pass --allow-{kind}-change."
    )


def run_facts(setup: TrainingSetup) -> dict[str, Any]:
    """Return what a run is made of besides its settings, as a checkpoint stores it.

    The fingerprint of the weights that are not trained is None until the weights of a sharded model are loaded.
    """
    return {
        "settings": {name: getattr(setup.config, name) for name in NEEDS_PERMISSION},
        "data_sha256": setup.training.fingerprint(),
        "num_samples": len(setup.training),
        "vocabulary_sha256": sha256(json.dumps(sorted(setup.tokenizer.get_vocab().items())).encode()).hexdigest(),
        "weights_dtype": str(setup.device_spec.weights_dtype),
        "frozen_sha256": None if setup.weights is not None else frozen_fingerprint(setup.model),
    }


def rank_invariants(setup: TrainingSetup, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be the same on all ranks of a run, by the name that a user knows it by.

    Args:
        setup: On this rank.
        facts: What `run_facts` returned for it.
    """
    settings = setup.config.model_dump(mode="json", exclude={"device", "out"})
    tensors = [(n, str(t.dtype), list(t.shape), t.requires_grad) for n, t in setup.model.named_parameters()]
    return {
        **{f"--{name.replace('_', '-')}": value for name, value in settings.items()},
        "the samples": facts["data_sha256"],
        "the tokenizers": facts["vocabulary_sha256"],
        "the parameters of the models": sha256(json.dumps(tensors).encode()).hexdigest(),
        "the weights of the models": None if setup.weights is None else setup.weights.fingerprint(),
        "the weights that are not trained": facts["frozen_sha256"],
        "the versions": [__version__, torch.__version__],
    }


def check_facts(
    folder: Path, data: str, before: Mapping[str, Any], now: Mapping[str, Any], *, allowed: Iterable[str]
) -> None:
    """Reject data, a vocabulary or frozen weights that differ from those of the run.

    Frozen weights are not compared if their dtype changed, because they are rounded differently.

    Raises:
        InputError: They differ, and the difference is not allowed.
    """
    same_dtype = now["weights_dtype"] == before["weights_dtype"]
    if same_dtype and now["frozen_sha256"] != before["frozen_sha256"]:
        raise InputError(
            f"the frozen weights of {folder} differ from those that its adapters were trained with. Restore the "
            "original model."
        )
    if now["data_sha256"] != before["data_sha256"] and "data" not in allowed:
        raise InputError(
            f"the data of {folder} has changed since the run started: {data} has {now['num_samples']:,} sequences now "
            f"and had {before['num_samples']:,}, or their content differs. Restore it, or pass --allow-data-change."
        )
    if now["vocabulary_sha256"] != before["vocabulary_sha256"]:
        raise InputError(
            f"the tokenizer of {folder} has changed since the run started, and its model needs the original one: "
            "--model tiny trains it on the data. Restore the data, or start a new run."
        )
