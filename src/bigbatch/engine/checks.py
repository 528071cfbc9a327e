"""Validate the settings of an engine."""

from collections.abc import Sequence

import torch

from bigbatch.batching.checks import check_count
from bigbatch.batching.plan import TokenBudget, plan
from bigbatch.distributed.gradient_sync import GradientSync
from bigbatch.types import Layout


def check_microbatch(microbatch: object, memory: object, lengths: object) -> None:
    """Validate microbatch= together with memory= and lengths=.

    Raises:
        TypeError: ``microbatch`` is of another type.
        ValueError: It is out of range, or does not go together with the other two.
    """
    if microbatch == "auto":
        return
    if memory is not None:
        raise ValueError(
            f"memory={memory!r} chooses the micro-batch, and microbatch={microbatch!r} is fixed: pass "
            'microbatch="auto", or leave memory= out.'
        )
    if isinstance(microbatch, str):
        raise ValueError(f'microbatch is {microbatch!r}: it must be "auto", an int, or a TokenBudget.')
    if not isinstance(microbatch, TokenBudget):
        check_count("microbatch", microbatch, "the samples of one micro-batch")  # type: ignore[arg-type]
    elif lengths is None:
        raise ValueError(
            "a TokenBudget needs the length of each sample: pass lengths=, a function from the batch to the lengths."
        )


def check_layout(layout: str, lengths: object, collate: object) -> Layout:
    """Return the layout if it is valid together with lengths= and collate=.

    Raises:
        ValueError: The layout is unknown, or needs an argument that is missing.
    """
    if layout == "packed" and (lengths is None or collate is None):
        missing = "lengths=, a function from the batch to the tokens of each sample" if lengths is None else "collate="
        raise ValueError(f'layout="packed" needs {missing}: samples are packed into rows by their tokens.')
    if layout not in ("padded", "packed"):
        raise ValueError(f'layout is {layout!r}: it must be "padded" or "packed".')
    return layout  # type: ignore[return-value]


def check_graphs(cuda_graphs: bool, device: torch.device) -> None:
    """Validate cuda_graphs=.

    Raises:
        ValueError: The model is not on CUDA.
    """
    if cuda_graphs and device.type != "cuda":
        raise ValueError(f"cuda_graphs=True needs a model on a CUDA device, and this one is on {device}: leave it out.")


def check_lockstep(sync: GradientSync, microbatch: object, cuda_graphs: bool) -> None:
    """Reject settings that sharded models, and other ranks in lockstep, do not support.

    Raises:
        ValueError: A setting is not supported.
    """
    if not sync.runs_in_lockstep:
        return
    if microbatch == "auto":
        whose = "a sharded model" if sync.is_sharded else "lockstep=True"
        raise ValueError(
            f'microbatch="auto" tries sizes until one does not fit, and the ranks of {whose} cannot continue after '
            "that: pass a number of samples, or a TokenBudget."
        )
    if cuda_graphs:
        whose = "for sharded models" if sync.is_sharded else "with lockstep=True"
        raise ValueError(f"cuda_graphs=True is not supported {whose}; remove it.")


def check_lengths(lengths: Sequence[int], num_samples: int) -> None:
    """Check that there is one length for each sample, each at least 1.

    Raises:
        ValueError: Lengths and samples differ in number, or a length is below 1.
    """
    check_num_lengths(lengths, num_samples)
    plan(lengths, token_budget=max(lengths, default=1))  # raises, naming a sample without tokens


def check_num_lengths(lengths: Sequence[int], num_samples: int) -> None:
    """Check that there is one length for each sample.

    Raises:
        ValueError: Lengths and samples differ in number.
    """
    if len(lengths) != num_samples:
        raise ValueError(
            f"lengths= returned {len(lengths)} lengths for a batch of {num_samples} samples: it must return one for "
            "each, in their order."
        )
