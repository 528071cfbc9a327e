"""The tokenizer: a small one trained on the data, or the one that comes with a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from bigbatch.errors import InputError, first_line
from bigbatch.lm.data.hub import is_local

BEGIN = "<|begin|>"
END = "<|end|>"
PAD = "<|pad|>"
SPECIAL_TOKENS = (BEGIN, END, PAD)
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
MAX_TRAINING_CHARACTERS = 16_000_000
"""Characters that a tokenizer is trained on; of more, evenly spread pieces are taken."""
PIECE_CHARACTERS = 4096

# Role markers are plain text, so that the vocabulary needs none; the end mark is last in the assistant's turn, so
# that nothing learned comes after it.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] + ':\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)

# Files that hold a vocabulary, in the formats that transformers loads. Without any of them it may build an empty
# tokenizer from the model's configuration, and say nothing.
_VOCABULARY_FILES = ("tokenizer*", "tekken.json", "vocab*", "*.model", "*.tiktoken")

AnyTokenizer: TypeAlias = PreTrainedTokenizerBase


def train_tokenizer(texts: Iterable[str], *, vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same texts in the same order always give the same one.

    Every string round-trips exactly: ``decode(encode(text)) == begin mark + text``. It begins every text with
    ``<|begin|>``; ``<|end|>`` ends one and ``<|pad|>`` fills rows. Its chat template renders the first turns of a
    conversation as a prefix of the whole.

    Args:
        texts: What to learn the pieces from. Of more than ``MAX_TRAINING_CHARACTERS`` characters, pieces of
            ``PIECE_CHARACTERS`` spread evenly over all of them are used.
        vocabulary_size: Largest number of tokens, special ones included. Little text may give fewer.

    Raises:
        ValueError: ``vocabulary_size`` does not hold the 256 bytes and the special tokens.
    """
    if vocabulary_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocabulary_size={vocabulary_size} cannot hold the 256 bytes and {len(SPECIAL_TOKENS)} special tokens. "
            f"Use at least {SMALLEST_VOCABULARY}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_evenly_spread(list(texts), MAX_TRAINING_CHARACTERS), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def load_tokenizer(folder_or_name: str) -> AnyTokenizer:
    """Load the tokenizer of a model folder, or of a model on the hub; code that comes with a model is not run.

    A tokenizer without a padding token pads with its end token: padding is masked, so nothing depends on it.

    Raises:
        InputError: There is no such folder or model, it has no tokenizer, or the tokenizer has no end token.
    """
    folder = Path(folder_or_name)
    is_folder = folder.is_dir()
    if is_folder and not any(any(folder.glob(pattern)) for pattern in _VOCABULARY_FILES):
        raise InputError(
            f"the folder {folder_or_name} holds no tokenizer. "
            "Save the model's own into it with tokenizer.save_pretrained(folder)."
        )
    # The hub is asked first: transformers would retry an unreachable one for most of a minute.
    local_only = is_local(folder_or_name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder_or_name, trust_remote_code=False, local_files_only=local_only)
    except Exception as error:  # noqa: BLE001  the tokenizers library raises bare Exception for a file it cannot read
        if local_only and not is_folder:
            raise InputError(
                f"{folder_or_name!r} is no folder here, and the hub that may have such a model cannot be reached. "
                "Check the path or the network."
            ) from None
        raise InputError(f"the tokenizer of {folder_or_name} cannot be loaded: {first_line(error)}.") from None
    return _usable(tokenizer, folder_or_name)


def _usable(tokenizer: AnyTokenizer, name: str) -> AnyTokenizer:
    """Refuse a tokenizer that cannot encode or end a text, and give it a padding token."""
    if set(tokenizer("a text", add_special_tokens=False)["input_ids"]) <= set(tokenizer.all_special_ids):
        raise InputError(f"the tokenizer of {name} knows no text: the files of its vocabulary are missing.")
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer of {name} has no end token, so a text could not be ended. "
            "Set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _evenly_spread(texts: list[str], max_characters: int) -> Iterator[str]:
    """Yield the texts, or every so many-th piece of them where they have more than ``max_characters``."""
    total = sum(map(len, texts))
    if total <= max_characters:
        yield from texts
        return
    seen = kept = 0
    for text in texts:
        for start in range(0, len(text), PIECE_CHARACTERS):
            piece = text[start : start + PIECE_CHARACTERS]
            if kept * total <= seen * max_characters:  # what is kept has fallen behind its share
                kept += len(piece)
                yield piece
            seen += len(piece)
