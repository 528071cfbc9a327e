"""Next-token cross entropy from hidden states, with at most one chunk of logits in memory.

    hidden, weight, labels → for each chunk: logits → loss, logit gradients → gradients of hidden and weight → loss sum

The gradient of a summed loss is known up to the factor passed to backward, so forward converts each chunk of logits to
its contribution to the gradients and frees it. Source: Hsu et al., "Liger Kernel", 2024, fused linear cross entropy.

Why not a library: `torch.nn.functional.linear_cross_entropy` (torch 2.13) sums the loss in the dtype of the hidden
states, which in bfloat16 was wrong by 0.5 to 4 % for two thousand tokens; it ignores autocast, has no soft-capping, and
is a single operation to `bigbatch.memory.allocation_tracker.AllocationTracker`, so that predictions would miss its
logits. Liger Kernel (0.8.5) runs only on Triton, synchronizes host and device, computes no gradient for a head above
frozen layers, rescales the gradients again in a second backward, and was slower on an H200. Compared in
tests/lm/model/test_linear_cross_entropy.py and benchmarks/loss.py.

Long because the operations on a chunk of logits are there twice: in place, and as one function to compile.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bigbatch.compiled_modules import FixedCode
from bigbatch.gradients.gradient_sums import HALF_PRECISION_DTYPES
from bigbatch.lm.data.dataset import IGNORED

CHUNK_TOKENS = 1024
"""By default; `chunk_size` chooses more where memory allows.

On an H200, 0.85 to 1.04 times the time of all logits of 8,192 tokens, in a fifth of the memory or less
(benchmarks/results/loss-h200.txt)."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    narrow_weight: Tensor | None = None,
    weights: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    softcap: float | None = None,
    scale: float = 1.0,
    fused: bool = False,
    fused_code: FixedCode | None = None,
    narrow_logits: bool = False,
) -> Tensor:
    """Compute the summed cross entropy of next tokens without materializing all logits.

        logits = scale · F.linear(hidden, weight, bias)
        logits = softcap · tanh(logits / softcap)                                       if softcap is not None
        (weights · F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")).sum()

    Matrix products use the autocast dtype if autocast is enabled; everything else is computed in float32. The gradient
    of the weight is summed over the chunks in float32, then rounded to the dtype of the weight. Memory: two chunks of
    logits in float32 at a time, three with soft-capping, and from forward to backward the gradients of hidden states
    and weight. In float16 the gradients are computed in backward from recomputed logits: they would underflow before
    the loss scale is applied.

    Args:
        hidden: ``[tokens, width]``. Rows with an ignored label may have any value, NaN included; their gradient is 0.
        weight: Weight of the head, ``[vocabulary, width]``.
        bias: ``[vocabulary]``, or None.
        labels: The next tokens, int64 ``[tokens]``; -100 is ignored.
        narrow_weight: A copy of the weight for products in its dtype, where the weight would be cast.
        weights: Factor of each loss, float32 ``[tokens]``; None for 1.
        chunk_tokens: Tokens in one chunk of logits.
        softcap: Bound on the absolute value of the logits; None for no bound.
        scale: Factor of the logits.
        fused: Whether to compile the operations on a chunk of logits between the products: two passes over it instead
            of six, equal up to rounding. The first use takes some seconds.
        fused_code: The compiled code of these operations; None for code of `torch.compile` that the process shares.
        narrow_logits: Whether products in 16 bits return 16-bit logits, where they could return them in float32: half
            of the memory of the logits, each of which is rounded. The loss is computed in float32 all the same.

    Returns:
        The 0-d sum in float32, or in float64 for float64.

    Raises:
        ValueError: ``chunk_tokens`` is below 1.
        RuntimeError: Backward with ``create_graph=True``.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}: a chunk needs at least 1 token.")
    fused = fused and not isinstance(hidden, FakeTensor)
    if fused_code is not None:  # of quanta: trials and validation need less memory in place
        fused = fused and fused_code.is_compiled and torch.are_deterministic_algorithms_enabled()
    dtype = _matmul_dtype(hidden)
    options = _Options(chunk_tokens, softcap, scale, dtype, fused, fused_code, narrow_weight, narrow_logits)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        loss_sum: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, weights, options)  # type: ignore[no-untyped-call]
        return loss_sum
    return _run_chunks(hidden, weight, bias, labels, weights, options, (False, False, False))[0]


@dataclass(frozen=True)
class _Options:
    chunk_tokens: int
    softcap: float | None
    scale: float
    dtype: torch.dtype  # of the matrix products' operands
    fused: bool
    fused_code: FixedCode | None
    narrow_weight: Tensor | None
    narrow_logits: bool


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        weights: Tensor | None,
        options: _Options,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels, weights)
        ctx.options = options
        ctx.gradients = None
        if options.dtype == torch.float16:  # gradients are computed in backward
            return _run_chunks(hidden, weight, bias, labels, weights, options, (False, False, False))[0]
        loss_sum, ctx.gradients = _run_chunks(hidden, weight, bias, labels, weights, options, ctx.needs_input_grad[:3])
        return loss_sum

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_cross_entropy cannot be differentiated twice: remove create_graph=True, or use "
                "F.cross_entropy on all logits."
            )
        gradients, ctx.gradients = ctx.gradients, None  # they are returned; a second backward recomputes them
        if gradients is None:
            hidden, weight, bias, labels, weights = ctx.saved_tensors
            needs_grad = ctx.needs_input_grad[:3]
            gradients = _run_chunks(hidden, weight, bias, labels, weights, ctx.options, needs_grad, factor=grad_output)[
                1
            ]
        else:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_output * ctx.options.scale)
        return (*gradients, None, None, None)


def _run_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    options: _Options,
    needs_grad: Sequence[bool],
    *,
    factor: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the loss sum and the requested gradients of hidden, weight and bias, in one pass over the chunks.

    The gradients are those of ``factor · sum``, or without a factor those of ``sum / scale``.
    """
    with _without_autocast(hidden.device):
        loop = _ChunkLoop(hidden, weight, bias, options, needs_grad, factor)
        for start in range(0, len(hidden), options.chunk_tokens):
            loop.add(slice(start, start + options.chunk_tokens), labels, weights)
        return loop.loss_sum, loop.gradients()


