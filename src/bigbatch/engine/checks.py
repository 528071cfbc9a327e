"""Validate the settings of an engine."""

from collections.abc import Sequence

import torch

from bigbatch.accumulation.accumulator import Accumulator
from bigbatch.batch_norm.checks import check_batch_norm
from bigbatch.batching.checks import check_count, check_functions
from bigbatch.batching.plan import TokenBudget, plan
from bigbatch.coupled.coupled import Coupled
from bigbatch.distributed.gradient_sync import GradientSync
from bigbatch.engine.host_check import check_host
from bigbatch.errors import InputError
from bigbatch.offload.levels import LEVELS
from bigbatch.types import Layout

SETTINGS = (  # arguments of `bigbatch.Engine` that are no attributes of it
    *("optimizer", "cuda_graphs", "fuse_gradients", "batch_norm", "max_grad_norm", "gradient_hook", "scheduler"),
    *("scaler", "nonfinite", "reproducible", "lockstep", "noise", "check"),
)


def check_microbatch(microbatch: object, memory: object, lengths: object, *, offload: object = "none") -> None:
    """Validate microbatch= together with memory=, lengths= and offload=.

    Raises:
        TypeError: ``microbatch`` or ``lengths`` is of another type.
        ValueError: It is out of range, or does not go together with the others.
    """
    if offload not in (*LEVELS, "auto"):
        raise InputError(f"offload is {offload!r}: it must be one of {', '.join(map(repr, LEVELS))}, or 'auto'.")
    check_functions(lengths=lengths)
    if microbatch == "auto":
        return
    if memory is not None and offload != "auto":
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


def check_switches(**switches: object) -> None:
    """Check that arguments that are on or off are bools: a text, such as "off", would mean on.

    Raises:
        TypeError: One is not.
    """
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}: pass True or False.")


def check_quantum(quantum: int | None, microbatch: object, *, reproducible: bool) -> None:
    """Check quantum= together with reproducible= and microbatch=.

    Raises:
        TypeError: The quantum is not an int, or ``reproducible`` is no bool.
        ValueError: It is below 1, missing, without effect, or no divisor of the micro-batch.
    """
    check_switches(reproducible=reproducible)
    if not reproducible:
        if quantum is not None:
            raise ValueError(f"quantum={quantum!r} has no effect without reproducible=True: pass both, or neither.")
        return
    if quantum is None:
        raise ValueError(
            "reproducible=True needs quantum=, the number of consecutive samples that are computed together whatever "
            "the micro-batch is: pass for example quantum=2."
        )
    check_count("quantum", quantum, "the samples that are computed together")
    if isinstance(microbatch, int) and microbatch % quantum:
        raise ValueError(
            f"microbatch={microbatch} is no whole number of quanta of {quantum} samples: pass a multiple, such as "
            f"{max(quantum, microbatch // quantum * quantum)}."
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


def check_loss(
    loss_fn: object, microbatch: object, batch_norm: object, *, cuda_graphs: bool, count_items: object
) -> bool:
    """Return whether each micro-batch has a gradient of its own, after rejecting settings that are not supported.

    Raises:
        InputError: A setting is not supported for a `Coupled`, or with ``batch_norm="exact"``.
        TypeError: ``loss_fn`` or ``count_items`` cannot be called, or ``cuda_graphs`` is no bool.
    """
    check_functions(loss_fn=loss_fn, count_items=count_items)
    check_switches(cuda_graphs=cuda_graphs)
    if isinstance(loss_fn, Coupled):
        _check_coupled(cuda_graphs, count_items)
    if batch_norm is not None:
        check_batch_norm(batch_norm, loss_fn)
        _check_exact_norms(microbatch, cuda_graphs)
    return batch_norm is None and not isinstance(loss_fn, Coupled)


def _check_coupled(cuda_graphs: bool, count_items: object) -> None:
    if cuda_graphs:
        raise InputError("cuda_graphs=True is not supported for a Coupled loss, which runs two passes; remove it.")
    if count_items is not None:
        raise InputError(
            "count_items= is for losses of several terms, and a Coupled loss has one, whose items are the samples: "
            "add the terms up in its loss, and remove count_items=."
        )


def _check_exact_norms(microbatch: object, cuda_graphs: bool) -> None:
    if cuda_graphs:
        raise InputError(
            'cuda_graphs=True is not supported with batch_norm="exact", where micro-batches wait for each other within '
            "their forward: remove one of the two."
        )
    if microbatch == "auto":
        raise InputError(
            'microbatch="auto" measures one micro-batch, and with batch_norm="exact" the memory depends on the whole '
            "batch: pass a number of samples, or a TokenBudget."
        )


def check_ranks(accumulator: Accumulator, microbatch: object, batch_norm: object, *, cuda_graphs: bool) -> None:
    """Reject settings that the device, its host, sharded models, or other ranks in lockstep do not support.

    Raises:
        MemoryLimitError: The host has too little memory for the level of offload.
        ValueError: A setting is not supported.
    """
    sync, device = accumulator.sync, accumulator.device
    check_host(accumulator)
    if sync.runs_in_lockstep:
        _check_lockstep(sync, microbatch, batch_norm, cuda_graphs)
    offload = accumulator.update.offload
    if cuda_graphs and offload is not None and offload.sums is not None:
        raise InputError(
            'cuda_graphs=True is not supported with offload="gradients", which copies gradient sums from and to host '
            'memory in each micro-batch: leave it out, or pass offload="master".'
        )
    if cuda_graphs and device.type != "cuda":
        raise ValueError(f"cuda_graphs=True needs a model on a CUDA device, and this one is on {device}: leave it out.")
    if batch_norm is not None and sync.size > 1 and _is_float16(accumulator):
        raise InputError(
            f'batch_norm="exact" over {sync.size} ranks is not supported with float16, whose gradients each rank '
            "scales by itself: use bfloat16, and leave scaler= out."
        )


def _is_float16(accumulator: Accumulator) -> bool:
    update = accumulator.update
    return update.scaler is not None or any(p.dtype is torch.float16 for p in update.parameters())


def _check_lockstep(sync: GradientSync, microbatch: object, batch_norm: object, cuda_graphs: bool) -> None:
    whose = "a sharded model" if sync.is_sharded else "lockstep=True"
    if batch_norm is not None:
        raise InputError(
            f'batch_norm="exact" is not supported with {whose}, whose ranks run one micro-batch after the other: use '
            "DistributedDataParallel or bigbatch.Replicated, without lockstep."
        )
    if microbatch == "auto":
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
