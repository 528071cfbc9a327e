"""Everything that a run needs before its first update, from its configuration: checked first, written never."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bigbatch.errors import InputError
from bigbatch.lm.config import DEFAULT_MAX_LENGTH, TrainConfig
from bigbatch.lm.dataset import TokenDataset, collate, encode, split_documents
from bigbatch.lm.device import Machine, find_machine
from bigbatch.lm.model import TINY, TINY_VOCABULARY, add_lora, load_model, tiny_model
from bigbatch.lm.sources import read_corpus
from bigbatch.lm.tokenizer import load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A run that could begin.

    Attributes:
        config: With every default written out.
        machine: Device and precision.
        tokenizer: Of the model.
        model: In training mode, on the device, in the precision's dtype.
        training: What is learned from.
        validation: What is not; None where there is too little data to keep any apart.
        notes: Sentences with the counts of what was read, cut and left out.
    """

    config: TrainConfig
    machine: Machine
    tokenizer: "PreTrainedTokenizerBase"
    model: Any
    training: TokenDataset
    validation: TokenDataset | None
    notes: tuple[str, ...]

    @property
    def collate(self) -> Callable[..., Any]:
        """Pads a list of samples to its longest."""
        pad = self.tokenizer.pad_token_id
        return partial(collate, pad_id=self.tokenizer.eos_token_id if pad is None else pad)


def prepare(config: TrainConfig, *, say: Say = lambda _: None) -> Prepared:
    """Read the data, make or load tokenizer and model, and put them on the device.

    Args:
        config: What is asked for.
        say: Told in a few words what goes on, for work that takes seconds.

    Raises:
        InputError: Something that the configuration names is not there or not usable.
    """
    config = config.resolved()
    machine = find_machine(config.device, config.precision)
    tokenizer = model = None
    if config.model != TINY:
        tokenizer = load_tokenizer(config.model)
        say(f"loading {config.model}")
        model = load_model(config.model, dtype=machine.weights_dtype)
        config = _fit(config, model, tokenizer)
    say(f"reading {config.data}")
    corpus = read_corpus(config.data)
    documents, held_out = split_documents(corpus.documents, validation_fraction=config.validation_fraction)
    if tokenizer is None:
        say("training a tokenizer")
        texts = [text for document in documents for text in document.texts]
        tokenizer = train_tokenizer(texts, vocabulary_size=TINY_VOCABULARY)
    assert config.max_length is not None, "resolved() gives the tiny model's, _fit() that of any other"
    if model is None:
        model = tiny_model(tokenizer, max_length=config.max_length, seed=config.seed).to(machine.weights_dtype)
    say("encoding the documents")
    training, counts = encode(documents, tokenizer, max_length=config.max_length)
    notes = [*corpus.notes, f"to learn from: {counts.describe()}"]
    validation = None
    if held_out:
        validation, counts = encode(held_out, tokenizer, max_length=config.max_length)
        notes.append(f"held out for validation: {counts.describe()}")
    elif config.validation_fraction:
        notes.append("held out for validation: nothing, the data is too short to spare any")
    if config.lora_rank:
        assert config.lora_alpha is not None, "resolved() gives it a value"
        model = add_lora(model, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed)
    model = model.to(machine.device).train()
    return Prepared(config, machine, tokenizer, model, training, validation, tuple(notes))


def _fit(config: TrainConfig, model: Any, tokenizer: "PreTrainedTokenizerBase") -> TrainConfig:
    """Check that model, tokenizer and length go together; choose the length where none was asked for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"--model {config.model}: its tokenizer has {len(tokenizer)} tokens and the model knows {rows}. "
            "The two do not belong together."
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if config.max_length is None:
        return config.model_copy(update={"max_length": min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)})
    if positions is not None and config.max_length > positions:
        raise InputError(
            f"--max-length {config.max_length} is more than the {positions} positions of {config.model}: "
            f"pass --max-length {positions} or less."
        )
    return config