class _ChunkLoop:
    """Running sums and operands of one pass over the chunks."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: _Options,
        needs_grad: Sequence[bool],
        factor: Tensor | None,
    ) -> None:
        self.hidden = hidden
        narrow = options.narrow_weight
        self.weight = weight.to(options.dtype) if narrow is None or narrow.dtype != options.dtype else narrow
        self.bias = None if bias is None else bias.to(options.dtype)
        self.options = options
        self.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        self.factor = None if factor is None else factor * options.scale
        sums = torch.float64 if options.dtype == torch.float64 else torch.float32
        self.loss_sum = hidden.new_zeros((), dtype=sums)
        self.grad_hidden = torch.empty_like(hidden) if needs_grad[0] else None
        self.grad_weight = weight.new_empty(weight.shape, dtype=sums) if needs_grad[1] else None
        self.beta = 0  # of the next product: the first one does not read what is in grad_weight
        self.grad_bias = weight.new_zeros(weight.shape[0], dtype=sums) if needs_grad[2] else None

    def gradients(self) -> list[Tensor | None]:
        if self.grad_weight is not None and self.beta == 0:
            self.grad_weight.zero_()
        weight, bias = (
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip((self.grad_weight, self.grad_bias), self.dtypes, strict=True)
        )
        return [self.grad_hidden, weight, bias]

    def add(self, chunk: slice, labels: Tensor, token_weights: Tensor | None) -> None:
        """Add the loss and the gradients of one chunk of tokens."""
        weights = None if token_weights is None else token_weights[chunk][:, None]
        ignored = labels[chunk] == IGNORED
        targets = labels[chunk].masked_fill(ignored, 0)[:, None]
        rows = self.hidden[chunk].to(self.options.dtype).masked_fill(ignored[:, None], 0)
        if self.options.fused:
            self._add_fused(chunk, rows, targets, ignored, weights)
            return
        log_probs, capped = self._log_softmax(rows)
        target_log_probs = log_probs.gather(1, targets)
        weighted = target_log_probs if weights is None else target_log_probs * weights
        self.loss_sum -= weighted.squeeze(1).masked_fill(ignored, 0).sum()
        if all(gradient is None for gradient in (self.grad_hidden, self.grad_weight, self.grad_bias)):
            return
        logit_grads = log_probs.exp_().scatter_(1, targets, target_log_probs.expm1_())  # softmax − one-hot
        if capped is not None:
            logit_grads.mul_(capped.square_().neg_().add_(1))  # tanh′ = 1 − tanh²
        if weights is not None:
            logit_grads.mul_(weights)
        if self.factor is not None:
            logit_grads.mul_(torch.where(ignored, 0, self.factor)[:, None])
        self._add_gradients(chunk, rows, logit_grads, ignored)

    def _add_fused(self, chunk: slice, rows: Tensor, targets: Tensor, ignored: Tensor, weights: Tensor | None) -> None:
        products = self._products(rows)
        scale, softcap = self.options.scale, self.options.softcap
        dtype = self.options.dtype if _has_wide_products(rows) and self.grad_bias is None else self.loss_sum.dtype
        inputs = (products, self.bias, targets, ignored, self.factor)
        settings = {"scale": scale, "softcap": softcap, "dtype": dtype, "weights": weights}
        code = self.options.fused_code
        if code is None:
            loss_sum, logit_grads = _fused()(*inputs, **settings)
        else:
            loss_sum, logit_grads = code.run(_loss_and_logit_grads, inputs, settings)
        del inputs
        del products
        self.loss_sum += loss_sum
        if any(gradient is not None for gradient in (self.grad_hidden, self.grad_weight, self.grad_bias)):
            self._add_gradients(chunk, rows, logit_grads, ignored)

    def _products(self, rows: Tensor) -> Tensor:
        weight = self.weight.T
        return rows @ weight if self.options.narrow_logits else _multiply(rows, weight)

    def _log_softmax(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the log-probabilities and, with soft-capping, the tanh that they were computed from."""
        products = self._products(rows)
        logits = products if products.dtype == torch.float64 else products.float()
        del products
        if self.bias is not None:
            logits += self.bias
        scale, softcap = self.options.scale, self.options.softcap
        if softcap is not None:
            capped = logits.mul_(scale / softcap).tanh_()
            return F.log_softmax(capped * softcap, 1), capped
        return F.log_softmax(logits if scale == 1 else logits.mul_(scale), 1), None

    def _add_gradients(self, chunk: slice, rows: Tensor, logit_grads: Tensor, ignored: Tensor) -> None:
        if self.grad_bias is not None:
            self.grad_bias += (~ignored).to(logit_grads.dtype) @ logit_grads
        narrow = logit_grads.to(self.options.dtype)
        if self.grad_hidden is not None:
            self.grad_hidden[chunk] = _multiply(narrow, self.weight).masked_fill_(ignored[:, None], 0)
        if self.grad_weight is None:
            return
        if _has_wide_products(rows):
            torch.addmm(self.grad_weight, narrow.T, rows, out_dtype=torch.float32, beta=self.beta, out=self.grad_weight)
        else:
            self.grad_weight.addmm_(logit_grads.T, rows.to(logit_grads.dtype), beta=self.beta)
        self.beta = 1


