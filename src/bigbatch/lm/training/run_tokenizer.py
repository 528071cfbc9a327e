"""The tokenizer of a run: that of its model, that of ``--tokenizer``, or one that is trained on the data."""

from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.tokenizer import AnyTokenizer, load_tokenizer
from bigbatch.lm.model.pretrained import TINY, TINY_VOCABULARY
from bigbatch.lm.training.data import DataLoader


def vocabulary_to_train(config: TrainConfig) -> int | None:
    """Return the most tokens of a tokenizer that is trained on the data; None if the tokenizer is loaded."""
    return TINY_VOCABULARY if config.model == TINY else config.vocabulary_to_train


def load_run_tokenizer(config: TrainConfig) -> AnyTokenizer | None:
    """Load the tokenizer of a run; None if it is trained on the data.

    Raises:
        InputError: It does not exist or cannot be used.
    """
    if vocabulary_to_train(config) is not None:
        return None
    return load_tokenizer(config.tokenizer_name, needs_end=config.objective != "embedding")


def train_run_tokenizer(config: TrainConfig, loader: DataLoader) -> AnyTokenizer:
    """Return the tokenizer that is trained on the data: of data that was tokenized ahead, the one it was made with.

    Raises:
        InputError: A document cannot be read, or the tokenizer of the data has more tokens than asked for.
    """
    size = vocabulary_to_train(config)
    assert size is not None, "the tokenizer is loaded"
    stored = loader.stored_tokenizer
    if stored is None:
        return loader.train_tokenizer(size)
    if config.model_config_path is not None and len(stored) > size:
        raise InputError(
            f"--tokenizer {config.tokenizer_name} is smaller than the tokenizer with which {config.data_text} was "
            f"tokenized, which has {len(stored):,} tokens: pass train:{len(stored)}."
        )
    return stored
