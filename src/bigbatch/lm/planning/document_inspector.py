"""One pass over documents, which counts what would be trained on, finds problems and chooses samples to show."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.config.train_fields import DEFAULT_MAX_LENGTH
from bigbatch.lm.data.chat_templates import describe_template
from bigbatch.lm.data.conversations import trained_weights
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.tokenization import Encoded, encode_documents
from bigbatch.lm.model.pretrained import load_config
from bigbatch.lm.text import plural

SHOWN = 3  # documents that cannot be encoded


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens with one weight as text; weight 0 is not trained on."""

    text: str
    weight: float


@dataclass(frozen=True)
class InspectedSample:
    """An encoded document, or a turn of a conversation, to be shown.

    Attributes:
        source: Of the document.
        num_tokens: All tokens.
        num_trained: Those that are trained on.
        segments: In order; joined, they are the text with its special tokens.
    """

    source: str
    num_tokens: int
    num_trained: int
    segments: tuple[Segment, ...]


@dataclass
class _Kind:
    """A kind of problem: how often it was found, and where first."""

    number: int = 0
    first: str = ""

    def add(self, place: str) -> None:
        self.number += 1
        self.first = self.first or place


@dataclass
class Findings:
    """What was found so far."""

    shapes: Counter[str] = field(default_factory=Counter)
    conversations: int = 0
    tokens: int = 0
    trained: int = 0
    weighted: int = 0
    sequences: Counter[int] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    cut: int = 0
    broken: list[str] = field(default_factory=list)
    special: _Kind = field(default_factory=_Kind)
    unknown: _Kind = field(default_factory=_Kind)
    empty: _Kind = field(default_factory=_Kind)


