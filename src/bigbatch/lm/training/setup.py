"""Set-up of a run from its configuration, before the first update: data, tokenizer, model. Writes nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from bigbatch.distributed.gradient_sync import GradientSync, SyncPolicy
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.config.train_fields import DEFAULT_MAX_LENGTH
from bigbatch.lm.data.chat_templates import set_chat_template
from bigbatch.lm.data.dataset import TokenDataset, encode, split_documents
from bigbatch.lm.data.records import RecordColumns
from bigbatch.lm.data.sources import Document, ReadOptions, open_sources
from bigbatch.lm.data.tokenizer import load_tokenizer, train_tokenizer
from bigbatch.lm.device import DeviceSpec, resolve_device
from bigbatch.lm.distributed.ranks import SINGLE_PROCESS, RankContext
from bigbatch.lm.model.causal_lm_loss import CausalLMLoss
from bigbatch.lm.model.chunked_loss import ChunkedCausalLMLoss
from bigbatch.lm.model.expert_notes import expert_notes
from bigbatch.lm.model.generation import prompt_tokens
from bigbatch.lm.model.meta_setup import set_up_meta_model
from bigbatch.lm.model.pretrained import TINY, TINY_VOCABULARY, load_model, tiny_model
from bigbatch.lm.model.setup import ModelSetup, set_up_model
from bigbatch.lm.model.weights import Weights, empty_copy, empty_model, load_shards
from bigbatch.lm.text import plural

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ProgressCallback(Protocol):
    """A function that receives the progress of a set-up."""

    def __call__(self, activity: str, done: int = 0, total: int = 0) -> None:
        """Receive the current activity in a few words, and for some activities the amount done and the total."""


def _no_progress(activity: str, done: int = 0, total: int = 0) -> None: ...


@dataclass(frozen=True)
class TrainingSetup:
    """A run that is ready to start.

    Attributes:
        config: With every default resolved.
        device_spec: Device and precision.
        tokenizer: Of the model.
        model_setup: The model, in training mode and on the device, with its loss and layout. In a sharded run, its
            parameters are on the meta device until the trainer shards it.
        weights: The source of their values in a sharded run; None otherwise.
        training: Training data.
        validation: Validation data; None if there is too little data to hold any out.
        notes: Sentences with the counts of records read, truncated and skipped.
    """

    config: TrainConfig
    device_spec: DeviceSpec
    tokenizer: "PreTrainedTokenizerBase"
    model_setup: ModelSetup
    training: TokenDataset
    validation: TokenDataset | None
    notes: tuple[str, ...]
    weights: Weights | None = None

    @property
    def model(self) -> Any:
        """The model of `model_setup`: in training mode, in the precision's dtype, with its adapters."""
        return self.model_setup.model

    @property
    def loss_fn(self) -> CausalLMLoss | ChunkedCausalLMLoss:
        """The cross entropy, without the load-balancing loss of experts."""
        return self.model_setup.loss_fn

    @property
    def collate(self) -> Callable[..., Any]:
        """A function that collates a list of samples to a micro-batch."""
        return self.model_setup.collate


def set_up_training(
    config: TrainConfig, *, ranks: RankContext = SINGLE_PROCESS, progress: ProgressCallback = _no_progress
) -> TrainingSetup:
    """Read the data, make or load tokenizer and model, and put them on the device.

    Where the ranks shard the model, no rank puts the whole of it on its device: it stays on the meta device, and
    `bigbatch.lm.training.trainer.Trainer` loads the shards. Nothing here is collective.

    Args:
        config: The configuration of the run.
        ranks: The processes of the run, with which the trainer is made.
        progress: Receives the current activity.

    Raises:
        InputError: A model, data or device of the configuration does not exist or cannot be used.
    """
    config = config.resolved()
    device_spec = resolve_device(config.device, config.precision, is_sharded=ranks.are_sharded)
    config = config.model_copy(update={"device": str(device_spec.device), "precision": device_spec.precision})
    tokenizer = None if config.model == TINY else load_tokenizer(config.model)
    data = read_documents(config, progress)
    documents, held_out = data.training, data.validation
    weights: Weights | None = None
    if tokenizer is None:
        progress("training a tokenizer")
        tokenizer, model = _make_tiny(config, device_spec, documents)
        if ranks.are_sharded:
            model, weights = empty_copy(model)
    else:
        progress(f"loading {config.model}")
        if ranks.are_sharded:
            model, weights = empty_model(config.model, dtype=device_spec.weights_dtype)
        else:
            model = load_model(config.model, dtype=device_spec.weights_dtype)
        config = _fit(config, model, tokenizer)
    template_notes = set_chat_template(tokenizer, config.chat_template)
    prompt_tokens(tokenizer, config.sample_prompt, model=model, name="--sample-prompt")
    training, validation, notes = _encode(config, tokenizer, documents, held_out, progress)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(max(part.lengths) for part in (training, validation) if part is not None)
    progress("testing attention, layout and compilation")
    if weights is None:
        model = model.to(device_spec.device)
        model_setup = set_up_model(model, config, device_spec, pad_id=pad, longest=longest)
    else:
        model_setup = set_up_meta_model(model, weights, config, device_spec, pad_id=pad, longest=longest)
    experts = expert_notes(model_setup.model, config, model_setup.balanced)
    notes = [*data.notes, *template_notes, *notes, *model_setup.notes, *experts]
    return TrainingSetup(config, device_spec, tokenizer, model_setup, training, validation, tuple(notes), weights)


