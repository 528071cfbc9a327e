"""The ranks of one run: their shares of the samples, and the replication or sharding of the model.

global window → this rank's samples;    model → replicas or shards → gradient synchronization
"""

import heapq
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from bigbatch.distributed.collective import RankGroup, raise_together, rank_group
from bigbatch.distributed.gradient_sync import GradientSync, SyncPolicy
from bigbatch.distributed.replicated import Replicated
from bigbatch.errors import InputError, first_line


@dataclass(frozen=True)
class RankContext:
    """The ranks of one run.

    Attributes:
        size: Number of ranks; 1 without a process group.
        rank: Rank of this process.
        local_size: Number of ranks on this machine.
        parallel: Distribution of the model: replicated on every rank (ddp), sharded over all ranks (fsdp), or sharded
            within each machine and replicated over machines (hsdp).
    """

    size: int = 1
    rank: int = 0
    local_size: int = 1
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"

    @property
    def is_first(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    @property
    def are_sharded(self) -> bool:
        """Whether no rank holds the whole model."""
        return self.size > 1 and self.parallel != "ddp"

    def shard_window(
        self, window: Sequence[int], lengths: Sequence[int] | NDArray[np.integer[Any]], *, quantum: int | None = None
    ) -> list[int]:
        """Return the samples of a window that this rank runs. Deterministic, so ranks do not communicate.

        Longest first, each sample goes to the rank that has the fewest tokens so far.

        Args:
            window: Samples of one update.
            lengths: Tokens of every sample of the data set.
            quantum: Samples that are computed together, in a fixed order: longest first, whole quanta on each rank,
                those of the first rank first. None to balance samples.
        """
        if quantum is not None:
            ordered = sorted(window, key=lambda i: (-int(lengths[i]), i))
            bounds = _bounds_of_ranks([int(lengths[i]) for i in ordered], quantum, self.size)
            return ordered[bounds[self.rank] : bounds[self.rank + 1]]
        if self.size == 1:
            return list(window)
        filled = [(0, rank) for rank in range(self.size)]
        own = []
        for sample in sorted(window, key=lambda i: (-int(lengths[i]), i)):
            tokens, rank = filled[0]
            heapq.heapreplace(filled, (tokens + int(lengths[sample]), rank))
            if rank == self.rank:
                own.append(sample)
        return own

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        """Reject ranks that would train another model or on other data. Collective.

        Args:
            facts: Values that must be equal on all ranks, by their name for the user.

        Raises:
            InputError: A value differs; all ranks raise the same.
        """
        per_machine = {"--nproc-per-node": self.local_size} if self.parallel == "hsdp" else {}
        gathered = self.all_gather({**facts, **per_machine})
        for name, own in gathered[0].items():
            other = next((rank for rank, values in enumerate(gathered) if values[name] != own), None)
            if other is not None:
                differs = f"{name} {gathered[other][name]}, not {own}" if name.startswith("--") else f"{name} differ"
                raise InputError(
                    f"rank {other} differs from rank 0 ({differs}). Use the same settings, data, model and versions on "
                    "every machine."
                )

    def parallelize(
        self, model: Any, device: torch.device, *, layers_dtype: torch.dtype | None = None
    ) -> GradientSync | SyncPolicy | None:
        """Replicate or shard a model over the ranks, before its optimizer is made. Collective.

        Args:
            model: On the device; or on the meta device if it is sharded, which it stays.
            device: Of this rank.
            layers_dtype: Of the weights of decoder layers as a sharded model gathers them; None for that of the shards.
                Gradients are reduced and summed in float32 all the same.

        Returns:
            What `bigbatch.Engine` accepts as ``sync``.

        Raises:
            InputError: It cannot be sharded.
        """
        if self.size == 1:
            return None
        if not self.are_sharded:
            return Replicated(model)
        try:
            _shard(model, self, device.type, layers_dtype)
            from bigbatch.distributed.sharded import ShardedSync

            sync = ShardedSync(model)
            keeps_gradients = self.parallel == "fsdp" and sync.fits_whole(device, gradients=True)
            policy = SyncPolicy.LAST if keeps_gradients else None  # reduce once a window, not once a micro-batch
            return ShardedSync(model, policy=policy, keeps_weights=sync.fits_whole(device))
        except (ValueError, TypeError, AssertionError) as error:
            raise InputError(f"--parallel {self.parallel} is not supported here: {first_line(error)}.") from error

    def raise_together(self) -> AbstractContextManager[None]:
        """Raise on every rank if any rank raises an `InputError` in the block. Collective at its end."""
        return raise_together(self._group(), InputError)

    def all_gather(self, value: Any) -> list[Any]:
        """Return the JSON value of every rank. Collective."""
        return self._group().all_gather(value)

    def broadcast(self, value: Any) -> Any:
        """Return the JSON value of the first rank. Collective."""
        return self._group().broadcast(value)

    def _group(self) -> RankGroup:
        return RankGroup() if self.size == 1 else rank_group()


SINGLE_PROCESS = RankContext()


def _bounds_of_ranks(lengths: Sequence[int], quantum: int, num_ranks: int) -> list[int]:
    """Return where the samples of each rank begin, and their number: whole quanta, with about as many tokens each.

    Args:
        lengths: Tokens of each sample, in the order of the quanta.
        quantum: Samples of each quantum but the last.
        num_ranks: At least 1.
    """
    starts = range(0, len(lengths), quantum)
    tokens = [sum(lengths[start : start + quantum]) for start in starts]
    bounds, quanta, done, total = [0], 0, 0, sum(tokens)
    for rank in range(1, num_ranks):
        while quanta < len(tokens) and done + tokens[quanta] / 2 <= total * rank / num_ranks:
            done += tokens[quanta]
            quanta += 1
        bounds.append(min(quanta * quantum, len(lengths)))
    return [*bounds, len(lengths)]


def gather_full_model(model: Any, empty: Any) -> Any:
    """Gather a sharded model on the host of the first rank, tensor by tensor. Collective.

    A device holds one whole tensor at a time.

    Args:
        model: With shards of its weights.
        empty: A copy of it on the meta device, made before it was sharded; receives the weights.

    Returns:
        ``empty``; on the other ranks, still without weights.
    """
    from torch.distributed.tensor import DTensor

    whole: dict[Tensor, Tensor] = {}
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for tensor in state.values():
        if tensor not in whole:  # tied tensors are gathered once
            gathered = tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
            whole[tensor] = gathered.cpu() if dist.get_rank() == 0 else gathered.new_empty(0)
    if dist.get_rank() == 0:
        empty.load_state_dict({name: whole[tensor] for name, tensor in state.items()}, assign=True)
        empty.tie_weights()
    return empty


def gather_trained(model: Any) -> dict[str, Tensor]:
    """Gather the trained parameters of a sharded model on the host of the first rank, one by one. Collective.

    Returns:
        Them by name; empty on the other ranks.
    """
    from torch.distributed.tensor import DTensor

    trained: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if dist.get_rank() == 0:
                trained[name] = whole.detach().cpu()
    return trained


def casts_weights_under_autocast(layer: nn.Module) -> bool:
    """Return whether all weights of a layer are cast under autocast, or are those of norms, whose output is cast."""
    owners = [module for module in layer.modules() if next(module.parameters(recurse=False), None) is not None]
    names = [type(owner).__name__ for owner in owners]
    return all(
        isinstance(owner, nn.Linear) or name == "Conv1D" or name.endswith("Norm")
        for owner, name in zip(owners, names, strict=True)
    )


def _shard(model: Any, ranks: RankContext, kind: str, layers_dtype: torch.dtype | None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    if ranks.parallel == "fsdp":
        mesh = init_device_mesh(kind, (ranks.size,))
    else:
        machines = ranks.size // ranks.local_size
        if machines < 2:
            raise ValueError("it replicates shards over machines, and this run has one machine. Use --parallel fsdp")
        mesh = init_device_mesh(kind, (machines, ranks.local_size), mesh_dim_names=("replicas", "shards"))
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    # peft generates text by calling the base model, whose own hooks then have to gather the embeddings.
    root = model.get_base_model() if hasattr(model, "get_base_model") else model
    precision = MixedPrecisionPolicy()
    if layers_dtype is not None and all(map(casts_weights_under_autocast, layers)):
        # inputs of layers are not cast: hidden states and rotary positions stay in float32, as under autocast
        precision = MixedPrecisionPolicy(layers_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(root, mesh=mesh)
