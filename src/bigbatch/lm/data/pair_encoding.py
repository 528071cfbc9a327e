"""Tokenize the sequences of pairs, and of queries with their passages.

dpo         prompt | answer + end     as TRL does: the prompt and the whole are tokenized, and the answer begins where
                                      the tokens of the whole differ from those of the prompt
reward      prompt + answer + end     the whole is tokenized as one text
embedding   text                      as ``tokenizer(text)`` encodes it

Special tokens are those that the tokenizer adds to a text by itself. Messages are rendered by the chat template,
without other special tokens and without an end token that it does not write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple, NoReturn

from bigbatch.errors import InputError
from bigbatch.lm.data.conversations import ConversationRenderer
from bigbatch.lm.data.documents import Document, Part
from bigbatch.lm.data.pairs import EXPECTED, Objective
from bigbatch.lm.data.text_tokens import num_shared, tokenize_texts
from bigbatch.lm.data.tokenization import Encoded
from bigbatch.lm.data.tokenizer import AnyTokenizer


class _Text(NamedTuple):
    """A sequence as text, and what of it is the prompt; conversations have their special tokens."""

    prompt: str
    whole: str
    has_special_tokens: bool


class PairEncoder:
    """Encodes documents with parts, one sequence for each part, as `DocumentEncoder` does other documents.

    Tokens of the answer of a dpo pair are marked as trained, and all tokens of other sequences; never the first one.

    Args:
        tokenizer: Needs an end token, and for messages a chat template.
        objective: Decides about the tokens.
    """

    def __init__(self, tokenizer: AnyTokenizer, objective: Objective) -> None:
        self.tokenizer = tokenizer
        self._objective = objective
        self._renderer: ConversationRenderer | None = None

    @property
    def releases_gil(self) -> bool:
        """Whether texts are tokenized outside of Python; pairs have none."""
        return False

    def texts(self, texts: list[str]) -> NoReturn:
        """Refuse documents that are texts.

        Raises:
            InputError: Always.
        """
        raise InputError(f"the data is text without records. {EXPECTED[self._objective]}")

    def text_piece(self, text: str, *, is_first: bool, is_last: bool) -> NoReturn:
        """Refuse a long text.

        Raises:
            InputError: Always.
        """
        self.texts([text])

    def accepts(self, document: Document, broken: list[str] | None) -> bool:
        """Return False for a document that is tokens; the error is raised, or appended to ``broken``.

        Raises:
            InputError: ``broken`` is None.
        """
        _refuse(f"{document.source}: it is tokens and no record. {EXPECTED[self._objective]}", broken)
        return False

    def encode(self, batch: list[Document], broken: list[str] | None, *, first: int = 0) -> Iterator[Encoded]:
        """Yield the tokens of each part of documents; ``first`` is the index of the first document.

        Raises:
            InputError: A document has no parts, or one without a token to compare, or the chat template rejects it,
                and ``broken`` is None.
        """
        texts: dict[int, list[_Text]] = {}
        for place, document in enumerate(batch):
            try:
                texts[place] = [self._text(document, part) for part in self._parts(document)]
            except InputError as error:
                _refuse(str(error), broken)
        tokens = self._tokens(list(chain.from_iterable(texts.values())))
        for place, found in texts.items():
            wholes = [tokens[text.whole, text.has_special_tokens] for text in found]
            start = 0
            if self._objective == "dpo":
                prompts = [tokens[text.prompt, text.has_special_tokens] for text in found]
                start = min(map(num_shared, prompts, wholes))
            masked = max(start, 1)
            least = masked + 1 if self._objective == "dpo" else 1
            if min(map(len, wholes)) < least:
                _refuse(f"{batch[place].source} has a sequence without a token to compare with this tokenizer.", broken)
                continue
            for whole in wholes:
                yield Encoded(whole, b"\0" * masked + b"\1" * (len(whole) - masked), None, first + place)

    def _parts(self, document: Document) -> tuple[Part, ...]:
        if document.parts is None:
            raise InputError(f"{document.source}: it is a text and no record. {EXPECTED[self._objective]}")
        return document.parts

    def _text(self, document: Document, part: Part) -> _Text:
        if isinstance(part.answer, str):
            assert isinstance(part.context, str), "both are strings, or both messages"
            whole = part.context + part.answer
            end = str(self.tokenizer.eos_token)
            if self._objective != "embedding" and not whole.endswith(end):
                whole += end
            return _Text(part.context, whole, has_special_tokens=False)
        messages = (*part.context, *part.answer)
        conversation = Document(document.source, messages=messages, tools=part.tools)
        try:
            self._renderer = self._renderer or ConversationRenderer(self.tokenizer)
        except InputError as error:
            raise InputError(f"{document.source}: {error}") from None
        num_context = len(part.context) if self._objective == "dpo" else 0
        return _Text(*self._renderer.continuation(conversation, num_context), has_special_tokens=True)

    def _tokens(self, texts: Sequence[_Text]) -> dict[tuple[str, bool], list[int]]:
        """Return the tokens of each different text, by the text and whether it has its special tokens."""
        found: dict[tuple[str, bool], list[int]] = {}
        for has_special_tokens in (False, True):
            group = [text for text in texts if text.has_special_tokens == has_special_tokens]
            strings = [text.whole for text in group]
            if self._objective == "dpo":
                strings += [text.prompt for text in group]
            different = list(dict.fromkeys(strings))
            rows = tokenize_texts(self.tokenizer, different, add_special_tokens=not has_special_tokens)
            found |= {(string, has_special_tokens): row for string, row in zip(different, rows, strict=True)}
        return found


def _refuse(message: str, broken: list[str] | None) -> None:
    if broken is None:
        raise InputError(message)
    broken.append(message)


def num_closing_tokens(tokenizer: AnyTokenizer) -> int:
    """Return how many special tokens a tokenizer adds at the end of a text, such as BERT's [SEP]."""
    full, plain = (tokenize_texts(tokenizer, ["a"], add_special_tokens=add)[0] for add in (True, False))
    starts = (i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    start = next(starts, None)
    return 0 if start is None else len(full) - start - len(plain)