class Inspector:
    """One pass over the documents."""

    def __init__(self, config: TrainConfig, tokenizer: Any, num_samples: int) -> None:
        self.found = Findings()
        self._config = config
        self._tokenizer = tokenizer
        self._max_length = config.max_length or _default_max_length(config)
        self._num_samples = num_samples
        self._random = random.Random(config.seed)
        self._chosen: dict[int, tuple[str, list[Encoded]]] = {}
        self._sources: dict[int, str] = {}
        special = sorted(filter(_is_visible, tokenizer.all_special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def run(self, documents: Iterable[Document]) -> None:
        """Read and encode all documents."""
        encoded_documents = self._encoded(self._seen(documents))
        for number, (index, parts) in enumerate(groupby(encoded_documents, key=lambda encoded: encoded.document)):
            encoded = list(parts)
            source = self._sources.pop(index)
            self._count(encoded, source)
            self._choose(number, source, encoded)

    def _encoded(self, documents: Iterator[Document]) -> Iterator[Encoded]:
        """Yield the sequences of documents."""
        return encode_documents(documents, self._tokenizer, train_on=self._config.train_on, broken=self.found.broken)

    def _seen(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield the documents after noting their shape, source and problems."""
        for index, document in enumerate(documents):
            self.found.shapes[_shape(document)] += 1
            self._sources[index] = document.source
            for text in document.texts:
                if (match := self._special.search(text)) is not None:
                    self.found.special.add(f"{match[0]} in {document.source}")
                    break
            if document.messages is not None:
                self.found.conversations += 1
                trained = trained_weights(document.messages, self._config.train_on)
                turns = [document.messages[place] for place in trained]
                if any(not turn["content"].strip() and "tool_calls" not in turn for turn in turns):
                    self.found.empty.add(document.source)
            yield document

    def _count(self, parts: list[Encoded], source: str) -> None:
        found = self.found
        found.sequences[len(parts)] += 1
        unknown = self._tokenizer.unk_token_id
        for encoded in parts:
            found.tokens += len(encoded.tokens)
            found.trained += sum(encoded.trained)
            found.weighted += encoded.weights is not None
            found.lengths[1 << (len(encoded.tokens) - 1).bit_length()] += 1
            found.cut += self._is_long(encoded)
        if unknown is not None and any(unknown in encoded.tokens for encoded in parts):
            found.unknown.add(source)

    def _is_long(self, encoded: Encoded) -> bool:
        """Return whether a sequence is longer than a run uses; the last token of a document is only a label."""
        return len(encoded.tokens) - 1 > self._max_length

    def _choose(self, number: int, source: str, encoded: list[Encoded]) -> None:
        """Keep a uniform sample of the documents so far (reservoir sampling)."""
        if len(self._chosen) < self._num_samples:
            self._chosen[number] = (source, encoded)
        elif self._num_samples and (place := self._random.randrange(number + 1)) < self._num_samples:
            del self._chosen[list(self._chosen)[place]]
            self._chosen[number] = (source, encoded)

    def samples(self) -> tuple[InspectedSample, ...]:
        """Return the samples to show."""
        return tuple(
            InspectedSample(source, len(part.tokens), sum(part.trained), tuple(segments_of(part, self._tokenizer)))
            for _, (source, parts) in sorted(self._chosen.items())
            for part in parts
        )

    def counts(self) -> list[str]:
        """Return lines with the numbers of documents, sequences and tokens."""
        found = self.found
        shapes = ", ".join(f"{number:,} {shape}" for shape, number in found.shapes.most_common())
        sequences = sum(parts * number for parts, number in found.sequences.items())
        share = f"{100 * found.trained / found.tokens:.0f} %" if found.tokens else "none"
        return [
            f"{plural(found.shapes.total(), 'document')}: {shapes}",
            f"{plural(sequences, 'sequence')} with {plural(found.tokens, 'token')}, {found.trained:,} of them "
            f"({share}) trained on",
        ]

    def notes(self) -> list[str]:
        """Return sentences about how the documents are trained on."""
        found, config = self.found, self._config
        notes = []
        if found.conversations:
            notes.append(f"chat template: {describe_template(self._tokenizer, config.chat_template)}")
        if (split := sum(number for parts, number in found.sequences.items() if parts > 1)) > 0:
            notes.append(
                f"{plural(split, 'conversation')} trained turn by turn, because the chat template renders "
                "earlier turns in another way"
            )
        if found.weighted:
            notes.append(f"{plural(found.weighted, 'sequence')} with weights of messages")
        if found.cut:
            notes.append(
                f"{plural(found.cut, 'sequence')} longer than --max-length {self._max_length} will be cut into pieces"
            )
        return notes

    def rejected(self) -> list[str]:
        """Return a sentence about the documents that cannot be encoded, which a run with --skip-broken leaves out."""
        broken = self.found.broken
        if not broken:
            return []
        first, *others = broken[:SHOWN]
        more = "".join(f"\n  {message}" for message in others)
        rest = f"\n  and {len(broken) - SHOWN:,} more" if len(broken) > SHOWN else ""
        return [f"{plural(len(broken), 'document')} cannot be trained on; the first: {first}{more}{rest}"]

    def problems(self) -> list[str]:
        """Return sentences about what should be changed in the data of the documents that are encoded."""
        found = self.found
        problems = []
        if found.special.number:
            problems.append(
                f"{plural(found.special.number, 'document')} with special tokens of the tokenizer in the text, which "
                f"are encoded as such; the first: {found.special.first}"
            )
        if found.unknown.number:
            problems.append(
                f"{plural(found.unknown.number, 'document')} with characters that the tokenizer lacks; the first: "
                f"{found.unknown.first}"
            )
        if found.empty.number:
            problems.append(
                f"{plural(found.empty.number, 'conversation')} with an empty answer that is trained on; the first: "
                f"{found.empty.first}. Remove it, or give it the weight 0"
            )
        return problems


def _shape(document: Document) -> str:
    if document.shape or document.text is not None:
        return document.shape or "text"
    return "messages" if document.messages is not None else "prompt-completion"


def _is_visible(token: str) -> bool:
    return bool(token.strip()) and len(token) > 1


def _default_max_length(config: TrainConfig) -> int:
    positions = getattr(load_config(config.model), "max_position_embeddings", None)
    return min(DEFAULT_MAX_LENGTH, positions) if isinstance(positions, int) and positions > 0 else DEFAULT_MAX_LENGTH


def segments_of(encoded: Encoded, tokenizer: Any) -> Iterator[Segment]:
    """Yield the text of each run of tokens with one weight; decoded from the beginning, as spaces may depend on it."""
    weights = encoded.weights if encoded.weights is not None else encoded.trained
    stop, before = 0, ""
    for weight, run in groupby(weights):
        stop += len(list(run))
        text: str = tokenizer.decode(encoded.tokens[:stop], skip_special_tokens=False)
        yield Segment(text[len(before) :], float(weight))
        before = text
