"""In which order an epoch takes the samples, and which of them are one update: integers only.

seed, epoch → epoch_order → epoch_windows → the samples of each update
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> list[int]:
    """Return a permutation of ``range(num_samples)`` that depends on the arguments alone.

    Args:
        num_samples: At least 0.
        seed: The run's.
        epoch: From 0; each has its own order.

    Raises:
        ValueError: ``num_samples`` or ``epoch`` is negative.
    """
    if num_samples < 0:
        raise ValueError(f"num_samples={num_samples} is negative. Give the number of samples, 0 or more.")
    if epoch < 0:
        raise ValueError(f"epoch={epoch} is negative. Epochs count from 0.")
    # Sorting by random() and not shuffle(): of the two, Python promises the same numbers in every version for the
    # first alone. A string as the seed is hashed whole, so neighbouring seeds and epochs have nothing in common.
    random = Random(f"seed {seed} epoch {epoch}")
    positions = [random.random() for _ in range(num_samples)]
    return sorted(range(num_samples), key=positions.__getitem__)


def epoch_windows(
    lengths: Sequence[int],
    *,
    global_batch: int | None,
    global_batch_tokens: int | None,
    seed: int,
    epoch: int,
    position: int = 0,
) -> list[list[int]]:
    """Cut the order of an epoch into the samples of each update; every sample is in exactly one.

    In sequences, a window takes ``global_batch`` of them. In tokens, it takes whole samples until its total is as
    close to ``global_batch_tokens`` as it comes: it ends where the next sample would not bring it closer. The last
    window takes what is left.

    Args:
        lengths: Tokens of each sample, without padding, each at least 1.
        global_batch: Samples behind one update, at least 1, or None.
        global_batch_tokens: Tokens behind one update, at least 1, or None. Exactly one of the two is given.
        seed: As for :func:`epoch_order`.
        epoch: As for :func:`epoch_order`.
        position: Samples of the epoch that are left out from its beginning; where that is the end of a window, those
            after it are the same as without.

    Raises:
        ValueError: Both or none of the two sizes are given, or a number is out of range.
    """
    if (global_batch is None) == (global_batch_tokens is None):
        raise ValueError(
            f"global_batch={global_batch} and global_batch_tokens={global_batch_tokens}: the batch is counted in "
            "sequences or in tokens. Give exactly one of them."
        )
    order = epoch_order(len(lengths), seed=seed, epoch=epoch)[position:]
    if global_batch is not None:
        _check_positive("global_batch", global_batch)
        return [order[i : i + global_batch] for i in range(0, len(order), global_batch)]
    assert global_batch_tokens is not None
    _check_positive("global_batch_tokens", global_batch_tokens)
    return _token_windows(order, lengths, global_batch_tokens)


def _token_windows(order: list[int], lengths: Sequence[int], target: int) -> list[list[int]]:
    windows: list[list[int]] = []
    total = 0
    for index in order:
        _check_positive(f"the length of sample {index}", lengths[index])
        closer = abs(total + lengths[index] - target) < abs(total - target)
        if windows and closer:
            windows[-1].append(index)
            total += lengths[index]
        else:
            windows.append([index])
            total = lengths[index]
    return windows


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value} and must be at least 1.")
