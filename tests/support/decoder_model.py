"""A small causal decoder with attention, its loss, and samples of any length."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.autotune.choice import TuningProblem
from bigbatch.autotune.peak_prediction import state_of
from bigbatch.batching.split import split
from bigbatch.memory.allocation_tracker import AllocationTracker, MemoryCategory

CPU = torch.device("cpu")
VOCABULARY = 128
IGNORED = -100


class Decoder(nn.Module):
    """Two layers of attention and an MLP, an optional batch norm, and a head."""

    def __init__(self, *, width: int = 32, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.mix = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(2)
        )
        self.norm = nn.BatchNorm1d(width) if norm else None
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for mix, mlp in zip(self.mix, self.mlp, strict=True):
            query, key, value = mix(hidden)[:, None].chunk(3, -1)
            hidden = hidden + self.dropout(F.scaled_dot_product_attention(query, key, value, is_causal=True)[:, 0])
            hidden = hidden + self.dropout(mlp(hidden))
        if self.norm is not None:
            hidden = self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        return self.head(hidden)


def make(seed: int = 0, **kind: Any) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(**kind)


def loss_fn(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    labels = tokens.masked_fill(tokens == 0, IGNORED)
    logits = model(tokens).float()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss, (labels != IGNORED).sum()


def samples(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


def collate(rows: Sequence[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def lengths_of(batch: Sequence[Tensor]) -> list[int]:
    return [len(sample) for sample in batch]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)


def make_step(
    batch: Any,
    *,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable[..., Any] = loss_fn,
    by_length: bool = False,
) -> TuningProblem:
    """Return the tuning problem of a step over a tensor or a list of samples."""
    model = make() if model is None else model
    optimizer = adamw(model) if optimizer is None else optimizer
    listed = isinstance(batch, list)
    parts = split(batch, 1, device=CPU, collate=collate if listed else None)
    return TuningProblem(
        model, optimizer, loss, parts, lengths_of(batch) if by_length else None, uniform_length=not listed
    )


def tracked(model: nn.Module, optimizer: torch.optim.Optimizer, run: Callable[[], Any]) -> AllocationTracker:
    """Track the memory of a training step: parameters, buffers, optimizer state, and every tensor that it allocates."""
    held = [*model.parameters(), *model.buffers(), *(p for group in optimizer.param_groups for p in group["params"])]
    with AllocationTracker(CPU) as tracker:
        tracker.track(held, MemoryCategory.PARAMETERS)
        tracker.track(state_of(optimizer), MemoryCategory.OPTIMIZER)
        run()
    return tracker
