"""Values that survive a round trip through JSON unchanged; others are rejected.

Floats are written like ``repr``, so every bit is preserved. NaN and the infinities are written as ``NaN``, ``Infinity``
and ``-Infinity``, as Python's json does although the standard does not define them; the sign and payload of a NaN are
lost.
"""

import json
from typing import Any

DEEPEST = 100  # levels; Python's json itself fails somewhere below a thousand, depending on the depth of the caller


def to_json(name: str, value: Any) -> bytes:
    """Return a value as the content of a JSON file: ``json.loads(to_json(name, value)) == value``, NaN aside.

    Args:
        name: Name of the value in messages.
        value: None, a bool, a number, a str, or a list or dict of these with str keys.

    Raises:
        TypeError: It contains another type, such as a tuple, which would be loaded as a list.
        ValueError: It is nested too deeply, or contains text that is not valid Unicode or a number of too many digits.
    """
    _check(name, value, 0)
    text = json.dumps(value, ensure_ascii=False, indent=1)
    return text.encode("utf-8") + b"\n"


def _check(place: str, value: Any, depth: int) -> None:
    if depth > DEEPEST:
        raise ValueError(f"{place[:60]}… is nested more than {DEEPEST} levels deep: store it flatter.")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(
                    f"{place} has the key {key!r}, a {type(key).__name__}, which JSON would turn into text: "
                    "use str keys."
                )
            _check_text(f"a key of {place}", key)
            _check(f"{place}.{key}", inner, depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check(f"{place}[{index}]", inner, depth + 1)
    elif isinstance(value, str):
        _check_text(place, value)
    elif isinstance(value, int):
        _check_digits(place, value)
    elif not (value is None or isinstance(value, float)):
        raise TypeError(
            f"{place} is a {type(value).__name__}, which JSON cannot store. Use a list, a dict, a str, a "
            "number, a bool or None."
        )


def _check_text(place: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{place} is text with half a surrogate pair, which UTF-8 cannot hold.") from None


def _check_digits(place: str, number: int) -> None:
    try:
        str(number)
    except ValueError:
        raise ValueError(f"{place} is a whole number of more digits than Python reads: store it as text.") from None
