"""The table of ``bigbatch plan --offload``: what fits in the memory of a card, with which level, and how fast.

config, memory → candidates of every memory → the fastest that fits of each → OffloadTable
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bigbatch.autotune.peak_prediction import PredictionError
from bigbatch.engine.card_target import local_card
from bigbatch.errors import BigbatchError, InputError, MemoryLimitError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.model.setup import compiles_layers
from bigbatch.lm.planning.data_statistics import measure_data
from bigbatch.lm.planning.device_target import resolve_target
from bigbatch.lm.planning.offload_cases import OffloadCases
from bigbatch.lm.planning.sharded_memory import less_margin
from bigbatch.lm.training.setup import ProgressCallback
from bigbatch.memory.limit import gpu_limit, gpu_memory, parse_memory
from bigbatch.memory.usage import MemoryBudget
from bigbatch.offload.cards import TYPICAL, Card, card, card_of_size
from bigbatch.offload.choice import Candidate, choose
from bigbatch.offload.host_memory import available_host_bytes
from bigbatch.offload.levels import LEVELS, Offload
from bigbatch.offload.link_rate import measure_link_rate


@dataclass(frozen=True)
class CardMemory:
    """Memory of a card that a run may use.

    Attributes:
        name: As asked for, or the common size.
        usable_bytes: For tensors, at the peak.
        card: Whose rates are used.
    """

    name: str
    usable_bytes: int
    card: Card


@dataclass(frozen=True)
class OffloadRow:
    """One candidate for one memory.

    Attributes:
        memory: Of the card.
        candidate: Level, checkpointing, micro-batch, bytes and time, for one card.
        fits: Whether it fits on the card and on the host.
        is_supported: Whether training supports it.
        is_chosen: Whether it is the fastest that fits and is supported.
    """

    memory: CardMemory
    candidate: Candidate
    fits: bool
    is_supported: bool
    is_chosen: bool


@dataclass(frozen=True)
class OffloadTable:
    """Levels of offload and checkpointing modes of a run, by memory of the card.

    Attributes:
        model: Name of the model.
        precision: Of the run.
        num_parameters, num_trained: Of the model.
        num_cards: That share the global batch.
        tokens: Of one card in the first update.
        unit: Of micro-batches: ``"tokens"`` or ``"samples"``.
        host_bytes: Host memory that all cards may use; None if unknown.
        rows: Of one memory all candidates; of several the fastest of each level, or the smallest if none fits.
        obstacle: Why nothing fits, of one memory; None if something does.
        notes: Sentences about the predictions.
    """

    model: str
    precision: str
    num_parameters: int
    num_trained: int
    num_cards: int
    tokens: int
    unit: str
    host_bytes: int | None
    rows: tuple[OffloadRow, ...]
    obstacle: str | None
    notes: tuple[str, ...]


def offload_table(
    config: TrainConfig, *, num_cards: int, host_memory: str | None, progress: ProgressCallback
) -> OffloadTable:
    """Predict what fits in the memory of a card, or in that of common ones.

    Args:
        config: The configuration of the run.
        num_cards: That share the global batch and, with ``--parallel fsdp`` or ``hsdp``, the model.
        host_memory: Host memory for all cards; None for that of this machine if it has the card, else unknown.
        progress: Receives progress messages.

    Raises:
        InputError: Something that the configuration names does not exist or is not usable.
        BigbatchError: The memory of this model cannot be predicted.
    """
    config = config.resolved()
    is_here = config.gpu is None and torch.cuda.is_available()
    if config.device not in ("auto", "cuda") and not config.device.startswith("cuda:"):
        raise InputError(
            f"--device {config.device} has no memory but that of the host: --offload and --cards are planned for CUDA. "
            "Leave --device out."
        )
    memories = _memories(config, is_here=is_here)
    if num_cards > 1 and config.parallel != "ddp":
        memories = [replace(memory, usable_bytes=less_margin(memory.usable_bytes)) for memory in memories]
    gpu = config.gpu or (None if is_here else memories[0].card.name)
    target = resolve_target(config.model_copy(update={"device": "auto" if gpu else config.device, "gpu": gpu}))
    data = measure_data(config, progress=progress)
    config = config.model_copy(update={"precision": target.device_spec.precision, "max_length": data.max_length})
    progress("predicting the memory")
    supported, levels = _levels(config, num_cards)
    try:
        device_bytes = _device_bytes(config, target.device, is_here=is_here)
        cases = OffloadCases(config, target, data, num_cards=num_cards, device_bytes=device_bytes, levels=levels)
        if not cases.levels:
            if config.offload == "gradients":
                raise InputError(
                    "--offload gradients is not supported with --precision fp16 and --reproducible: pass --offload "
                    "optimizer."
                )
            raise InputError(
                f"--offload {config.offload} keeps float32 weights of linear layers in host memory, and this run has "
                "none that it computes with in bf16: pass --offload optimizer."
            )
        host_bytes = _host_bytes(host_memory, num_cards, is_here=is_here)
        share = None if host_bytes is None else host_bytes // num_cards
        rows, obstacle = [], None
        for memory in memories:
            candidates = cases.candidates(memory.usable_bytes, memory.card, share)
            found, obstacle = _rows(memory, candidates, supported, share)
            rows += found if len(memories) == 1 else _best_of_levels(found)
    except PredictionError as error:
        raise BigbatchError(f"the memory of {config.model} cannot be predicted: {error}.") from error
    return OffloadTable(
        model=config.model,
        precision=config.precision,
        num_parameters=cases.num_parameters,
        num_trained=cases.num_trained,
        num_cards=num_cards,
        tokens=cases.tokens,
        unit=cases.unit,
        host_bytes=host_bytes,
        rows=tuple(rows),
        obstacle=obstacle if len(memories) == 1 else None,
        notes=(*data.notes, *_notes(config, target.device, levels, supported)),
    )


def _memories(config: TrainConfig, *, is_here: bool) -> list[CardMemory]:
    """Return the memory that is asked for, that of this machine's card, or those of common cards."""
    if config.gpu is not None:
        return [_of_gpu(config.gpu, config.gpu)]
    if is_here:
        target = resolve_target(config)
        assert target.budget is not None, "known on this machine"
        rates = local_card(target.device).with_link_rate(measure_link_rate(target.device))
        return [CardMemory(config.memory or rates.name, target.budget.usable_bytes, rates)]
    if config.memory is not None:
        try:
            limit_bytes = parse_memory(config.memory).to_bytes()
        except ValueError as error:  # its message begins with the name of the flag
            raise InputError(f"--{error}") from error
        usable = MemoryBudget.from_limit(limit_bytes, config.memory).usable_bytes
        return [CardMemory(config.memory, usable, card_of_size(limit_bytes))]
    return [_of_gpu(size, gpu) for size, gpu in TYPICAL.items()]


