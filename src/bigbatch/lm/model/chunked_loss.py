"""Causal language-modelling loss without all logits: the loss uses the weight of the head, not its output.

    model → hidden states before the head → `linear_cross_entropy` with the weight of the head

The model is called as it is, wrappers included; only its head receives a single token instead of all. The only
assumption is how the model post-processes logits, which `chunked_loss_is_exact` checks on the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.compiled_modules import FixedCode
from bigbatch.gradients.fused_embedding import weights_for_loss
from bigbatch.gradients.fused_linear import is_exactly_linear
from bigbatch.lm.data.dataset import IGNORED
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.causal_lm_loss import CausalLMLoss, count_items
from bigbatch.lm.model.linear_cross_entropy import CHUNK_TOKENS, linear_cross_entropy
from bigbatch.lm.model.packed_rows import model_inputs
from bigbatch.preserve import preserved
from bigbatch.verification.cut_gradients import narrowest_dtype
from bigbatch.verification.tolerances import coarser_dtype, tolerance_for

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
LENGTH = 6  # tokens of the test rows
CHUNKED_FROM = 16_384  # tokens in the vocabulary
SIZES = (1.0, 1000.0)  # largest product in the tests; the second is far above any soft cap


@dataclass(frozen=True)
class LmHead:
    """The last layer of a language model, and how the model post-processes its output.

        logits = scale · linear(hidden)
        logits = softcap · tanh(logits / softcap)                                       if softcap is not None

    Attributes:
        linear: The layer.
        scale: Factor of the logits.
        softcap: Bound on the absolute value of the logits; None for no bound.
    """

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None


def find_lm_head(model: Any) -> LmHead | None:
    """Find the head of a model, by its output embeddings and its configuration.

    Args:
        model: A transformers causal language model, or peft's wrapper of one.

    Returns:
        None if the head is not a plain linear layer: another kind of model, a quantized head, or one with adapters.
        Otherwise the head, to be confirmed by `chunked_loss_is_exact`.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "get_output_embeddings") or not hasattr(base, "config"):
        return None
    linear = base.get_output_embeddings()
    if not is_exactly_linear(linear):
        return None
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    softcaps = (getattr(config, name, None) for name in SOFTCAPS)
    return LmHead(linear, scale=_scale(base, config), softcap=next((cap for cap in softcaps if cap), None))


def _scale(base: Any, config: Any) -> float:
    factors = (getattr(base, "logit_scale", None), getattr(config, "lm_head_multiplier", None))  # Cohere, Falcon-H1
    divisor = getattr(config, "logits_scaling", None)  # Granite
    scale = 1.0 if divisor is None else 1 / divisor
    for factor in factors:
        scale *= 1.0 if factor is None else factor
    return float(scale)


def worth_chunking(head: LmHead | None) -> bool:
    """Return whether the head is known and its vocabulary so large that logits dominate the memory.

    Below 16,384 tokens in the vocabulary they do not, and all logits at once are slightly faster: on two CPU cores the
    tiny model of 4,096 tokens reached 1.24 times the tokens/s of one sample at a time with them, 1.17 times in chunks.
    """
    return head is not None and head.linear.weight.shape[0] >= CHUNKED_FROM


