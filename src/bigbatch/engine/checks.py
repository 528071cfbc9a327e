"""What an engine may be asked for: checks of its settings, each with the sentence for what cannot be."""

from collections.abc import Sequence

import torch

from bigbatch.batching.checks import check_count
from bigbatch.batching.plan import TokenBudget, plan
from bigbatch.distributed.gradient_sync import GradientSync
from bigbatch.types import Layout


def check_microbatch(microbatch: object, memory: object, lengths: object) -> None:
    """Hold the limit of a micro-batch to what there is of such, and to what it needs.

    Raises:
        TypeError: It is no such thing.
        ValueError: It is out of its range, or something else is missing or too much beside it.
    """
    if microbatch == "auto":
        return
    if memory is not None:
        raise ValueError(
            f"memory={memory!r} decides about the micro-batch, and microbatch={microbatch!r} is decided: pass "
            'microbatch="auto", or leave memory= out.'
        )
    if isinstance(microbatch, str):
        raise ValueError(f'microbatch is {microbatch!r}: it must be "auto", an int, or a TokenBudget.')
    if not isinstance(microbatch, TokenBudget):
        check_count("microbatch", microbatch, "the samples of one micro-batch")  # type: ignore[arg-type]
    elif lengths is None:
        raise ValueError(
            "a TokenBudget needs the length of each sample: pass lengths=, a function from the batch to them."
        )


def check_layout(layout: str, lengths: object, collate: object) -> Layout:
    """Give the layout, if it is one and what it needs is there.

    Raises:
        ValueError: It is not.
    """
    if layout == "packed" and (lengths is None or collate is None):
        missing = "lengths=, a function from the batch to the tokens of each sample" if lengths is None else "collate="
        raise ValueError(f'layout="packed" needs {missing}: rows are packed of samples, by their tokens.')
    if layout not in ("padded", "packed"):
        raise ValueError(f'layout is {layout!r}: it must be "padded" or "packed".')
    return layout  # type: ignore[return-value]


def check_graphs(cuda_graphs: bool, device: torch.device) -> bool:
    """Tell whether CUDA graphs are asked for.

    Raises:
        ValueError: They are, elsewhere than on CUDA.
    """
    if cuda_graphs and device.type != "cuda":
        raise ValueError(f"cuda_graphs=True needs a model on a CUDA device, and this one is on {device}: leave it out.")
    return cuda_graphs


def check_sharded(sync: GradientSync, microbatch: object, cuda_graphs: bool) -> None:
    """Refuse what a model whose layers run on all ranks or on none cannot have.

    Raises:
        ValueError: It is asked for.
    """
    if not sync.runs_in_lockstep:
        return
    if microbatch == "auto":
        raise ValueError(
            'microbatch="auto" tries sizes until one does not fit, and the ranks of a sharded model cannot go on after '
            "that: pass a number of samples, or a TokenBudget."
        )
    if cuda_graphs:
        raise ValueError("cuda_graphs=True is not there for sharded models: leave it out.")


def check_lengths(lengths: Sequence[int], num_samples: int) -> None:
    """Hold lengths to one for each sample, each at least 1.

    Raises:
        ValueError: They are not.
    """
    if len(lengths) != num_samples:
        raise ValueError(
            f"lengths= gave {len(lengths)} lengths for a batch of {num_samples} samples: it must give one for each, in "
            "their order."
        )
    plan(lengths, token_budget=max(lengths, default=1))  # names a sample without tokens


def initial_size(microbatch: int | TokenBudget | str) -> int:
    """Give the tokens or samples of a micro-batch; 0 where they are still to be chosen."""
    if isinstance(microbatch, TokenBudget):
        return microbatch.tokens
    return 0 if isinstance(microbatch, str) else microbatch
