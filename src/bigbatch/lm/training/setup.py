"""Everything that a run needs before its first update, from its configuration: checked first, written never."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.config.train_fields import DEFAULT_MAX_LENGTH
from bigbatch.lm.data.dataset import TokenDataset, encode, split_documents
from bigbatch.lm.data.sources import Document, read_corpus
from bigbatch.lm.data.tokenizer import load_tokenizer, train_tokenizer
from bigbatch.lm.device import DeviceSpec, resolve_device
from bigbatch.lm.model.causal_lm_loss import CausalLMLoss
from bigbatch.lm.model.chunked_loss import ChunkedCausalLMLoss
from bigbatch.lm.model.generation import prompt_tokens
from bigbatch.lm.model.pretrained import TINY, TINY_VOCABULARY, load_model, tiny_model
from bigbatch.lm.model.setup import ModelSetup, set_up_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ProgressCallback(Protocol):
    """Whom a preparation tells what goes on."""

    def __call__(self, activity: str, done: int = 0, total: int = 0) -> None:
        """Hear in a few words of work that takes seconds; of some work, also how much of it is done."""


def _no_progress(activity: str, done: int = 0, total: int = 0) -> None: ...


@dataclass(frozen=True)
class TrainingSetup:
    """A run that could begin.

    Attributes:
        config: With every default written out.
        device_spec: Device and precision.
        tokenizer: Of the model.
        model_setup: The model, in training mode and on the device, and how it is run.
        training: What is learned from.
        validation: What is not; None where there is too little data to keep any apart.
        notes: Sentences with the counts of what was read, cut and left out.
    """

    config: TrainConfig
    device_spec: DeviceSpec
    tokenizer: "PreTrainedTokenizerBase"
    model_setup: ModelSetup
    training: TokenDataset
    validation: TokenDataset | None
    notes: tuple[str, ...]

    @property
    def model(self) -> Any:
        """In training mode, on the device, in the precision's dtype, with its adapters."""
        return self.model_setup.model

    @property
    def loss_fn(self) -> CausalLMLoss | ChunkedCausalLMLoss:
        """What the model is trained with, as `bigbatch.Engine` takes it."""
        return self.model_setup.loss_fn

    @property
    def collate(self) -> Callable[..., Any]:
        """Makes a micro-batch of a list of samples."""
        return self.model_setup.collate


def set_up_training(config: TrainConfig, *, progress: ProgressCallback = _no_progress) -> TrainingSetup:
    """Read the data, make or load tokenizer and model, and put them on the device.

    Args:
        config: What is asked for.
        progress: Told what goes on.

    Raises:
        InputError: Something that the configuration names is not there or not usable.
    """
    config = config.resolved()
    device_spec = resolve_device(config.device, config.precision)
    config = config.model_copy(update={"device": str(device_spec.device), "precision": device_spec.precision})
    tokenizer = None if config.model == TINY else load_tokenizer(config.model)
    progress(f"reading {config.data}")
    corpus = read_corpus(config.data, skip_broken=config.skip_broken)
    documents, held_out = split_documents(corpus.documents, validation_fraction=config.validation_fraction)
    if tokenizer is None:
        progress("training a tokenizer")
        tokenizer, model = _make_tiny(config, device_spec, documents)
    else:
        progress(f"loading {config.model}")
        model = load_model(config.model, dtype=device_spec.weights_dtype)
        config = _fit(config, model, tokenizer)
    prompt_tokens(tokenizer, config.sample_prompt, model=model, name="--sample-prompt")
    training, validation, notes = _encode(config, tokenizer, documents, held_out, progress)
    assert config.max_length is not None, "_fit() gives it a value where resolved() does not"
    model = model.to(device_spec.device)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(max(part.lengths) for part in (training, validation) if part is not None)
    progress("trying how the model runs best")
    model_setup = set_up_model(model, config, device_spec, pad_id=pad, longest=longest)
    notes = [*corpus.notes, *notes, *model_setup.notes]
    return TrainingSetup(config, device_spec, tokenizer, model_setup, training, validation, tuple(notes))


def _make_tiny(config: TrainConfig, device_spec: DeviceSpec, documents: Sequence[Document]) -> tuple[Any, Any]:
    assert config.max_length is not None, "resolved() gives it a value"
    texts = [text for document in documents for text in document.texts]
    tokenizer = train_tokenizer(texts, vocabulary_size=TINY_VOCABULARY)
    model = tiny_model(tokenizer, max_length=config.max_length, seed=config.seed)
    return tokenizer, model.to(device_spec.weights_dtype)


def _encode(
    config: TrainConfig,
    tokenizer: "PreTrainedTokenizerBase",
    documents: Sequence[Document],
    held_out: Sequence[Document],
    progress: ProgressCallback,
) -> tuple[TokenDataset, TokenDataset | None, list[str]]:
    """Encode both sides of the split; tell in sentences what became of them."""
    assert config.max_length is not None, "_fit() gives it a value where resolved() does not"
    progress = partial(progress, "encoding the documents")
    progress()
    training, counts = encode(documents, tokenizer, max_length=config.max_length, progress=progress)
    notes = [f"to learn from: {counts.describe()}"]
    if not held_out:
        if config.validation_fraction:
            notes.append("held out for validation: nothing, the data is too short to spare any")
        return training, None, notes
    validation, counts = encode(held_out, tokenizer, max_length=config.max_length)
    return training, validation, [*notes, f"held out for validation: {counts.describe()}"]


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
