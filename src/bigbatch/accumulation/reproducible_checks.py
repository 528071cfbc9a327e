"""Refuse what cannot be the same bits for every order, cut and number of ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bigbatch.accumulation.optimizer_update import OptimizerUpdate
from bigbatch.compiled_modules import has_fixed_code, is_compiled
from bigbatch.distributed.gradient_sync import GradientSync
from bigbatch.errors import InputError

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16)


def check_reproducible(module: nn.Module, update: OptimizerUpdate, sync: GradientSync) -> None:
    """Check that the windows of an accumulator can be reproducible.

    Raises:
        InputError: They cannot.
    """
    if sync.is_sharded:
        raise InputError(
            "reproducible=True is not supported for a sharded model, whose gradients are added over ranks in floating "
            "point: use DistributedDataParallel or bigbatch.Replicated."
        )
    if update.scaler is not None:
        raise InputError(
            "reproducible=True is not supported with a GradScaler, whose scale depends on the history of the run: use "
            "bfloat16, and leave scaler= out."
        )
    if update.steps.require_closure:
        raise InputError(
            "reproducible=True runs the micro-batches of an update once, and an optimizer here calls a closure that "
            "runs them again: use another optimizer."
        )
    _check_parameters(update.parameters())
    for name, layer in module.named_modules():
        if is_compiled(layer) and not has_fixed_code(layer):
            what = f"the compiled module {name!r}" if name else "a compiled model"
            raise InputError(
                f"reproducible=True is not supported for {what}: "
                "torch.compile chooses the order of sums by timing and by the shapes that come first, which differ "
                "between runs and ranks. Pass the model before it is compiled."
            )
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.track_running_stats and layer.training:
            raise InputError(
                f"reproducible=True is not supported for the {type(layer).__name__} {name!r}, whose running statistics "
                "depend on the order of the micro-batches: use a norm over each sample, such as GroupNorm, or call its "
                "eval()."
            )


def _check_parameters(parameters: Sequence[Tensor]) -> None:
    for index, parameter in enumerate(parameters):
        if parameter.dtype not in SUPPORTED_DTYPES:
            raise InputError(
                f"reproducible=True sums gradients of float32 and bfloat16 as integers, and parameter {index + 1} of "
                f"{len(parameters)} is {str(parameter.dtype).removeprefix('torch.')}: convert the model."
            )
    if len({parameter.device for parameter in parameters}) > 1:
        raise InputError("reproducible=True needs all parameters on one device: move the model to one.")
