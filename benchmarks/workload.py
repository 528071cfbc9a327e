"""Workload W: a Qwen2 of 494 million parameters, and a global batch of 256 sequences of 32 to 2,048 tokens.

float32 weights under bf16 autocast, fused AdamW, random token ids, every token a label: 92,493 tokens an update.
Imported by the benchmarks that measure on it; `bigbatch bench` runs the same (`bigbatch.lm.bench.workload.W`).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigbatch.lm.bench.workload import W
from bigbatch.lm.data.dataset import IGNORED
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.chunked_loss import ChunkedCausalLMLoss

LONGEST = W.longest

Sample = Tensor


def make_model(device: str = "cuda", *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Make the model with random weights."""
    return W.make_model(device, dtype=dtype, **changes)


def make_batch(vocabulary: int = 151_936, *, seed: int = 0) -> list[Sample]:
    """Make the global batch: int64 token ids ``[length]``; seed 0 is the workload's."""
    return W.make_sequences(vocabulary=vocabulary, seed=seed)


def lengths(samples: Sequence[Sample]) -> list[int]:
    """Return the number of tokens of each sample."""
    return [len(sample) for sample in samples]


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Pad on the right to the longest; every token is a label of its own position."""
    ids = torch.nn.utils.rnn.pad_sequence(list(samples), batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(list(samples), batch_first=True, padding_value=IGNORED)
    return {"input_ids": ids, "labels": labels}


def loss_fn(model: Any, microbatch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the summed cross entropy of all labels, from all logits in float32, and their number."""
    labels = microbatch["labels"]
    with torch.autocast(labels.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=microbatch["input_ids"], use_cache=False).logits
    loss_sum = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss_sum, (labels != IGNORED).sum()


def chunked_loss_fn(model: Any, microbatch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the same from chunks of logits, as `bigbatch train` does."""
    machine = DeviceSpec(microbatch["labels"].device, "bf16")
    return ChunkedCausalLMLoss(machine, needs_mask=False)(model, microbatch)