class ChunkedCausalLMLoss:
    """`CausalLMLoss` with the same sums and gradients, in the memory of one chunk of logits.

    Args:
        device_spec: Decides about autocast.
        needs_mask: Whether to pass the attention mask to the model.
        longest: As for `CausalLMLoss`.
        chunk_tokens: Tokens in one chunk of logits.
        fused: As for `linear_cross_entropy`.
        fused_code: As for `linear_cross_entropy`.
        narrow_logits: As for `linear_cross_entropy`.

    Attributes:
        fused_code: As passed.
    """

    def __init__(
        self,
        device_spec: DeviceSpec,
        *,
        needs_mask: bool = True,
        longest: int | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
        fused: bool = False,
        fused_code: FixedCode | None = None,
        narrow_logits: bool = False,
    ) -> None:
        self._device_spec = device_spec
        self._needs_mask = needs_mask
        self._longest = longest
        self._chunk_tokens = chunk_tokens
        self._fused, self.fused_code = fused, fused_code
        self._narrow_logits = narrow_logits

    def __call__(self, model: nn.Module, microbatch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the summed loss of one micro-batch.

        Args:
            model: A transformers causal language model for which `chunked_loss_is_exact` is true.
            microbatch: As for `CausalLMLoss`.

        Returns:
            The 0-d sum in float32 (float64 for a float64 model), and the 0-d count of labels or sum of weights.

        Raises:
            ValueError: The head of the model is not supported.
        """
        head = find_lm_head(model)
        if head is None:
            raise ValueError(
                f"the head of this {type(model).__name__} is not supported by ChunkedCausalLMLoss: use CausalLMLoss."
            )
        labels, weights = microbatch["labels"], microbatch.get("weights")
        inputs = model_inputs(microbatch, longest=self._longest, needs_mask=self._needs_mask)
        with self._device_spec.autocast():
            hidden = hidden_states(model, head, **inputs)
        # A second context: the first would keep its own cast copy of the head's weight.
        weight, narrow_weight = weights_for_loss(head.linear)
        with self._device_spec.autocast():
            loss_sum = linear_cross_entropy(
                hidden.flatten(0, 1),
                weight,
                head.linear.bias,
                labels.flatten(),
                narrow_weight=narrow_weight,
                weights=None if weights is None else weights.flatten(),
                chunk_tokens=self._chunk_tokens,
                softcap=head.softcap,
                scale=head.scale,
                fused=self._fused,
                fused_code=self.fused_code,
                narrow_logits=self._narrow_logits,
            )
        return loss_sum, count_items(microbatch)


def hidden_states(model: nn.Module, head: LmHead, *, input_ids: Tensor, **inputs: Any) -> Tensor:
    """Run a model and return the input of its head, ``[rows, length, width]``.

    Raises:
        ValueError: The model does not call its head exactly once with all tokens.
    """
    inputs_of_head: list[Tensor] = []

    def capture(_linear: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        inputs_of_head.append(arguments[0])
        return (arguments[0][:1, :1],)

    handle = head.linear.register_forward_pre_hook(capture)
    try:
        model(input_ids=input_ids, use_cache=False, **inputs)
    finally:
        handle.remove()
    if [tensor.shape[:-1] for tensor in inputs_of_head] != [input_ids.shape]:
        shapes = [list(tensor.shape) for tensor in inputs_of_head]
        raise ValueError(
            f"this {type(model).__name__} called its head with {shapes} for tokens of shape {list(input_ids.shape)}: "
            "use CausalLMLoss."
        )
    return inputs_of_head[0]


def chunked_loss_is_exact(model: Any, device_spec: DeviceSpec) -> bool:
    """Return whether `ChunkedCausalLMLoss` equals `CausalLMLoss` on a model, within rounding.

        softcap · tanh(scale · linear(hidden) / softcap) = logits               for small and large products of the head
        ChunkedCausalLMLoss = CausalLMLoss

    Tested on the model in evaluation mode, in four forwards of two rows of 6 tokens. Training modes, random states and
    buffers are restored.

    Args:
        model: A transformers language model, on its device.
        device_spec: Decides about autocast. The tolerance is that of `verify` for the narrowest dtype in use, and at
            least that for float32, in which some models compute logits in every precision.

    Returns:
        False also if the test fails to run.
    """
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < LENGTH:
        return False  # an out-of-range position would leave the CUDA context of this process unusable
    try:
        head = find_lm_head(model)
        if head is None:
            return False
        with preserved(model, parameters=False), torch.no_grad(), narrowest_dtype(model) as dtypes:
            model.eval()
            microbatch = _rows(model, device_spec.device)
            errors = [_error_of_logits(model, head, device_spec, microbatch, size) for size in SIZES]
            errors.append(_error_of_loss(model, device_spec, microbatch))
    except Exception:  # noqa: BLE001 - on any error, CausalLMLoss is used instead
        return False
    dtype = coarser_dtype(dtypes[-1], torch.float32)
    return all(error <= tolerance_for(dtype) for error in errors)


def _rows(model: Any, device: torch.device) -> dict[str, Tensor]:
    """Create two rows with tokens spread over the vocabulary; some labels are ignored."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(2 * (LENGTH + 1), device=device).reshape(2, -1) * (vocabulary - 1) // (2 * LENGTH + 1)
    labels = tokens[:, 1:].clone()
    labels[0, :2] = IGNORED
    return {"input_ids": tokens[:, :-1], "labels": labels, "attention_mask": torch.ones_like(labels)}


def _error_of_logits(
    model: Any, head: LmHead, device_spec: DeviceSpec, microbatch: dict[str, Tensor], size: float
) -> float:
    """Return the relative error of the logits for hidden states whose largest product with the head is ``size``."""
    with device_spec.autocast(), _products_of_size(head.linear, size) as rescaled:
        tokens = {name: microbatch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**tokens, use_cache=False).logits.cpu().double()
        expected = F.linear(rescaled[0], head.linear.weight, head.linear.bias).cpu().double() * head.scale
    if head.softcap is not None:
        expected = torch.tanh(expected / head.softcap) * head.softcap
    error: float = ((logits - expected).norm() / logits.norm()).item()
    return error


@contextmanager
def _products_of_size(linear: nn.Linear, size: float) -> Iterator[list[Tensor]]:
    """Rescale the inputs of a layer to a largest product of ``size``, and collect them."""
    rescaled: list[Tensor] = []

    def rescale(_linear: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        products = F.linear(arguments[0], linear.weight)
        rescaled.append(arguments[0] * (size / products.abs().max()))
        return (rescaled[-1],)

    handle = linear.register_forward_pre_hook(rescale)
    try:
        yield rescaled
    finally:
        handle.remove()


def _error_of_loss(model: Any, device_spec: DeviceSpec, microbatch: dict[str, Tensor]) -> float:
    full, chunked = (kind(device_spec)(model, microbatch)[0].item() for kind in (CausalLMLoss, ChunkedCausalLMLoss))
    return abs(chunked - full) / abs(full)
