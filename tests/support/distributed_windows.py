"""Windows over any cut of one batch on several ranks, compared with one process and the whole batch."""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import bigbatch
from support import full_batch_reference as ref

SMALL = 64  # elements per rank of a collective that counts as scalar-sized

Cut = Sequence[Sequence[Sequence[int]]]
"""The samples of each micro-batch of each rank."""


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives of this rank, scalar-sized ones separately."""

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


def parallelize(model: nn.Module, how: str, **settings: bool) -> tuple[nn.Module, Any]:
    """Wrap or shard the model over ranks; return it with the accumulator's ``sync`` argument."""
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model, **settings), None
    if how == "plain":
        return model, bigbatch.Replicated(model)
    if how == "overlap":
        return model, bigbatch.Replicated(model, overlap=True)
    if how == "one process":
        return model, None
    name, _, policy = how.partition("-")
    size = dist.get_world_size()
    mixed = {"mixed": MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)}
    precision = mixed.get(name, MixedPrecisionPolicy())
    if name != "hsdp":
        mesh = init_device_mesh("cpu", (size,))
    else:
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicas", "shards"))
    for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    return model, bigbatch.SyncPolicy(policy) if policy else None


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor or a plain tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class GradientRecorder(torch.optim.SGD):
    """SGD that keeps full copies of the gradients of each step."""

    def __init__(self, model: nn.Module, lr: float = 0.0) -> None:
        super().__init__(model.parameters(), lr=lr)
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.names = {p: name for name, p in inner.named_parameters()}
        self.seen: list[dict[str, Tensor]] = []

    def step(self, closure: Any = None) -> Any:
        self.seen.append(
            {
                name: full_tensor(torch.zeros_like(p) if p.grad is None else p.grad).clone()
                for p, name in self.names.items()
            }
        )
        return super().step(closure)


@dataclass
class WindowResult:
    """Result of one rank.

    Attributes:
        error: Relative error of the gradient against the whole batch in one process.
        norm_error: Relative error of ``report.grad_norm``.
        loss_error: Relative error of ``report.loss``.
        report: The report, with its terms read.
        large: CollectiveCounter of gradients or parameters, by name.
        small: Scalar-sized ones.
    """

    error: float
    norm_error: float
    loss_error: float
    report: bigbatch.WindowReport
    large: Counter[str] = field(default_factory=Counter)
    small: Counter[str] = field(default_factory=Counter)


def select_rows(batch: ref.Batch, rows: Sequence[int]) -> ref.Batch:
    """Return some samples of a batch."""
    return {name: column[list(rows)] for name, column in batch.items()}


def terms_and_items(model: nn.Module, batch: ref.Batch) -> dict[str, tuple[Tensor, int]]:
    """Return a loss of two terms with different denominators: labelled tokens, and samples with an odd first label."""
    logits = model(batch["tokens"])
    odd = batch["labels"][:, 0] % 2 == 1
    labels = batch["labels"].flatten()
    loss_sum = nn.functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=ref.IGNORED, reduction="sum")
    return {"tokens": (loss_sum, ref.count(batch)), "odd": (logits[odd].square().mean((1, 2)).sum(), int(odd.sum()))}


def count_terms(batch: ref.Batch) -> dict[str, int]:
    """Count the items of both terms."""
    return {"tokens": ref.count(batch), "odd": int((batch["labels"][:, 0] % 2 == 1).sum())}


def loss_over_odd(model: nn.Module, batch: ref.Batch) -> tuple[Tensor, int]:
    """Return the loss of all labelled tokens, to be divided by the samples with an odd first label."""
    return ref.loss_and_items(model, batch)[0], int((batch["labels"][:, 0] % 2 == 1).sum())


def total(terms: dict[str, tuple[Tensor, int]]) -> Tensor:
    """Return the sum of the mean terms over a whole batch."""
    return torch.stack([loss_sum / items for loss_sum, items in terms.values() if items]).sum()


def mean_of(model: nn.Module, batch: ref.Batch, loss: str) -> Tensor:
    """Return the loss of a whole batch in one process."""
    if loss == "loss_over_odd":
        return total({"loss": loss_over_odd(model, batch)})
    return total(terms_and_items(model, batch)) if loss == "terms_and_items" else ref.loss_mean(model, batch)


def loss_named(name: str) -> ref.LossFunction:
    """Return the loss function of that name, here or in the reference."""
    here: dict[str, ref.LossFunction] = {"terms_and_items": terms_and_items, "loss_over_odd": loss_over_odd}
    return here[name] if name in here else getattr(ref, name)


