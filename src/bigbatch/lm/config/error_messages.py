"""Error messages about arguments: pydantic errors as one sentence in the user's names, and spelling suggestions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from pydantic import ValidationError

FOREIGN_NAMES = {
    "learning_rate": "lr",
    "batch_size": "global_batch",
    "train_batch_size": "global_batch",
    "total_batch_size": "global_batch",
    "per_device_train_batch_size": "microbatch",
    "micro_batch_size": "microbatch",
    "device_batch_size": "microbatch",
    "auto_find_batch_size": "microbatch",
    "max_tokens": "token_budget",
    "max_tokens_per_batch": "token_budget",
    "batch_tokens": "token_budget",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "grad_accum_steps": "gradient_accumulation_steps",
    "max_steps": "steps",
    "max_iters": "steps",
    "num_iterations": "steps",
    "num_train_epochs": "epochs",
    "max_seq_length": "max_length",
    "block_size": "max_length",
    "warmup": "warmup_steps",
    "gradient_clip_val": "max_grad_norm",
    "gradient_clipping": "max_grad_norm",
    "lr_scheduler_type": "schedule",
    "model_name_or_path": "model",
    "lora_r": "lora_rank",
    "lora_target_modules": "lora_targets",
    "target_modules": "lora_targets",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "dataset": "data",
    "dataset_name": "data",
    "train_file": "data",
    "dataset_config": "subset",
    "dataset_config_name": "subset",
    "dataset_train_split": "split",
    "validation_file": "validation_data",
    "eval_steps": "validation_every",
    "output_dir": "out",
    "dtype": "precision",
    "gpu_memory": "memory",
    "max_memory": "memory",
    "vram": "memory",
    "activation_checkpointing": "gradient_checkpointing",
}
"""Names of our settings in other tools, used only for suggestions; never accepted as input."""


def sentence(error: ValidationError, display_names: Mapping[str, str]) -> str:
    """Return the first problem of ``error`` as one sentence; ``display_names`` maps fields to the user's names."""
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    if not first["loc"]:  # a problem of several fields, which the message names
        names = "|".join(re.escape(str(name)) for key, name in context.items() if key != "value")
        value = re.escape(str(context.get("value", "")))  # of the name before it, and may be a name itself
        pattern = rf"\b({names})\b(?P<value> {value}\b)?" if value else rf"\b({names})\b(?P<value>)"
        shown = re.sub(pattern, lambda found: _shown(found[1], display_names) + (found["value"] or ""), first["msg"])
        return f"{shown}."
    key, *inside = map(str, first["loc"])
    if first["type"] == "missing":
        return f"{display_names.get(key, key)} is missing: it has no default."
    verb = "contains" if inside else "is"
    requirement = _requirement(first["type"], first["msg"], context)
    return f"{display_names.get(key, key)} {verb} {format_value(first['input'])}: {requirement}."


def _shown(name: str, display_names: Mapping[str, str]) -> str:
    return display_names.get(name, name)


_REQUIREMENTS = {
    "int": "it must be a whole number",
    "int_parsing_size": "it is too large",
    "float": "it must be a number",
    "finite_number": "it must be a finite number",
    "greater_than_equal": "it must be at least {ge:g}",
    "greater_than": "it must be more than {gt:g}",
    "less_than_equal": "it must be at most {le}",
    "less_than": "it must be less than {lt:g}",
    "string_type": "it must be text",
    "string_too_short": "it must not be empty",
    "string_unicode": "it must be valid UTF-8 text",
    "bool_type": "it must be true or false",
    "too_short": "it must not be an empty list",
    "tuple_type": "it must be a list of numbers",
}


def _requirement(kind: str, message: str, context: Mapping[str, object]) -> str:
    """Return the requirement for an error type of pydantic; messages of our own validators are used as they are."""
    if kind == "literal_error":
        return "it must be " + str(context["expected"]).replace("'", "")
    if kind.startswith(("int_", "float_")) and kind not in _REQUIREMENTS:
        kind = kind.partition("_")[0]
    return _REQUIREMENTS[kind].format(**context) if kind in _REQUIREMENTS else message[0].lower() + message[1:]


def format_value(value: object) -> str:
    """Format a value as the user wrote it: numbers without quotes, text in quotes, other types by TOML's names."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, str) and not re.fullmatch(
        r"[+-]?([\d.][\d_.]*(e[+-]?\d+)?|nan|inf(inity)?)", value, re.IGNORECASE
    ):
        return truncate(repr(value))
    return truncate(str(value))


def truncate(text: str) -> str:
    """Truncate user input to 60 characters."""
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the field with the most similar name, either ours or that of another tool; None if none is similar."""
    names = {key: key for key in known}
    names |= {theirs: ours for theirs, ours in FOREIGN_NAMES.items() if ours in names}
    near = difflib.get_close_matches(word.strip("-").replace("-", "_").lower(), names, n=1)
    return names[near[0]] if near else None


def suggestion(command: str, near: str | None) -> str:
    """Return a suggestion: the similar name if there is one, else the help page."""
    return f"did you mean {near}?" if near else f"see bigbatch {command} --help."
