"""Documents: the units of training data, each with its origin."""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from json.encoder import encode_basestring_ascii
from typing import Any, Self

_CANONICAL = json.JSONEncoder(ensure_ascii=True, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Part:
    """One of the sequences that a record of pairs consists of.

    Attributes:
        name: Its field, such as ``chosen``.
        context: What comes before the answer: a string, or messages; may be empty.
        answer: What is compared with the other parts, of the same type.
        tools: As for a `Document`, for messages.
    """

    name: str
    context: str | tuple[dict[str, Any], ...]
    answer: str | tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """Every string of the content, in order."""
        if isinstance(self.answer, str):
            assert isinstance(self.context, str), "both are strings, or both messages"
            return self.context, self.answer
        assert not isinstance(self.context, str), "both are strings, or both messages"
        return Document("", messages=(*self.context, *self.answer), tools=self.tools).texts


@dataclass(frozen=True)
class Document:
    """A text, a prompt with its completion, a conversation, tokens, or parts to compare: one unit of training data.

    Exactly one of ``text``, ``prompt`` with ``completion``, ``messages``, ``tokens`` and ``parts`` is set.

    Attributes:
        source: Origin, for messages to the user: a path, or ``path:line`` for a record.
        text: Text whose tokens are all trained on.
        prompt: Context, never trained on.
        completion: Continuation of ``prompt``, trained on.
        messages: JSON objects with at least ``role`` and the string ``content``, as
            :func:`bigbatch.lm.data.messages.to_messages` returns them; those of the assistant are trained on, each
            times its ``weight`` if it has one.
        tools: JSON schemas of the tools that a conversation may call; None for none.
        tokens: Token ids, encoded by another tool: little-endian int32.
        trained: For each of the tokens, a byte: 1 if it is trained on, else 0; None if all but the first are.
        shape: Shape of the record (see :mod:`bigbatch.lm.data.records`), for counts; no part of the content.
        parts: The sequences of a pair, or of a query with its passages (see :mod:`bigbatch.lm.data.pairs`).
    """

    source: str
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    tokens: bytes | None = field(default=None, repr=False)
    trained: bytes | None = field(default=None, repr=False)
    shape: str = field(default="", compare=False)
    parts: tuple[Part, ...] | None = None

    def __post_init__(self) -> None:
        assert (self.prompt is None) == (self.completion is None), "a prompt and its completion come together"
        kinds = [value is not None for value in (self.text, self.prompt, self.messages, self.tokens, self.parts)]
        assert sum(kinds) == 1, "a document is a text, a prompt with its completion, a conversation, tokens, or parts"
        assert self.tools is None or self.messages is not None, "tools belong to a conversation"

    @classmethod
    def of_text(cls, source: str, text: str, *, shape: str = "") -> Self:
        """Return the document of a text, as the constructor does in five times the time, for millions of records."""
        document = object.__new__(cls)
        document.__dict__.update(source=source, text=text, shape=shape)  # the defaults of the others are the class's
        return document

    @cached_property
    def key(self) -> str:
        """SHA-256 of the content in hex, independent of the source."""
        if self.tokens is not None:
            head = b"%d bytes of tokens" % len(self.tokens)
            return hashlib.sha256(head + self.tokens + (self.trained or b"")).hexdigest()
        if self.text is not None:
            return _text_hash(self.text).hexdigest()
        content: list[Any] = [self.text, self.prompt, self.completion, self.messages]
        if self.tools is not None:
            content.append(self.tools)
        if self.parts is not None:
            content.append([[part.name, part.context, part.answer, part.tools] for part in self.parts])
        # ASCII escapes make the digest independent of the machine and defined for every Python string. One encoder for
        # all documents: json.dumps would create one for each, which takes longer than the digest.
        return hashlib.sha256(_CANONICAL.encode(content).encode("ascii")).hexdigest()

    @property
    def size(self) -> int:
        """Characters of the texts; of tokens, 4 for each."""
        return sum(map(len, self.texts)) if self.tokens is None else len(self.tokens)

    @property
    def texts(self) -> tuple[str, ...]:
        """Every string of the content, in order, to train a tokenizer on; tools and calls of tools as JSON.

        None of tokens.
        """
        if self.parts is not None:
            return tuple(chain.from_iterable(part.texts for part in self.parts))
        if self.messages is None:
            return tuple(part for part in (self.text, self.prompt, self.completion) if part is not None)
        tools = () if self.tools is None else (json.dumps(self.tools, ensure_ascii=False),)
        turns = (
            (message["content"], *(json.dumps(message[name], ensure_ascii=False) for name in _JSON if name in message))
            for message in self.messages
        )
        return (*tools, *chain.from_iterable(turns))


def text_key(text: str) -> int:
    """Return the first 64 bits of the `Document.key` of a text."""
    return int.from_bytes(_text_hash(text).digest()[:8], "big")


def _text_hash(text: str) -> "hashlib._Hash":
    # the JSON of _CANONICAL, in a third of the time of its encoder
    return hashlib.sha256(f"[{encode_basestring_ascii(text)},null,null,null]".encode("ascii"))


_JSON = ("tool_calls",)  # entries of a message that templates render as JSON