def _device_bytes(config: TrainConfig, device: torch.device, *, is_here: bool) -> int | None:
    """Return the memory of the card, of which `_memories` may be a part; None if it is one of several."""
    if config.gpu is not None:
        return gpu_memory(config.gpu)
    return torch.cuda.get_device_properties(device).total_memory if is_here else None


def _of_gpu(name: str, gpu: str) -> CardMemory:
    return CardMemory(name, MemoryBudget.from_limit(gpu_limit(gpu), name).usable_bytes, card(gpu))


def _levels(config: TrainConfig, num_cards: int) -> tuple[Sequence[Offload], Sequence[Offload]]:
    """Return the levels that training supports, and those to predict."""
    if num_cards > 1 and config.parallel != "ddp":
        return ("none",), LEVELS
    levels = levels_of(config)
    return levels, levels


def levels_of(config: TrainConfig) -> Sequence[Offload]:
    """Return the levels that a configuration allows."""
    return LEVELS if config.offload == "auto" else (config.offload,)


def _host_bytes(host_memory: str | None, num_cards: int, *, is_here: bool) -> int | None:
    if host_memory is not None:
        try:
            return parse_memory(host_memory).to_bytes()
        except ValueError as error:
            raise InputError(f"--host-{error}") from error
    return num_cards * available_host_bytes(num_processes=num_cards) if is_here else None


def _rows(
    memory: CardMemory, candidates: Sequence[Candidate], supported: Sequence[Offload], host_bytes: int | None
) -> tuple[list[OffloadRow], str | None]:
    """Return a row for each candidate, and why none of them fits."""
    chosen, obstacle = None, None
    try:
        chosen = choose(
            [each for each in candidates if each.level in supported],
            card_bytes=memory.usable_bytes,
            host_bytes=host_bytes,
        )
    except MemoryLimitError as error:
        obstacle = str(error)
    rows = [
        OffloadRow(
            memory,
            each,
            fits=each.card_bytes <= memory.usable_bytes and (host_bytes is None or each.host_bytes <= host_bytes),
            is_supported=each.level in supported,
            is_chosen=each is chosen,
        )
        for each in candidates
    ]
    return rows, obstacle


def _best_of_levels(rows: Sequence[OffloadRow]) -> list[OffloadRow]:
    """Return the fastest row of each level that fits, or the one with the lowest peak if none does."""
    found = []
    for level in dict.fromkeys(row.candidate.level for row in rows):
        of_level = [row for row in rows if row.candidate.level == level]
        fitting = [row for row in of_level if row.fits]
        if fitting:
            found.append(min(fitting, key=lambda row: row.candidate.time.total_s))
        else:
            found.append(min(of_level, key=lambda row: row.candidate.card_bytes))
    return found


def _notes(
    config: TrainConfig, device: torch.device, levels: Sequence[Offload], supported: Sequence[Offload]
) -> list[str]:
    notes = []
    if device.type == "cuda" and config.objective == "sft" and compiles_layers(config, device):
        notes.append("layers are compiled in training and need less memory than this eager-mode estimate")
    if any(level not in supported for level in levels):
        notes.append("offload of sharded models is predicted here and not supported in training")
    return notes
