"""Muon for matrices and AdamW for all other parameters, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bigbatch.errors import InputError


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for the parameters of some groups, `torch.optim.AdamW` for those of the others.

    Muon orthogonalizes the momentum of a matrix (Jordan et al., "Muon: An optimizer for hidden layers in neural
    networks", 2024). Its updates are scaled to the root mean square of those of AdamW (Liu et al., "Muon is Scalable
    for LLM Training", 2025, arXiv 2502.16982, section 2.2), so that both use the same learning rate and weight decay.

    Args:
        matrices: Parameter groups of tensors ``[rows, columns]`` for Muon.
        others: Parameter groups for AdamW. One of the two may be empty.
        lr: Learning rate of both.
        momentum: Nesterov momentum of Muon.
        betas: Of AdamW.
        eps: Of AdamW.
    """

    def __init__(
        self,
        matrices: Iterable[dict[str, Any]],
        others: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        parts: list[tuple[torch.optim.Optimizer, int]] = []
        if matrices := list(matrices):
            muon = torch.optim.Muon(matrices, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
            parts.append((muon, len(matrices)))
        if others := list(others):
            parts.append((torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, foreach=True), len(others)))
        super().__init__([group for part, _ in parts for group in part.param_groups], {})
        self._parts = parts

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; not supported once the optimizer is made."""
        if hasattr(self, "_parts"):
            raise InputError(
                "MuonWithAdamW takes no further parameter group, because it cannot know whether Muon or AdamW is to "
                "update it: make another one with all groups."
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Keep what updates the groups in copies, too: that of torch keeps its own attributes only."""
        return {**super().__getstate__(), "_parts": self._parts}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters with a gradient."""
        loss: Tensor | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        start = 0
        for part, num_groups in self._parts:
            # Groups and state are those of this optimizer, also after load_state_dict() has replaced them.
            part.param_groups, part.state = self.param_groups[start : start + num_groups], self.state
            part.step()
            start += num_groups
        return loss
