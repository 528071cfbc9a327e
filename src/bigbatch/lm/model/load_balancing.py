"""The load-balancing loss of a mixture of experts, over the global batch or over each micro-batch.

    loss = Σ cross entropy / labels + coefficient · E · Σ_e f_e · p_e

f_e is the share of tokens routed to expert e, and p_e the mean router probability of e, over all tokens of all layers
that have a router, without padding; E is the number of experts. This is ``load_balancing_loss_func`` of transformers.
f has no gradient. Once f of the whole batch is known, the term is a sum over tokens:

    routing(micro-batch), without gradient, for every micro-batch of every rank → f → the loss of each micro-batch

Sources: Fedus et al., "Switch Transformers", 2021, equations 4 to 6; Qiu et al., "Demons in the Detail: On Implementing
Load Balancing Loss for Training Specialized Mixture-of-Expert Models", 2025, for f over the global batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bigbatch.lm.model.causal_lm_loss import count_items
from bigbatch.trials.trial import is_trial
from bigbatch.types import Items, LossResult

Scope = Literal["global", "microbatch"]
CROSS_ENTROPY, LOAD_BALANCING = "cross_entropy", "load_balancing"


@dataclass(frozen=True)
class Routing:
    """Counts of the routing of some tokens; the counts of two sets of tokens add up.

    Attributes:
        hits: Tokens routed to each expert, summed over the layers and divided by their number, float64 ``[experts]``.
        probabilities: Router probabilities of each expert, summed and divided likewise, float64 ``[experts]``.
        tokens: Tokens without padding, 0-d.
        labels: Tokens that are trained on, 0-d.
    """

    hits: Tensor
    probabilities: Tensor
    tokens: Tensor
    labels: Tensor

    def __add__(self, other: "Routing") -> "Routing":
        return Routing(
            self.hits + other.hits,
            self.probabilities + other.probabilities,
            self.tokens + other.tokens,
            self.labels + other.labels,
        )

    @property
    def loss(self) -> Tensor:
        """The load-balancing loss of these tokens, without coefficient, 0-d; 0 without tokens."""
        tokens = self.tokens.clamp(min=1)
        return len(self.hits) * ((self.hits / tokens) * (self.probabilities / tokens)).sum()

    def numbers(self) -> list[float]:
        """Return all counts as ``2 · experts + 2`` numbers. Waits for the device."""
        values: list[float] = torch.cat([self.hits, self.probabilities, self.tokens[None], self.labels[None]]).tolist()
        return values

    @classmethod
    def from_numbers(cls, numbers: Sequence[float], device: torch.device) -> "Routing":
        """Return the counts that `numbers` returned, on a device."""
        values = torch.tensor(numbers, dtype=_wide(device)).to(device)
        experts = len(numbers) // 2 - 1
        return cls(values[:experts], values[experts : 2 * experts], values[-2], values[-1])


class LoadBalancedLoss:
    """A language-model loss with the load-balancing loss of its experts, for `bigbatch.Engine`.

        loss_sum = Σ cross entropy + coefficient · E · Σ_t f · p_t · labels / tokens

    With scope ``"global"``, f, ``labels`` and ``tokens`` are those of the whole window on all ranks, set by `window`;
    so the sum divided by the labels of the window is the loss of the whole batch. With ``"microbatch"``, f is that of
    the micro-batch, and the load-balancing loss is a second term, averaged over tokens: no additional forward, but
    another loss than that of the whole batch.

    Args:
        loss_fn: The loss without the term.
        coefficient: Weight of the term, above 0.
        num_experts: Experts of each layer that has a router.
        top_k: Experts for each token.
        scope: Tokens over which f is computed.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any, dict[str, Tensor]], tuple[Tensor, Tensor]],
        *,
        coefficient: float,
        num_experts: int,
        top_k: int,
        scope: Scope = "global",
    ) -> None:
        self.loss_fn = loss_fn
        self.coefficient = coefficient
        self.num_experts = num_experts
        self.top_k = top_k
        self.scope: Scope = scope
        self._window: Routing | None = None

    def __call__(self, model: nn.Module, microbatch: dict[str, Tensor]) -> LossResult:
        """Compute the loss of one micro-batch.

        Args:
            model: A transformers causal language model for which `routing_of` returns a result.
            microbatch: As for the loss without the term. A packed row has an ``attention_mask``; without one all its
                tokens count.

        Returns:
            The 0-d sum and the 0-d count of labels; with scope ``"microbatch"`` two terms.

        Raises:
            RuntimeError: The scope is ``"global"``, and no window is open.
        """
        with _recorded_router_logits(model) as recorded:
            loss_sum, labels = self.loss_fn(model, microbatch)
        mask = _token_mask(microbatch)
        window = self._window
        if window is None or self.scope == "microbatch":
            if self.scope == "global" and not is_trial():
                raise RuntimeError("the routing of the whole batch is unknown: call this loss inside of window().")
            window = _routing(recorded, mask, self.top_k, labels)
        probabilities = _probabilities(recorded, mask)
        shares = (window.hits / window.tokens.clamp(min=1)).to(probabilities.dtype)
        balancing_sum = self.coefficient * self.num_experts * (probabilities * shares).sum()
        if self.scope == "microbatch":
            return {CROSS_ENTROPY: (loss_sum, labels), LOAD_BALANCING: (balancing_sum.to(loss_sum.dtype), mask.sum())}
        ratio = (window.labels / window.tokens.clamp(min=1)).to(balancing_sum.dtype)
        return loss_sum + (balancing_sum * ratio).to(loss_sum.dtype), labels

    @torch.no_grad()
    def routing(self, model: nn.Module, microbatch: dict[str, Tensor]) -> Routing:
        """Run a micro-batch without gradient and return its counts."""
        with _recorded_router_logits(model) as recorded:
            _, labels = self.loss_fn(model, microbatch)
        return _routing(recorded, _token_mask(microbatch), self.top_k, labels)

    def no_routing(self, device: torch.device) -> Routing:
        """Return the counts of no tokens."""
        return Routing.from_numbers([0.0] * (2 * self.num_experts + 2), device)

    @contextmanager
    def window(self, routing: Routing) -> Iterator[None]:
        """Use the counts of a window, over all ranks, for the micro-batches of the block."""
        self._window = routing
        try:
            yield
        finally:
            self._window = None

    def count_items(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Items]:
        """Return the items of each term of scope ``"microbatch"``, for ``Engine(count_items=...)``."""
        return {
            CROSS_ENTROPY: sum(count_items(sample).item() for sample in samples),
            LOAD_BALANCING: sum(len(sample["input_ids"]) for sample in samples),
        }


