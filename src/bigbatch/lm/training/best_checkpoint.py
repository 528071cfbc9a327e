"""The checkpoint with the lowest validation loss, and the end of a run whose validation loss no longer decreases.

validation loss → `record_validation` → `Progress` → checkpoints to keep, early stopping, and at the end `load_best`

The decision depends on the losses alone, which all ranks compute together, and its state is in every checkpoint: ranks,
and a run that is resumed, make the same choice.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bigbatch.engine.engine import Engine
from bigbatch.errors import CheckpointError, InputError
from bigbatch.lm.checkpoint import read
from bigbatch.lm.checkpoint.run_checkpoint import FILES, Progress, RunCheckpoint
from bigbatch.lm.checkpoint.sharded_reader import read_into
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.distributed.ranks import RankContext
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.text import plural

MODEL_PREFIX = next(prefix for prefix, file in FILES.items() if file == "model")


def record_validation(now: Progress, loss: float, *, min_delta: float) -> bool:
    """Update the best validation and the count of those without improvement; return whether this one is the best.

        best:         the lowest loss, the first of equal ones; NaN and infinity never are
        improvement:  loss < reference − min_delta; the reference is the loss of the last improvement

    so small decreases add up until they are an improvement.

    Args:
        now: Progress after the update that was validated.
        loss: Validation loss in nats per token.
        min_delta: Of ``early_stopping_min_delta``.
    """
    if math.isfinite(loss) and (now.improved_loss is None or loss < now.improved_loss - min_delta):
        now.improved_loss, now.validations_without_improvement = loss, 0
    else:
        now.validations_without_improvement += 1
    if not math.isfinite(loss) or (now.best_loss is not None and loss >= now.best_loss):
        return False
    now.best_loss, now.best_step = loss, now.step
    return True


def check_validation(config: TrainConfig, validation: object) -> None:
    """Check that a run has the validation data that its settings need.

    Raises:
        InputError: It has none.
    """
    flag = "--early-stopping" if config.early_stopping is not None else "--keep best"
    if validation is None and (config.early_stopping is not None or config.resolved_keep == "best"):
        raise InputError(
            f"{flag} compares validation losses, and this run has no validation data: pass --validation-data, or a "
            "larger --validation-fraction."
        )


def check_comparable(
    now: Progress, checkpoint: RunCheckpoint, facts: Mapping[str, Any], config: TrainConfig, ranks: RankContext
) -> str | None:
    """Reset what `record_validation` counts if the best validation can no longer be used. Collective.

    Args:
        now: Progress in the checkpoint.
        checkpoint: From which the run is resumed.
        facts: What the run learns from now.
        config: Of the run.
        ranks: The processes of the run; the first one looks for the checkpoint of the best validation.

    Returns:
        A sentence that says why, if the run chooses by it; None if it can be used.
    """
    before = checkpoint.facts
    names = [name for name in ("data_sha256", "validation_sha256") if name in before]
    is_kept = not now.best_step or checkpoint.path.with_name(f"step-{now.best_step}").is_dir()
    if any(before[name] != facts[name] for name in names):
        why = "the data has changed"
    elif config.resolved_keep == "best" and not ranks.broadcast(is_kept):
        why = f"the checkpoint of update {now.best_step:,}, with the lowest one, was not kept"
    else:
        return None
    now.best_loss, now.best_step = None, 0
    now.improved_loss, now.validations_without_improvement = None, 0
    is_used = config.early_stopping is not None or config.resolved_keep == "best"
    return f"validation losses are compared from here on: {why}" if is_used else None


def stops_early(now: Progress, config: TrainConfig) -> bool:
    """Return whether ``early_stopping`` ends the run."""
    return config.early_stopping is not None and now.validations_without_improvement >= config.early_stopping


def early_stopping_reason(config: TrainConfig) -> str:
    """Return why ``early_stopping`` has ended a run, as the end of a sentence."""
    loss, delta = "a lower validation loss", config.early_stopping_min_delta
    if delta:  # the best of these validations may have a loss that is lower by less
        loss = f"a validation loss that is lower by more than {delta:.12g}"
    return f"{plural(config.early_stopping or 0, 'validation')} without {loss}"


@torch.no_grad()
def load_best(
    engine: Engine, now: Progress, directory: RunDirectory, ranks: RankContext, on_note: Callable[[str], object]
) -> int:
    """Load the weights of the best validation into the model; return the update that they are of.

    If they cannot be read, the model stays as it is, and a note says so. Collective if the ranks shard the model;
    otherwise the first rank reads, which saves the model, and the weights of the others stay as they are.

    Args:
        engine: Of the run, after its last update.
        now: Progress after the last update.
        directory: Of the run.
        ranks: The processes of the run.
        on_note: Receives the note.
    """
    if now.best_step in (0, now.step):
        return now.step
    path = directory.checkpoints / f"step-{now.best_step}"
    own: dict[str, Any] = {f"{MODEL_PREFIX}{name}": tensor for name, tensor in engine.state_dict()["model"].items()}
    try:
        if ranks.are_sharded:
            read_into(path, own)
        elif ranks.is_first:
            stored = read(path, parts=("model",)).tensors["model"]
            for tensor, values in [(tensor, stored[name]) for name, tensor in own.items()]:  # all of them, or none
                tensor.copy_(values)
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        on_note(
            f"the weights of update {now.best_step:,} cannot be loaded, so those of the last update are saved: {error}"
        )
        return now.step
    return now.best_step
