"""Train a small tokenizer on the data, or load the one of a model."""

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
END_TOKENS = (END, "</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[EOS]")
BEGIN_TOKENS = (BEGIN, "<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "[BOS]")
PAD_TOKENS = (PAD, "<pad>", "[PAD]")
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
MAX_TRAINING_CHARACTERS = 16_000_000
"""Maximum number of characters to train a tokenizer on; longer data is sampled in evenly spread pieces."""
PIECE_CHARACTERS = 4096

# Role markers are plain text and need no special tokens; the end token is last in the assistant's turn, so that no
# trained token follows it.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ 'tools:\n' + tools | tojson + '\n' }}{% endif %}"
    "{% for message in messages %}{{ message['role'] + ':\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{% for call in message['tool_calls'] %}"
    "{{ ('\n' if message['content'] or not loop.first else '') + 'call: ' }}"
    "{{ {'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson }}"
    "{% endfor %}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)

# Vocabulary files of the formats that transformers loads. Without any of them it may silently build an empty
# tokenizer from the model's configuration.
_VOCABULARY_FILES = ("tokenizer*", "tekken.json", "vocab*", "*.model", "*.tiktoken")

AnyTokenizer: TypeAlias = PreTrainedTokenizerBase


def train_tokenizer(
    texts: Iterable[str], *, vocabulary_size: int, characters: int | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; deterministic for the same texts in the same order.

    Every string round-trips exactly: ``decode(encode(text)) == "<|begin|>" + text``. ``<|begin|>`` starts a text,
    ``<|end|>`` ends it and ``<|pad|>`` pads rows. The chat template renders the first turns of a conversation as a
    prefix of the whole.

    Args:
        texts: Training texts. Of more than ``MAX_TRAINING_CHARACTERS`` characters, evenly spread pieces of
            ``PIECE_CHARACTERS`` are used.
        vocabulary_size: Maximum number of tokens, special ones included. Little text may result in fewer.
        characters: Of all texts, if known: they are read one by one then.

    Raises:
        ValueError: ``vocabulary_size`` is too small for the 256 bytes and the special tokens.
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
    if characters is None:
        texts = list(texts)
        characters = sum(map(len, texts))
    tokenizer.train_from_iterator(_evenly_spread(texts, characters, MAX_TRAINING_CHARACTERS), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return _wrapped(tokenizer)


def read_trained(path: Path) -> PreTrainedTokenizerFast:
    """Read a tokenizer of `train_tokenizer` from the file that ``tokenizer.backend_tokenizer.save`` wrote.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        return _wrapped(Tokenizer.from_file(str(path)))
    except Exception as error:  # noqa: BLE001  tokenizers raises a bare Exception for an unreadable file
        raise InputError(f"the tokenizer {path} cannot be read: {first_line(error)}.") from None


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def load_tokenizer(folder_or_name: str, *, needs_end: bool = True) -> AnyTokenizer:
    """Load the tokenizer of a model folder or of a model on the hub, without running code of the model.

    A tokenizer without a padding token pads with its end token: padding is masked and does not affect the result.

    Args:
        folder_or_name: Of the model.
        needs_end: Whether the tokenizer must have an end token.

    Raises:
        InputError: The folder or model does not exist or has no tokenizer, or the tokenizer has no end token.
    """
    folder = Path(folder_or_name)
    if folder.is_file():
        return _load_file(folder)
    is_folder = folder.is_dir()
    if is_folder and not any(any(folder.glob(pattern)) for pattern in _VOCABULARY_FILES):
        raise InputError(
            f"the folder {folder_or_name} contains no tokenizer. "
            "Save the model's tokenizer into it with tokenizer.save_pretrained(folder)."
        )
    # Check the hub first: transformers would retry an unreachable one for most of a minute.
    local_only = is_local(folder_or_name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder_or_name, trust_remote_code=False, local_files_only=local_only)
    except Exception as error:  # noqa: BLE001  tokenizers raises a bare Exception for an unreadable file
        if local_only and not is_folder:
            raise InputError(
                f"{folder_or_name!r} is not a folder, and the hub cannot be reached to look for a model of that name. "
                "Check the path or the network."
            ) from None
        raise InputError(f"the tokenizer of {folder_or_name} cannot be loaded: {first_line(error)}.") from None
    return _usable(tokenizer, folder_or_name, needs_end=needs_end)


def _load_file(path: Path) -> AnyTokenizer:
    """Load a tokenizer.json; without a tokenizer_config.json next to it, the end token is recognized by its name."""
    if path.name == "tokenizer.json" and path.with_name("tokenizer_config.json").is_file():
        return load_tokenizer(str(path.parent))
    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # noqa: BLE001  tokenizers raises a bare Exception for an unreadable file
        raise InputError(f"the tokenizer {path} cannot be read: {first_line(error)}.") from None
    known = tokenizer.get_vocab()
    for role, names in (("eos_token", END_TOKENS), ("bos_token", BEGIN_TOKENS), ("pad_token", PAD_TOKENS)):
        found = [name for name in names if name in known]
        if len(found) == 1:
            setattr(tokenizer, role, found[0])
        elif role == "eos_token":
            which = "several: " + ", ".join(found) if found else "none of " + ", ".join(names)
            raise InputError(
                f"the tokenizer {path} does not say which token ends a document, and has {which}. Save it in a folder "
                "with a tokenizer_config.json that sets eos_token, and pass the folder."
            )
    return _usable(tokenizer, str(path), needs_end=True)


def _usable(tokenizer: AnyTokenizer, name: str, *, needs_end: bool) -> AnyTokenizer:
    """Check that a tokenizer can encode and end a text, and set its padding token if it has none."""
    if set(tokenizer("a text", add_special_tokens=False)["input_ids"]) <= set(tokenizer.all_special_ids):
        raise InputError(f"the tokenizer of {name} cannot encode text: its vocabulary files are missing.")
    if tokenizer.eos_token_id is None and (needs_end or tokenizer.pad_token_id is None):
        raise InputError(
            f"the tokenizer of {name} has no end token to terminate documents with. "
            "Set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _evenly_spread(texts: Iterable[str], total: int, max_characters: int) -> Iterator[str]:
    """Yield the texts, or evenly spread pieces of them with about ``max_characters`` of their ``total`` characters."""
    if total <= max_characters:
        yield from texts
        return
    seen = sampled = 0
    for text in texts:
        for start in range(0, len(text), PIECE_CHARACTERS):
            piece = text[start : start + PIECE_CHARACTERS]
            if sampled * total <= seen * max_characters:  # below its share of the characters so far
                sampled += len(piece)
                yield piece
            seen += len(piece)
