"""Tokenize a corpus into a store of the cache, or find it there.

corpus, tokenizer, settings → key → cached folder, or documents → batches → blocks on every core → shards
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from bigbatch import __version__
from bigbatch.errors import InputError, os_reason
from bigbatch.lm.cpu_cores import cpu_cores
from bigbatch.lm.data.corpus import Corpus
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.token_store.cache import Cache
from bigbatch.lm.data.token_store.encoding import batches
from bigbatch.lm.data.token_store.manifest import VERSION, Manifest, read_manifest
from bigbatch.lm.data.token_store.workers import Encoding, encode_all
from bigbatch.lm.data.token_store.writer import StoreWriter
from bigbatch.lm.data.tokenizer import AnyTokenizer
from bigbatch.lm.data.validation_split import cut_single
from bigbatch.lm.text import plural

TOKENS = "tokens"
"""Kind of the cache's entries that are token stores."""

READING = 2
"""Changed when records are read, or texts are encoded, otherwise than before: older stores are then made again."""

Store = tuple[Path, Manifest]
ProgressCallback = Callable[[str, int, int], object]


@dataclass(frozen=True)
class Tokenization:
    """How corpora become stores.

    Attributes:
        encoding: With the tokenizer of the model and its chat template.
        cache: Where stores are.
        settings: Other settings on which the tokens depend.
        by_content: Whether files are known by a hash of their content, not by size and modification time.
        model: Where the tokenizer came from, for messages.
        progress: Receives an activity, the documents done, and 0.
    """

    encoding: Encoding
    cache: Cache
    settings: Mapping[str, Any] = field(default_factory=dict)
    by_content: bool = False
    model: str = ""
    progress: ProgressCallback = lambda activity, done, total: None

    def store(self, corpus: Corpus) -> Store:
        """Return the store of a corpus; tokenize it if the cache has none.

        Raises:
            InputError: A document cannot be read or encoded, or a file changed meanwhile.
            BigbatchError: The cache cannot be written.
        """
        return self._store(corpus, self._key(corpus), lambda folder: self._write(folder, corpus))

    def cut_store(self, corpus: Corpus, *, validation_fraction: float) -> tuple[Store, int | None]:
        """Return the store of a corpus of one text, cut in two, and the key of the part that is held out, if any.

        Raises:
            InputError: As `store`.
        """
        key = _digest([self._key(corpus), "cut", validation_fraction])
        store = self._store(corpus, key, lambda folder: self._write_cut(folder, corpus, validation_fraction))
        return store, store[1].description.get("held_out")

    def _store(self, corpus: Corpus, key: str, build: Callable[[Path], object]) -> Store:
        def load(folder: Path) -> Store:
            return folder, read_manifest(folder)

        def wait() -> None:
            self.progress(f"waiting for another process that tokenizes {corpus.name}", 0, 0)

        return self.cache.folder(TOKENS, key, load=load, build=build, on_wait=wait)

    def _key(self, corpus: Corpus) -> str:
        return _digest(
            {
                "versions": [VERSION, READING, __version__, tokenizers.__version__, transformers.__version__],
                "data": corpus_state(corpus, by_content=self.by_content),
                "tokenizer": tokenizer_state(self.encoding.tokenizer),
                "settings": dict(self.settings),
                # only then: stores of other tokenizers stay valid
                **({"prompts": "with their completions"} if self.encoding.joins_texts else {}),
            }
        )

    def _write(self, folder: Path, corpus: Corpus) -> None:
        before = file_states(corpus.files)
        documents = iter(corpus)
        first = list(islice(documents, 2))
        is_single_text = len(first) == 1 and first[0].text is not None
        with StoreWriter(folder) as writer:
            write_documents(writer, chain(first, documents), self.encoding, name=corpus.name, progress=self.progress)
        if file_states(corpus.files) != before:
            raise InputError(f"{corpus.name} changed while it was read. Start again when nothing writes to it.")
        self._finish(writer, corpus, is_single_text=is_single_text)

    def _write_cut(self, folder: Path, corpus: Corpus, fraction: float) -> None:
        training, held_out = cut_single(list(corpus), fraction)
        with StoreWriter(folder) as writer:
            write_documents(writer, [*training, *held_out], self.encoding, name=corpus.name, progress=self.progress)
        self._finish(writer, corpus, held_out=int(held_out[0].key[:16], 16) if held_out else None)

    def _finish(self, writer: StoreWriter, corpus: Corpus, *, is_single_text: bool = False, **more: Any) -> None:
        broken = broken_notes(writer)
        manifest = Manifest(
            shards=(),
            documents=0,
            tokenizer=vocabulary_state(self.encoding.tokenizer),
            model=self.model,
            notes=(*corpus.notes, *broken),
            left_out=(*corpus.left_out, *broken),
            is_single_text=is_single_text,
            description={"data": corpus.name, **more},
        )
        writer.finish(manifest)