@cache
def _fused() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_loss_and_logit_grads, dynamic=True)


def _loss_and_logit_grads(
    products: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignored: Tensor,
    factor: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss sum of a chunk and, in ``dtype``, its gradient by the products, without the factor ``scale``."""
    logits = products if products.dtype == torch.float64 else products.float()
    if bias is not None:
        logits = logits + bias
    capped = None
    if softcap is not None:
        capped = torch.tanh(logits * (scale / softcap))
        logits = capped * softcap
    elif scale != 1:
        logits = logits * scale
    log_sum = torch.logsumexp(logits, 1, keepdim=True)
    losses = (log_sum - logits.gather(1, targets)).masked_fill(ignored[:, None], 0)
    columns = torch.arange(logits.shape[1], device=logits.device)
    logit_grads = torch.exp(logits - log_sum) - (columns == targets).to(logits.dtype)
    if capped is not None:
        logit_grads = logit_grads * (1 - capped * capped)
    if weights is not None:
        losses, logit_grads = losses * weights, logit_grads * weights
    if factor is not None:
        logit_grads = logit_grads * torch.where(ignored, 0, factor)[:, None]
    return losses.sum(), logit_grads.to(dtype)


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices, with a float32 result for 16-bit operands if the device supports it."""
    return torch.mm(left, right, out_dtype=torch.float32) if _has_wide_products(left) else left @ right


def _has_wide_products(operand: Tensor) -> bool:
    """Return whether the device can multiply matrices of this 16-bit dtype into float32."""
    if not operand.is_cuda or operand.dtype not in HALF_PRECISION_DTYPES or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(operand.device) >= (8, 0)


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype in which `F.linear` would multiply under the current autocast state."""
    kind = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return hidden.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
