"""Tokens in one chunk of logits, by the memory of the run: larger chunks make larger, faster matrix products."""

import torch

from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.model.chunked_loss import LmHead
from bigbatch.lm.model.linear_cross_entropy import CHUNK_TOKENS
from bigbatch.memory.limit import gpu_memory, parse_memory

MAX_CHUNK_TOKENS = 4_096
CHUNK_SHARE = 16
"""A chunk takes at most one part in sixteen of the memory. More would cost more tokens of the micro-batch than it saves
time: of 8,192 tokens, chunks of 4,096 saved 7 % of the head's time on an H200, which is 2 % of an update of W
(benchmarks/results/loss-h200.txt)."""

LOGIT_BYTES = {"auto": 8, "bf16": 4}  # a logit and its gradient


def chunk_tokens_of(head: LmHead | None, config: TrainConfig, device: torch.device) -> int:
    """Return the tokens of a chunk for a run: 1,024, 2,048 or 4,096.

    Larger than 1,024 only on CUDA, and not under ``--reproducible``, whose sums must not depend on the memory.

    Args:
        head: Of the model; None for 1,024.
        config: Its ``memory`` or ``gpu`` is the limit; else it is the memory of the device.
        device: Device of the run; it need not exist on this machine.
    """
    if head is None or device.type != "cuda" or config.reproducible:
        return CHUNK_TOKENS
    vocabulary = head.linear.weight.shape[0]
    return largest_chunk(_limit_bytes(config, device), vocabulary=vocabulary, logit_bytes=LOGIT_BYTES[config.logits])


def largest_chunk(limit_bytes: int, *, vocabulary: int, logit_bytes: int = LOGIT_BYTES["auto"]) -> int:
    """Return the largest of 1,024, 2,048 and 4,096 whose logits and gradients take a sixteenth of a limit or less."""
    tokens = CHUNK_TOKENS
    while tokens < MAX_CHUNK_TOKENS and CHUNK_SHARE * logit_bytes * vocabulary * 2 * tokens <= limit_bytes:
        tokens *= 2
    return tokens


def _limit_bytes(config: TrainConfig, device: torch.device) -> int:
    """Return the memory that a run may use; 0 if that is unknown, or refused when it is applied."""
    if config.gpu is not None:
        return gpu_memory(config.gpu)
    total_bytes = torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else None
    if config.memory is None:
        return total_bytes or 0
    try:
        return parse_memory(config.memory).to_bytes(total_bytes)
    except ValueError:
        return 0
