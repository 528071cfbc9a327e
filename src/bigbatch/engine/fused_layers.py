"""Decide which linear layers of an engine's model add the gradients of their weights to its sums by themselves."""

from typing import Literal, TypeAlias

from bigbatch.accumulation.accumulator import Accumulator
from bigbatch.errors import InputError
from bigbatch.gradients.fused_gradients import FusedGradients, FusedParts

FuseGradients: TypeAlias = bool | Literal["auto", "sums", "copies"]

_PARTS: dict[FuseGradients, FusedParts] = {True: "both", "auto": "both", "sums": "sums", "copies": "copies"}


def make_fused_gradients(
    fuse_gradients: FuseGradients, accumulator: Accumulator, *, is_additive: bool
) -> FusedGradients:
    """Return the fused layers of an engine; without any, their ``disabled_reason`` says why.

    Args:
        fuse_gradients: As for `bigbatch.Engine`.
        accumulator: Of the engine.
        is_additive: Whether each micro-batch has a gradient of its own.

    Raises:
        InputError: ``fuse_gradients`` is another value; or layers are to be fused, and none can be.
    """
    if not isinstance(fuse_gradients, bool) and fuse_gradients not in _PARTS:
        raise InputError(f'fuse_gradients is {fuse_gradients!r}: it must be True, False, "auto", "sums" or "copies".')
    model, parameters = accumulator.sync.module, accumulator.update.parameters()
    obstacle = _obstacle(fuse_gradients, accumulator, is_additive=is_additive)
    fused = FusedGradients(model, parameters, parts=_PARTS.get(fuse_gradients, "both"), obstacle=obstacle)
    if fuse_gradients not in (False, "auto") and fused.disabled_reason is not None:
        raise InputError(f"fuse_gradients={fuse_gradients!r} can fuse nothing: {fused.disabled_reason}; leave it out.")
    return fused


def _obstacle(fuse_gradients: FuseGradients, accumulator: Accumulator, *, is_additive: bool) -> str | None:
    if fuse_gradients is False:
        return "it was not requested"
    if not is_additive:
        return "the micro-batches of a Coupled loss, or with exact batch norms, are not differentiated one by one"
    if accumulator.reproducible is not None:
        return "reproducible=True sums the gradients of quanta as integers"
    if accumulator.sync.is_sharded:
        return "the weights of a sharded model are gathered for each layer, and their gradients reduced after it"
    if accumulator.update.offload is not None and accumulator.update.offload.sums is not None:
        return 'offload="gradients" sums gradients in host memory'
    if fuse_gradients == "auto" and accumulator.device.type != "cuda":
        return f"the model is on {accumulator.device}, and it pays on CUDA only"
    return None
