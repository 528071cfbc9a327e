"""Resuming a run: its stored configuration, the settings that may change, and the facts that may not.

config.json, compared with run-manifest.json → flags → merged configuration → set-up → facts, compared with earlier ones

Long because each reason to refuse has its sentence here.
"""

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bigbatch.errors import InputError, first_line, os_reason
from bigbatch.lm.checkpoint.manager import frozen_fingerprint
from bigbatch.lm.checkpoint.saved_state import SavedFacts
from bigbatch.lm.checkpoint.state_tree import bits
from bigbatch.lm.config.batch_schedule import read
from bigbatch.lm.config.error_messages import sentence
from bigbatch.lm.config.field_groups import CHANGEABLE, EXCLUSIVE, NEEDS_PERMISSION, flag_of
from bigbatch.lm.config.field_types import join_texts
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.chat_templates import template_digest
from bigbatch.lm.data.model_files import tokenizer_digest
from bigbatch.lm.files import read_json
from bigbatch.lm.model.quantization import weights_dtype_of
from bigbatch.lm.objectives.dropout import OBJECTIVES as DROPOUT_FREE
from bigbatch.lm.runs.file_names import CONFIG
from bigbatch.lm.runs.identity import RunIdentity, digest_of, read_identity
from bigbatch.lm.text import describe_invalid
from bigbatch.lm.training.passed_data import PASSED, check_nothing_passed
from bigbatch.lm.training.setup import TrainingSetup
from bigbatch.offload.host_values import whole_value

RECORDED = sorted(TrainConfig.model_fields.keys() - {*CHANGEABLE, "out", "validation_every"} | {"precision"})
"""Settings that must not be edited in config.json: what is learned depends on them."""

LEARNING = sorted(set(RECORDED) - {*NEEDS_PERMISSION, "precision"})
"""Settings that no resume may change; a part of the fingerprint of a run."""

BALANCING = "router_aux_loss_coef"
"""The setting of the load-balancing loss, and the entry of the model's configuration that it replaces."""

COMPILED = "compiled_layers"
"""The fact whether the decoder layers of a reproducible run are compiled; earlier versions ran them in eager mode."""

UNSTABLE = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Entries of a model's configuration that do not affect what is learned, or follow from --precision."""


def stored_config(folder: Path, *, from_python: bool = False) -> TrainConfig:
    """Read the configuration of a run; with ``from_python``, also of one to which Python code passed a dataset or loss.

    Raises:
        InputError: The folder is not a run, or its configuration is invalid, or was edited in a setting that affects
            what is learned.
    """
    path = folder / CONFIG
    try:
        settings = read_json(path)
        stored = TrainConfig.model_validate(settings).model_copy(update={"out": folder})
    except OSError as error:
        raise InputError(f"{folder} is no run: {path} cannot be read ({os_reason(error)}).") from error
    except ValidationError as error:
        reason = describe_invalid(error.errors(include_url=False)[0])
        raise InputError(f"{path} is not the configuration of a run: {reason}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not the configuration of a run: {first_line(error)}.") from error
    identity = read_identity(folder)
    _check_unedited(path, stored, identity)
    check_nothing_passed(folder, None if from_python else identity.facts)
    if BALANCING not in settings and _has_key((identity.facts or {}).get("model"), BALANCING):
        return stored.model_copy(update={BALANCING: 0.0})  # of an earlier version, which did not train that loss
    return stored


def _has_key(value: Any, key: str) -> bool:
    """Return whether a JSON object, or an object in it, has a key."""
    return isinstance(value, dict) and (key in value or any(_has_key(part, key) for part in value.values()))


def _check_unedited(path: Path, stored: TrainConfig, identity: RunIdentity) -> None:
    """Compare config.json with run-manifest.json; in layout 1, the run id of the checkpoints depends on config.json."""
    before, now = identity.settings or {}, stored.model_dump(mode="json")
    for name in RECORDED:
        if name in before and before[name] != now[name]:
            flag = flag_of(name)
            raise InputError(
                f"{path} has {flag} {join_texts(now[name])}, and the run was started with {flag} "
                f"{join_texts(before[name])}. Restore the file, or start a new run."
            )


