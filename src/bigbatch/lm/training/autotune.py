"""The fastest way to run a batch in the memory that is there: what is computed anew, and the micro-batch to go with it.

for each level of recomputation: Engine.tune → faster than the one before, and is memory what limits it? → next level
"""

from typing import Any

from bigbatch.autotune.choice import SPEED_TOLERANCE, MicrobatchChoice
from bigbatch.engine.engine import Engine
from bigbatch.errors import MemoryLimitError
from bigbatch.lm.config.field_types import CHECKPOINTING_MODES, CheckpointingMode
from bigbatch.lm.model.decoder_layers import DecoderLayers


def tune(
    engine: Engine, layers: DecoderLayers | None, samples: list[Any], *, modes: bool
) -> tuple[CheckpointingMode, MicrobatchChoice]:
    """Choose the micro-batch, and what is computed anew where it is asked for; the engine takes the choice.

    Computing anew costs time and saves memory, so a level is tried only where memory limits the micro-batch of the one
    before, and the search ends with the first that is not faster.

    Args:
        engine: Of the model that the layers belong to.
        layers: None where nothing can be computed anew.
        samples: As for `Engine.tune`.
        modes: Whether to try others than the one that is set.

    Raises:
        MemoryLimitError: A single sample does not fit at any level that was to be tried.
    """
    found: tuple[CheckpointingMode, MicrobatchChoice] | None = None
    refused: MemoryLimitError | None = None
    now: CheckpointingMode = "none" if layers is None else layers.mode
    for mode in CHECKPOINTING_MODES if modes and layers is not None else (now,):
        if layers is not None:
            layers.set_checkpointing(mode)
        try:
            choice = engine.tune(samples)
        except MemoryLimitError as error:
            refused = error
            continue
        faster = found is None or choice.per_s > found[1].per_s * SPEED_TOLERANCE
        if faster:
            found = (mode, choice)
        if not faster or not choice.limited:
            break
    if found is None:
        assert refused is not None, "one of the two has happened"
        raise refused
    take(engine, layers, *found)
    return found


def take(engine: Engine, layers: DecoderLayers | None, mode: CheckpointingMode, choice: MicrobatchChoice) -> None:
    """Take what `tune` found."""
    if layers is not None:
        layers.set_checkpointing(mode)
    engine.set_microbatch(choice)


def describe(mode: CheckpointingMode) -> str:
    """Say what is computed anew, for a line about a choice; nothing where nothing is."""
    return {"none": "", "selective": ", every second layer computed anew", "full": ", all layers computed anew"}[mode]
