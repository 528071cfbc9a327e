"""Find the parts of a conversation that a chat template leaves out of its rendering."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

REASONING = ("reasoning_content", "reasoning", "thinking")
"""The entries of a message that transformers passes to templates as its reasoning."""


def lost_part(messages: Sequence[Mapping[str, Any]], text: str, *, first: int, trained: int | None) -> str | None:
    """Return which part of the messages a rendering lacks, in words; None if it has all of them.

    Of a content the last visible line is looked up, as it is or in a JSON string: templates trim contents and move
    reasoning. Reasoning is looked up in the message that is trained on only, since templates drop it from others.

    Args:
        messages: Those of the rendering.
        text: The rendering.
        first: Index of the first message to look up.
        trained: Index of the message that is trained on, or None.
    """
    for index, message in enumerate(messages[first:], first):
        lost = None
        if not _is_in(_last_line(message["content"]), text):
            lost = "the content"
        elif not all(_is_in(call["function"]["name"], text) for call in message.get("tool_calls", ())):
            lost = "the calls of tools"
        elif index == trained and not _is_in(_last_line(_reasoning(message)), text):
            lost = "the reasoning"
        if lost is not None:
            return f"{lost} of message {index + 1} ({message['role']})"
    return None


def lost_tools(tools: Sequence[Mapping[str, Any]], text: str) -> str | None:
    """Return "the tools" if a rendering lacks the name of one; else None."""
    functions = (tool.get("function", tool) for tool in tools)
    names = [function.get("name") for function in functions if isinstance(function, Mapping)]
    return None if all(_is_in(name, text) for name in names if isinstance(name, str)) else "the tools"


def _reasoning(message: Mapping[str, Any]) -> str:
    return next((message[name] for name in REASONING if isinstance(message.get(name), str)), "")


def _last_line(content: str) -> str:
    """Return the last line with a visible character, after any reasoning in front of it."""
    lines = content.rpartition("</think>")[2].rstrip().splitlines()
    return lines[-1].strip() if lines else ""


def _is_in(part: str, text: str) -> bool:
    """Return whether a text has a part, as it is or in a JSON string."""
    return part in text or any(json.dumps(part, ensure_ascii=is_ascii)[1:-1] in text for is_ascii in (False, True))