@contextmanager
def _recorded_router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the router logits of one call of a model, ``[tokens, experts]`` for each layer with a router."""
    recorded: list[Tensor] = []

    def request(_model: nn.Module, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return inputs, {**options, "output_router_logits": True}

    def record(_model: nn.Module, _inputs: Any, output: Any) -> None:
        recorded.extend(output.router_logits or ())

    handles = [model.register_forward_pre_hook(request, with_kwargs=True), model.register_forward_hook(record)]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _token_mask(microbatch: dict[str, Tensor]) -> Tensor:
    """Return 1 for each token and 0 for padding, int64 ``[rows · length]``."""
    mask = microbatch.get("attention_mask")
    return torch.ones_like(microbatch["input_ids"]).flatten() if mask is None else mask.flatten()


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


def _probabilities(router_logits: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return the router probabilities of each expert, summed over tokens and averaged over layers, ``[experts]``."""
    sums: Tensor | None = None
    for logits in _checked(router_logits, mask):
        probabilities = _softmax(logits)
        total = (probabilities * mask[:, None].to(probabilities.dtype)).sum(0)
        sums = total if sums is None else sums + total
    assert sums is not None, "checked"
    return sums / len(router_logits)


@torch.no_grad()
def _routing(router_logits: Sequence[Tensor], mask: Tensor, top_k: int, labels: Tensor) -> Routing:
    wide = _wide(mask.device)
    hits: Tensor | None = None
    for logits in _checked(router_logits, mask):
        probabilities = _softmax(logits)
        chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k, dim=-1).indices, 1.0)
        total = (chosen * mask[:, None].to(chosen.dtype)).sum(0, dtype=wide)
        hits = total if hits is None else hits + total
    assert hits is not None, "checked"
    probabilities = _probabilities(router_logits, mask).to(wide)
    return Routing(hits / len(router_logits), probabilities, mask.sum().to(wide), labels.to(wide))


def _checked(router_logits: Sequence[Tensor], mask: Tensor) -> Sequence[Tensor]:
    """Check that there are router logits, one row for each token."""
    shapes = [list(logits.shape) for logits in router_logits]
    if not shapes or any(len(shape) != 2 or shape[0] != len(mask) for shape in shapes):
        raise ValueError(
            f"the model returned router logits of shapes {shapes} for {len(mask)} tokens, and the load-balancing loss "
            "needs [tokens, experts] of every layer with a router: leave it out with a coefficient of 0."
        )
    return router_logits


def _wide(device: torch.device) -> torch.dtype:
    """Return the dtype of counts: float64, which mps lacks."""
    return torch.float32 if device.type == "mps" else torch.float64
