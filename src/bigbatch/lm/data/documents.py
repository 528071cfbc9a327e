"""What a source gives: documents, each with the place it comes from, and notes about what was read."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Document:
    """One unit of training data: a text, a prompt with its completion, or a conversation.

    Exactly one of ``text``, ``prompt`` with ``completion``, and ``messages`` is set.

    Attributes:
        source: Where it comes from, for messages to the user: a path, or ``path:line`` for a record.
        text: Every token of it is learned.
        prompt: Given, never learned.
        completion: Learned, as what follows ``prompt``.
        messages: Turns ``{"role": ..., "content": ...}``; the turns of the assistant are learned.
    """

    source: str
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[dict[str, str], ...] | None = None

    def __post_init__(self) -> None:
        assert (self.prompt is None) == (self.completion is None), "a prompt and its completion come together"
        kinds = [self.text is not None, self.prompt is not None, self.messages is not None]
        assert sum(kinds) == 1, "a document is a text, a prompt with its completion, or a conversation"

    @cached_property
    def key(self) -> str:
        """SHA-256 of the content in hex, the same wherever the content comes from."""
        content = [self.text, self.prompt, self.completion, self.messages]
        # ASCII escapes keep the digest the same on every machine and for every string that Python can hold.
        canonical = json.dumps(content, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    @property
    def texts(self) -> tuple[str, ...]:
        """Every string of the content, in order: what a tokenizer is trained on."""
        if self.messages is not None:
            return tuple(message["content"] for message in self.messages)
        return tuple(part for part in (self.text, self.prompt, self.completion) if part is not None)


@dataclass(frozen=True)
class Corpus:
    """Every document of a source, and what a reader should know about it.

    Attributes:
        documents: In the order of the source, at least one.
        notes: Lines for the user with counts of what was read and of what was left out.
    """

    documents: tuple[Document, ...]
    notes: tuple[str, ...]
