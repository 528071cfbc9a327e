"""What a run is going to need, before anything is spent: from the configuration, the data and a limit.

    configuration → a model without weights → the peak of a step → the micro-batch that fits → the first update's plan

No weights are read and no GPU is needed. Where the run could begin here and now, the time of an update is measured too,
with random weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from bigbatch.engine import Engine
from bigbatch.errors import InputError
from bigbatch.limit import gpu_limit, parse_memory
from bigbatch.lm.attention import attends_to_all, use_causal_attention
from bigbatch.lm.config import DEFAULT_MAX_LENGTH, TrainConfig
from bigbatch.lm.dataset import collate, encode, split_documents
from bigbatch.lm.device import Machine, find_machine
from bigbatch.lm.documents import Document, count
from bigbatch.lm.loss import CausalLMLoss
from bigbatch.lm.model import TINY, TINY_VOCABULARY, equip, load_config, model_of, tiny_config
from bigbatch.lm.optimization import make_optimizer
from bigbatch.lm.order import epoch_windows
from bigbatch.lm.prepare import Say
from bigbatch.lm.sources import read_corpus
from bigbatch.lm.tokenizer import load_tokenizer, train_tokenizer
from bigbatch.memory import Prediction, Rehearsal, Room, find_room
from bigbatch.memory.choice import largest_below
from bigbatch.memory.prediction import stand_in_for
from bigbatch.plan import Plan, TokenBudget, plan

MOST_DOCUMENTS = 2_000  # that are encoded for their lengths: evenly spaced, if there are more
BYTES_A_TOKEN = 4  # where there is no tokenizer: of English text and of code, about
PROBE_OPERATIONS = {"cpu": 3e11, "cuda": 1e15}  # in one update: seconds on two cores, and on a card of today
LEVERS: dict[str, dict[str, Any]] = {
    "--gradient-checkpointing": {"gradient_checkpointing": True},
    "--precision bf16-weights": {"precision": "bf16-weights"},
    "--lora-rank 16": {"lora_rank": 16, "lora_alpha": 32.0},
}


@dataclass(frozen=True)
class Target:
    """What is planned for.

    Attributes:
        name: Of the device.
        device: Its kind; it need not be here.
        machine: Where the step is rehearsed, and in which precision it is to run.
        room: The memory; None where it is not known.
        here: Whether the run could begin on this machine.
    """

    name: str
    device: torch.device
    machine: Machine
    room: Room | None
    here: bool


@dataclass(frozen=True)
class Forecast:
    """What a run is going to need.

    Attributes:
        config: With every default written out.
        target: What it is planned for.
        num_parameters: Of the model.
        num_trained: Those of them that are trained.
        unit: What ``size`` counts: ``"tokens"`` or ``"samples"``.
        size: The most of a micro-batch.
        prediction: The peak at the fullest micro-batch of that size.
        fits: Whether it is within the memory; None where that is not known.
        plan: The micro-batches of the first update.
        levers: Peak in bytes of the same micro-batch with one setting more, the least first.
        update_s: Seconds of an update, where it could be measured.
        notes: Sentences about what was estimated.
    """

    config: TrainConfig
    target: Target
    num_parameters: int
    num_trained: int
    unit: str
    size: int
    prediction: Prediction
    fits: bool | None
    plan: Plan
    levers: tuple[tuple[str, int], ...]
    update_s: float | None
    notes: tuple[str, ...] = field(default=())


def forecast(config: TrainConfig, *, say: Say) -> Forecast:
    """Predict memory, micro-batches and, where possible, time of a run.

    Raises:
        InputError: Something that the configuration names is not there or not usable.
    """
    config = config.resolved()
    target = find_target(config)
    config = config.model_copy(update={"precision": target.machine.precision})
    data = _read(config, say)
    config = config.model_copy(update={"max_length": data.max_length})
    say("predicting the memory")
    desk = _Desk(config, target, data)
    unit, size = desk.microbatch()
    prediction = desk.predict(desk.fullest(size))
    room = target.room
    update_s = None
    if target.here and room is not None and prediction.peak_bytes <= room.usable_bytes and desk.is_quick(size):
        say("timing an update with random weights")
        size, update_s = desk.measure()
        prediction = desk.predict(desk.fullest(size))
    say("looking for what would help")
    levers = sorted(desk.levers(desk.fullest(size)), key=lambda lever: lever[1])
    return Forecast(
        config=config,
        target=target,
        num_parameters=desk.num_parameters,
        num_trained=desk.num_trained,
        unit=unit,
        size=size,
        prediction=prediction,
        fits=None if room is None else prediction.peak_bytes <= room.usable_bytes,
        plan=plan(desk.window, token_budget=size) if unit == "tokens" else plan(desk.window, microbatch_size=size),
        levers=tuple(levers),
        update_s=update_s,
        notes=(*data.notes, *_notes(target)),
    )


def find_target(config: TrainConfig) -> Target:
    """Find what a plan is for: a card by its name, a device of this machine, or a CUDA device that is not here.

    Raises:
        InputError: The memory that is asked for is more than there is, or a share of what is not known.
    """
    named = config.gpu is not None or (config.device.startswith("cuda") and not torch.cuda.is_available())
    if not named:
        machine = find_machine(config.device, config.precision)
        try:
            here = find_room(config.memory, machine.device, ())
        except ValueError as error:
            raise InputError(f"--{error}") from error
        return Target(str(machine), machine.device, machine, here, True)
    device = torch.device("cuda")
    precision = "bf16" if config.precision == "auto" else config.precision
    machine = Machine(stand_in_for(device), precision)
    room: Room | None
    try:
        if config.gpu is not None:
            room = Room.of(gpu_limit(config.gpu), f"what is free on {config.gpu}")
        elif config.memory is not None:
            room = Room.of(parse_memory(config.memory).bytes_of(), config.memory)
        else:
            room = None
    except ValueError as error:
        raise InputError(f"--{error}") from error
    return Target(f"{config.gpu or 'a CUDA device'}, {precision}", device, machine, room, False)


def _notes(target: Target) -> list[str]:
    if target.device.type == target.machine.device.type:
        return []
    why = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
    return [f"torch {why} here: memory is that of the CPU's operations, counted as CUDA counts"]


# data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    lengths: Sequence[int]
    max_length: int
    model_config: Any
    collate: Callable[..., Any]
    notes: tuple[str, ...]


def _read(config: TrainConfig, say: Say) -> _Data:
    say(f"reading {config.data}")
    corpus = read_corpus(config.data)
    documents, _ = split_documents(corpus.documents, validation_fraction=config.validation_fraction)
    notes = []
    tokenizer: Any = None
    if config.model == TINY:
        say("training a tokenizer")
        texts = [text for document in documents for text in document.texts]
        tokenizer = train_tokenizer(texts, vocabulary_size=TINY_VOCABULARY)
        assert config.max_length is not None, "resolved() gives it a value"
        model_config = tiny_config(tokenizer, max_length=config.max_length)
    else:
        model_config = load_config(config.model)
        try:
            tokenizer = load_tokenizer(config.model)
        except InputError:
            notes.append(f"{config.model} comes without a tokenizer: {BYTES_A_TOKEN} bytes count as a token")
    positions = getattr(model_config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
    max_length = config.max_length or min(DEFAULT_MAX_LENGTH, positions)
    if max_length > positions:
        raise InputError(
            f"--max-length {max_length} is more than the {positions} positions of {config.model}: pass --max-length "
            f"{positions} or less."
        )
    if len(documents) > MOST_DOCUMENTS:
        notes.append(f"lengths are those of {MOST_DOCUMENTS:,} of {count(len(documents), 'document')}")
        documents = [documents[i * len(documents) // MOST_DOCUMENTS] for i in range(MOST_DOCUMENTS)]
    say("measuring the documents")
    if tokenizer is None:
        lengths, pad = _estimated_lengths(documents, max_length), 0
    else:
        lengths = encode(documents, tokenizer, max_length=max_length)[0].lengths
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if not lengths:
        raise InputError(f"{config.data} holds nothing to learn from.")
    return _Data(lengths, max_length, model_config, partial(collate, pad_id=pad), tuple(notes))


def _estimated_lengths(documents: Sequence[Document], max_length: int) -> list[int]:
    lengths = []
    for document in documents:
        tokens = max(1, sum(len(text.encode()) for text in document.texts) // BYTES_A_TOKEN)
        lengths += [max_length] * (tokens // max_length) + [tokens % max_length] * bool(tokens % max_length)
    return lengths


# figures ---------------------------------------------------------------------------------------------------------


class _Desk:
    """Works out the figures of one configuration."""

    def __init__(self, config: TrainConfig, target: Target, data: _Data) -> None:
        self._config = config
        self._target = target
        self._data = data
        windows = epoch_windows(
            data.lengths,
            global_batch=config.global_batch,
            global_batch_tokens=config.global_batch_tokens,
            seed=config.seed,
            epoch=0,
        )
        self.window = [data.lengths[i] for i in windows[0]]
        model = self._model(config, torch.device("meta"))
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._rehearsal = self._rehearse(config, model)
        self._predicted: dict[tuple[int, int], Prediction] = {}

    def microbatch(self) -> tuple[str, int]:
        """Give the unit and the size of the micro-batch: as asked, else the largest that fits."""
        config, longest = self._config, max(self._data.lengths)
        if config.token_budget is not None:
            if config.token_budget < longest:
                raise InputError(
                    f"--token-budget {config.token_budget} is less than the longest sequence, which has {longest} "
                    f"tokens: pass --token-budget {longest} or more, or a smaller --max-length."
                )
            return "tokens", config.token_budget
        if isinstance(config.microbatch, int):
            return "samples", config.microbatch
        if self._target.room is None:
            raise InputError(
                f"how much memory {self._target.name} has is not known: name a card, such as --gpu h100, or an "
                "amount, such as --memory 24GiB, or pass --microbatch or --token-budget."
            )
        usable = self._target.room.usable_bytes
        if self.predict((1, longest)).peak_bytes > usable:
            return "tokens", longest
        rows = largest_below(lambda rows: self.predict((rows, longest)).peak_bytes, 1, len(self.window), usable)
        return "tokens", rows * longest

    def fullest(self, size: int) -> tuple[int, int]:
        """Rows and tokens of the fullest micro-batch of a size."""
        longest = max(self._data.lengths)
        return (size if isinstance(self._config.microbatch, int) else size // longest), longest

    def predict(self, shape: tuple[int, int]) -> Prediction:
        """Predict the peak of a window of micro-batches of a shape."""
        if shape not in self._predicted:
            self._predicted[shape] = self._rehearsal.predict(_rows(shape))
        return self._predicted[shape]

    def levers(self, shape: tuple[int, int]) -> list[tuple[str, int]]:
        """Predict the same with one setting more; those that are set already are left out."""
        found = []
        for flags, changes in LEVERS.items():
            if any(getattr(self._config, name) not in (False, 0) and name != "precision" for name in changes):
                continue
            if changes.get("precision") == self._config.precision:
                continue
            config = self._config.model_copy(update=changes)
            rehearsal = self._rehearse(config, self._model(config, torch.device("meta")))
            found.append((flags, rehearsal.predict(_rows(shape)).peak_bytes))
        return found

    def is_quick(self, size: int) -> bool:
        """Whether an update can be measured in seconds."""
        tokens = sum(self.window) + 8 * size  # the update itself, and what choosing its micro-batch takes
        most = PROBE_OPERATIONS.get(self._target.machine.device.type, 0.0)
        return bool(6.0 * self.num_parameters * tokens < 10 * most)

    def measure(self) -> tuple[int, float]:
        """Run two updates with random weights and samples; give the micro-batch that was chosen, and the seconds."""
        machine, config = self._target.machine, self._config
        model = self._model(config, machine.device)
        microbatch: Any = config.microbatch
        if config.token_budget is not None:
            microbatch = TokenBudget(config.token_budget)
        engine = Engine(
            model,
            make_optimizer(model, config, machine),
            self._loss(machine),
            microbatch=microbatch,
            memory=config.memory if microbatch == "auto" else None,
            collate=self._data.collate,
            lengths=lambda samples: [len(sample["input_ids"]) for sample in samples],
            scaler=machine.scaler(),
        )
        samples = [
            {"input_ids": torch.zeros(length, dtype=torch.int64), "labels": torch.zeros(length, dtype=torch.int64)}
            for length in (*self.window, max(self._data.lengths))
        ]
        size = engine.tune(samples).size if microbatch == "auto" else config.token_budget or microbatch
        seconds = min(engine.step(samples[:-1]).elapsed_s for _ in range(2))
        return size, seconds

    def _model(self, config: TrainConfig, device: torch.device) -> Any:
        dtype = Machine(self._target.machine.device, config.precision).weights_dtype
        model = model_of(self._data.model_config, dtype=dtype, device=device)
        self._needs_mask = not attends_to_all(model.config, max_length=self._data.max_length)
        if not self._needs_mask:
            use_causal_attention(model)
        return equip(model, config).train()

    def _rehearse(self, config: TrainConfig, model: Any) -> Rehearsal:
        machine = Machine(self._target.machine.device, config.precision)
        optimizer = make_optimizer(model, config, Machine(self._target.device, config.precision))
        return Rehearsal.of(model, optimizer, self._loss(machine), device=self._target.device)

    def _loss(self, machine: Machine) -> CausalLMLoss:
        return CausalLMLoss(machine, needs_mask=self._needs_mask)


def _rows(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    names = ("input_ids", "labels", "attention_mask")
    return {name: torch.empty(shape, dtype=torch.int64, device="meta") for name in names}
