"""Tokenize data ahead of training, into a folder that is written at once or not at all.

sources → documents of one part → token store and tokenizer → FOLDER, or FOLDER/part-00003-of-00008
"""

import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from bigbatch.errors import BigbatchError, InputError, os_reason
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.chat_templates import set_chat_template
from bigbatch.lm.data.corpus import Corpus
from bigbatch.lm.data.sources import open_sources
from bigbatch.lm.data.token_store.build import broken_notes, vocabulary_state, write_documents
from bigbatch.lm.data.token_store.manifest import Manifest
from bigbatch.lm.data.token_store.reader import StoredTokens
from bigbatch.lm.data.token_store.samples import make_samples
from bigbatch.lm.data.token_store.tokenized import TOKENIZER, TRAINED, find_stores, part_name, part_of
from bigbatch.lm.data.token_store.workers import Encoding
from bigbatch.lm.data.token_store.writer import StoreWriter
from bigbatch.lm.data.tokenizer import AnyTokenizer
from bigbatch.lm.data.validation_split import HashSplit
from bigbatch.lm.files import PARTIAL, remove, sync_folder, write_atomically
from bigbatch.lm.runs.identity import digest_of
from bigbatch.lm.text import plural
from bigbatch.lm.training.data import DataLoader, ProgressCallback, read_options
from bigbatch.lm.training.run_tokenizer import (
    load_run_tokenizer,
    train_run_tokenizer,
    vocabulary_to_train,
)
from bigbatch.memory.limit import describe_bytes


@dataclass(frozen=True)
class TokenizeResult:
    """What was written.

    Attributes:
        notes: Sentences with the counts.
        missing: Numbers of the parts that do not exist yet.
    """

    notes: tuple[str, ...]
    missing: tuple[int, ...]


def tokenize(config: TrainConfig, out: Path, *, part: tuple[int, int], progress: ProgressCallback) -> TokenizeResult:
    """Tokenize one part of the data into a folder.

    Args:
        config: The data, the conversations and the model.
        out: The folder.
        part: Number of the part, from 0, and how many there are.
        progress: Receives the current activity.

    Raises:
        InputError: The data cannot be read or encoded, or the folder exists and holds something else.
        BigbatchError: The folder cannot be written.
    """
    number, of = part
    target = out if of == 1 else out / part_name(number, of)
    _check_free(out, target, of)
    for name in config.data:
        if find_stores(Path(name)) is not None:
            raise InputError(f"{name} holds tokens already. Pass the data that they were made from.")
    progress(f"reading {config.data_text}")
    sources = open_sources(config.data, options=read_options(config), with_validation=False)
    tokenizer = _tokenizer(config, progress)
    template_notes = set_chat_template(tokenizer, config.chat_template)
    encoding = Encoding(tokenizer, config.train_on, config.skip_broken)
    partial = target.with_name(f"{target.name}.{os.getpid()}{PARTIAL}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(f"{target.name}.*{PARTIAL}"):  # of a killed process
            remove(leftover)
        partial.mkdir()
        manifest = _write(partial, config, encoding, sources.training, part, progress)
        with suppress(FileNotFoundError):
            target.rmdir()
        partial.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise BigbatchError(
            f"--out {out} cannot be written: {os_reason(error)}. Nothing incomplete is kept."
        ) from error
    finally:
        with suppress(OSError):
            remove(partial)
    size = describe_bytes(manifest.num_bytes)
    counts = f"{target}: {plural(manifest.documents, 'document')}, {plural(manifest.tokens, 'token')}, {size}"
    unused_splits = [*sources.notes, _about_unused(config, out)] if sources.notes else []
    notes = [*template_notes, *manifest.notes, *unused_splits, counts]
    if config.max_length is not None:
        samples, _ = make_samples(StoredTokens([(target, manifest)]), max_length=config.max_length, split=HashSplit())
        sequences = plural(samples.counts.samples, "sequence")
        notes.append(f"with --max-length {config.max_length}: {sequences}, before any are held out for validation")
    parts = [i for i in range(of) if of > 1 and not (out / part_name(i, of)).is_dir()]
    return TokenizeResult(tuple(notes), tuple(parts))


def _about_unused(config: TrainConfig, out: Path) -> str:
    """Return what a run on the tokens validates on, although the data has a validation split, and how to use that."""
    is_whole = len(config.data) == 1 and config.subset is None
    how = f"--validation-data {shlex.quote(config.data[0])}" if is_whole else "--validation-data with the data it is in"
    return (
        f"bigbatch train --data {shlex.quote(str(out))} holds documents out of these tokens to validate on; to "
        f"validate on the split validation instead, pass {how}"
    )


def _write(
    folder: Path,
    config: TrainConfig,
    encoding: Encoding,
    corpora: Sequence[Corpus],
    part: tuple[int, int],
    progress: ProgressCallback,
) -> Manifest:
    documents = chain.from_iterable(corpora)
    with StoreWriter(folder) as writer:
        write_documents(writer, part_of(documents, *part), encoding, name=config.data_text, progress=progress)
    _save_tokenizer(encoding.tokenizer, folder / TOKENIZER, is_trained=vocabulary_to_train(config) is not None)
    broken = broken_notes(writer)
    sizes = [[path.name, path.stat().st_size] for corpus in corpora for path in corpus.files]
    sizes += [corpus.state() for corpus in corpora if corpus.state is not None and not corpus.files]  # remote
    settings = [config.skip_broken, config.split, config.subset, config.train_on, config.text_column]
    manifest = Manifest(
        shards=(),
        documents=0,
        tokenizer=vocabulary_state(encoding.tokenizer),
        model=config.tokenizer_name,
        notes=(*(note for corpus in corpora for note in corpus.notes), *broken) if part[0] == 0 else broken,
        left_out=(*(note for corpus in corpora for note in corpus.left_out), *broken) if part[0] == 0 else broken,
        part=part,
        description={
            "data": config.data_text,
            "state": digest_of({"files": sizes}),
            "settings": digest_of({"settings": [*settings, config.messages_column]}),
        },
    )
    return writer.finish(manifest)


def _tokenizer(config: TrainConfig, progress: ProgressCallback) -> AnyTokenizer:
    tokenizer = load_run_tokenizer(config)
    if tokenizer is not None:
        return tokenizer
    with DataLoader(config.model_copy(update={"no_cache": True}).resolved(), progress) as loader:
        return train_run_tokenizer(config, loader)


def _save_tokenizer(tokenizer: AnyTokenizer, folder: Path, *, is_trained: bool) -> None:
    folder.mkdir()
    if is_trained:
        write_atomically(folder / TRAINED, tokenizer.backend_tokenizer.to_str().encode())
    else:
        tokenizer.save_pretrained(str(folder))
        sync_folder(folder)


def _check_free(out: Path, target: Path, of: int) -> None:
    """Check that the folder, or this part of it, can be made."""
    try:
        names = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
        others = sorted(path.name for path in out.iterdir()) if out.is_dir() and of > 1 else []
    except OSError as error:
        raise InputError(f"--out {out} cannot be read: {os_reason(error)}.") from error
    if names or (target.exists() and not target.is_dir()):
        raise InputError(f"--out {target} exists. Name a new folder, or remove it first.")
    strange = [name for name in others if not name.startswith("part-") or f"-of-{of:05d}" not in name]
    if strange:
        raise InputError(f"--out {out} holds {strange[0]}, which is no part of {of:,}. Name a new or empty folder.")
