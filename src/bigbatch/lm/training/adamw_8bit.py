"""`bitsandbytes.optim.AdamW8bit` with a state that a checkpoint can hold. Importing this needs bitsandbytes."""

from collections.abc import Iterable, Mapping
from typing import Any

import bitsandbytes
import torch
from torch import Tensor

_MAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}  # constants: which value each of the 256 codes has


class AdamW8bit(bitsandbytes.optim.AdamW8bit):  # type: ignore[misc]
    """AdamW with both moments in 8 bits, in blocks of 256 with a scale each (Dettmers et al., 2022, arXiv 2110.02861).

    Tensors of fewer than 4,096 elements have moments in 32 bits. The update is computed in float32.

    Args:
        params: Parameters, or groups of parameters, in float32, bfloat16 or float16.
        lr: Learning rate.
        betas: As for `torch.optim.AdamW`.
        eps: As for `torch.optim.AdamW`.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in the form of torch: a tensor for each name, without constants."""
        state = torch.optim.Optimizer.state_dict(self)
        entries = {key: _without_constants(entry) for key, entry in state["state"].items()}
        return {**state, "state": entries}

    def load_state_dict(self, state_dict: Mapping[str, Any], move_to_device: bool = True) -> None:
        """Load what `state_dict` returned."""
        entries = {key: {**entry, "step": int(entry["step"])} for key, entry in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": entries}, move_to_device=move_to_device)
        for parameter, state in self.state.items():
            if state["state1"].dtype == torch.uint8:
                for name, kind in _MAPS.items():
                    self.name2qmap[kind] = state[name] = self.name2qmap[kind].to(parameter.device)


def _without_constants(entry: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value) for name, value in entry.items() if name not in _MAPS}
