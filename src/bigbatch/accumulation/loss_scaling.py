"""The loss scale of float16: gradients are unscaled for one update, and the scaler then changes its scale."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bigbatch.errors import RankFailedError

if TYPE_CHECKING:
    from torch.amp import GradScaler
    from torch.optim import Optimizer


@contextmanager
def unscaled(
    scaler: "GradScaler", optimizers: "Sequence[Optimizer]", gradients: list[Tensor], loss_scale: Tensor
) -> Iterator[None]:
    """Unscale the gradients of a window in place, and let the scaler update its scale at the end.

    Args:
        scaler: Of the update.
        optimizers: Of the update.
        gradients: The sums of the window.
        loss_scale: When the window opened: another window may have changed the scaler since.
    """
    now, new = scaler.scale(torch.ones_like(loss_scale)), None
    torch._foreach_mul_(gradients, now / loss_scale)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    try:
        yield
    except RankFailedError:
        new = now  # as on the rank that failed
        raise
    finally:
        scaler.update(new)
