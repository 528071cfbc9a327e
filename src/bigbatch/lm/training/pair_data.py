"""The samples of objectives that compare sequences: rows of token stores → pairs → data sets.

These are arrays in memory with a few numbers for each sequence, made at every start; tokens are mapped from files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.config.validation_sets import UNNAMED, read_sets
from bigbatch.lm.data.pair_dataset import PairDataset, Pairs, joined_pairs, make_pairs, most_parts
from bigbatch.lm.data.pair_encoding import num_closing_tokens
from bigbatch.lm.data.token_store.reader import TokenReader
from bigbatch.lm.data.tokenizer import AnyTokenizer
from bigbatch.lm.data.validation_split import HashSplit
from bigbatch.lm.training.token_sources import TokenSource, joined


@dataclass(frozen=True)
class PairData:
    """The samples of a run.

    Attributes:
        training: Samples to train on.
        validation: Samples to validate on; None without any.
        by_source: Training samples of each source.
        notes: Sentences with the counts of both.
    """

    training: PairDataset
    validation: PairDataset | None
    by_source: tuple[int, ...]
    notes: tuple[str, ...]


def load_pairs(
    config: TrainConfig,
    tokenizer: AnyTokenizer,
    training: Sequence[TokenSource],
    validation: Sequence[TokenSource],
    *,
    max_length: int,
    split: HashSplit,
) -> PairData:
    """Return the data sets of stores that were encoded for an objective.

    Args:
        config: Of the run.
        tokenizer: That encoded them.
        training: Of each source.
        validation: Of sources for validation alone.
        max_length: Tokens of the longest sequence.
        split: Which documents of the sources for training are held out.
    """
    objective = config.objective
    if UNNAMED not in (read_sets(config.validation_data or ()) or {UNNAMED: ()}):
        raise InputError(
            f"--validation-data with names is not supported with --objective {objective}: pass the sources without "
            "NAME=."
        )
    sources = [source.reader for source in training]
    num_parts = most_parts([source.reader for source in (*training, *validation)])
    num_closing = num_closing_tokens(tokenizer)

    def pairs_of(readers: Sequence[TokenReader], split: HashSplit) -> list[list[Pairs]]:
        first_token = 0
        found = []
        for reader in readers:
            found.append(
                make_pairs(
                    reader,
                    objective=objective,
                    max_length=max_length,
                    split=split,
                    num_parts=num_parts,
                    first_token=first_token,
                )
            )
            first_token += reader.num_tokens
        return found

    sides = pairs_of(sources, split)
    chosen = joined_pairs([side[0] for side in sides])
    if not len(chosen.starts):
        raise InputError(
            f"{config.data_text} has nothing to train on with --max-length {max_length}: "
            f"{chosen.counts.describe(objective, max_length)}. Pass other --data, or a larger --max-length."
        )
    reader = joined(training).reader
    notes = [f"training data: {chosen.counts.describe(objective, max_length)}"]
    others = joined_pairs([side[1] for side in sides])
    if validation:
        reader_of_others = joined(validation).reader
        others = pairs_of([reader_of_others], HashSplit())[0][0]
    else:
        reader_of_others = reader
    validation_set = None
    if len(others.starts):
        validation_set = PairDataset(reader_of_others, others, objective, num_closing=num_closing)
        notes.append(f"validation data: {others.counts.describe(objective, max_length)}")
    elif config.validation_fraction:
        notes.append("no validation set: the data is too small to split")
    return PairData(
        PairDataset(reader, chosen, objective, num_closing=num_closing),
        validation_set,
        tuple(side[0].counts.samples for side in sides),
        tuple(notes),
    )
