"""Coupled windows on several ranks, run by a pool of processes."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import bigbatch
from coupled.models import CASES, Case, batch, gradient_error, relative_error, rows_of, towers
from support.distributed_windows import full_tensor, parallelize

DROPOUT = 0.3


def bare(model: Any) -> Any:
    return getattr(model, "module", model)


class Forward(nn.Module):
    """Runs an encoder of the towers in its forward, as wrappers of a model need it, and the head with a batch."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        inner = towers(dropout)
        self.left, self.right, self.head = inner.left, inner.right, nn.Linear(4, 4).double()
        self.scale = nn.Parameter(torch.full((1,), 0.5, dtype=torch.float64))

    def forward(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.left(data["left"]), self.right(data["right"])


def forward_model(dropout: float = 0.0) -> Forward:
    torch.manual_seed(3)
    return Forward(dropout)


def encode(model: Any, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return model(data)


def clip_with_head(model: Any, features: tuple[Tensor, Tensor]) -> Tensor:
    """CLIP with a head and a scale that only the loss uses."""
    left, right = features
    return bigbatch.losses.clip(bare(model).head(left), right, logit_scale=bare(model).scale.exp())


def clip_without_parameters(_model: Any, features: tuple[Tensor, Tensor]) -> Tensor:
    return bigbatch.losses.clip(*features)


LOSSES = {"head": clip_with_head, "plain": clip_without_parameters}


def parts_of(sizes: list[int]) -> list[slice]:
    return [slice(sum(sizes[:rank]), sum(sizes[: rank + 1])) for rank in range(len(sizes))]


def reference(loss: str, sizes: list[int], gather: str) -> tuple[nn.Module, float]:
    """Return the gradient and the loss of the global batch in one process."""
    model, data = forward_model(), batch(sum(sizes))
    function = LOSSES[loss]
    if gather == "all":
        total = function(model, encode(model, data))
    else:
        shares = [
            (function(model, encode(model, rows_of(data, rows))), rows)
            for rows in parts_of(sizes)
            if rows.stop > rows.start
        ]
        total = sum(value * (rows.stop - rows.start) for value, rows in shares) / sum(sizes)
    total.backward()
    return model, total.item()


def run_window(how: str, loss: str, gather: str, sizes: list[int], cut: int, lockstep: bool = False) -> dict[str, Any]:
    """Run one window on this rank; return its errors against one process."""
    rank = dist.get_rank()
    data = rows_of(batch(sum(sizes)), parts_of(sizes)[rank])
    model, sync = parallelize(forward_model(), how)
    coupled = bigbatch.Coupled(encode, LOSSES[loss], gather=gather)
    engine = bigbatch.Engine(model, None, coupled, microbatch=cut, sync=sync, lockstep=lockstep, check=False)
    if engine.sync.runs_in_lockstep:  # a rank needs a sample to repeat before it can be empty
        engine.backward(rows_of(batch(4 * len(sizes)), slice(rank, rank + 3)))
    report = engine.backward(data)
    expected, value = reference(loss, sizes, gather)
    found = [None if p.grad is None else full_tensor(p.grad) for p in model.parameters()]
    return {
        "error": relative_error(found, [p.grad for p in expected.parameters()]),
        "loss_error": abs(report.loss / value - 1),
        "items": report.items,
    }


class FailsOnce:
    """Encodes as `encode`, and runs out of memory above some samples in the second pass on one rank."""

    def __init__(self, rank: int, fits: int) -> None:
        self.rank, self.fits, self.sizes = rank, fits, list[int]()

    def __call__(self, model: Any, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            if dist.get_rank() == self.rank and len(data["left"]) > self.fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.sizes.append(len(data["left"]))
        return model(data)


def run_with_dropout(gather: str, sizes: list[int], fits: int) -> dict[str, Any]:
    """Run a window with dropout in which the last rank restarts; compare with the same masks in one graph."""
    rank = dist.get_rank()
    data = rows_of(batch(sum(sizes)), parts_of(sizes)[rank])
    model, sync = parallelize(forward_model(DROPOUT), "ddp")
    failing = FailsOnce(len(sizes) - 1, fits)
    coupled = bigbatch.Coupled(failing, clip_with_head, gather=gather)
    engine = bigbatch.Engine(model, None, coupled, microbatch=4, sync=sync, check=False)
    torch.manual_seed(rank)
    report = engine.backward(data)
    used = failing.sizes[-report.num_microbatches :]
    plain, features = forward_model(DROPOUT), []
    cuts: list[Any] = [None] * len(sizes)
    dist.all_gather_object(cuts, used)
    for other, rows in enumerate(parts_of(sizes)):
        torch.manual_seed(other)
        mine, start = [], rows.start
        for size in cuts[other]:
            mine.append(plain(rows_of(batch(sum(sizes)), slice(start, start + size))))
            start += size
        features.append(tuple(torch.cat(column) for column in zip(*mine, strict=True)))
    if gather == "all":
        total = clip_with_head(plain, tuple(torch.cat(column) for column in zip(*features, strict=True)))
    else:
        total = sum(clip_with_head(plain, each) * len(each[0]) for each in features) / sum(sizes)
    total.backward()
    return {"error": gradient_error(bare(model), plain), "retries": report.retries, "used": used}


def run_failing(gather: str, where: str) -> str:
    """Run a window in which rank 1 fails; return the class of the error, and check that the next window runs."""
    model, sync = parallelize(forward_model(), "ddp")

    def failing_encode(model: Any, data: dict[str, Tensor]) -> Any:
        is_second = torch.is_grad_enabled()
        if fails and dist.get_rank() == 1 and where == ("second pass" if is_second else "first pass"):
            raise ArithmeticError("broken")
        return model(data)

    def failing_loss(model: Any, features: Any) -> Tensor:
        if fails and dist.get_rank() == 1 and where == "loss":
            raise ArithmeticError("broken")
        return clip_with_head(model, features)

    fails = True
    coupled = bigbatch.Coupled(failing_encode, failing_loss, gather=gather)
    engine = bigbatch.Engine(model, None, coupled, microbatch=2, sync=sync, check=False)
    data = rows_of(batch(12), slice(6 * dist.get_rank(), 6 * dist.get_rank() + 6))
    broken = {**data, "left": data["left"][:3]} if where == "batch" and dist.get_rank() == 1 else data
    calls = iter(range(99))
    abandon_at = {"abandon in first pass": 1, "abandon in second pass": 4}.get(where, -1)
    name = "none"
    try:
        engine.backward(broken, should_abandon=lambda: dist.get_rank() == 1 and next(calls) == abandon_at)
    except Exception as error:  # noqa: BLE001 - reported to the test
        name = type(error).__name__
    fails = False
    assert engine.backward(data).items == 12
    return name


def run_other_shapes() -> str:
    """Gather features of another width on rank 1; return the message."""
    model, sync = parallelize(forward_model(), "ddp")

    def narrow(model: Any, data: dict[str, Tensor]) -> Any:
        left, right = model(data)
        return (left[:, :2], right[:, :2]) if dist.get_rank() else (left, right)

    coupled = bigbatch.Coupled(narrow, clip_without_parameters, gather="all")
    engine = bigbatch.Engine(model, None, coupled, microbatch=2, sync=sync, check=False)
    try:
        engine.backward(batch(4))
    except bigbatch.InputError as error:
        return str(error)
    return "no error"


def run_labels(sizes: list[int]) -> float:
    """Gather labels and bool masks along with features; the empty rank does not know their structure."""
    case: Case = CASES["sup_con"]
    model, rank = towers(), dist.get_rank()
    plain = copy.deepcopy(model)
    data = rows_of(batch(sum(sizes)), parts_of(sizes)[rank])

    def encode_labels(model: Any, part: dict[str, Tensor]) -> Any:
        return {**case.encode(bare(model), part), "mask": part["label"] > 0}

    def loss(_model: Any, features: Any) -> Tensor:
        chosen = features["mask"]
        return case.loss(_model, {"features": features["features"][chosen], "labels": features["labels"][chosen]})

    sync = bigbatch.Replicated(model)
    coupled = bigbatch.Coupled(encode_labels, loss, gather="all")
    bigbatch.Engine(model, None, coupled, microbatch=3, sync=sync, check=False).backward(data)
    loss(plain, encode_labels(plain, batch(sum(sizes)))).backward()
    return gradient_error(model, plain)
