"""The optimizer of the trained parameters, and the learning-rate schedule."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.nf4 import load_kernels
from bigbatch.lm.training.lion import Lion
from bigbatch.lm.training.muon import MuonWithAdamW

Named = Sequence[tuple[str, nn.Parameter]]


def make_optimizer(model: Any, config: TrainConfig, device_spec: DeviceSpec) -> torch.optim.Optimizer:
    """Create the optimizer of the trained parameters, without weight decay of biases, norms and excluded names.

    Raises:
        InputError: No parameter has a part of ``--no-weight-decay`` in its name.
    """
    config = config.resolved()
    assert config.lr is not None, "set by resolved()"
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    settings, lr = config.optimizer_settings(), config.lr
    excluded = _excluded(trained, config.no_weight_decay)
    if config.optimizer == "muon":
        matrices, others = split_for_muon(model, trained)
        return MuonWithAdamW(
            _groups(matrices, config.weight_decay, excluded),
            _groups(others, config.weight_decay, excluded),
            lr=lr,
            momentum=settings["momentum"],
            betas=(settings["beta1"], settings["beta2"]),
            eps=settings["eps"],
        )
    groups = _groups(trained, config.weight_decay, excluded)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=settings["momentum"])
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=lr)
    betas = settings["beta1"], settings["beta2"]
    if config.optimizer == "adamw-8bit":
        load_kernels("--optimizer adamw-8bit")
        from bigbatch.lm.training.adamw_8bit import AdamW8bit

        return AdamW8bit(groups, lr=lr, betas=betas, eps=settings["eps"])
    if config.optimizer == "lion":
        return Lion(groups, lr=lr, betas=betas)
    fused = device_spec.device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=settings["eps"], fused=fused)


def optimizer_notes(model: Any, config: TrainConfig) -> list[str]:
    """Return sentences for the user about which parameters an optimizer handles in which way."""
    if config.optimizer != "muon":
        return []
    matrices, others = split_for_muon(model, [(n, p) for n, p in model.named_parameters() if p.requires_grad])
    counts = [sum(p.numel() for _, p in part) for part in (matrices, others)]
    return [f"Muon updates {counts[0]:,} parameters in {len(matrices):,} matrices, AdamW the other {counts[1]:,}"]


def split_for_muon(model: Any, trained: Named) -> tuple[Named, Named]:
    """Return the trained parameters that Muon updates, the matrices of layers, and all others.

    Embeddings, norms, the output layer and tensors that are not called a weight are no matrices in the sense of Muon;
    experts that are stored as one tensor of three dimensions are not supported by `torch.optim.Muon`.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    outer = {id(p) for module in ends if module is not None for p in module.parameters()}
    outer |= {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    weights = {  # not the states of Mamba (A_log), nor norms with a row for each head
        id(p)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if "weight" in name and "norm" not in type(module).__name__.lower()
    }
    is_matrix = [p.ndim == 2 and id(p) in weights and id(p) not in outer for _, p in trained]
    matrices = [pair for pair, matrix in zip(trained, is_matrix, strict=True) if matrix]
    return matrices, [pair for pair, matrix in zip(trained, is_matrix, strict=True) if not matrix]


def _excluded(trained: Named, text: str | None) -> set[str]:
    """Return the names of parameters that contain one of the comma-separated parts of a text."""
    found: set[str] = set()
    for part in [] if text is None else [part.strip() for part in text.split(",")]:
        names = {name for name, _ in trained if part and part in name}
        if not names:
            example = next((name for name, p in trained if p.ndim > 1), "")
            raise InputError(
                f"--no-weight-decay {text}: no trained parameter has {part!r} in its name, such as {example}."
            )
        found |= names
    return found


def _groups(named: Named, weight_decay: float, excluded: set[str]) -> list[dict[str, Any]]:
    has_decay = [p.ndim > 1 and name not in excluded for name, p in named]
    groups: list[dict[str, Any]] = [
        {"params": [p for (_, p), has in zip(named, has_decay, strict=True) if has], "weight_decay": weight_decay},
        {"params": [p for (_, p), has in zip(named, has_decay, strict=True) if not has], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def rescale_second_moment(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply Adam's second moments by old batch / new batch when the batch changes.

    Gradient noise dominates them; without this they need 1 / (1 − β2) updates to adapt to the noise of the new batch.
    """
    moments = [state["exp_avg_sq"] for state in optimizer.state.values() if "exp_avg_sq" in state]
    if moments:
        torch._foreach_mul_(moments, factor)


def lr_factor(
    step: float, *, total_steps: int, warmup_steps: int, schedule: str, final: float, decay_steps: int = 1
) -> float:
    """Return the learning rate of an update, as a fraction of the peak.

    Args:
        step: Updates done before this one.
        total_steps: Updates of the run.
        warmup_steps: Updates over which the rate rises linearly to the peak.
        schedule: ``cosine`` and ``linear`` fall from the peak to ``final`` at the last update, ``wsd`` linearly in the
            last ``decay_steps``; ``constant`` stays.
        final: The rate of the last update, as a fraction of the peak. A rate of 0 is that of the update after the last
            one, as in transformers: the last one would change nothing.
        decay_steps: Updates with a rate below the peak at the end of ``wsd``.
    """
    last = total_steps - 1 if final else total_steps  # the update with the final rate
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant" or total_steps == 1:  # the only update of a run is made with the peak
        return 1.0
    if schedule == "wsd":
        start = total_steps - 1 - decay_steps  # the last update with the peak
        return 1 - (1 - final) * min(1.0, max(0.0, (step - start) / (last - start)))
    done = min(1.0, (step - warmup_steps) / max(1, last - warmup_steps))
    if schedule == "linear":
        return 1 - (1 - final) * done
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
