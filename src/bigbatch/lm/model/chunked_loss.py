"""The causal language-modelling loss without the logits: the head's weight goes to the loss, not its output.

    model → what its head is given → `linear_cross_entropy` with the head's weight

The model itself is called, whatever wraps it; only its head is handed a single token instead of all. So nothing has to
be known of a model but what it does to the logits, and `chunked_loss_is_exact` asks the model about that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.lm.data.dataset import IGNORED
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.causal_lm_loss import CausalLMLoss
from bigbatch.lm.model.linear_cross_entropy import CHUNK_TOKENS, linear_cross_entropy
from bigbatch.lm.model.packed_rows import model_inputs
from bigbatch.preserve import preserved
from bigbatch.verification.cut_gradients import narrowest_dtype
from bigbatch.verification.tolerances import coarser_dtype, tolerance_for

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
LENGTH = 6  # of the rows that are tried
CHUNKED_FROM = 16_384  # tokens in the vocabulary
SIZES = (1.0, 1000.0)  # of the largest product that is tried: the second is far above any soft cap


@dataclass(frozen=True)
class LmHead:
    """The last layer of a language model, and what the model does to its products.

        logits = scale · linear(hidden)
        logits = softcap · tanh(logits / softcap)                                       where there is a softcap

    Attributes:
        linear: The layer.
        scale: Factor of the logits.
        softcap: What logits stay below in absolute value; None for no bound.
    """

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None


def find_lm_head(model: Any) -> LmHead | None:
    """Find the head of a model, by its output embeddings and its configuration.

    Args:
        model: A transformers causal language model, or peft's wrapper of one.

    Returns:
        None where the head is no plain linear layer: another kind of model, quantized, or itself adapted. What it says
        of other models holds where `chunked_loss_is_exact`.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "get_output_embeddings") or not hasattr(base, "config"):
        return None
    linear = base.get_output_embeddings()
    if type(linear) is not nn.Linear:
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
    """Tell whether a head is known, and so wide that its logits are what takes the memory.

    Below 16,384 tokens in the vocabulary they are not, and all logits at once are a little faster: on two CPU cores the
    tiny model of 4,096 tokens took 1.24 times the tokens/s of one sample at a time with them, and 1.17 times in chunks.
    """
    return head is not None and head.linear.weight.shape[0] >= CHUNKED_FROM


