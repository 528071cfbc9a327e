"""Detect how a model is distributed over ranks."""

import warnings

import torch.distributed as dist
from torch import nn

from bigbatch.distributed.gradient_sync import GradientSync, SyncPolicy
from bigbatch.distributed.replicated import Replicated, ddp_wrapper


def detect_sync(model: nn.Module, sync: "GradientSync | SyncPolicy | None" = None) -> GradientSync:
    """Return the gradient synchronization that a model needs.

    Args:
        model: Plain, wrapped in ``DistributedDataParallel``, or with `fully_shard` applied to it.
        sync: A policy for a sharded model; or a `GradientSync` of this model, which is returned.

    Warns if the model is not distributed in a process of several ranks.

    Raises:
        TypeError: The model is distributed in a way that does not support exact accumulation.
        ValueError: The model does not support the policy, or ``sync`` is of another model.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(sync, GradientSync):
        if sync.model is not model:
            raise ValueError(
                f"sync= was made for another object ({type(sync.model).__name__}) than the model "
                f"({type(model).__name__}): make it for the model that is passed here."
            )
        return sync
    if sync is not None and not isinstance(sync, SyncPolicy):
        raise TypeError(f"sync is {sync!r}: pass a bigbatch.SyncPolicy, a bigbatch.Replicated(model), or None.")
    modules = list(model.modules())
    kinds = {kind.__name__ for module in modules for kind in type(module).__mro__}
    if "FullyShardedDataParallel" in kinds:
        raise TypeError(
            "the model is wrapped in FullyShardedDataParallel, which keeps gradients where a window cannot add to "
            "them. Use torch.distributed.fsdp.fully_shard on the model instead."
        )
    if any(isinstance(module, FSDPModule) for module in modules):
        from bigbatch.distributed.sharded import ShardedSync

        return ShardedSync(model, policy=sync)
    if sync not in (None, SyncPolicy.LAST):
        raise ValueError(f"sync is {sync}, which is for models that are sharded: leave it out.")
    if ddp_wrapper(model) is not None:
        return Replicated(model)
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in modules):
        raise TypeError(
            "only a part of the model is wrapped in DistributedDataParallel: wrap the whole model, or "
            "make an accumulator for each part."
        )
    if "DataParallel" in kinds:
        raise TypeError("the model is wrapped in DataParallel: use one process a GPU, and DistributedDataParallel.")
    if _has_other_ranks() and not any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        warnings.warn(
            f"the model ({type(model).__name__}) is not distributed, and this process is one of "
            f"{dist.get_world_size()} ranks: each rank trains by itself, and gradients are not reduced. Pass "
            "sync=bigbatch.Replicated(model), or a model that is wrapped in DistributedDataParallel or to which "
            "fully_shard was applied.",
            stacklevel=4,
        )
    return GradientSync(model)


def _has_other_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