def with_saved_changes(stored: TrainConfig, facts: Mapping[str, Any] | None) -> TrainConfig:
    """Return the configuration at the time of a checkpoint, which an earlier resume may have changed.

    Raises:
        InputError: The settings in the checkpoint are invalid.
    """
    if facts is None:
        return stored
    changed = {name: value for name, value in facts["settings"].items() if name in NEEDS_PERMISSION}
    try:
        return TrainConfig.model_validate({**stored.model_dump(), **changed})
    except ValidationError as error:
        reason = describe_invalid(error.errors(include_url=False)[0])
        raise InputError(
            f"the newest checkpoint of {stored.out} has invalid settings: {reason}. Move it away to resume from an "
            "older one."
        ) from error


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
        if name == "precision" and now != before and "fp8" in (now, before):  # another gradient, not another rounding
            raise InputError(_refusal(stored.out, name, before, now))
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
    schedule = changes.get("global_batch_schedule")
    if schedule is not None and read(schedule).first is not None:
        changes.setdefault("global_batch", None)  # the first one of the schedule
    if changes.get("no_cache"):
        changes.setdefault("cache", None)
    elif changes.get("cache") is not None:
        changes.setdefault("no_cache", False)
    merged = stored.model_copy(update=changes)
    _check_together(merged)
    return merged


def _check_together(config: TrainConfig) -> None:
    """Check the rules between settings, which a copy does not."""
    settings = config.model_dump()
    if config.early_stopping is None:
        settings["early_stopping_min_delta"] = 0.0  # it cannot change, and does nothing once early stopping is off
    try:
        TrainConfig.model_validate(settings)
    except ValidationError as error:
        raise InputError(sentence(error, {name: flag_of(name) for name in TrainConfig.model_fields})) from error


def _refusal(folder: Path | None, name: str, before: Any, now: Any) -> str:
    flag = flag_of(name)
    before, now = join_texts(before), join_texts(now)
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
    """Return what a run learns from, as run-manifest.json and each checkpoint store it.

    The fingerprint of the weights that are not trained is None until the weights of a sharded model are loaded.
    """
    settings = setup.config.model_dump(mode="json")
    learning = {name: settings[name] for name in LEARNING}
    model = _stable(json.loads(setup.model.config.to_json_string(use_diff=False)))
    facts = {
        "fingerprint": digest_of({"learning": learning, "model": model}),
        "learning": learning,
        "model": model,
        "settings": {name: settings[name] for name in NEEDS_PERMISSION},
        "data_sha256": setup.data_fingerprint,
        "validation_sha256": setup.validation_fingerprint,
        "sampling_order": setup.order_version,
        "num_samples": len(setup.training),
        "vocabulary_sha256": sha256(json.dumps(sorted(setup.tokenizer.get_vocab().items())).encode()).hexdigest(),
        "chat_template_sha256": template_digest(setup.tokenizer),
        "tokenizer_sha256": setup.config.model_config_path and tokenizer_digest(setup.config.tokenizer_name),
        "weights_dtype": str(weights_dtype_of(setup.config, setup.device_spec)),
        "frozen_sha256": _frozen_sha256(setup),
        **({PASSED: dict(setup.passed)} if setup.passed else {}),
        **({COMPILED: setup.model_setup.has_compiled_layers} if setup.config.reproducible else {}),
    }
    SavedFacts.model_validate(facts)  # refused now: a checkpoint with other facts could not be read later
    return facts


def _frozen_sha256(setup: TrainingSetup) -> str | None:
    """Return the fingerprint of the weights that are not trained, as they were before they were quantized."""
    if setup.weights is not None:
        return None
    return setup.frozen_sha256 or frozen_fingerprint(setup.model)


def _stable(model: Any) -> Any:
    """Return the configuration of a model without what does not affect learning, also in its parts."""
    if not isinstance(model, dict):
        return model
    return {key: _stable(value) for key, value in model.items() if key not in UNSTABLE and not key.startswith("_")}


def weights_fingerprint(setup: TrainingSetup) -> str:
    """Return a SHA-256 of the trained parameters at the start; of a sharded model, of the first elements of all."""
    if setup.weights is not None:
        return setup.weights.fingerprint()
    named = sorted((name, parameter) for name, parameter in setup.model.named_parameters() if parameter.requires_grad)
    with ThreadPoolExecutor(4) as pool:  # SHA-256 of large arrays runs without the interpreter lock
        digests = list(pool.map(lambda pair: sha256(bits(whole_value(pair[1])).numpy().data).hexdigest(), named))
    return digest_of({name: digest for (name, _), digest in zip(named, digests, strict=True)})


