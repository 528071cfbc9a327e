"""Tokenize documents with a training mask; the only module that handles a tokenizer's special tokens.

text             prefix + text + end                  every token but the first is trained on
prompt           prefix + prompt | completion + end   the tokens after the bar are trained on; tokenized separately, or
                                                      as one text where a tokenizer would put a space between both
messages         the chat template's rendering        what the assistant says is trained on, end marks included
tokens           as they are                          those that their labels or masks train on

Long because the kinds of documents share the special tokens, and the batches that are tokenized together.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from bigbatch.errors import InputError
from bigbatch.lm.data.conversations import ConversationRenderer, Rendering, Span, TrainOn
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.reading import advised
from bigbatch.lm.data.text_tokens import JoinedTexts, num_shared, releases_gil, tokenize_texts
from bigbatch.lm.data.token_records import all_but_first, foreign_token, token_ids
from bigbatch.lm.data.tokenizer import AnyTokenizer

BATCH_CHARACTERS = 500_000
BATCH_DOCUMENTS = 1_000

_Made: TypeAlias = "tuple[list[int], bytes, array[float] | None]"  # tokens, trained, weights


@dataclass(frozen=True)
class Encoded:
    """One document as tokens, or one turn of a conversation with what comes before it.

    Attributes:
        tokens: Token ids, special ones included, at least one.
        trained: For each token, 1 if it is trained on as a target, else 0. The first is never a target: 0.
        weights: For each token, the weight of its loss in float32, 0 where it is not trained on; None if all are 1.
        document: Index of the document, from 0: several in a row have the same one if the chat template renders earlier
            turns of a conversation in another way.
    """

    tokens: list[int]
    trained: bytes
    weights: array[float] | None = None
    document: int = 0


def encode_documents(
    documents: Iterable[Document],
    tokenizer: AnyTokenizer,
    *,
    train_on: TrainOn = "all-assistant",
    broken: list[str] | None = None,
) -> Iterator[Encoded]:
    """Yield the tokens of each document, in order; the tokenizer is called with many documents at a time.

    Args:
        documents: Any number; read as they are needed.
        tokenizer: Needs an end token, and for conversations a chat template and token offsets.
        train_on: Which turns of conversations are trained on.
        broken: List to which the error of each document that cannot be encoded is appended, which is then skipped; None
            to raise it.

    Raises:
        InputError: A document has no training token or is rejected by the chat template, and ``broken`` is None; or the
            tokenizer cannot render and mask conversations; or no document can be encoded.
    """
    encoder = DocumentEncoder(tokenizer, train_on=train_on)
    index, is_empty = 0, True
    for batch in _batches(documents):
        for encoded in encoder.encode(batch, broken, first=index):
            is_empty = False
            yield encoded
        index += len(batch)
    if is_empty and broken:
        raise InputError(broken[0])


class DocumentEncoder:
    """Encodes batches of documents, as `encode_documents`, whose arguments these are."""

    def __init__(self, tokenizer: AnyTokenizer, *, train_on: TrainOn = "all-assistant") -> None:
        self.tokenizer = tokenizer
        self._train_on = train_on
        self._special_tokens = _SpecialTokens.of(tokenizer)
        self.joined_texts = JoinedTexts.of(tokenizer)
        self._renderer: ConversationRenderer | None = None

    @property
    def releases_gil(self) -> bool:
        """Whether texts are tokenized outside of Python, so that several threads can do so at a time."""
        return releases_gil(self.tokenizer)

    def texts(self, texts: list[str]) -> tuple[list[int], list[list[int]], int]:
        """Return the tokens before each text, those of each text, and the token after it; as `encode` joins them."""
        return self._special_tokens.prefix, tokenize_texts(self.tokenizer, texts), self._special_tokens.end

    def text_piece(self, text: str, *, is_first: bool, is_last: bool) -> Encoded:
        """Return the tokens of a piece of a text, with those before the text and at its end where it has them."""
        tokens = [*(self._special_tokens.prefix if is_first else []), *tokenize_texts(self.tokenizer, [text])[0]]
        tokens += [self._special_tokens.end] if is_last else []
        return Encoded(tokens, b"\0" * is_first + b"\1" * (len(tokens) - is_first))

    def accepts(self, document: Document, broken: list[str] | None) -> bool:
        """Return whether the tokens of a document are those of the tokenizer; an error is raised or appended.

        Raises:
            InputError: They are not, and ``broken`` is None.
        """
        reason = foreign_token(int(token_ids(document).max()), document.source, len(self.tokenizer))
        if reason is not None:
            _refuse(reason, broken)
        return reason is None

    def encode(self, batch: list[Document], broken: list[str] | None, *, first: int = 0) -> Iterator[Encoded]:
        """Yield the tokens of documents; ``first`` is the index of the first one.

        Raises:
            InputError: As `encode_documents` raises it, but not if no document can be encoded.
        """
        plain = iter(tokenize_texts(self.tokenizer, [text for document in batch for text in self._strings(document)]))
        for group in _groups(self._parts(batch, plain, broken)):
            found = self._with_offsets([part.text for _, part in group if isinstance(part, Rendering)])
            row = 0
            for place, part in group:
                if isinstance(part, Rendering):
                    part = _masked(found, row, part)
                    row += 1
                tokens, trained, weights = part
                if any(trained):
                    yield Encoded(tokens, trained, weights, first + place)
                else:
                    _refuse(f"{batch[place].source} yields no training token with this tokenizer.", broken)

    def _strings(self, document: Document) -> tuple[str, ...]:
        """Return the strings of a document to tokenize directly; none for a conversation, which needs its template."""
        if self._is_joined(document):
            prompt, completion = document.texts
            return prompt, prompt + completion
        return document.texts if document.messages is None else ()

    def _is_joined(self, document: Document) -> bool:
        """Return whether a prompt is tokenized together with its completion."""
        return document.completion is not None and self.joined_texts.has(document.completion)

    def _parted(self, document: Document, prompt: list[int], tokens: list[int]) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt and of its completion, from the tokens of `_strings`."""
        if not self._is_joined(document):
            return prompt, tokens
        size = num_shared(prompt, tokens)
        return tokens[:size], tokens[size:]

    def _parts(
        self, batch: list[Document], plain: Iterator[list[int]], broken: list[str] | None
    ) -> Iterator[tuple[int, _Made | Rendering]]:
        """Yield the place of each document with its tokens, or with each rendering of a conversation."""
        for place, document in enumerate(batch):
            if document.text is not None:
                yield place, self._special_tokens.text(next(plain))
            elif document.tokens is not None:
                if self.accepts(document, broken):
                    yield place, (token_ids(document).tolist(), document.trained or all_but_first(document), None)
            elif document.messages is None:
                yield place, self._special_tokens.completion(*self._parted(document, next(plain), next(plain)))
            else:
                for rendering in self._render(document, broken):
                    yield place, rendering

    def _render(self, document: Document, broken: list[str] | None) -> list[Rendering]:
        """Return the renderings of a conversation; none if it is rejected."""
        if self._renderer is None:
            try:
                self._renderer = ConversationRenderer(self.tokenizer, train_on=self._train_on)
            except InputError as error:
                raise InputError(f"{document.source}: {error}") from None
        try:
            return self._renderer.render(document)
        except InputError as error:
            _refuse(str(error), broken)
            return []

    def _with_offsets(self, texts: list[str]) -> Any:
        """Tokenize renderings, which have their special tokens; the result maps characters to tokens."""
        if not texts:
            return None
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            padding=False,
            verbose=False,
        )


