"""Tokenize documents with a training mask; the only module that handles a tokenizer's special tokens.

text             prefix + text + end                  every token but the first is trained on
prompt           prefix + prompt | completion + end   the tokens after the bar are trained on
messages         the chat template's rendering        the assistant's turns, end tokens included, are trained on
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from bigbatch.errors import InputError, first_line
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.tokenizer import AnyTokenizer

BATCH_CHARACTERS = 500_000
BATCH_DOCUMENTS = 1_000


@dataclass(frozen=True)
class Encoded:
    """One document as tokens.

    Attributes:
        tokens: Token ids, special ones included, at least one.
        trained: For each token, 1 if it is trained on as a target, else 0. The first is never a target: 0.
    """

    tokens: list[int]
    trained: bytes


def encode_documents(documents: Sequence[Document], tokenizer: AnyTokenizer) -> Iterator[Encoded]:
    """Yield the tokens of each document, in order; the tokenizer is called with many documents at a time.

    Raises:
        InputError: A document has no training token, or the tokenizer cannot render and mask conversations.
    """
    special_tokens = _SpecialTokens.of(tokenizer)
    for batch in _batches(documents):
        plain = iter(_tokenize(tokenizer, list(chain.from_iterable(_strings(document) for document in batch))))
        for document in batch:
            if document.messages is not None:
                encoded = _encode_messages(document, tokenizer)
            elif document.text is not None:
                encoded = special_tokens.text(next(plain))
            else:
                encoded = special_tokens.completion(next(plain), next(plain))
            if not any(encoded.trained):
                raise InputError(f"{document.source} yields no training token with this tokenizer.")
            yield encoded


@dataclass(frozen=True)
class _SpecialTokens:
    """Special tokens around a document; ``adds_prefix`` is whether the tokenizer itself adds ``prefix``."""

    prefix: list[int]
    adds_prefix: bool
    end: int

    @classmethod
    def of(cls, tokenizer: AnyTokenizer) -> _SpecialTokens:
        end: int | None = tokenizer.eos_token_id
        if end is None:
            raise InputError("the tokenizer has no end token to terminate documents with. Set its eos_token.")
        full, plain = (_tokenize(tokenizer, ["a"], add_special_tokens=add)[0] for add in (True, False))
        starts = (i for i in range(len(full)) if full[i : i + len(plain)] == plain)
        prefix = full[: next(starts, 0)]
        fallback = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
        return cls(prefix or [fallback], bool(prefix), end)

    def text(self, tokens: list[int]) -> Encoded:
        # Without a prefix, the first token of the text could not be predicted from anything.
        all_tokens = [*self.prefix, *tokens, self.end]
        return Encoded(all_tokens, b"\0" + b"\1" * (len(all_tokens) - 1))

    def completion(self, prompt: list[int], completion: list[int]) -> Encoded:
        # The prompt starts as in generation, which for some tokenizers is without special tokens.
        context = [*(self.prefix if self.adds_prefix or not prompt else []), *prompt]
        targets = [*completion, self.end]
        return Encoded(context + targets, bytes(len(context)) + b"\1" * len(targets))


def _encode_messages(document: Document, tokenizer: AnyTokenizer) -> Encoded:
    rendered, spans = _render(document, tokenizer)
    if not tokenizer.is_fast:
        raise InputError(
            f"{document.source}: {type(tokenizer).__name__} does not return token offsets, so the turns of a "
            "conversation cannot be masked. Use the model's fast tokenizer (tokenizer.json)."
        )
    found = tokenizer(
        rendered, add_special_tokens=False, return_offsets_mapping=True, truncation=False, padding=False, verbose=False
    )
    trained = bytearray()
    remaining = iter([*spans, (len(rendered), len(rendered))])
    start, stop = next(remaining)
    for _, last in found["offset_mapping"]:
        while last > stop:
            start, stop = next(remaining)
        trained.append(start < last <= stop)
    if trained:
        trained[0] = 0
    return Encoded(list(found["input_ids"]), bytes(trained))


def _render(document: Document, tokenizer: AnyTokenizer) -> tuple[str, list[tuple[int, int]]]:
    """Return the conversation as text, and the (start, end) of the assistant's turns in characters."""
    assert document.messages is not None
    if not tokenizer.chat_template:
        raise InputError(
            f"{document.source} is a conversation, and the tokenizer has no chat template to render it. "
            "Use a model with one, or records with 'prompt' and 'completion'."
        )
    messages = list(document.messages)
    rendered = _rendering(tokenizer, messages, document.source)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _rendering(tokenizer, messages[:i], document.source, add_generation_prompt=True)
            after = _rendering(tokenizer, messages[: i + 1], document.source)
            if not (after.startswith(before) and rendered.startswith(after)):
                raise InputError(
                    f"{document.source}: the chat template renders message {i + 1} differently when more messages "
                    "follow, so its training tokens cannot be located. Cut the conversation after this message."
                )
            spans.append((len(before), len(after)))
    return rendered, spans


def _rendering(tokenizer: AnyTokenizer, messages: list[dict[str, str]], source: str, **options: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"{source}: the chat template rejects the conversation: {first_line(error)}.") from None


def _strings(document: Document) -> tuple[str, ...]:
    """Return the strings of a document to tokenize directly; none for a conversation, which needs its template."""
    return document.texts if document.messages is None else ()


def _tokenize(tokenizer: AnyTokenizer, texts: list[str], *, add_special_tokens: bool = False) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: transformers would warn about texts longer than the model supports; they are cut later.
    found: Any = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = found["input_ids"]
    return ids


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Group documents, in order, into batches with enough characters to use every core."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += sum(map(len, _strings(document)))
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
