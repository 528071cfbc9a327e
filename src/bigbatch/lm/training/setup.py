"""Set-up of a run from its configuration, before the first update: data, tokenizer, model. Writes nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bigbatch.distributed.gradient_sync import GradientSync, SyncPolicy
from bigbatch.errors import InputError
from bigbatch.lm.checkpoint.manager import frozen_fingerprint
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.config.train_fields import DEFAULT_MAX_LENGTH
from bigbatch.lm.data.chat_templates import set_chat_template
from bigbatch.lm.data.dataset import TokenDataset
from bigbatch.lm.data.model_files import check_has_weights, check_model_config, has_weights
from bigbatch.lm.data.pair_dataset import PairDataset
from bigbatch.lm.data.run_order import RunOrder
from bigbatch.lm.data.sampling_order import ORDER_VERSION
from bigbatch.lm.device import DeviceSpec, resolve_device
from bigbatch.lm.distributed.ranks import SINGLE_PROCESS, RankContext
from bigbatch.lm.model.expert_notes import expert_notes
from bigbatch.lm.model.fp8_gradient import NUM_SAMPLES, Fp8Gradient, compare_gradients
from bigbatch.lm.model.from_scratch import new_model, new_model_config
from bigbatch.lm.model.generation import prompt_tokens
from bigbatch.lm.model.loss_types import LanguageLoss
from bigbatch.lm.model.meta_setup import set_up_meta_model
from bigbatch.lm.model.pretrained import TINY
from bigbatch.lm.model.quantization import QuantizedBase, load_quantized, quantization_note
from bigbatch.lm.model.sent_weights import SentWeights, receive_shards, sent_model
from bigbatch.lm.model.setup import ModelSetup, set_up_model
from bigbatch.lm.model.start import move_model
from bigbatch.lm.model.task_models import load_task_model, make_tiny
from bigbatch.lm.model.weights import Weights, empty_copy, empty_model, load_shards
from bigbatch.lm.objectives.setup import set_up_objective
from bigbatch.lm.runs.identity import digest_of
from bigbatch.lm.training.data import DataLoader as DataLoader
from bigbatch.lm.training.data import ProgressCallback as ProgressCallback
from bigbatch.lm.training.run_tokenizer import load_run_tokenizer, train_run_tokenizer
from bigbatch.memory.usage import free_cached_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _no_progress(activity: str, done: int = 0, total: int = 0) -> None: ...


@dataclass(frozen=True)
class TrainingSetup:
    """A run that is ready to start.

    Attributes:
        config: With every default resolved.
        device_spec: Device and precision.
        tokenizer: Of the model.
        model_setup: The model, in training mode and on the device, with its loss and layout. In a sharded run, its
            parameters are on the meta device until the trainer shards it. Weights that offload will narrow are in
            bfloat16, and their float32 values in host memory.
        weights: The source of their values in a sharded run; None otherwise.
        frozen_sha256: Fingerprint of the weights under the adapters, as they were before they were quantized; None
            without quantization.
        validation_sets: Validation data by name; empty if the only set has no name.
        validation_fingerprint: SHA-256 of its tokens, in hex; None if it is held out of the training data.
        fp8_gradient: How far products in float8 move the gradient; None if it was not measured.
        passed: The facts of `bigbatch.lm.training.passed_data.PassedInputs`.
        training: Training data.
        validation: Validation data; None if there is too little data to hold any out. Of several sets, the one whose
            loss decides.
        notes: Sentences with the counts of records read, truncated and skipped.
        order: Of the training samples.
        data_fingerprint: SHA-256 of the tokens, in hex; as its run has stored it.
        order_version: Of the sampling order.
    """

    config: TrainConfig
    device_spec: DeviceSpec
    tokenizer: "PreTrainedTokenizerBase"
    model_setup: ModelSetup
    training: TokenDataset | PairDataset
    validation: TokenDataset | PairDataset | None
    notes: tuple[str, ...]
    order: RunOrder
    data_fingerprint: str
    order_version: int = ORDER_VERSION
    weights: Weights | None = None
    frozen_sha256: str | None = None
    validation_sets: Mapping[str, TokenDataset] = field(default_factory=dict)
    validation_fingerprint: str | None = None
    fp8_gradient: Fp8Gradient | None = None
    passed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        """The model of `model_setup`: in training mode, in the precision's dtype, with its adapters."""
        return self.model_setup.model

    @property
    def loss_fn(self) -> LanguageLoss:
        """The loss of the objective, without the load-balancing loss of experts."""
        return self.model_setup.loss_fn

    @property
    def has_perplexity(self) -> bool:
        """Whether the validation loss is the cross entropy of tokens, so that its exponential is a perplexity."""
        return self.config.objective == "sft" and "loss_fn" not in self.passed

    @property
    def collate(self) -> Callable[..., Any]:
        """A function that collates a list of samples to a micro-batch."""
        return self.model_setup.collate


