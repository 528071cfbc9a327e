"""Documents as tokens, each with whether it is learned: the only place that knows a tokenizer's special tokens.

text             front + text + end                  every token learned but the first
prompt           front + prompt | completion + end   what is right of the bar learned
messages         the chat template's rendering       the assistant's turns learned, end marks included
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
        trained: For each token, 1 if it is learned when it is predicted, else 0. The first is never predicted: 0.
    """

    tokens: list[int]
    trained: bytes


def encode_documents(documents: Sequence[Document], tokenizer: AnyTokenizer) -> Iterator[Encoded]:
    """Yield the tokens of each document, in order, and hand the tokenizer many documents at a time.

    Raises:
        InputError: A document has nothing to learn, or the tokenizer cannot render and mask conversations.
    """
    marks = _Marks.of(tokenizer)
    for batch in _batches(documents):
        plain = iter(_tokenize(tokenizer, list(chain.from_iterable(_strings(document) for document in batch))))
        for document in batch:
            if document.messages is not None:
                encoded = _encode_messages(document, tokenizer)
            elif document.text is not None:
                encoded = marks.text(next(plain))
            else:
                encoded = marks.completion(next(plain), next(plain))
            if not any(encoded.trained):
                raise InputError(f"{document.source} yields no training token with this tokenizer.")
            yield encoded


@dataclass(frozen=True)
class _Marks:
    """The special tokens around a document; ``given`` says whether the tokenizer itself puts ``front`` there."""

    front: list[int]
    given: bool
    end: int

    @classmethod
    def of(cls, tokenizer: AnyTokenizer) -> _Marks:
        end: int | None = tokenizer.eos_token_id
        if end is None:
            raise InputError("the tokenizer has no end token, so a document could not be ended. Set its eos_token.")
        with_marks, plain = (_tokenize(tokenizer, ["a"], marks=marks)[0] for marks in (True, False))
        fits = (i for i in range(len(with_marks)) if with_marks[i : i + len(plain)] == plain)
        front = with_marks[: next(fits, 0)]
        fallback = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
        return cls(front or [fallback], bool(front), end)

    def text(self, tokens: list[int]) -> Encoded:
        # Without a mark in front, the first token of the text would have nothing to be predicted from.
        whole = [*self.front, *tokens, self.end]
        return Encoded(whole, b"\0" + b"\1" * (len(whole) - 1))

    def completion(self, prompt: list[int], completion: list[int]) -> Encoded:
        # The prompt begins as generation will begin it, which for some tokenizers is without any mark.
        given = [*(self.front if self.given or not prompt else []), *prompt]
        learned = [*completion, self.end]
        return Encoded(given + learned, bytes(len(given)) + b"\1" * len(learned))


def _encode_messages(document: Document, tokenizer: AnyTokenizer) -> Encoded:
    whole, spans = _render(document, tokenizer)
    if not tokenizer.is_fast:
        raise InputError(
            f"{document.source}: {type(tokenizer).__name__} cannot tell where its tokens lie in a text, so the turns "
            "of a conversation cannot be masked. Use the model's fast tokenizer (tokenizer.json)."
        )
    found = tokenizer(
        whole, add_special_tokens=False, return_offsets_mapping=True, truncation=False, padding=False, verbose=False
    )
    trained = bytearray()
    remaining = iter([*spans, (len(whole), len(whole))])
    start, stop = next(remaining)
    for _, last in found["offset_mapping"]:
        while last > stop:
            start, stop = next(remaining)
        trained.append(start < last <= stop)
    if trained:
        trained[0] = 0
    return Encoded(list(found["input_ids"]), bytes(trained))


def _render(document: Document, tokenizer: AnyTokenizer) -> tuple[str, list[tuple[int, int]]]:
    """Return the whole conversation as text, and where in it, in characters, the turns of the assistant are."""
    assert document.messages is not None
    if not tokenizer.chat_template:
        raise InputError(
            f"{document.source} is a conversation, and the tokenizer has no chat template to render it. "
            "Use a model with one, or records with 'prompt' and 'completion'."
        )
    messages = list(document.messages)
    whole = _rendering(tokenizer, messages, document.source)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _rendering(tokenizer, messages[:i], document.source, add_generation_prompt=True)
            after = _rendering(tokenizer, messages[: i + 1], document.source)
            if not (after.startswith(before) and whole.startswith(after)):
                raise InputError(
                    f"{document.source}: the chat template renders message {i + 1} differently once the conversation "
                    "goes on, so what to learn cannot be told apart. Cut the conversation after this message."
                )
            spans.append((len(before), len(after)))
    return whole, spans


def _rendering(tokenizer: AnyTokenizer, messages: list[dict[str, str]], source: str, **options: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"{source}: the chat template refuses the conversation: {first_line(error)}.") from None


def _strings(document: Document) -> tuple[str, ...]:
    """What of a document goes to the tokenizer as it stands; a conversation needs its template first."""
    return document.texts if document.messages is None else ()


def _tokenize(tokenizer: AnyTokenizer, texts: list[str], *, marks: bool = False) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: transformers would warn that a text is longer than the model takes; it is cut later.
    found: Any = tokenizer(
        texts,
        add_special_tokens=marks,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = found["input_ids"]
    return ids


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Group documents, in order, into batches of a bounded number of characters: enough work for every core."""
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
