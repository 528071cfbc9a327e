"""AdamW for the trained parameters, and the learning-rate schedule."""

import math
from typing import Any

import torch

from bigbatch.lm.config.scale_from import BETAS, EPS
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec

FINAL_LR_FACTOR = 0.1  # of the peak rate, at the end of the cosine


def make_optimizer(model: Any, config: TrainConfig, device_spec: DeviceSpec) -> torch.optim.AdamW:
    """Create AdamW for the trained parameters, without weight decay of biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    assert config.lr is not None, "set by resolved()"
    fused = device_spec.device.type in ("cuda", "cpu")
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, eps=EPS, fused=fused)


def rescale_second_moment(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply Adam's second moments by old batch / new batch when the batch changes.

    Gradient noise dominates them; without this they need 1 / (1 − β2) updates to adapt to the noise of the new batch.
    """
    moments = [state["exp_avg_sq"] for state in optimizer.state.values() if "exp_avg_sq" in state]
    if moments:
        torch._foreach_mul_(moments, factor)


def lr_factor(step: float, *, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """Return the learning rate of an update, as a fraction of the peak.

    Args:
        step: Updates done before this one.
        total_steps: Updates of the run.
        warmup_steps: Updates over which the rate rises linearly to the peak.
        schedule: ``cosine`` falls to a tenth at the last update; ``constant`` stays.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return FINAL_LR_FACTOR + (1 - FINAL_LR_FACTOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
