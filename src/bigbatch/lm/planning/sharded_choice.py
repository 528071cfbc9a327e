"""The micro-batch of ``--microbatch auto`` for a sharded model: chosen by prediction, before the first update.

Ranks that share a model cannot try sizes: an out-of-memory error on one of them ends all.

config, memory of the rank with the least → micro-batch that fits and pays, fastest checkpointing → config
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bigbatch import __version__
from bigbatch.autotune.peak_prediction import PredictionError
from bigbatch.engine.card_target import local_card
from bigbatch.errors import BigbatchError, InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec, resolve_device
from bigbatch.lm.distributed.ranks import RankContext
from bigbatch.lm.files import read_json, write_atomically
from bigbatch.lm.planning.data_statistics import DataStatistics, measure_data
from bigbatch.lm.planning.device_target import PlanTarget, resolve_target
from bigbatch.lm.planning.offload_cases import OffloadCases
from bigbatch.lm.planning.sharded_memory import less_margin
from bigbatch.lm.runs.file_names import SHARDED_MICROBATCH
from bigbatch.lm.training.microbatch_limits import memory_of
from bigbatch.lm.training.setup import ProgressCallback
from bigbatch.memory.limit import describe_bytes
from bigbatch.memory.usage import MemoryBudget
from bigbatch.offload.cards import Card
from bigbatch.offload.choice import Candidate

HOST = Card("cpu", 1e11, 2e10, 1e10, False, 0, 1e9)
"""Rates of a rank on the CPU, assumed: they only order the candidates."""

DEPENDS_ON = (
    "data", "max_length", "seed", "global_batch", "global_batch_tokens", "global_batch_schedule", "objective",
    "gradient_checkpointing", "layout", "attention", "compile", "optimizer", "parallel", "memory", "gpu", "lora_rank",
    "lora_targets", "lora_dropout", "dora", "logits",
)  # fmt: skip


@dataclass(frozen=True)
class ChosenMicrobatch:
    """A configuration whose micro-batch is chosen.

    Attributes:
        config: With the chosen token budget and checkpointing; as it was asked for if nothing had to be chosen.
        sentence: About the choice; None without one.
        record: What `save` writes; None without a choice.
        asked: The settings that the choice replaces, as config.json keeps them: a resumed run may choose otherwise.
    """

    config: TrainConfig
    sentence: str | None = None
    record: Mapping[str, Any] | None = None
    asked: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the choice into a run directory, for a resumed run; a write error is ignored: it is made again then."""
        if self.record is not None:
            with suppress(OSError):
                write_atomically(folder / SHARDED_MICROBATCH, (json.dumps(self.record, indent=2) + "\n").encode())


def with_chosen_microbatch(
    config: TrainConfig, ranks: RankContext, *, progress: ProgressCallback, folder: Path | None = None
) -> ChosenMicrobatch:
    """Return a configuration with a token budget in place of ``auto``, if the model is sharded. Collective.

    The first rank chooses, for the memory of the rank with the least. With an explicit limit, that limit is applied to
    each process.

    Args:
        config: Of the run.
        ranks: The processes of the run.
        progress: Receives progress messages.
        folder: Of a run to resume: its choice is used again if it depends on the same facts and still fits.

    Raises:
        InputError: The longest sequence alone does not fit, or the memory of the model cannot be predicted.
    """
    asked = config.resolved()
    if not ranks.are_sharded or asked.microbatch != "auto" or asked.deterministic:
        return ChosenMicrobatch(config)
    with ranks.raise_together():
        device_spec, budget = _memory(asked, ranks)
    usable = MemoryBudget(*map(min, zip(*ranks.all_gather([budget.limit_bytes, budget.usable_bytes]), strict=True)))
    found: dict[str, Any] | None = None
    with ranks.raise_together():
        if ranks.is_first:
            try:
                found = _choose(asked, ranks, device_spec, usable, progress=progress, folder=folder)
            except InputError:
                raise
            except (BigbatchError, ModuleNotFoundError) as error:  # the other ranks wait for an InputError
                raise InputError(str(error)) from error
    found = ranks.broadcast(found)
    settings = {"microbatch": None, "token_budget": found["size"], "gradient_checkpointing": found["checkpointing"]}
    settings |= dict.fromkeys(("memory", "gpu"))  # applied here; they limit "auto", which is replaced
    sentence = (
        f"micro-batches of up to {found['size']:,} tokens, chosen by prediction for a sharded model: "
        f"{describe_bytes(found['peak_bytes'])} of {describe_bytes(usable.limit_bytes)} a rank, checkpointing "
        f"{found['checkpointing']}"
    )
    before = {name: getattr(asked, name) for name in settings}
    return ChosenMicrobatch(config.model_copy(update=settings), sentence, found, before)


