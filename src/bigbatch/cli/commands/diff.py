"""``bigbatch diff``: the first update, and the parameter, at which two reproducible runs differ."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bigbatch.cli.console import make_console
from bigbatch.cli.options import DiffOptions
from bigbatch.cli.run_lookup import check_run
from bigbatch.errors import InputError
from bigbatch.lm.config.field_groups import flag_of
from bigbatch.lm.runs.fingerprints import Difference, Fingerprints, first_difference, read_fingerprints
from bigbatch.lm.runs.identity import read_identity
from bigbatch.lm.text import plural

EQUAL = 0
DIFFERENT = 1
MOST_NAMES = 5
NO_EFFECT = {
    *("out", "microbatch", "token_budget", "memory", "gpu", "parallel", "cache", "no_cache", "cache_by_content", "log"),
    *("checkpoint_every", "keep", "async_checkpoint", "max_skipped", "grace_s", "timeout_s", "sample_prompt"),
}
"""Settings that change no bit of a reproducible run."""
FACTS = {
    "data_sha256": "other documents",
    "validation_sha256": "other validation documents",
    "vocabulary_sha256": "another vocabulary",
    "chat_template_sha256": "another chat template",
    "model": "another configuration of the model",
    "weights_sha256": "other initial weights",
    "frozen_sha256": "other frozen weights",
    "compiled_layers": "compiled layers in one and layers in eager mode in the other",
}
"""What run-manifest.json records besides settings."""


def run(options: DiffOptions) -> int:
    """Print the first difference; return 0 only if all updates that both runs have are equal."""
    if len(options.runs) != 2:
        raise InputError(f"diff compares two runs, not {len(options.runs)}: pass two run directories.")
    for folder in options.runs:
        check_run(folder)
    one, other = map(read_fingerprints, options.runs)
    difference = first_difference(one, other)
    console = make_console()
    lines = list(_describe(one, other, difference))
    if difference is not None:
        named = {*one.setting, *other.setting}  # by the lines before
        first, second = map(_started_with, options.runs)
        lines += _other_settings(first, second, named)
    for line in lines:
        console.print_unbroken(line)
    return EQUAL if difference is None else DIFFERENT


def _describe(one: Fingerprints, other: Fingerprints, difference: Difference | None) -> Iterator[str]:
    common = len(one.parameters.keys() & other.parameters.keys())
    if difference is None:
        more = abs(len(one.parameters) - len(other.parameters))
        remark = f"; {plural(more, 'update')} of one run only" if more else ""
        yield f"equal in {plural(common, 'update')} and {plural(len(one.names), 'parameter')}{remark}"
        return
    what = "gradients" if difference.is_gradient else "parameters, after equal gradients,"
    yield (
        f"update {difference.step} is the first that differs: the {what} of {len(difference.names)} of "
        f"{plural(len(one.names), 'parameter')}"
    )
    yield from (f"  {name}" for name in difference.names[:MOST_NAMES])
    if len(difference.names) > MOST_NAMES:
        yield f"  and {len(difference.names) - MOST_NAMES} more"
    for name in sorted(one.setting.keys() | other.setting.keys()):
        a, b = one.setting.get(name), other.setting.get(name)
        if a != b:
            yield f"the runs have another {name}: {a} and {b}"


def _started_with(run: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the settings that a run was started with, and what is known of its model and data; none if unreadable."""
    try:
        identity = read_identity(run)
    except InputError:
        return {}, {}
    return identity.settings or {}, identity.facts or {}


def _other_settings(
    one: tuple[Mapping[str, Any], Mapping[str, Any]],
    other: tuple[Mapping[str, Any], Mapping[str, Any]],
    named: set[str],
) -> Iterator[str]:
    (settings, facts), (other_settings, other_facts) = one, other
    for name in sorted((settings.keys() & other_settings.keys()) - NO_EFFECT - named):
        a, b = settings[name], other_settings[name]
        if a != b:
            yield f"the runs have another {flag_of(name)}: {_shown(a)} and {_shown(b)}"
    for name, words in FACTS.items():
        if (facts.get(name) or None) != (other_facts.get(name) or None):  # earlier versions have no compiled layers
            yield f"the runs have {words}"


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