class RunDocuments(NamedTuple):
    """The documents to train on and to validate on; notes about what was read, and of these, what was left out."""

    training: list[Document]
    validation: list[Document]
    notes: list[str]
    left_out: list[str]


def read_documents(config: TrainConfig, progress: ProgressCallback) -> RunDocuments:
    """Read the documents of a run.

    Raises:
        InputError: The data does not exist or cannot be read.
    """
    options = read_options(config)
    progress(f"reading {config.data_text}")
    sources = open_sources(
        config.data,
        validation_data=config.validation_data or (),
        options=options,
        with_validation=config.validation_fraction > 0,
    )
    training = [document for corpus in sources.training for document in corpus]
    validation = [document for corpus in sources.validation for document in corpus]
    if not sources.validation:
        training, validation = split_documents(training, validation_fraction=config.validation_fraction)
    corpora = (*sources.training, *sources.validation)
    notes = [note for corpus in corpora for note in corpus.notes]
    left_out = [note for corpus in corpora for note in corpus.left_out]
    return RunDocuments(training, validation, [*notes, *sources.notes], left_out)


def read_options(config: TrainConfig) -> ReadOptions:
    """Return how the data of a run is read."""
    columns = RecordColumns(config.text_column, config.messages_column)
    return ReadOptions(skip_broken=config.skip_broken, split=config.split, subset=config.subset, columns=columns)


def parallelize(setup: TrainingSetup, ranks: RankContext) -> GradientSync | SyncPolicy | None:
    """Replicate or shard the model of a set-up over the ranks, and load the shards of this rank. Collective.

    Returns:
        The ``sync`` of `bigbatch.Engine`.

    Raises:
        InputError: The model cannot be sharded, or a rank cannot load its shards.
    """
    device = setup.device_spec.device
    sync = ranks.parallelize(setup.model, device)
    if setup.weights is not None:
        with ranks.raise_together():
            load_shards(setup.model, setup.weights, device)
    return sync


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
    """Encode both sides of the split; return them with sentences about their counts."""
    assert config.max_length is not None, "_fit() gives it a value where resolved() does not"
    progress = partial(progress, "encoding the documents")
    progress()
    broken: list[str] | None = [] if config.skip_broken else None
    options: dict[str, Any] = {"max_length": config.max_length, "train_on": config.train_on, "broken": broken}
    training, counts = encode(documents, tokenizer, progress=progress, **options)
    notes = [f"training data: {counts.describe()}"]
    if not held_out:
        if config.validation_fraction:
            notes.append("no validation set: the data is too small to split")
        return training, None, notes
    validation, counts = encode(held_out, tokenizer, **options)
    notes.append(f"validation data: {counts.describe()}")
    if broken:
        notes.append(f"{plural(len(broken), 'document')} left out; the first: {broken[0]}")
    return training, validation, notes


def _fit(config: TrainConfig, model: Any, tokenizer: "PreTrainedTokenizerBase") -> TrainConfig:
    """Check that model, tokenizer and length are compatible; choose the length if none is given."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"--model {config.model}: its tokenizer has {len(tokenizer)} tokens and the model has {rows}. "
            "Use the tokenizer of the model."
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
