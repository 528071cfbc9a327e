"""The data of a run: sources → token stores, from the cache or made now → samples → datasets and their order.

Nothing is in memory that is as long as the data: tokens and samples are mapped from files.

Long because one class opens the sources of a run and makes all of its data.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from json import dumps
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bigbatch.errors import InputError
from bigbatch.lm.config.field_groups import GROUPS
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.config.validation_sets import check_named_paths, sources_of
from bigbatch.lm.data.dataset import TokenDataset
from bigbatch.lm.data.document_counts import sample_documents, training_texts
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.legacy_fingerprint import legacy_fingerprint
from bigbatch.lm.data.pair_dataset import PairDataset
from bigbatch.lm.data.records import RecordColumns
from bigbatch.lm.data.run_order import MixedOrder, RunOrder, UniformOrder
from bigbatch.lm.data.sampling_order import LEGACY_ORDER, ORDER_VERSION
from bigbatch.lm.data.sources import DataSources, ReadOptions, open_sources
from bigbatch.lm.data.token_store.build import Tokenization, corpus_state
from bigbatch.lm.data.token_store.cache import Cache, cache_folder
from bigbatch.lm.data.token_store.reader import StoredTokens, TokenReader
from bigbatch.lm.data.token_store.samples import Samples, read_samples, write_samples
from bigbatch.lm.data.token_store.tokenized import find_stores, stored_tokenizer
from bigbatch.lm.data.token_store.workers import Encoding
from bigbatch.lm.data.tokenizer import AnyTokenizer, read_trained, train_tokenizer
from bigbatch.lm.data.validation_split import HashSplit
from bigbatch.lm.files import write_atomically
from bigbatch.lm.training.pair_data import load_pairs
from bigbatch.lm.training.token_sources import (
    TokenSource,
    check_tokenizer,
    document_inputs,
    joined,
    source_of_corpus,
    source_of_stores,
)
from bigbatch.lm.training.validation_data import read_validation_data
from bigbatch.memory.limit import describe_bytes

SAMPLES, TOKENIZERS = "samples", "tokenizers"  # kinds of the cache's entries, with ``tokens``
_NOT_IN_TOKENS = {
    *(name for group in GROUPS if group.title not in ("data", "conversations") for name in group.fields),
    *("data", "validation_data", "validation_fraction", "max_length", "data_weights"),
    *("cache", "no_cache", "cache_by_content"),
}
"""Settings that do not affect the tokens of a source: with another value, the cache is used again."""


class ProgressCallback(Protocol):
    """A function that receives the progress of a set-up."""

    def __call__(self, activity: str, done: int = 0, total: int = 0) -> None:
        """Receive the current activity in a few words, and for some the amount done and the total, 0 if unknown."""


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        training: Samples to train on.
        validation: Samples to validate on; None if there is too little data to hold any out. Of several sets, that of
            ``best_metric``, else the first.
        order: Of the training samples.
        fingerprint: SHA-256 of the tokens, in hex.
        notes: Sentences with the counts of records read, cut and left out.
        validation_sets: By name; empty if the only one has no name.
        validation_fingerprint: SHA-256 of their tokens, in hex; None if they are held out of the data.
    """

    training: TokenDataset | PairDataset
    validation: TokenDataset | PairDataset | None
    order: RunOrder
    fingerprint: str
    notes: tuple[str, ...]
    validation_sets: Mapping[str, TokenDataset] = field(default_factory=dict)
    validation_fingerprint: str | None = None


@dataclass(frozen=True)
class DataSample:
    """Some of the data, for a plan.

    Attributes:
        documents: Evenly spaced, the longest included.
        num_documents: Of how many.
        stored_inputs: Input tokens of each document of the sources that are tokens already.
        left_out: Notes about what was left out.
    """

    documents: list[Document]
    num_documents: int
    stored_inputs: NDArray[np.int64]
    left_out: tuple[str, ...]


