"""Statistics of the data for a plan: the lengths of the sequences, without their tokens.

documents → at most 2,000 of them, the longest included → tokens of each sequence
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.config.train_fields import DEFAULT_MAX_LENGTH
from bigbatch.lm.data.chat_templates import set_chat_template
from bigbatch.lm.data.dataset import encode
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.pair_dataset import encode_pairs
from bigbatch.lm.data.sampling_order import epoch_windows
from bigbatch.lm.model.from_scratch import new_model_config
from bigbatch.lm.model.pretrained import TINY, load_config, tiny_config
from bigbatch.lm.text import plural
from bigbatch.lm.training.data import DataLoader, ProgressCallback
from bigbatch.lm.training.run_tokenizer import (
    load_run_tokenizer,
    train_run_tokenizer,
    vocabulary_to_train,
)

MOST_DOCUMENTS = 2_000  # encoded for their lengths; evenly spaced if the data has more
BYTES_A_TOKEN = 4  # approximately, of English text and code; used without a tokenizer


@dataclass(frozen=True)
class DataStatistics:
    """Lengths of the data, and the configuration of the model.

    Attributes:
        model_config: Model configuration of transformers.
        max_length: Tokens to which sequences are cut.
        lengths: The distinct lengths of sequences in tokens, the longest first.
        window: Tokens of each sequence of the first update.
        most_rows: Sequences of the largest update.
        num_updates: Updates of the run; approximate if the batch is counted in tokens or documents were sampled.
        notes: Sentences about the estimates.
        num_parts: Sequences of a sample; its tokens are those of all of them, padded to the longest.
        is_sample: Whether only some of the documents were measured.
    """

    model_config: Any
    max_length: int
    lengths: tuple[int, ...]
    window: tuple[int, ...]
    most_rows: int
    num_updates: int
    notes: tuple[str, ...]
    num_parts: int = 1
    is_sample: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.lengths[0]


def measure_data(config: TrainConfig, *, progress: ProgressCallback) -> DataStatistics:
    """Read the data of a run and measure its sequences.

    Args:
        config: With every default resolved.
        progress: Receives progress messages.

    Raises:
        InputError: Data, model or length does not exist or is not usable.
    """
    notes: list[str] = []
    model_config: Any = None
    tokenizer: Any = None
    if config.model != TINY:
        model_config = load_config(config.model)
        _check_length(config, model_config)
        try:
            tokenizer = load_run_tokenizer(config)
        except InputError as error:
            if config.model_config_path is not None:
                raise
            notes.append(f"lengths are estimated, {BYTES_A_TOKEN} bytes a token: {error}")
    # Without the cache: a plan writes nothing.
    with DataLoader(config.model_copy(update={"no_cache": True}), progress) as loader:
        if vocabulary_to_train(config) is not None:
            tokenizer = train_run_tokenizer(config, loader)
        data = loader.sample(MOST_DOCUMENTS)
    notes += data.left_out
    if config.model == TINY:
        assert config.max_length is not None, "set by resolved()"
        model_config = tiny_config(tokenizer, max_length=config.max_length)
    if config.model_config_path is not None:
        path, name = config.model_config_path, config.tokenizer_name
        model_config = new_model_config(path, tokenizer, tokenizer_name=name)
    max_length = config.max_length or min(DEFAULT_MAX_LENGTH, _positions(model_config) or DEFAULT_MAX_LENGTH)
    measured = data.documents
    if len(measured) < data.num_documents:
        notes.append(f"lengths are those of {len(measured):,} of {plural(data.num_documents, 'document')}")
    progress("measuring the documents")
    num_parts = 1
    broken: list[str] | None = [] if config.skip_broken else None
    if tokenizer is None:
        if config.objective != "sft":
            num_parts = max((len(document.parts or ()) for document in measured), default=1)
        lengths = estimated_lengths(measured, max_length, num_parts=num_parts)
    elif config.objective != "sft":
        notes += set_chat_template(tokenizer, config.chat_template)
        pairs, counts = encode_pairs(measured, tokenizer, config.objective, max_length=max_length, broken=broken)
        notes.append(f"measured: {counts.describe(config.objective, max_length)}")
        num_parts, lengths = pairs.num_parts, pairs.lengths.tolist()
    else:
        notes += set_chat_template(tokenizer, config.chat_template)
        encoded, _ = encode(measured, tokenizer, max_length=max_length, train_on=config.train_on, broken=broken)
        lengths = encoded.lengths.tolist()
    share = data.num_documents / max(1, len(measured))
    if len(data.stored_inputs):
        lengths = [*lengths * round(share), *stored_lengths(data.stored_inputs, max_length)]
        share = 1.0
    if not lengths:
        raise InputError(f"{config.data_text} contains no text to train on. Pass other --data.")
    windows, num_updates = _windows(config, lengths, share)
    return DataStatistics(
        model_config=model_config,
        max_length=max_length,
        lengths=tuple(sorted(set(lengths), reverse=True)),
        window=windows[0],
        most_rows=max(map(len, windows)),
        num_updates=num_updates,
        notes=tuple(notes),
        num_parts=num_parts,
        is_sample=len(measured) < data.num_documents,
    )


def _positions(model_config: Any) -> int | None:
    """Return the number of positions of a model; None if it has no limit."""
    positions = getattr(model_config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _check_length(config: TrainConfig, model_config: Any) -> None:
    positions = _positions(model_config)
    if config.max_length is not None and positions is not None and config.max_length > positions:
        raise InputError(
            f"--max-length {config.max_length} is more than the {positions} positions of {config.model}: pass "
            f"--max-length {positions} or less."
        )


def stored_lengths(inputs: NDArray[np.int64], max_length: int) -> list[int]:
    """Return the tokens of each sequence of documents with these numbers of inputs."""
    full, rest = np.divmod(inputs, max_length)
    lengths: list[int] = rest[rest > 0].tolist()
    return [max_length] * int(full.sum()) + lengths


def estimated_lengths(documents: Sequence[Document], max_length: int, *, num_parts: int = 1) -> list[int]:
    """Estimate the tokens of each sample from the bytes of the documents, without a tokenizer."""
    lengths = []
    for document in documents:
        if document.parts is not None:
            sizes = [sum(len(text.encode()) for text in part.texts) // BYTES_A_TOKEN for part in document.parts]
            lengths.append(num_parts * min(max_length, max(1, *sizes)))
            continue
        num_bytes = document.size if document.tokens is not None else sum(len(text.encode()) for text in document.texts)
        tokens = max(1, num_bytes // BYTES_A_TOKEN)
        lengths += [max_length] * (tokens // max_length) + [tokens % max_length] * bool(tokens % max_length)
    return lengths


def _windows(config: TrainConfig, lengths: list[int], share: float) -> tuple[list[tuple[int, ...]], int]:
    """Return the lengths of each update of an epoch, and the number of updates of the run.

    If ``lengths`` are those of one document in ``share``, they are repeated until an update is full.
    """
    num_sequences = round(len(lengths) * share)
    wanted = config.global_batch or -(-(config.global_batch_tokens or 0) * len(lengths) // sum(lengths))
    sequences = list(islice(cycle(lengths), min(num_sequences, max(len(lengths), wanted))))
    windows = epoch_windows(
        sequences,
        global_batch=config.global_batch,
        global_batch_tokens=config.global_batch_tokens,
        seed=config.seed,
        epoch=0,
    )
    if config.global_batch is not None:
        updates_per_epoch = -(-num_sequences // config.global_batch)
    else:
        updates_per_epoch = max(1, round(len(windows) * num_sequences / len(sequences)))
    return [tuple(sequences[i] for i in window) for window in windows], config.steps or (
        config.epochs or 0
    ) * updates_per_epoch
