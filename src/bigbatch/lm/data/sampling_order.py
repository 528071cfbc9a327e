"""Order of the samples within an epoch and their division into updates, as integers.

seed, epoch → epoch_order → epoch_windows → the samples of each update
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> list[int]:
    """Return a permutation of ``range(num_samples)`` that depends on the arguments only.

    Args:
        num_samples: At least 0.
        seed: Seed of the run.
        epoch: From 0; every epoch has its own order.

    Raises:
        ValueError: ``num_samples`` or ``epoch`` is negative.
    """
    if num_samples < 0:
        raise ValueError(f"num_samples={num_samples} is negative. Pass the number of samples, 0 or more.")
    if epoch < 0:
        raise ValueError(f"epoch={epoch} is negative. Epochs count from 0.")
    # Sort by random() instead of shuffle(): Python guarantees the same numbers in every version only for the former.
    # A string seed is hashed as a whole, so neighbouring seeds and epochs are unrelated.
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
    """Split the order of an epoch into the samples of each update; every sample is in exactly one.

    In sequences, a window has ``global_batch`` samples. In tokens, it has whole samples with a total as close to
    ``global_batch_tokens`` as possible: it ends before the first sample that would not bring the total closer. The
    last window has the remaining samples.

    Args:
        lengths: Tokens of each sample, without padding, each at least 1.
        global_batch: Samples behind one update, at least 1, or None.
        global_batch_tokens: Tokens behind one update, at least 1, or None. Exactly one of the two is set.
        seed: As for :func:`epoch_order`.
        epoch: As for :func:`epoch_order`.
        position: Samples to skip at the start of the epoch; at the end of a window, the windows after it are the
            same as without skipping.

    Raises:
        ValueError: Both sizes are set, or neither, or a number is out of range.
    """
    if (global_batch is None) == (global_batch_tokens is None):
        raise ValueError(
            f"global_batch={global_batch} and global_batch_tokens={global_batch_tokens}: the batch is counted in "
            "sequences or in tokens. Set exactly one of them."
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
