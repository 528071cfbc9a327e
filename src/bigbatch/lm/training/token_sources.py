"""The tokens of each source of a run: token stores from the cache or made now, and shards where they are.

corpus → store of the cache, or index of its shards → TokenSource: a reader, its fingerprints and notes
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from json import dumps
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bigbatch import __version__
from bigbatch.errors import InputError
from bigbatch.lm.data.corpus import Corpus
from bigbatch.lm.data.token_records import foreign_token, token_ids
from bigbatch.lm.data.token_shards.index import VERSION, Index, read_index, write_index
from bigbatch.lm.data.token_shards.reader import ShardTokens
from bigbatch.lm.data.token_shards.shards import TokenShards, state_of
from bigbatch.lm.data.token_store.build import Store, Tokenization, vocabulary_state
from bigbatch.lm.data.token_store.reader import JoinedTokens, StoredTokens, TokenReader

SHARDS = "shards"  # kind of the cache's entries that are indexes


@dataclass(frozen=True)
class TokenSource:
    """The tokens of one source.

    Attributes:
        reader: Of them.
        fingerprints: SHA-256 of the tokens, in hex; of each store or index.
        notes: About the data.
        is_single_text: Whether the source is one text in a store of the cache.
    """

    reader: TokenReader
    fingerprints: tuple[str, ...]
    notes: tuple[str, ...]
    is_single_text: bool = False


def source_of_stores(stores: Sequence[Store]) -> TokenSource:
    """Return the tokens of stores as one source."""
    manifests = [manifest for _, manifest in stores]
    return TokenSource(
        StoredTokens(stores),
        tuple(manifest.fingerprint for manifest in manifests),
        tuple(note for manifest in manifests for note in manifest.notes),
        is_single_text=len(manifests) == 1 and manifests[0].is_single_text,
    )


def source_of_corpus(corpus: Corpus, tokenization: Tokenization) -> TokenSource:
    """Return the tokens of a corpus: of its shards where they are, or of a store that is made if the cache has none.

    Raises:
        InputError: A document or a shard cannot be read or encoded, or has tokens of another tokenizer.
        BigbatchError: The cache cannot be written.
    """
    if corpus.shards is None:
        return source_of_stores([tokenization.store(corpus)])
    index = indexed(corpus.shards, tokenization)
    manifest = index.manifest
    vocabulary = len(tokenization.encoding.tokenizer)
    if (reason := foreign_token(manifest.largest_token, corpus.name, vocabulary)) is not None:
        raise InputError(reason)
    reader = ShardTokens(corpus.shards, index)
    if not corpus.shards.storage.is_local:
        reader.read(0, 1)  # a storage that cannot send parts of files is an error now, not in the first update
    return TokenSource(reader, (manifest.fingerprint,), manifest.notes)


def joined(sources: Sequence[TokenSource]) -> TokenSource:
    """Return several sources as one, without notes."""
    reader = sources[0].reader if len(sources) == 1 else JoinedTokens([source.reader for source in sources])
    return TokenSource(reader, tuple(chain.from_iterable(source.fingerprints for source in sources)), ())


def indexed(shards: TokenShards, tokenization: Tokenization) -> Index:
    """Return the index of shards; make it if the cache has none.

    Raises:
        InputError: A shard cannot be read, or changed meanwhile.
        BigbatchError: The cache cannot be written.
    """
    skip_broken = tokenization.encoding.skip_broken
    state = state_of(shards)
    key = sha256(dumps([VERSION, __version__, shards.name, state, skip_broken]).encode()).hexdigest()

    def build(folder: Path) -> None:
        tokenization.progress(f"indexing {shards.name}", 0, 0)
        write_index(folder, shards, skip_broken=skip_broken, progress=tokenization.progress)

    def wait() -> None:
        tokenization.progress(f"waiting for another process that indexes {shards.name}", 0, 0)

    return tokenization.cache.folder(SHARDS, key, load=read_index, build=build, on_wait=wait)


def document_inputs(corpus: Corpus) -> NDArray[np.int64]:
    """Return the input tokens of each document of a corpus of tokens; reads it once.

    Raises:
        InputError: A shard or a record cannot be read.
    """
    return np.fromiter((len(token_ids(document)) - 1 for document in corpus), np.int64)


def check_tokenizer(name: str, stores: Sequence[Store], tokenization: Tokenization, model: str) -> None:
    """Check that stores that were made ahead have the tokens of the run's tokenizer.

    Raises:
        InputError: They have not.
    """
    found = stores[0][1]
    if found.tokenizer != vocabulary_state(tokenization.encoding.tokenizer):
        raise InputError(
            f"{name} was tokenized with the tokenizer of {found.model}, and that of {model} differs in its tokens, "
            "special tokens or chat template. Tokenize the data again, or pass the same --model."
        )