def _groups(parts: Iterator[tuple[int, _Made | Rendering]]) -> Iterator[list[tuple[int, _Made | Rendering]]]:
    """Group parts, in order: a conversation that is rendered for each turn has many times its own characters."""
    group: list[tuple[int, _Made | Rendering]] = []
    characters = 0
    for place, part in parts:
        group.append((place, part))
        characters += len(part.text) if isinstance(part, Rendering) else 0
        if characters >= BATCH_CHARACTERS:
            yield group
            group, characters = [], 0
    yield group


def _refuse(message: str, broken: list[str] | None) -> None:
    if broken is None:
        raise advised(InputError(message))
    broken.append(message)


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
        full, plain = (tokenize_texts(tokenizer, ["a"], add_special_tokens=add)[0] for add in (True, False))
        starts = (i for i in range(len(full)) if full[i : i + len(plain)] == plain)
        prefix = full[: next(starts, 0)]
        fallback = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
        return cls(prefix or [fallback], bool(prefix), end)

    def text(self, tokens: list[int]) -> _Made:
        # Without a prefix, the first token of the text could not be predicted from anything.
        all_tokens = [*self.prefix, *tokens, self.end]
        return all_tokens, b"\0" + b"\1" * (len(all_tokens) - 1), None

    def completion(self, prompt: list[int], completion: list[int]) -> _Made:
        # The prompt starts as in generation, which for some tokenizers is without special tokens.
        context = [*(self.prefix if self.adds_prefix or not prompt else []), *prompt]
        targets = [*completion, self.end]
        return context + targets, bytes(len(context)) + b"\1" * len(targets), None


def _masked(found: Any, row: int, rendering: Rendering) -> _Made:
    """Return the tokens of a rendering with their mask and, if one of them is not 1, the weights of the spans."""
    tokens: list[int] = list(found["input_ids"][row])
    offsets: list[tuple[int, int]] = found["offset_mapping"][row]
    trained = bytearray(len(tokens))
    has_weights = any(span.weight != 1 for span in rendering.spans)
    weights = array("f", bytes(4 * len(tokens))) if has_weights else None
    for span in rendering.spans:
        first, last = _tokens_of(found, row, span)
        while rendering.marks is None and last < len(tokens) and offsets[last][0] < span.stop:
            last += 1  # the other tokens of a last character that has several
        first = max(first, 1)
        count = max(0, last - first)
        trained[first : first + count] = b"\1" * count
        if weights is not None:
            weights[first : first + count] = array("f", [span.weight]) * count
    return tokens, bytes(trained), weights


def _tokens_of(found: Any, row: int, span: Span) -> tuple[int, int]:
    """Return the bounds of the tokens of a span: from the token of its first character to that of its last one.

    This is the mask of transformers' ``apply_chat_template(return_assistant_tokens_mask=True)``. It looks up only the
    first and the last character, and if a tokenizer drops one of them, such as white space, it masks all later turns,
    or trains on all that follows. Here the nearest character of the span that has a token is used instead.
    """
    inside = range(span.start, span.stop)
    first = next((token for place in inside if (token := found.char_to_token(row, place)) is not None), None)
    last = next((token for place in reversed(inside) if (token := found.char_to_token(row, place)) is not None), None)
    return (0, 0) if first is None or last is None else (first, last + 1)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents, in order, into batches with enough characters to use every core."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += document.size
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
