"""Text helpers: plurals, and what is wrong with a value."""

from collections.abc import Mapping
from typing import Any

SAMPLE_NOUNS = {"sft": "sequence", "dpo": "pair", "reward": "pair", "embedding": "example"}
"""What a sample of an objective is, for notes."""


def plural(number: int, noun: str) -> str:
    """Return ``1,234 files`` or ``1 file``: a number with its noun, for notes."""
    ending = "" if number == 1 else "es" if noun.endswith(("ch", "s")) else "s"
    return f"{number:,} {noun}{ending}"


def describe_invalid(problem: Mapping[str, Any]) -> str:
    """Return an entry of `pydantic.ValidationError.errors` as a clause, such as ``progress.cursor: field required``."""
    place = ".".join(str(part) for part in problem["loc"][:6])[:80]
    message = problem["msg"]
    return f"{place}: {message[0].lower()}{message[1:]}" if place else message[0].lower() + message[1:]