class ChunkedCausalLMLoss:
    """`CausalLMLoss` without the logits: the same sums and gradients, in the memory of a chunk of logits.

    Args:
        device_spec: Decides about autocast.
        needs_mask: Whether the model is given the attention mask.
        longest: As for `CausalLMLoss`.
        chunk_tokens: Tokens whose logits are held at a time.
        fused: As for `linear_cross_entropy`.
    """

    def __init__(
        self,
        device_spec: DeviceSpec,
        *,
        needs_mask: bool = True,
        longest: int | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
        fused: bool = False,
    ) -> None:
        self._device_spec = device_spec
        self._needs_mask = needs_mask
        self._longest = longest
        self._chunk_tokens = chunk_tokens
        self._fused = fused

    def __call__(self, model: nn.Module, microbatch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the summed loss of one micro-batch.

        Args:
            model: A transformers causal language model of which `chunked_loss_is_exact` holds.
            microbatch: As for `CausalLMLoss`.

        Returns:
            The 0-d sum in float32 (float64 for a float64 model), and the 0-d count of labels.

        Raises:
            ValueError: The head of the model is not known.
        """
        head = find_lm_head(model)
        if head is None:
            raise ValueError(f"the head of this {type(model).__name__} is not known: use CausalLMLoss.")
        labels = microbatch["labels"]
        inputs = model_inputs(microbatch, longest=self._longest, needs_mask=self._needs_mask)
        with self._device_spec.autocast():
            hidden = hidden_states(model, head, **inputs)
        with self._device_spec.autocast():  # another one: the first would keep its own copy of the head's weight
            loss_sum = linear_cross_entropy(
                hidden.flatten(0, 1),
                head.linear.weight,
                head.linear.bias,
                labels.flatten(),
                chunk_tokens=self._chunk_tokens,
                softcap=head.softcap,
                scale=head.scale,
                fused=self._fused,
            )
        return loss_sum, (labels != IGNORED).sum()


def hidden_states(model: nn.Module, head: LmHead, *, input_ids: Tensor, **inputs: Any) -> Tensor:
    """Run a model and give what its head was to be given, ``[rows, length, width]``.

    Raises:
        ValueError: The model does not call its head once with all tokens.
    """
    given: list[Tensor] = []

    def take(_linear: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        given.append(arguments[0])
        return (arguments[0][:1, :1],)

    handle = head.linear.register_forward_pre_hook(take)
    try:
        model(input_ids=input_ids, use_cache=False, **inputs)
    finally:
        handle.remove()
    if [tensor.shape[:-1] for tensor in given] != [input_ids.shape]:
        raise ValueError(
            f"this {type(model).__name__} gave its head {[list(tensor.shape) for tensor in given]} for tokens of shape "
            f"{list(input_ids.shape)}: use CausalLMLoss."
        )
    return given[0]


def chunked_loss_is_exact(model: Any, device_spec: DeviceSpec) -> bool:
    """Tell whether the loss of a model can be computed without its logits.

        scale and softcap of `find_lm_head` make of the head's products, small and large, the logits of the model
        ChunkedCausalLMLoss = CausalLMLoss                          both within rounding

    Tried on the model itself in evaluation mode, in four forwards of two rows of 6 tokens. Training modes, random
    states and buffers are put back.

    Args:
        model: A transformers language model, on its device.
        device_spec: Decides about autocast. The tolerance is that of `verify` for the narrowest dtype in use, and at
            least that for float32, in which some models compute logits whatever they are in.

    Returns:
        False also where it cannot be told.
    """
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < LENGTH:
        return False  # a CUDA device that is asked for a position too many is lost to this process
    try:
        head = find_lm_head(model)
        if head is None:
            return False
        with preserved(model, parameters=False), torch.no_grad(), narrowest_dtype(model) as dtypes:
            model.eval()
            microbatch = _rows(model, device_spec.device)
            errors = [_error_of_logits(model, head, device_spec, microbatch, size) for size in SIZES]
            errors.append(_error_of_loss(model, device_spec, microbatch))
    except Exception:  # noqa: BLE001 - whatever a model says to this, it can have its logits
        return False
    dtype = coarser_dtype(dtypes[-1], torch.float32)
    return all(error <= tolerance_for(dtype) for error in errors)


def _rows(model: Any, device: torch.device) -> dict[str, Tensor]:
    """Make two rows with tokens from all over the vocabulary; some labels are ignored."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(2 * (LENGTH + 1), device=device).reshape(2, -1) * (vocabulary - 1) // (2 * LENGTH + 1)
    labels = tokens[:, 1:].clone()
    labels[0, :2] = IGNORED
    return {"input_ids": tokens[:, :-1], "labels": labels, "attention_mask": torch.ones_like(labels)}


def _error_of_logits(
    model: Any, head: LmHead, device_spec: DeviceSpec, microbatch: dict[str, Tensor], size: float
) -> float:
    """Compare logits where the head is given such hidden states that its largest product is of a size."""
    with device_spec.autocast(), _products_of_size(head.linear, size) as given:
        tokens = {name: microbatch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**tokens, use_cache=False).logits.cpu().double()
        expected = F.linear(given[0], head.linear.weight, head.linear.bias).cpu().double() * head.scale
    if head.softcap is not None:
        expected = torch.tanh(expected / head.softcap) * head.softcap
    error: float = ((logits - expected).norm() / logits.norm()).item()
    return error


@contextmanager
def _products_of_size(linear: nn.Linear, size: float) -> Iterator[list[Tensor]]:
    """Scale what a layer is given; collect it."""
    given: list[Tensor] = []

    def rescale(_linear: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        products = F.linear(arguments[0], linear.weight)
        given.append(arguments[0] * (size / products.abs().max()))
        return (given[-1],)

    handle = linear.register_forward_pre_hook(rescale)
    try:
        yield given
    finally:
        handle.remove()


def _error_of_loss(model: Any, device_spec: DeviceSpec, microbatch: dict[str, Tensor]) -> float:
    full, chunked = (kind(device_spec)(model, microbatch)[0].item() for kind in (CausalLMLoss, ChunkedCausalLMLoss))
    return abs(chunked - full) / abs(full)