def check_facts(
    config: TrainConfig, before: Mapping[str, Any], now: Mapping[str, Any], *, allowed: Iterable[str]
) -> None:
    """Reject a model, data, a vocabulary, a chat template or weights that differ from those of the run.

    Weights are not compared if their dtype changed, because they are rounded differently.

    Args:
        config: The configuration with which the run is resumed.
        before: The facts in the newest checkpoint, or without one, in run-manifest.json.
        now: The facts of the run as it is set up.
        allowed: Which of ``batch``, ``seed`` and ``data`` may change.

    Raises:
        InputError: They differ, and the difference is not allowed.
    """
    folder = config.out
    same_dtype = now["weights_dtype"] == before["weights_dtype"]
    if same_dtype and now["frozen_sha256"] != before["frozen_sha256"]:
        raise InputError(
            f"the frozen weights of {folder} differ from those that its adapters were trained with. Restore the "
            "original model."
        )
    if before.get("chat_template_sha256") not in (None, now["chat_template_sha256"]):  # None: of an earlier version
        origin = f"the tokenizer of {config.model}" if config.chat_template is None else config.chat_template
        raise InputError(
            f"the chat template of {folder} has changed since the run started. Restore that of {origin}, or start a "
            "new run."
        )
    if before.get("tokenizer_sha256") != now.get("tokenizer_sha256"):
        raise InputError(
            f"the tokenizer {config.tokenizer_name} has changed since {folder} started. Restore it, or start a new run."
        )
    if now["data_sha256"] != before["data_sha256"] and "data" not in allowed:
        raise InputError(
            f"the data of {folder} has changed since the run started: {config.data_text} has {now['num_samples']:,} "
            f"sequences now and had {before['num_samples']:,}, or their content differs. Restore it, or pass "
            "--allow-data-change."
        )
    if now["vocabulary_sha256"] != before["vocabulary_sha256"]:
        raise InputError(
            f"the tokenizer of {folder} has changed since the run started, and its model needs the original one: "
            f"--{'model tiny' if config.tokenizer is None else 'tokenizer train:N'} trains it on the data. Restore the "
            "data, or start a new run."
        )
    if before.get("fingerprint") != now["fingerprint"]:
        _check_fingerprint(config, before, now)
    if COMPILED in now and (was_compiled := before.get(COMPILED, False)) != now[COMPILED]:
        raise InputError(_refusal_of_compilation(folder, was_compiled=was_compiled))
    weights = before.get("weights_sha256"), now.get("weights_sha256")
    if same_dtype and None not in weights and len(set(weights)) > 1 and not {"seed", "data"} & set(allowed):
        raise InputError(
            f"the weights of {config.model} have changed since {folder} was started, and it has no checkpoint. Restore "
            "them, or start a new run."
        )


def _refusal_of_compilation(folder: Path | None, *, was_compiled: bool) -> str:
    if was_compiled:
        return (
            f"{folder} is reproducible and its layers were compiled, and they cannot be compiled now, which would "
            "change the bits. Leave out --compile none, resume it where they can be compiled, or start a new run."
        )
    return (
        f"{folder} is reproducible and its layers were not compiled, and they are compiled now, which would change the "
        "bits. Pass --compile none, or start a new run."
    )


def _check_fingerprint(config: TrainConfig, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise if an entry of the model's configuration, or a setting, differs; layout 1 has stored neither."""
    if (
        BALANCING not in (before.get("learning") or {})
        and now["learning"][BALANCING] != 0
        and _has_key(now["model"], BALANCING)
    ):
        raise InputError(
            f"{config.out} was started by an earlier version of bigbatch, which did not train the load-balancing loss "
            f"of the experts of {config.model}, and this version would. Start a new run."
        )
    if (change := _difference(before.get("model") or {}, now["model"])) is not None:
        name, one, other = change
        if config.objective in DROPOUT_FREE and "drop" in name and other == 0:
            raise InputError(
                f"{config.out} was started by an earlier version of bigbatch, which trained with the dropout of "
                f"{config.model} ({name} {one}), and this version sets it to 0 for --objective {config.objective}. "
                "Start a new run."
            )
        raise InputError(
            f"the configuration of the model {config.model} has changed since {config.out} was started: {name} is "
            f"{other} and was {one}. Restore it, or start a new run."
        )
    if (change := _difference(before.get("learning") or {}, now["learning"])) is not None:
        raise InputError(_refusal(config.out, *change))


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first entry that differs: its name, old and new value. Another version may add or drop entries."""
    for name in sorted(before.keys() & now.keys()):
        one, other = before[name], now[name]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            if (inner := _difference(one, other)) is not None:
                return f"{name}.{inner[0]}", *inner[1:]
        elif one != other:
            return name, one, other
    return None
