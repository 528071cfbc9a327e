"""Refuse models whose batch norms cannot be replaced, or whose ranks would not agree."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bigbatch.coupled.coupled import Coupled
from bigbatch.errors import InputError


def check_batch_norm(batch_norm: object, loss_fn: object) -> None:
    """Check the setting itself.

    Raises:
        InputError: It is something else, or not supported for this loss.
    """
    if batch_norm != "exact":
        raise InputError(f'batch_norm is {batch_norm!r}: it must be "exact", or left out.')
    if isinstance(loss_fn, Coupled):
        raise InputError(
            'batch_norm="exact" is not supported for a Coupled loss, which encodes each micro-batch twice: use layer '
            "or group norm in encode; batch norm in its loss is exact without it."
        )


def check_modules(modules: Iterable[nn.Module], loss_fn: Any, *, num_ranks: int = 1) -> None:
    """Check that ``batch_norm="exact"`` is supported.

    Args:
        modules: The model, and others that run.
        loss_fn: As for `bigbatch.Engine`.
        num_ranks: Of the batch.

    Raises:
        InputError: It is not.
    """
    if hasattr(loss_fn, "_torchdynamo_orig_callable"):
        raise InputError(_compiled("loss_fn is compiled"))
    for root in modules:
        for name, module in root.named_modules():
            named = f"the module {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
            if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
                raise InputError(_compiled(f"{named} is compiled"))
            if isinstance(module, torch.jit.ScriptModule):
                raise InputError(_compiled(f"{named} is compiled by torch.jit"))
            if isinstance(module, nn.SyncBatchNorm):
                _check_group(named, module, num_ranks)


def _compiled(what: str) -> str:
    return (
        f'{what}, and batch_norm="exact" cannot stop inside compiled code, where micro-batches wait for each other: '
        "pass what was compiled, or leave batch_norm= out."
    )


def _check_group(named: str, norm: nn.SyncBatchNorm, num_ranks: int) -> None:
    if norm.process_group is None or num_ranks == 1:
        return
    size = dist.get_world_size(norm.process_group)
    if size != num_ranks:
        raise InputError(
            f'{named} has a process_group of {size} ranks, and batch_norm="exact" normalizes by the batch of all '
            f"{num_ranks} ranks: leave process_group= out, or leave batch_norm= out."
        )
