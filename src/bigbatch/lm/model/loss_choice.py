"""Choice of the loss of a language model: over all logits at once, or over chunks of them."""

from typing import Any

from bigbatch.compiled_modules import FIXED_OPTIONS, FixedCode
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.causal_lm_loss import CausalLMLoss
from bigbatch.lm.model.chunked_loss import ChunkedCausalLMLoss


def make_loss_fn(
    config: TrainConfig,
    device_spec: DeviceSpec,
    *,
    chunk_tokens: int | None,
    needs_mask: bool,
    longest: int,
    fused: bool = False,
) -> CausalLMLoss | ChunkedCausalLMLoss:
    """Create the loss function of a language model.

    Args:
        config: Its ``logits`` is their precision.
        device_spec: Device and precision of the loss.
        chunk_tokens: As for `ChunkedCausalLMLoss`; None for all logits at once.
        needs_mask: As for `CausalLMLoss`.
        longest: As for `CausalLMLoss`.
        fused: As for `linear_cross_entropy`; under ``--reproducible`` only once the code of the loss is compiled.

    Raises:
        InputError: The precision of the run has no 16-bit logits.
    """
    if config.logits == "bf16" and device_spec.precision not in ("bf16", "bf16-weights", "fp8"):
        raise InputError(
            f"--logits bf16 needs --precision bf16, bf16-weights or fp8, and this run is in {device_spec.precision}."
        )
    options: dict[str, Any] = {"needs_mask": needs_mask, "longest": longest}
    if chunk_tokens is not None:
        options |= {"chunk_tokens": chunk_tokens, "fused": fused, "narrow_logits": config.logits == "bf16"}
        if fused and config.reproducible:
            options["fused_code"] = FixedCode("inductor", FIXED_OPTIONS)
        return ChunkedCausalLMLoss(device_spec, **options)
    return CausalLMLoss(device_spec, **options)
