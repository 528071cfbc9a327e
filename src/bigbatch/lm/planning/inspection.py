"""Inspection of data before a run: counts, lengths, samples with what is trained on, and problems.

documents → tokenizer of the run, trained on the same texts → encoded as a run encodes them → Inspection
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.config.validation_sets import sources_of
from bigbatch.lm.data.chat_templates import set_chat_template
from bigbatch.lm.data.corpus import Corpus
from bigbatch.lm.data.document_counts import training_texts
from bigbatch.lm.data.sources import DataSources, open_sources
from bigbatch.lm.data.token_store.tokenized import find_stores
from bigbatch.lm.data.tokenizer import AnyTokenizer, train_tokenizer
from bigbatch.lm.planning.document_inspector import InspectedSample as InspectedSample
from bigbatch.lm.planning.document_inspector import Inspector
from bigbatch.lm.planning.document_inspector import Segment as Segment
from bigbatch.lm.planning.pair_inspector import PairInspector
from bigbatch.lm.training.data import ProgressCallback, read_options
from bigbatch.lm.training.run_tokenizer import load_run_tokenizer, vocabulary_to_train

SKIPPED = "left out; the first: "  # in notes about broken input
REFUSED = ", refused by a run without --skip-broken"


@dataclass(frozen=True)
class Inspection:
    """What `inspect_data` found.

    Attributes:
        notes: Sentences about the data and the template.
        lengths: Number of sequences to train on by the power of two that is at least their length in tokens, before
            cutting.
        samples: Of the documents to train on, at random; the same for the same data and seed.
        problems: Sentences; empty for data that can be trained on as it is, or with ``skip_broken``, without what is
            left out.
        left_out: Sentences about broken records, files and documents that a run with ``skip_broken`` leaves out;
            without it they are problems.
    """

    notes: tuple[str, ...]
    lengths: dict[int, int]
    samples: tuple[InspectedSample, ...]
    problems: tuple[str, ...]
    left_out: tuple[str, ...] = ()


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
    if tokenizer is None:
        progress("training a tokenizer")
        tokenizer = _train_tokenizer(config, sources)
    template_notes = set_chat_template(tokenizer, config.chat_template)
    progress("encoding the documents")
    inspector = _inspector(sources.training, config, tokenizer, num_samples)
    counts, rejected, problems = inspector.counts(), inspector.rejected(), inspector.problems()
    if sources.validation:
        held = _inspector(sources.validation, config, tokenizer, 0)
        counts = [f"training data: {line}" for line in counts] + [f"validation data: {line}" for line in held.counts()]
        rejected += [f"validation data: {sentence}" for sentence in held.rejected()]
        problems += [f"validation data: {sentence}" for sentence in held.problems()]
    corpora = (*sources.training, *sources.validation)
    skips = config.skip_broken
    broken = [kind.describe("" if skips else REFUSED) for corpus in corpora for kind in corpus.broken] + rejected
    # Without --skip-broken, a run does not leave broken input out.
    notes = [note for corpus in corpora for note in corpus.notes if skips or not (corpus.broken and SKIPPED in note)]
    return Inspection(
        notes=(*notes, *sources.notes, *counts, *inspector.notes(), *template_notes),
        lengths=dict(sorted(inspector.found.lengths.items())),
        samples=inspector.samples(),
        problems=tuple(problems if skips else broken + problems),
        left_out=tuple(broken if skips else ()),
    )


def _train_tokenizer(config: TrainConfig, sources: DataSources) -> AnyTokenizer:
    """Return the tokenizer that a run trains on these sources: on the documents for training only."""
    size = vocabulary_to_train(config)
    assert size is not None, "the tokenizer is loaded"
    texts, characters = training_texts(sources.training, 0.0 if sources.validation else config.validation_fraction)
    return train_tokenizer(texts, vocabulary_size=size, characters=characters)


def _inspector(corpora: Sequence[Corpus], config: TrainConfig, tokenizer: AnyTokenizer, num_samples: int) -> Inspector:
    """Return an inspector that has read all documents of the corpora."""
    inspector = (Inspector if config.objective == "sft" else PairInspector)(config, tokenizer, num_samples)
    inspector.run(chain.from_iterable(corpora))
    return inspector
