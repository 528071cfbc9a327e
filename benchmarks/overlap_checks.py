"""Checks of `benchmarks/overlap.py`: windows that overlap their reduction, against windows that do not, and failures.

Every function is collective: all ranks call it with the same arguments.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TextIO

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch
from bigbatch.distributed import buckets, overlap_choice

SMALL_BUCKET = 20_000  # bytes, so that a model of 130 kB is sent in several buckets
NUM_UPDATES, FAILING_UPDATE = 5, 2
PLACES = ("forward", "before any bucket", "between buckets", "last gradient")


@dataclass
class Ranks:
    """Rank, device, the file that receives the output too, and the names of the checks that failed."""

    rank: int
    size: int
    device: torch.device
    file: TextIO | None = None
    failed: list[str] = field(default_factory=list)

    @property
    def is_last(self) -> bool:
        """Whether this is the rank that fails."""
        return self.rank == self.size - 1

    def say(self, line: str) -> None:
        """Print a line on the first rank, and write it to the file if there is one."""
        if self.rank == 0:
            print(line, flush=True)
            if self.file is not None:
                print(line, file=self.file, flush=True)

    def check(self, name: str, is_right: bool, more: str = "") -> None:
        """Print whether a check passed on all ranks. Collective."""
        flag = torch.tensor([float(is_right)], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        if not flag.item():
            self.failed.append(name)
        self.say(f"{'ok   ' if flag.item() else 'WRONG'} {name} {more}")


class Net(nn.Module):
    """Embedding, layers with dropout, batch norm statistics, a head for even and one for odd ranks, an unused layer."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.statistics = nn.BatchNorm1d(64)
        self.head, self.other = nn.Linear(64, 50), nn.Linear(64, 50)
        self.unused = nn.Linear(3, 3)
        self.rank = rank

    def own_head(self) -> nn.Linear:
        """Return the head that this rank uses."""
        return self.other if self.rank % 2 else self.head

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [batch, length, 50]."""
        hidden = self.embedding(tokens)
        self.statistics(hidden.detach().flatten(0, 1))
        for layer in self.layers:
            hidden = hidden + F.dropout(torch.tanh(layer(hidden)), 0.1)
        logits: Tensor = self.own_head()(hidden)
        return logits

    def parameter_at(self, place: str) -> Tensor:
        """Return the parameter whose gradient is complete at a place of the backward."""
        if place == "before any bucket":
            return self.own_head().weight
        layer = self.layers[3] if place == "between buckets" else self.embedding
        return layer.get_parameter("weight")


class Failure:
    """Raises an error once, at a place of the last micro-batch of a window; or makes the losses of a window NaN."""

    def __init__(self, place: str = "", error: BaseException | None = None) -> None:
        self.place, self.error = place, error
        self.is_armed, self.has_nan = False, False
        self.num_calls = 0  # of the loss since the window began

    def start_window(self, *, is_armed: bool = False, has_nan: bool = False) -> None:
        """Set what is to happen in the next window."""
        self.is_armed, self.has_nan = is_armed and self.error is not None, has_nan
        self.num_calls = 0

    def reach(self, place: str, last: int, _gradient: Tensor | None = None) -> None:
        """Raise the error if this is its place, in the last of so many micro-batches."""
        if self.is_armed and place == self.place and self.num_calls == last:
            self.is_armed = False
            assert self.error is not None
            raise self.error


@dataclass
class Trained:
    """Five updates: tensors of the model afterwards, and of each update its norm and whether it overlapped."""

    values: dict[str, Tensor]
    norms: list[float | None] = field(default_factory=list)
    overlapped: list[bool] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    num_retries: int = 0


def make_engine(
    ranks: Ranks, model: Net, rows: Sequence[int], failure: Failure, *, overlap: bool, fuse: bool
) -> bigbatch.Engine:
    """Return an engine over replicas, whose loss and backward fail where asked."""
    last = -(-rows[ranks.rank] // 2)

    def loss_fn(model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        failure.num_calls += 1
        logits = model(batch).flatten(0, 1)
        logits = logits.float() if logits.dtype is torch.bfloat16 else logits
        value = F.cross_entropy(logits, batch.flatten(), reduction="sum")
        if failure.has_nan:
            value = value * float("nan")
        failure.reach("forward", last)
        return value, batch.numel()

    for place in PLACES[1:]:
        hook = partial(failure.reach, place, last)
        model.parameter_at(place).register_hook(hook)  # type: ignore[no-untyped-call]
    return bigbatch.Engine(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
        loss_fn,
        microbatch=2,
        sync=bigbatch.Replicated(model, overlap=overlap),
        check=False,
        noise=False,
        max_grad_norm=1.0,
        fuse_gradients=fuse,
    )


def train(
    ranks: Ranks,
    rows: Sequence[int],
    *,
    overlap: bool = True,
    dtype: torch.dtype = torch.float64,
    failure: Failure | None = None,
    nan_at: int = -1,
    fuse: bool = False,
) -> Trained:
    """Run five updates, with so many rows on each rank; the last rank fails, or has a NaN loss, in one of them."""
    torch.manual_seed(0)
    model = Net(ranks.rank).to(ranks.device, dtype)
    failure = failure or Failure()
    engine = make_engine(ranks, model, rows, failure, overlap=overlap, fuse=fuse)
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(ranks.rank)
    trained = Trained({})
    for number in range(NUM_UPDATES):
        whole = torch.randint(50, (sum(rows), 9), generator=generator)
        own = whole[sum(rows[: ranks.rank]) : sum(rows[: ranks.rank + 1])]
        if ranks.is_last:
            failure.start_window(is_armed=number == FAILING_UPDATE, has_nan=number == nan_at)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an error that does not occur again is one
                report = engine.step(own)
        except BaseException as error:  # noqa: BLE001  an injected interrupt is one
            trained.errors.append(type(error).__name__)
            failure.start_window()
            report = engine.step(own)
        assert report.ranks is not None
        trained.overlapped.append(report.ranks.overlapped)
        trained.norms.append(report.grad_norm)
        trained.num_retries += report.retries
    trained.values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return trained


def are_same(first: Trained, second: Trained) -> bool:
    """Return whether all tensors have the same bits."""
    return all(torch.equal(value, second.values[name]) for name, value in first.values.items())


def are_close(first: Trained, second: Trained, tolerance: float = 1e-9) -> bool:
    """Return whether all tensors agree to a tolerance, absolute plus relative."""
    pairs = [(value.double(), second.values[name].double()) for name, value in first.values.items()]
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in pairs)


def whole_batch_error(ranks: Ranks) -> float:
    """Return the relative error of the gradient of an overlapped window against that of the whole batch."""
    torch.manual_seed(0)
    layers = [nn.Embedding(50, 64), *(nn.Linear(64, 64) for _ in range(6)), nn.Linear(64, 50)]
    model = nn.Sequential(*layers).to(ranks.device).double()
    reference = copy.deepcopy(model)
    seen: dict[Tensor, Tensor] = {}
    engine = bigbatch.Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        lambda m, b: (F.cross_entropy(m(b).flatten(0, 1), b.flatten(), reduction="sum"), b.numel()),
        microbatch=3,
        sync=bigbatch.Replicated(model, overlap=True),
        gradient_hook=lambda ps: seen.update({p: p.grad.clone() for p in ps if p.grad is not None}),
        check=False,
    )
    batch = torch.randint(50, (5 + 8 * ranks.size, 9), generator=torch.Generator().manual_seed(1))
    shares = [batch[rank :: ranks.size] if rank else batch[:: ranks.size][:1] for rank in range(ranks.size)]
    for _ in range(3):
        report = engine.step(shares[ranks.rank])
    assert report.ranks is not None
    assert report.ranks.overlapped
    rows = torch.cat(shares).to(ranks.device)
    F.cross_entropy(reference(rows).flatten(0, 1), rows.flatten()).backward()  # type: ignore[no-untyped-call]
    pairs = [(seen[p], q.grad) for p, q in zip(model.parameters(), reference.parameters(), strict=True)]
    differences = [(found - expected).norm() for found, expected in pairs if expected is not None]
    norms = [expected.norm() for _, expected in pairs if expected is not None]
    return float(torch.stack(differences).norm() / torch.stack(norms).norm())


def check_updates(ranks: Ranks) -> None:
    """Compare updates with and without overlap: the same bits for two ranks, close for more."""
    rest = ranks.size - 1
    shares = {
        "equal": [6] * ranks.size,
        "one micro-batch each": [2] * ranks.size,
        "few and many": [1, *[7] * rest],
        "none on the first": [0, *[6] * rest],
        "none on the last": [*[6] * rest, 0],
    }
    for name, rows in shares.items():
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for fuse in (False, True) if name == "equal" else (False,):
                found = train(ranks, rows, dtype=dtype, fuse=fuse)
                expected = train(ranks, rows, overlap=False, dtype=dtype, fuse=fuse)
                tolerance = 1e-9 if dtype is torch.float64 else 2e-2
                agree = are_same(found, expected) if ranks.size == 2 else are_close(found, expected, tolerance)
                right = agree and found.overlapped == [False, *[True] * 4] and not any(expected.overlapped)
                label = f"same as without: {name}, {dtype}{', fused' if fuse else ''}"
                ranks.check(label, right, str(found.overlapped))
    nan, expected = (train(ranks, [6] * ranks.size, overlap=overlap, nan_at=3) for overlap in (True, False))
    ranks.check("a NaN loss on one rank skips the window", are_close(nan, expected))


def check_failures(ranks: Ranks, num_rows: int, place: str, plain: Trained) -> None:
    """Let the last rank fail in the third window, in three ways, and compare with five updates without a failure."""
    rows = [num_rows] * ranks.size
    where = f"{place}, {num_rows // 2} micro-batches"
    found = train(ranks, rows, failure=Failure(place, ArithmeticError("injected")))
    right = not found.errors and found.overlapped == [False, True, False, True, True] and are_close(found, plain)
    ranks.check(f"error, {where}: run again, nothing lost", right, str(found.overlapped))
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    found = train(ranks, rows, failure=Failure(place, memory))
    norm, expected = found.norms[FAILING_UPDATE], plain.norms[FAILING_UPDATE]
    right = norm is not None and expected is not None and abs(norm / expected - 1) < 1e-9
    right = right and not found.errors and found.overlapped[:3] == [False, True, False]
    right = right and found.num_retries == int(ranks.is_last)
    ranks.check(f"out of memory, {where}: run again", right, f"retries {found.num_retries}")
    found = train(ranks, rows, failure=Failure(place, KeyboardInterrupt()))
    right = found.errors == ["KeyboardInterrupt" if ranks.is_last else "RankFailedError"]
    ranks.check(f"interrupt, {where}: dropped everywhere", right, str(found.errors))


@contextmanager
def settings_of_checks() -> Iterator[None]:
    """Reduce in small buckets, overlap again right after a failure, and use deterministic algorithms."""
    before = buckets.BUCKET_BYTES, overlap_choice.FIRST_REST
    buckets.BUCKET_BYTES, overlap_choice.FIRST_REST = SMALL_BUCKET, 0
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        buckets.BUCKET_BYTES, overlap_choice.FIRST_REST = before
        torch.use_deterministic_algorithms(False)


def check_all(ranks: Ranks) -> None:
    """Run all checks, and print a line for each."""
    with settings_of_checks():
        error = whole_batch_error(ranks)
        ranks.check("gradient of the whole batch, float64", error <= 1e-12, f"{error:.1e}")
        check_updates(ranks)
        for num_rows in (6, 2):
            plain = train(ranks, [num_rows] * ranks.size)
            for place in PLACES:
                check_failures(ranks, num_rows, place, plain)
