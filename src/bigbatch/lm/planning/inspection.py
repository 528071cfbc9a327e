"""Inspection of data before a run: counts, lengths, samples with what is trained on, and problems.

documents → encoded as a run encodes them → Inspection
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.config.train_fields import DEFAULT_MAX_LENGTH
from bigbatch.lm.config.validation_sets import sources_of
from bigbatch.lm.data.chat_templates import describe_template, set_chat_template
from bigbatch.lm.data.conversations import trained_weights
from bigbatch.lm.data.document_counts import texts_of
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.sources import open_sources
from bigbatch.lm.data.token_store.tokenized import find_stores
from bigbatch.lm.data.tokenization import Encoded, encode_documents
from bigbatch.lm.data.tokenizer import train_tokenizer
from bigbatch.lm.model.pretrained import TINY_VOCABULARY, load_config
from bigbatch.lm.text import plural
from bigbatch.lm.training.data import ProgressCallback, read_options
from bigbatch.lm.training.run_tokenizer import load_run_tokenizer, vocabulary_to_train

SKIPPED = "left out; the first: "  # in notes about broken input
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


@dataclass(frozen=True)
class Inspection:
    """What `inspect_data` found.

    Attributes:
        notes: Sentences about the data and the template.
        lengths: Number of sequences by the power of two that is at least their length in tokens, before cutting.
        samples: At random, the same for the same data and seed.
        problems: Sentences; empty for data that can be trained on as it is.
    """

    notes: tuple[str, ...]
    lengths: dict[int, int]
    samples: tuple[InspectedSample, ...]
    problems: tuple[str, ...]


@dataclass
class _Kind:
    """A kind of problem: how often it was found, and where first."""

    number: int = 0
    first: str = ""

    def add(self, place: str) -> None:
        self.number += 1
        self.first = self.first or place


@dataclass
class _Findings:
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


def inspect_data(config: TrainConfig, *, num_samples: int, progress: ProgressCallback) -> Inspection:
    """Read and encode the data of a run, and report what would be trained on.

    Args:
        config: With every default resolved.
        num_samples: Samples to show.
        progress: Receives the current activity.

    Raises:
        InputError: The data, the model or the template does not exist or cannot be used at all.
    """
    for name in config.data:
        if find_stores(Path(name)) is not None:
            raise InputError(f"{name} holds tokens. Inspect the data that they were made from.")
    tokenizer: Any = load_run_tokenizer(config)
    progress(f"reading {config.data_text}")
    sources = open_sources(
        config.data,
        validation_data=sources_of(config.validation_data or ()),
        options=replace(read_options(config), skip_broken=True),
        with_validation=config.validation_fraction > 0,
    )
    corpora = (*sources.training, *sources.validation)
    if tokenizer is None:
        progress("training a tokenizer")
        texts = (text for corpus in corpora for document in corpus for text in texts_of(document))
        tokenizer = train_tokenizer(texts, vocabulary_size=vocabulary_to_train(config) or TINY_VOCABULARY)
    template_notes = set_chat_template(tokenizer, config.chat_template)
    progress("encoding the documents")
    inspector = _Inspector(config, tokenizer, num_samples)
    inspector.run(chain.from_iterable(corpora))
    skipped = [kind.describe() for corpus in corpora for kind in corpus.broken]
    notes = [note for corpus in corpora for note in corpus.notes if not (corpus.broken and SKIPPED in note)]
    return Inspection(
        notes=(*notes, *sources.notes, *inspector.notes(), *template_notes),
        lengths=dict(sorted(inspector.found.lengths.items())),
        samples=inspector.samples(),
        problems=(*skipped, *inspector.problems()),
    )


class _Inspector:
    """One pass over the documents."""

    def __init__(self, config: TrainConfig, tokenizer: Any, num_samples: int) -> None:
        self.found = _Findings()
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
        encoded_documents = encode_documents(
            self._seen(documents), self._tokenizer, train_on=self._config.train_on, broken=self.found.broken
        )
        for number, (index, parts) in enumerate(groupby(encoded_documents, key=lambda encoded: encoded.document)):
            encoded = list(parts)
            source = self._sources.pop(index)
            self._count(encoded, source)
            self._choose(number, source, encoded)

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
            found.cut += len(encoded.tokens) - 1 > self._max_length
        if unknown is not None and any(unknown in encoded.tokens for encoded in parts):
            found.unknown.add(source)

    def _choose(self, number: int, source: str, encoded: list[Encoded]) -> None:
        """Keep a uniform sample of the documents so far (reservoir sampling)."""
        if len(self._chosen) < self._num_samples:
            self._chosen[number] = (source, encoded)
        elif self._num_samples and (place := self._random.randrange(number + 1)) < self._num_samples:
            del self._chosen[list(self._chosen)[place]]
            self._chosen[number] = (source, encoded)

    def samples(self) -> tuple[InspectedSample, ...]:
        return tuple(
            InspectedSample(source, len(part.tokens), sum(part.trained), tuple(_segments(part, self._tokenizer)))
            for _, (source, parts) in sorted(self._chosen.items())
            for part in parts
        )

    def notes(self) -> list[str]:
        found, config = self.found, self._config
        shapes = ", ".join(f"{number:,} {shape}" for shape, number in found.shapes.most_common())
        sequences = sum(parts * number for parts, number in found.sequences.items())
        share = f"{100 * found.trained / found.tokens:.0f} %" if found.tokens else "none"
        notes = [
            f"{plural(found.shapes.total(), 'document')}: {shapes}",
            f"{plural(sequences, 'sequence')} with {plural(found.tokens, 'token')}, {found.trained:,} of them "
            f"({share}) trained on",
        ]
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

    def problems(self) -> list[str]:
        found = self.found
        problems = []
        if found.broken:
            number = plural(len(found.broken), "document")
            first, *others = found.broken[:SHOWN]
            more = "".join(f"\n  {message}" for message in others)
            rest = f"\n  and {len(found.broken) - SHOWN:,} more" if len(found.broken) > SHOWN else ""
            problems.append(f"{number} cannot be trained on; the first: {first}{more}{rest}")
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


def _segments(encoded: Encoded, tokenizer: Any) -> Iterator[Segment]:
    """Yield the text of each run of tokens with one weight; decoded from the beginning, as spaces may depend on it."""
    weights = encoded.weights if encoded.weights is not None else encoded.trained
    stop, before = 0, ""
    for weight, run in groupby(weights):
        stop += len(list(run))
        text: str = tokenizer.decode(encoded.tokens[:stop], skip_special_tokens=False)
        yield Segment(text[len(before) :], float(weight))
        before = text
