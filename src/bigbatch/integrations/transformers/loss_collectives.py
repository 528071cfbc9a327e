"""Find out, in the first window of several ranks, whether a trainer's loss itself calls collectives.

Ranks run different numbers of micro-batches, so each collective of a loss would wait for one that is not called. And
what a loss adds up over ranks, such as a number of tokens, is that of unrelated micro-batches.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from bigbatch.errors import InputError
from bigbatch.integrations.transformers.traceless import fresh, traceless
from bigbatch.integrations.transformers.unit_probe import SEED, ComputeLoss
from bigbatch.integrations.transformers.unit_refusals import depends_on_ranks
from bigbatch.integrations.transformers.window_samples import Collator, size_of
from bigbatch.rng import seed_everything

_NAMESPACES = {"c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor"}
_TOLERANCE = 1e-3  # of the loss of one micro-batch that runs twice, in half precision


class _CollectiveWatch(TorchDispatchMode):
    """Notes whether a collective of torch.distributed is called, under whatever name."""

    supports_higher_order_operators = True
    was_called = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.was_called |= getattr(func, "namespace", "") in _NAMESPACES
        return func(*args, **(kwargs or {}))


def calls_collectives(
    trainer: Any, collate: Callable[[Any], Any], samples: Sequence[Any], compute_loss: ComputeLoss
) -> bool:
    """Return whether the loss of one sample calls collectives; of a sharded model, whose forward does, False.

    Runs it once on one sample of each rank, and if it calls collectives, once more for that of each of two ranks, which
    all ranks then have. Leaves no trace on the trainer. Collective.

    Args:
        trainer: On several ranks.
        collate: Makes a micro-batch of a list of samples.
        samples: Of this rank, at least one.
        compute_loss: The trainer's own.

    Raises:
        InputError: The loss depends on the samples of other ranks; on all ranks.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    collator = Collator(collate, [trainer.data_collator])
    chosen = (max if rank % 2 else min)(samples, key=size_of)  # in sizes that differ a dependence shows
    inputs: Any = None
    with collator.restored(), suppress(Exception):  # errors are raised by the window, on all ranks
        inputs = collator.collate([chosen])
    collated: list[Any] = [None] * size
    dist.all_gather_object(collated, inputs)
    with traceless(trainer, compute_loss) as model, _CollectiveWatch() as watch:

        def loss_of(source: int) -> float:
            seed_everything(SEED)
            one = torch.ones((), dtype=torch.int64, device=trainer.args.device)
            with torch.no_grad(), suppress(Exception):
                return float(compute_loss(model, trainer._prepare_inputs(fresh(collated[source])), one))
            return math.nan

        own = loss_of(rank)
        called: list[Any] = [None] * size
        is_called = watch.was_called
        dist.all_gather_object(called, is_called)
        if not any(called):
            return False
        same_on_all = [loss_of(source) for source in range(2)]
    is_equal = rank > 1 or math.isclose(own, same_on_all[rank], rel_tol=_TOLERANCE) or math.isnan(own)
    results: list[Any] = [None] * size
    dist.all_gather_object(results, is_equal)
    if not all(results):
        raise depends_on_ranks(trainer)
    return not any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
