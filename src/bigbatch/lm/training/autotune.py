"""The choice of micro-batch and activation checkpointing under ``--microbatch auto``: a cached one, or a measured one.

for each checkpointing mode: Engine.tune → faster than the mode before, and limited by memory? → next mode
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bigbatch.autotune.choice import SPEED_TOLERANCE, MicrobatchChoice
from bigbatch.engine.engine import Engine
from bigbatch.errors import InputError, MemoryLimitError
from bigbatch.lm.config.field_types import AUTO_MODES, CheckpointingMode
from bigbatch.lm.distributed.ranks import RankContext
from bigbatch.lm.model.decoder_layers import DecoderLayers
from bigbatch.lm.training.setup import TrainingSetup
from bigbatch.lm.training.tuning_cache import cache_key, load_cached

RECOMPUTED = 0.1
"""Smallest share of time that recomputing every second layer adds: half of the forward, which is a third of the time of
a layer or more, less the head, which is not recomputed."""


def choose_microbatch(
    engine: Engine,
    setup: TrainingSetup,
    make_samples: Callable[[], list[Any]],
    *,
    ranks: RankContext,
    cache: Path | None,
    usable_bytes: int | None,
) -> Path | None:
    """Apply the choice of an earlier run with the same cache key, or tune. Collective.

    Args:
        engine: With ``microbatch="auto"``.
        setup: Model, data and settings of the engine.
        make_samples: Returns the samples to tune with: this rank's share of a window, and the longest sample.
        ranks: The processes of the run; the first one reads the cache.
        cache: A run directory; it and its siblings are searched for a cached choice. None to tune always.
        usable_bytes: Memory that tensors may use.

    Returns:
        The run directory of the cached choice; None if the choice is new.

    Raises:
        InputError: A single sequence does not fit in memory.
    """
    layers = setup.model_setup.layers
    own = None if cache is None else load_cached(cache, cache_key(setup), usable_bytes=usable_bytes)
    found = ranks.broadcast(own and [asdict(own.choice), own.checkpointing_mode, str(own.folder)])
    if found is not None:
        choice, mode, folder = found
        apply_choice(engine, layers, mode, MicrobatchChoice.from_dict(choice))
        return Path(folder)
    try:
        tune(engine, layers, make_samples(), modes=setup.config.gradient_checkpointing == "auto")
    except MemoryLimitError as error:
        raise InputError(
            f"{error} Here that is --max-length, --gradient-checkpointing, --precision bf16-weights and --lora-rank."
        ) from error
    return None


def tune(
    engine: Engine, layers: DecoderLayers | None, samples: list[Any], *, modes: bool
) -> tuple[CheckpointingMode, MicrobatchChoice]:
    """Choose and apply the micro-batch and, with ``modes``, the mode of activation checkpointing.

    Checkpointing trades time for memory, so a mode is tried only if memory limits the micro-batch of the mode before,
    and the search ends with the first mode that is not faster, or where the fixed time of a micro-batch is so short
    that larger ones cannot make up for recomputed layers.

    Args:
        engine: Of the model that the layers belong to.
        layers: None if the model does not support checkpointing.
        samples: As for `Engine.tune`.
        modes: Whether to try `AUTO_MODES` instead of the current one.

    Raises:
        MemoryLimitError: A single sample does not fit in any mode that was tried.
    """
    found: tuple[CheckpointingMode, MicrobatchChoice] | None = None
    last_error: MemoryLimitError | None = None
    current: CheckpointingMode = "none" if layers is None else layers.mode
    for mode in AUTO_MODES if modes and layers is not None else (current,):
        if layers is not None:
            layers.set_checkpointing(mode)
        try:
            choice = engine.tune(samples)
        except MemoryLimitError as error:
            last_error = error
            continue
        faster = found is None or choice.per_s > found[1].per_s * SPEED_TOLERANCE
        if faster:
            found = (mode, choice)
        if not faster or not choice.limited or not _recomputing_may_pay(choice):
            break
    if found is None:
        assert last_error is not None, "every mode failed"
        raise last_error
    apply_choice(engine, layers, *found)
    return found


def _recomputing_may_pay(choice: MicrobatchChoice) -> bool:
    """Return whether the fixed time that larger micro-batches would save may exceed that of recomputed layers."""
    if len(choice.timing.points) < 2:
        return True  # the fixed time is unknown
    return choice.timing.overhead_tokens(choice.size) >= RECOMPUTED * choice.size


def apply_choice(
    engine: Engine, layers: DecoderLayers | None, mode: CheckpointingMode, choice: MicrobatchChoice
) -> None:
    """Apply a result of `tune` to an engine and its layers."""
    if layers is not None:
        layers.set_checkpointing(mode)
    engine.set_microbatch(choice)


def describe(mode: CheckpointingMode) -> str:
    """Describe activation checkpointing for a line about a choice; an empty string for none."""
    return {
        "none": "",
        "selective": ", activation checkpointing in every second layer",
        "full": ", activation checkpointing in all layers",
        "offload": ", activation checkpointing in all layers with their inputs in host memory",
    }[mode]