def set_up_training(
    config: TrainConfig,
    *,
    ranks: RankContext = SINGLE_PROCESS,
    progress: ProgressCallback = _no_progress,
    order_version: int = ORDER_VERSION,
    data_loader: Callable[..., DataLoader] = DataLoader,
) -> TrainingSetup:
    """Read the data, make or load tokenizer and model, and put them on the device.

    Where the ranks shard the model, no rank puts the whole of it on its device: it stays on the meta device, and
    `bigbatch.lm.training.trainer.Trainer` loads the shards. Nothing here is collective; of the ranks of one machine,
    one writes the token cache, while the others wait for its lock.

    Args:
        config: The configuration of the run.
        ranks: The processes of the run, with which the trainer is made.
        progress: Receives the current activity.
        order_version: Of the sampling order; that of the run that is resumed.
        data_loader: Makes the data loader.

    Raises:
        InputError: A model, data or device of the configuration does not exist or cannot be used.
        BigbatchError: The token cache cannot be written.
    """
    config = config.resolved()
    allows_fp16 = not (ranks.are_sharded or config.reproducible)
    device_spec = resolve_device(config.device, config.precision, allows_fp16=allows_fp16)
    config = config.model_copy(update={"device": str(device_spec.device), "precision": device_spec.precision})
    if config.model_config_path is not None:
        check_model_config(config.model_config_path, config.tokenizer)
    elif config.model != TINY:
        check_has_weights(config.model)
    tokenizer = load_run_tokenizer(config)
    weights: Weights | None = None
    quantized: QuantizedBase | None = None
    with data_loader(config, progress, order_version=order_version) as loader:
        if tokenizer is None:
            tokenizer = train_run_tokenizer(config, loader)
        if config.model == TINY or config.model_config_path is not None:
            if config.model_config_path is not None:
                progress(f"initializing the weights of {config.model_config_path}")
            model, weights = _make_new(config, device_spec, tokenizer, ranks)
        else:
            progress(f"loading {config.model}")
            if ranks.are_sharded and config.generates_text:
                model, weights = empty_model(config.model, dtype=device_spec.weights_dtype)
            elif config.quantize is not None:
                quantized = load_quantized(config, device_spec)
                model = quantized.model
            else:
                model = load_task_model(
                    config.model,
                    config.objective,
                    dtype=device_spec.weights_dtype,
                    seed=config.seed,
                    pad_id=tokenizer.pad_token_id,
                )
                if ranks.are_sharded:
                    model, weights = empty_copy(model)
        config = _fit(config, model, tokenizer)
        template_notes = set_chat_template(tokenizer, config.chat_template)
        if config.generates_text and config.sample_prompt is not None:
            prompt_tokens(tokenizer, config.sample_prompt, model=model, name="--sample-prompt")
        assert config.max_length is not None, "_fit() gives it a value where resolved() does not"
        data = loader.load(tokenizer, config.max_length)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(part.longest for part in (data.training, data.validation) if part is not None)
    progress("testing attention, layout and compilation")
    if weights is None:
        model = move_model(model, config, device_spec)
    if config.objective != "sft":
        model_setup = set_up_objective(model, config, device_spec, weights, pad_id=pad)
    elif weights is None:
        model_setup = set_up_model(model, config, device_spec, pad_id=pad, longest=longest)
    else:
        model_setup = set_up_meta_model(model, weights, config, device_spec, pad_id=pad, longest=longest)
    return TrainingSetup(
        config=config,
        device_spec=device_spec,
        tokenizer=tokenizer,
        model_setup=model_setup,
        training=data.training,
        validation=data.validation,
        notes=(
            *template_notes,
            *notes_of_new_model(config),
            *data.notes,
            *([quantization_note(model_setup.model)] if quantized is not None else []),
            *model_setup.notes,
            *expert_notes(model_setup.model, config, model_setup.balanced),
        ),
        order=data.order,
        data_fingerprint=data.fingerprint,
        order_version=order_version,
        weights=weights,
        frozen_sha256=None if quantized is None else _fingerprint(quantized, model_setup.model),
        validation_sets=data.validation_sets,
        validation_fingerprint=data.validation_fingerprint,
    )