def write_documents(
    writer: StoreWriter,
    documents: Iterable[Document],
    encoding: Encoding,
    *,
    name: str,
    progress: ProgressCallback = lambda activity, done, total: None,
) -> None:
    """Encode documents on every core and append them to a store.

    Raises:
        InputError: A document cannot be read or encoded.
        OSError: The store cannot be written.
    """
    activity = f"tokenizing {name}"  # how many documents there are is not known
    progress(activity, 0, 0)
    for block in encode_all(batches(documents, encoding.encoder), encoding, processes=cpu_cores().usable):
        writer.add(block)
        progress(activity, writer.documents, 0)
    if not writer.documents and writer.num_broken:
        raise InputError(writer.first_broken)


def broken_notes(writer: StoreWriter) -> tuple[str, ...]:
    """Return a note about the documents that could not be encoded, if there are any."""
    if not writer.num_broken:
        return ()
    left_out = plural(writer.num_broken, "document")
    return (f"{left_out} left out; the first: {writer.first_broken}",)


def corpus_state(corpus: Corpus, *, by_content: bool) -> Any:
    """Return a JSON value that differs if the documents of a corpus do.

    For each file its path, size and modification time; with ``by_content``, its name and a hash of its content, except
    of shards and remote files. Of a corpus without files, a hash of its documents.

    Raises:
        InputError: A file cannot be read.
    """
    if corpus.state is not None:
        return [corpus.name, corpus.state()]
    if not corpus.files:
        digest = hashlib.sha256()
        for document in corpus:
            digest.update(bytes.fromhex(document.key))
        return [corpus.name, digest.hexdigest()]
    return [corpus.name, file_hashes(corpus.files) if by_content else file_states(corpus.files)]


def file_states(files: Iterable[Path]) -> list[list[Any]]:
    """Return [path, size, modification time in ns] of files.

    Raises:
        InputError: A file cannot be found.
    """
    found: list[list[Any]] = []
    for path in files:
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"cannot read {path}: {os_reason(error)}.") from error
        found.append([str(path.absolute()), status.st_size, status.st_mtime_ns])
    return found


def file_hashes(files: Iterable[Path]) -> list[list[str]]:
    """Return [name, SHA-256 of the content] of files.

    Raises:
        InputError: A file cannot be read.
    """
    found = []
    for path in files:
        try:
            with path.open("rb") as file:
                found.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
        except OSError as error:
            raise InputError(f"cannot read {path}: {os_reason(error)}.") from error
    return found


def tokenizer_state(tokenizer: AnyTokenizer) -> str:
    """Return a SHA-256, in hex, of everything in a tokenizer that tokens depend on."""
    if tokenizer.is_fast:
        backend: Any = tokenizer.backend_tokenizer
        backend.no_truncation()  # encoding does the same
        backend.no_padding()
        rules = backend.to_str()
    else:
        rules = f"{type(tokenizer).__name__} {tokenizer.init_kwargs}"
    return _digest([rules, vocabulary_state(tokenizer), tokenizer.split_special_tokens])


def vocabulary_state(tokenizer: AnyTokenizer) -> str:
    """Return a SHA-256, in hex, of the tokens, the special tokens and the chat template of a tokenizer."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return _digest([sorted(tokenizer.get_vocab().items()), special, tokenizer.chat_template])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
