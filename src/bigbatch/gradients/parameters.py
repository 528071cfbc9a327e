"""Parameters of an optimizer."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.optim import Optimizer


def optimizer_parameters(optimizer: "Optimizer") -> list[Tensor]:
    """Return the parameters of all groups of an optimizer, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
