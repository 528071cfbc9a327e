"""What ranks run in the tests: a window over some cut of one batch, beside one process with the whole batch."""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from tests.exactness import reference as ref
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import bigbatch

SMALL = 64  # values: what counts as scalar-sized

Cut = Sequence[Sequence[Sequence[int]]]
"""The samples of each micro-batch of each rank."""


class Collectives(TorchDispatchMode):
    """Counts the collectives of this rank, those of one or few values apart."""

    def __init__(self) -> None:
        super().__init__()
        self.small: Counter[str] = Counter()
        self.large: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
            name = function._schema.name.rpartition("::")[2]
            most = max((tensor.numel() for tensor in tensors), default=0)
            (self.small if most <= SMALL * dist.get_world_size() else self.large)[name] += 1
        return function(*args, **kwargs or {})


def spread(model: nn.Module, how: str) -> tuple[nn.Module, Any]:
    """Give the model as it is spread over ranks, and what an accumulator is told about it."""
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model), None
    if how == "plain":
        return model, bigbatch.Replicated(model)
    name, _, policy = how.partition("-")
    size = dist.get_world_size()
    if name == "fsdp":
        mesh = init_device_mesh("cpu", (size,))
    else:
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicas", "shards"))
    for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, bigbatch.SyncPolicy(policy) if policy else None


def whole(tensor: Tensor) -> Tensor:
    """Give all of a tensor, whatever part of it is here."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Recorder(torch.optim.SGD):
    """Keeps whole copies of the gradients that each step was given."""

    def __init__(self, model: nn.Module, lr: float = 0.0) -> None:
        super().__init__(model.parameters(), lr=lr)
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.names = {p: name for name, p in inner.named_parameters()}
        self.seen: list[dict[str, Tensor]] = []

    def step(self, closure: Any = None) -> Any:
        self.seen.append(
            {name: whole(torch.zeros_like(p) if p.grad is None else p.grad).clone() for p, name in self.names.items()}
        )
        return super().step(closure)


@dataclass
class Found:
    """What one rank found.

    Attributes:
        error: Of its gradient, relative to that of the whole batch in one process.
        norm_error: Of ``report.grad_norm``, relative.
        loss_error: Of ``report.loss``, relative.
        report: With its terms read.
        large: Collectives of gradients or parameters, by name.
        small: Scalar-sized ones.
    """

    error: float
    norm_error: float
    loss_error: float
    report: bigbatch.WindowReport
    large: Counter[str] = field(default_factory=Counter)
    small: Counter[str] = field(default_factory=Counter)


def rows_of(batch: ref.Batch, rows: Sequence[int]) -> ref.Batch:
    """Take some samples of a batch."""
    return {name: column[list(rows)] for name, column in batch.items()}


def window_of(how: str, cut: Cut, loss: str = "loss_and_items", num_samples: int = 12) -> Found:
    """Run one window of an accumulator on this rank's part of a cut, through ``windows``."""
    model = ref.make_model()
    reference = copy.deepcopy(model)
    batch = ref.ragged_batch(num_samples)
    used = [row for rank in cut for rows in rank for row in rows]
    expected = ref.full_gradient(reference, rows_of(batch, used))
    spread_model, sync = spread(model, how)
    optimizer = Recorder(spread_model)
    accumulator = bigbatch.Accumulator(spread_model, optimizer, sync=sync)
    own = [rows_of(batch, rows) for rows in cut[dist.get_rank()]]
    most = max(1, *(len(rank) for rank in cut))
    loss_fn = getattr(ref, loss)
    accumulator.spare = rows_of(batch, [0])  # what a rank without samples runs that has had some before
    reports = []
    with Collectives() as collectives:
        for window in accumulator.windows(own, num_microbatches=most):
            for part in window:
                result = loss_fn(spread_model, part)
                window.backward(result[0], items=result[1])
            reports.append(window.step())
    (report,), (found,) = reports, optimizer.seen
    return _compare(found, expected, ref.loss_mean(reference, rows_of(batch, used)), report, collectives)


def _compare(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    loss: Tensor,
    report: bigbatch.WindowReport,
    collectives: Collectives,
) -> Found:
    norm = float(torch.nn.utils.get_total_norm(list(expected.values())))
    return Found(
        error=ref.relative_error(found, expected),
        norm_error=abs(report.grad_norm / norm - 1),
        loss_error=abs(report.loss / float(loss) - 1),
        report=_plain(report),
        large=collectives.large,
        small=collectives.small,
    )


def _plain(report: bigbatch.WindowReport) -> bigbatch.WindowReport:
    from dataclasses import replace

    return replace(report, _read_terms=dict)