def _memory(config: TrainConfig, ranks: RankContext) -> tuple[DeviceSpec, MemoryBudget]:
    """Return device and memory of this rank, and apply a limit that was asked for."""
    device_spec = resolve_device(config.device, config.precision, allows_fp16=False)
    memory = memory_of(config, device_spec, ranks=ranks)
    own = config.model_copy(update={"memory": memory, "gpu": None, "precision": device_spec.precision})
    budget = resolve_target(own).budget
    assert budget is not None, "the device is in this machine"
    if config.memory is not None or config.gpu is not None:
        device_spec.limit_memory(budget.limit_bytes)
    return device_spec, budget


def _choose(
    config: TrainConfig,
    ranks: RankContext,
    device_spec: DeviceSpec,
    budget: MemoryBudget,
    *,
    progress: ProgressCallback,
    folder: Path | None,
) -> dict[str, Any]:
    """Choose on this rank, or return the earlier choice."""
    data = measure_data(config, progress=progress)
    if data.is_sample:  # a sequence that is not in it may be as long as any
        data = replace(data, lengths=tuple(dict.fromkeys((data.max_length, *data.lengths))))
    precision = device_spec.precision
    config = config.model_copy(update={"precision": precision, "max_length": data.max_length})
    usable_bytes = less_margin(budget.usable_bytes)
    is_cuda = device_spec.device.type == "cuda"
    device_bytes = torch.cuda.get_device_properties(device_spec.device).total_memory if is_cuda else None
    key = _key(config, ranks, data, device_spec, device_bytes)
    earlier = None if folder is None else _earlier(folder, key, usable_bytes)
    if earlier is not None:
        return earlier
    progress("choosing the micro-batch")
    config = config.model_copy(update={"memory": None, "gpu": None})
    card = local_card(device_spec.device) if is_cuda else HOST
    try:
        candidates = sharded_cases(config, resolve_target(config), data, ranks, device_bytes=device_bytes).candidates(
            usable_bytes, card
        )
    except PredictionError as error:
        raise InputError(
            f"--microbatch auto of a sharded model is predicted, and the memory of {config.model} cannot be: {error}. "
            "Pass --token-budget or --microbatch."
        ) from error
    chosen = fastest(candidates, usable_bytes, config, num_ranks=ranks.size)
    return {"key": key, "size": chosen.size, "peak_bytes": chosen.card_bytes, "checkpointing": chosen.checkpointing}


def sharded_cases(
    config: TrainConfig, target: PlanTarget, data: DataStatistics, ranks: RankContext, *, device_bytes: int | None
) -> OffloadCases:
    """Predict a configuration on ranks that share the model: all of them, or those of a machine.

    Args:
        config: With every default resolved, the precision included.
        target: Device of a rank.
        data: Of the whole run.
        ranks: Of the run.
        device_bytes: Memory of the device; None on the CPU.
    """
    num_shards = ranks.local_size if config.parallel == "hsdp" else ranks.size
    return OffloadCases(
        config, target, data, num_cards=ranks.size, num_shards=num_shards, device_bytes=device_bytes, levels=("none",)
    )


def fastest(candidates: list[Candidate], usable_bytes: int, config: TrainConfig, *, num_ranks: int) -> Candidate:
    """Return the fastest candidate whose peak fits.

    Raises:
        InputError: None does.
    """
    fitting = [each for each in candidates if each.card_bytes <= usable_bytes]
    if not fitting:
        least = min(candidates, key=lambda each: each.card_bytes)
        raise InputError(
            f"{config.model} does not fit with --parallel {config.parallel} on {num_ranks} ranks: micro-batches of "
            f"{least.size:,} tokens with checkpointing {least.checkpointing} need {describe_bytes(least.card_bytes)} a "
            f"rank, and {describe_bytes(usable_bytes)} are usable. Use more ranks, a smaller --max-length, --precision "
            "bf16-weights or --lora-rank."
        )
    return min(fitting, key=lambda each: each.time.total_s)


def _key(
    config: TrainConfig,
    ranks: RankContext,
    data: DataStatistics,
    device_spec: DeviceSpec,
    device_bytes: int | None,
) -> str:
    """Return a hash of what a choice depends on, but for the memory that happens to be free."""
    import transformers

    facts = {
        "model": data.model_config.to_json_string(),
        "ranks": [ranks.size, ranks.local_size, ranks.parallel],
        "device": [str(device_spec), device_bytes],
        "settings": {name: getattr(config, name) for name in DEPENDS_ON},
        "lengths": [data.longest, data.most_rows, sum(data.window)],
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _earlier(folder: Path, key: str, usable_bytes: int) -> dict[str, Any] | None:
    """Return the choice in a run directory; None if it depends on other facts or does not fit now."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        found: dict[str, Any] = read_json(folder / SHARDED_MICROBATCH)
        if found["key"] == key and found["peak_bytes"] <= usable_bytes and found["size"] > 0:
            return found
    return None
