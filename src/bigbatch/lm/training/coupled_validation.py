"""The validation loss of an objective whose samples are compared with each other: that of all of them as one batch."""

from collections.abc import Sequence

import torch
from torch import nn

from bigbatch.coupled.coupled import Coupled
from bigbatch.engine.engine import Engine
from bigbatch.lm.training.setup import TrainingSetup


def coupled_validation_loss(
    setup: TrainingSetup, engine: Engine, loss_fn: Coupled, model: nn.Module, chosen: Sequence[int]
) -> float:
    """Return the loss of some held-out samples as one batch. Every rank encodes all of them.

    Args:
        setup: With validation data.
        engine: Limits the micro-batches.
        loss_fn: Whose ``encode`` returns a mapping of tensors.
        model: In evaluation mode.
        chosen: Samples.
    """
    held_out, device = setup.validation, setup.device_spec.device
    assert held_out is not None, "called only with validation data"
    parts = []
    for rows in engine.groups([int(held_out.lengths[i]) for i in chosen]):
        samples = [held_out[chosen[row]] for row in rows]
        microbatch = {name: tensor.to(device) for name, tensor in setup.collate(samples).items()}
        parts.append(loss_fn.encode(model, microbatch))
    features = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return float(loss_fn.loss(model, features).item())