class DataLoader:
    """Opens the sources of a run, and makes its datasets once the tokenizer is known.

        with DataLoader(config, progress) as loader:
            tokenizer = ... or loader.train_tokenizer(size)
            data = loader.load(tokenizer, max_length)

    Args:
        config: With every default resolved.
        progress: Receives the current activity.
        order_version: Of the sampling order.

    Raises:
        InputError: A source does not exist or cannot be used.
    """

    def __init__(self, config: TrainConfig, progress: ProgressCallback, *, order_version: int = ORDER_VERSION) -> None:
        self._config = config
        self._progress = progress
        self._order_version = order_version
        progress(f"reading {config.data_text}")
        self._stores = [find_stores(Path(name)) for name in config.data]
        self._sources = self._open([name for name, found in zip(config.data, self._stores, strict=True) if not found])
        self._check_no_tokens()
        root, self._cache_note = (None, None) if config.no_cache else cache_folder(config.cache)
        self._cache = Cache(root)

    def _open(self, raw: Sequence[str]) -> DataSources:
        """Open the sources that were not tokenized ahead."""
        named, fraction = self._config.validation_data or (), self._config.validation_fraction
        check_named_paths(named)
        for name in sources_of(named):
            if find_stores(Path(name)) is not None:
                raise InputError(
                    f"--validation-data {name} holds tokens of bigbatch tokenize. Pass the data that they were made "
                    "from."
                )
        if not raw and not named:
            return DataSources((), ())
        options, validation_data = read_options(self._config), sources_of(named)
        return open_sources(raw, validation_data=validation_data, options=options, with_validation=fraction > 0)

    def _check_no_tokens(self) -> None:
        """Refuse shards of tokens, to train or to validate on, for an objective that compares sequences."""
        for corpus in (*self._sources.training, *self._sources.validation):
            if corpus.shards is not None and self._config.objective != "sft":
                raise InputError(
                    f"{corpus.name} holds tokens, which are for --objective sft alone. Pass records for --objective "
                    f"{self._config.objective}."
                )

    def __enter__(self) -> "DataLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self._cache.release()

    @property
    def stored_tokenizer(self) -> AnyTokenizer | None:
        """The tokenizer in the first source that was tokenized ahead; None without such a source."""
        found = next((stores for stores in self._stores if stores is not None), None)
        return None if found is None else stored_tokenizer(found[0])

    def train_tokenizer(self, vocabulary_size: int) -> AnyTokenizer:
        """Return a tokenizer trained on the documents for training, from the cache if possible.

        Raises:
            InputError: A document cannot be read.
        """
        corpora, config = self._sources.training, self._config
        state = [corpus_state(corpus, by_content=config.cache_by_content) for corpus in corpora]
        fraction = 0.0 if self._sources.validation else config.validation_fraction
        key = _digest([vocabulary_size, fraction, state, self._settings()])

        def build(folder: Path) -> None:
            self._progress("training a tokenizer")
            texts, characters = training_texts(corpora, fraction)
            tokenizer = train_tokenizer(texts, vocabulary_size=vocabulary_size, characters=characters)
            write_atomically(folder / "tokenizer.json", tokenizer.backend_tokenizer.to_str().encode())

        return self._cache.folder(
            TOKENIZERS, key, load=lambda folder: read_trained(folder / "tokenizer.json"), build=build
        )

    def sample(self, most: int) -> DataSample:
        """Return at most ``most`` of the documents for training, evenly spaced, the longest included. Writes nothing.

        Raises:
            InputError: A document cannot be read.
        """
        corpora = self._sources.training
        raw = [corpus for corpus in corpora if corpus.shards is None]
        documents, num_documents = sample_documents(raw, self._config.validation_fraction * self._splits, most)
        stored = [store for stores in self._stores if stores is not None for store in stores]
        counts = [rows.counts - 1 for rows in StoredTokens(stored).rows()]
        counts += [document_inputs(corpus) for corpus in corpora if corpus.shards is not None]
        left_out = tuple(note for corpus in corpora for note in corpus.left_out)
        return DataSample(documents, num_documents, np.concatenate([np.zeros(0, np.int64), *counts]), left_out)

    def load(self, tokenizer: AnyTokenizer, max_length: int) -> RunData:
        """Return the datasets, from the cache if possible.

        Raises:
            InputError: A document cannot be read or encoded, or a source was tokenized with another tokenizer.
            BigbatchError: The cache cannot be written.
        """
        config = self._config
        tokenization = Tokenization(
            Encoding(tokenizer, config.train_on, config.skip_broken, config.objective),
            self._cache,
            settings=self._settings(),
            by_content=config.cache_by_content,
            model=config.tokenizer_name,
            progress=self._progress,
        )
        training, split_key = self._training_sources(tokenization)
        validation = [source_of_corpus(corpus, tokenization) for corpus in self._sources.validation]
        readers = [source.reader for source in training]
        split = self._split(readers, split_key)
        notes = [note for source in (*training, *validation) for note in source.notes]
        notes += self._sources.notes
        if config.objective != "sft":
            pairs = load_pairs(config, tokenizer, training, validation, max_length=max_length, split=split)
            order = self._order(pairs.training, pairs.by_source)
            fingerprint = _digest(joined(training).fingerprints)
            notes += [*pairs.notes, *self._notes_of_order(order), *self._cache_notes()]
            apart = _digest(joined(validation).fingerprints) if validation else None
            return RunData(pairs.training, pairs.validation, order, fingerprint, tuple(notes), {}, apart)
        (samples, held_out), by_source, fingerprint = self._samples(training, max_length, split)
        if not len(samples.starts):
            raise InputError(f"{config.data_text} has no sequence to train on. Pass other --data.")
        tokens = joined(training).reader
        dataset = TokenDataset(tokens, samples)
        order = self._order(dataset, [number for number, _ in by_source])
        notes += [f"training data: {samples.counts.describe()}", *self._notes_of_order(order)]
        held = read_validation_data(config, validation, (tokens, held_out), self._samples, max_length)
        notes += (*held.notes, *self._cache_notes())
        if self._order_version == LEGACY_ORDER:
            fingerprint = legacy_fingerprint(readers, max_length=max_length, split=split)
        return RunData(dataset, held.primary, order, fingerprint, tuple(notes), held.named, held.fingerprint)

    def _settings(self) -> dict[str, Any]:
        settings = self._config.model_dump(mode="json", exclude=_NOT_IN_TOKENS)
        return settings if self._config.objective == "sft" else settings | {"objective": self._config.objective}

    def _training_sources(self, tokenization: Tokenization) -> tuple[list[TokenSource], int | None]:
        """Return the tokens of each source, and the key of the part of a single text that is held out, if any."""
        corpora = iter(self._sources.training)
        found = []
        for name, stores in zip(self._config.data, self._stores, strict=True):
            if stores is None:
                found.append(source_of_corpus(next(corpora), tokenization))
            elif self._config.objective != "sft":
                raise InputError(
                    f"{name} holds tokens, which bigbatch tokenize writes for --objective sft alone. Pass the records "
                    "that they were made from."
                )
            else:
                check_tokenizer(name, stores, tokenization, self._config.tokenizer_name)
                found.append(source_of_stores(stores))
        if len(found) == 1 and found[0].is_single_text and self._sources.training and self._splits:
            store, held_out = tokenization.cut_store(
                self._sources.training[0], validation_fraction=self._config.validation_fraction
            )
            return [source_of_stores([store])], held_out
        return found, None

    @property
    def _splits(self) -> bool:
        """Whether validation data is held out of the training data."""
        return self._config.validation_fraction > 0 and not self._sources.validation

    def _split(self, readers: Sequence[TokenReader], held_out: int | None) -> HashSplit:
        if held_out is not None:
            return HashSplit(also=held_out)
        if not self._splits:
            return HashSplit()
        keys = (rows.keys for reader in readers for rows in reader.rows())
        return HashSplit.of(keys, validation_fraction=self._config.validation_fraction)

    def _samples(
        self, sources: Sequence[TokenSource], max_length: int, split: HashSplit
    ) -> tuple[list[Samples], list[list[int]], str]:
        """Return the samples of both sides, their numbers by source, and the fingerprint of the tokens."""
        readers = [source.reader for source in sources]
        fingerprint = _digest([fingerprint for source in sources for fingerprint in source.fingerprints])
        split_facts = [split.fraction, split.also, split.never]
        samples, by_source = self._cache.folder(
            SAMPLES,
            _digest([[source.fingerprints for source in sources], max_length, split_facts]),
            load=read_samples,
            build=lambda folder: write_samples(folder, readers, max_length=max_length, split=split, facts={}),
        )
        return samples, by_source, fingerprint

    def _notes_of_order(self, order: RunOrder) -> list[str]:
        return [order.describe(self._config.data)] if isinstance(order, MixedOrder) else []

    def _order(self, dataset: TokenDataset | PairDataset, numbers: Sequence[int]) -> RunOrder:
        config = self._config
        if config.data_weights is None:
            return UniformOrder(dataset.lengths, config.seed, self._order_version)
        empty = next((name for name, number in zip(config.data, numbers, strict=True) if not number), None)
        if empty is not None:
            raise InputError(f"{empty} has no sequence to train on, so it cannot have a weight. Leave it out.")
        lengths: NDArray[np.integer[Any]] = dataset.lengths
        parts = np.split(lengths, np.cumsum(numbers)[:-1])
        return MixedOrder(parts, config.data_weights, seed=config.seed)

    def _cache_notes(self) -> Iterator[str]:
        if self._cache_note is not None:
            yield self._cache_note
        if not self._cache.has_written or self._cache.is_temporary:
            return
        entries = self._cache.entries()
        size = describe_bytes(sum(entry.num_bytes for entry in entries))
        yield f"token cache: {size} in {self._cache.root}; bigbatch cache lists and removes it"


def read_options(config: TrainConfig) -> ReadOptions:
    """Return how the data of a run is read."""
    columns = RecordColumns(config.text_column, config.messages_column, config.objective)
    return ReadOptions(skip_broken=config.skip_broken, split=config.split, subset=config.subset, columns=columns)


def _digest(value: Any) -> str:
    return sha256(dumps(value, sort_keys=True, default=str).encode()).hexdigest()