def with_fp8_gradient(setup: TrainingSetup, *, progress: ProgressCallback = _no_progress) -> TrainingSetup:
    """Measure how far products in float8 move the gradient of the first samples, and add a note with the cosine."""
    if setup.model_setup.fp8 is None:
        return setup
    progress("comparing the gradient of products in fp8 with that of products in bf16")
    samples = [setup.training[i] for i in setup.order.epoch(0).part(0, NUM_SAMPLES).tolist()]
    device = setup.device_spec.device
    found = compare_gradients(setup.model_setup, samples, device)
    if device.type == "cuda":
        free_cached_memory()  # of two gradients; the micro-batch is chosen for the memory that is free
    return replace(setup, fp8_gradient=found, notes=(*setup.notes, str(found)))


def parallelize(setup: TrainingSetup, ranks: RankContext) -> GradientSync | SyncPolicy | None:
    """Replicate or shard the model of a set-up over the ranks, and load the shards of this rank. Collective.

    Returns:
        The ``sync`` of `bigbatch.Engine`.

    Raises:
        InputError: The model cannot be sharded, or a rank cannot load its shards.
    """
    device = setup.device_spec.device
    sync = ranks.parallelize(setup.model, device, layers_dtype=setup.device_spec.gathered_dtype)
    if isinstance(setup.weights, SentWeights):
        receive_shards(setup.model, setup.weights, device)
    elif setup.weights is not None:
        with ranks.raise_together():
            load_shards(setup.model, setup.weights, device)
    return sync


def _fingerprint(quantized: QuantizedBase, model: Any) -> str | None:
    """Return the fingerprint of a base before it was quantized, then close its files."""
    try:
        return frozen_fingerprint(model, quantized.frozen_values(model))
    finally:
        quantized.weights.close()


def notes_of_new_model(config: TrainConfig) -> tuple[str, ...]:
    """Return a sentence about the random weights of a new model, and about trained ones next to its configuration."""
    if config.model_config_path is None:
        return ()
    others = f"; those in {config.model_config_path} are not used" if has_weights(config.model_config_path) else ""
    return (f"the weights of the new model are random, from --seed {config.seed}{others}",)


def _make_new(
    config: TrainConfig, device_spec: DeviceSpec, tokenizer: "PreTrainedTokenizerBase", ranks: RankContext
) -> tuple[Any, Weights | None]:
    """Create the tiny model, or that of ``--model-config``, on the CPU with random weights.

    If it is sharded, it stays on the meta device, and the weights are returned apart from it.
    """
    dtype = device_spec.weights_dtype
    if config.model_config_path is None:
        model = make_tiny(tokenizer, config).to(dtype)
        return empty_copy(model) if ranks.are_sharded else (model, None)
    path = config.model_config_path
    model_config = new_model_config(path, tokenizer, tokenizer_name=config.tokenizer_name)
    make_model = partial(new_model, model_config, name=path, dtype=dtype, seed=config.seed)
    if not ranks.are_sharded:
        return make_model(), None
    text = model_config.to_json_string(use_diff=False)
    identity = digest_of({"model": text, "seed": config.seed, "dtype": str(dtype)})
    return sent_model(model_config, make_model, dtype=dtype, identity=identity, is_first=ranks.is_first)


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