def window_of(how: str, cut: Cut, loss: str = "loss_and_items", num_samples: int = 12) -> WindowResult:
    """Run one window of an accumulator on this rank's part of a cut, through ``windows``."""
    model = ref.make_model()
    reference = copy.deepcopy(model)
    batch = ref.ragged_batch(num_samples)
    used = select_rows(batch, [row for rank in cut for rows in rank for row in rows])
    spread_model, sync = parallelize(model, how)
    optimizer = GradientRecorder(spread_model)
    accumulator = bigbatch.Accumulator(spread_model, optimizer, sync=sync)
    own = [select_rows(batch, rows) for rows in cut[dist.get_rank()]]
    most = max(1, *(len(rank) for rank in cut))
    accumulator.sync.set_padding_microbatch(select_rows(batch, [0]))  # used by a rank without samples
    count_items = count_terms if loss == "terms_and_items" else None
    reports = []
    with CollectiveCounter() as collectives:
        for window in accumulator.windows(own, num_microbatches=most, count_items=count_items):
            for part in window:
                result = loss_named(loss)(spread_model, part)
                window.backward(result)
            reports.append(window.step())
    (report,), (found,) = reports, optimizer.seen
    return compare(found, mean_of(reference, used, loss), reference, report, collectives)


def engine_of(
    how: str, rows: Sequence[Sequence[int]], sizes: Sequence[int], loss: str = "loss_and_items", limit: str = "samples"
) -> WindowResult:
    """Run one step of an engine on this rank's rows, in micro-batches of this rank's size, of samples or of tokens."""
    model = ref.make_model()
    reference = copy.deepcopy(model)
    batch = ref.ragged_batch(12)
    rank = dist.get_rank()
    spread_model, sync = parallelize(model, how)
    optimizer = GradientRecorder(spread_model)
    settings: dict[str, Any] = {"microbatch": sizes[rank]}
    own: Any = select_rows(batch, rows[rank])
    if limit != "samples":
        own = [select_rows(batch, [row]) for row in rows[rank]]
        settings = {
            "microbatch": bigbatch.TokenBudget(sizes[rank]),
            "lengths": lambda samples: [max(1, ref.count(sample)) for sample in samples],
            "collate": pack if limit == "packed" else pad,
            "layout": limit,
        }
    if loss == "terms_and_items":
        settings["count_items"] = count_terms
    engine = bigbatch.Engine(spread_model, optimizer, loss_named(loss), sync=sync, **settings)
    engine.sync.set_padding_microbatch(select_rows(batch, [0]))
    with CollectiveCounter() as collectives:
        report = engine.step(own)
    (found,) = optimizer.seen
    used = select_rows(batch, [row for part in rows for row in part])
    return compare(found, mean_of(reference, used, loss), reference, report, collectives)


def pad(samples: Sequence[ref.Batch]) -> ref.Batch:
    """Concatenate samples as rows."""
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


def pack(samples: Sequence[ref.Batch]) -> ref.Batch:
    """Concatenate samples into one row without padding; the model has no operation across tokens."""
    kept = [sample["labels"] != ref.IGNORED for sample in samples]
    return {
        name: torch.cat([sample[name][mask] for sample, mask in zip(samples, kept, strict=True)])[None]
        for name in samples[0]
    }


def compare(
    found: dict[str, Tensor],
    loss: Tensor,
    reference: nn.Module,
    report: bigbatch.WindowReport,
    collectives: CollectiveCounter,
) -> WindowResult:
    """Compare with the gradient of a loss in one process."""
    expected = ref.gradients_of(reference, loss)
    norm = float(torch.nn.utils.get_total_norm(list(expected.values())))
    return WindowResult(
        error=ref.relative_error(found, expected),
        norm_error=abs(report.grad_norm / norm - 1),
        loss_error=abs(report.loss / float(loss) - 1),
        report=plain(report),
        large=collectives.large,
        small=collectives.small,
    )


def plain(report: bigbatch.WindowReport) -> bigbatch.WindowReport:
    """Return a picklable report, with its terms read."""
    terms = report.terms
    return replace(report, _read_terms=partial(dict, terms))


def local(value: Any) -> Any:
    """Return the local part of a tensor; other values unchanged."""
    if isinstance(value, DTensor):
        value = value.to_local()
    return value.detach() if isinstance(value, Tensor) else value


def inner(model: nn.Module) -> nn.Module:
    """Return the model inside its wrapper."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def sync_flags(model: nn.Module) -> dict[str, Any]:
    """Return the settings of DDP or of FSDP's parameter groups that windows change and must restore."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        names = ("require_backward_grad_sync", "require_forward_param_sync", "_static_graph_delay_allreduce_enqueued")
        return {name: getattr(model, name) for name in names if hasattr(model, name)}
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            found[f"{name} flags"] = (group.reduce_grads, group.all_reduce_grads)
            found[f"{name} left over"] = any(p.unsharded_accumulated_grad is not None for p in group.fsdp_params)
            found[f"{name} in part"] = group._partial_reduce_output is not None
    found["hooks"] = len(model._forward_hooks)
    return found
