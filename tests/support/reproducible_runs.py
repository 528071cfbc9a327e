"""Short runs of small language models with dropout, whose parameters are compared bit by bit."""

import hashlib
import os
import random
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch
from bigbatch.engine import batch_windows

VOCABULARY = 61
KINDS = [("llama", "float32"), ("llama", "bf16"), ("gpt2", "float32"), ("gpt2", "bf16")]
Sample = Tensor


@dataclass(frozen=True)
class Run:
    """One way to run the same updates.

    Attributes:
        kind: ``"llama"`` or ``"gpt2"``.
        precision: ``"float32"`` or ``"bf16"``, for autocast.
        updates: Number of them.
        microbatch: Samples.
        order: Seed of the order in which quanta run; None for that of the batch.
        fails: Numbers of the forwards that run out of memory, and of backwards that do so half-way.
        samples: Of the first global batch; later ones have up to two fewer.
        seed: Of dropout.
    """

    kind: str = "llama"
    precision: str = "float32"
    updates: int = 8
    microbatch: int = 2
    order: int | None = None
    fails: tuple[int, ...] = ()
    samples: int = 17
    seed: int = 7


@dataclass(frozen=True)
class Outcome:
    """Fingerprints of all parameters after each update, what reports say, and the retries after out-of-memory."""

    fingerprints: list[str]
    losses: list[float]
    norms: list[float]
    retries: int

    def same(self, other: "Outcome") -> bool:
        """Return whether all updates are the same bits."""
        mine, theirs = replace(self, retries=0), replace(other, retries=0)
        return len(self.fingerprints) > 1 and mine == theirs

    def after(self, number: int) -> "Outcome":
        """Return the updates after some."""
        return Outcome(self.fingerprints[number:], self.losses[number:], self.norms[number:], self.retries)


def make_model(kind: str) -> nn.Module:
    """Return a model with some thousand parameters and dropout 0.1."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)
        size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **size, **drops))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_dropout=0.1,
        )
    )


def batch_of(update: int, run: Run) -> list[Sample]:
    """Return the global batch of an update: samples of different lengths, in which each token follows from the last."""
    generator = torch.Generator().manual_seed(1000 + update)
    lengths = torch.randint(3, 12, (run.samples - update % 3,), generator=generator).tolist()
    firsts = torch.randint(VOCABULARY, (len(lengths),), generator=generator).tolist()
    return [
        torch.tensor([((first + 1) * 2**place - 1) % VOCABULARY for place in range(length)])
        for first, length in zip(firsts, lengths, strict=True)
    ]


def collate(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Pad samples to the longest of them."""
    inputs = nn.utils.rnn.pad_sequence(list(samples), batch_first=True)
    labels = nn.utils.rnn.pad_sequence(list(samples), batch_first=True, padding_value=-100)
    return inputs, labels


def loss_of(precision: str) -> Callable[[nn.Module, Any], tuple[Tensor, int]]:
    """Return the sum of the cross entropy of all next tokens, and their number."""

    def loss_fn(model: nn.Module, microbatch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        inputs, labels = microbatch
        autocast: AbstractContextManager[Any] = nullcontext()
        if precision == "bf16":
            autocast = torch.autocast("cpu", torch.bfloat16)
        with autocast:
            logits = model(input_ids=inputs, attention_mask=(labels != -100).long()).logits
        targets = labels[:, 1:].flatten()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum"), int(
            (targets >= 0).sum()
        )

    return loss_fn


def make_engine(run: Run, **settings: Any) -> bigbatch.Engine:
    """Return the engine of a run; over several ranks with a replicated model."""
    model = make_model(run.kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if dist.is_initialized() and dist.get_world_size() > 1:
        settings.setdefault("sync", bigbatch.Replicated(model))
    torch.manual_seed(run.seed)
    return bigbatch.Engine(
        model,
        optimizer,
        with_failures(loss_of(run.precision), model, run.fails),
        **{
            "microbatch": run.microbatch,
            "collate": collate,
            "max_grad_norm": 1.0,
            "check": False,
            "reproducible": True,
            "quantum": 2,
            **settings,
        },
    )


def with_failures(loss_fn: Any, model: nn.Module, fails: tuple[int, ...]) -> Any:
    """Raise out-of-memory errors in some calls: even numbers within the forward, odd ones within the backward."""
    calls = 0
    parameters = list(model.parameters())
    middle = parameters[len(parameters) // 2]
    is_due = False

    def fail(gradient: Tensor) -> None:
        nonlocal is_due
        if is_due:
            is_due = False
            raise torch.OutOfMemoryError("injected")

    if fails:
        middle.register_hook(fail)

    def failing(model: nn.Module, microbatch: Any) -> Any:
        nonlocal calls, is_due
        calls += 1
        if calls in fails:
            if calls % 2 == 0:
                raise torch.OutOfMemoryError("injected")
            is_due = True
        return loss_fn(model, microbatch)

    return failing if fails else loss_fn


def train(run: Run, *, saved: Path | None = None, killed_after: int | None = None, **settings: Any) -> Outcome:
    """Run the updates, from a saved state if it exists.

    Args:
        run: What to run.
        saved: File of the state; loaded if it exists, and written after every third update.
        killed_after: The update after which the process is killed.
        settings: Of the engine.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    engine = make_engine(run, **settings)
    if saved is not None and saved.exists():
        engine.load_state_dict(torch.load(saved))
    fingerprints, reports = [], []
    with shuffled_quanta(run.order):
        for update in range(engine.accumulator.num_steps, run.updates):
            report = engine.step(part_of_rank(batch_of(update, run), rank, size))
            fingerprints.append(fingerprint(engine.sync.module))
            reports.append(report)
            if saved is not None and rank == 0 and (update + 1) % 3 == 0:
                torch.save(engine.state_dict(), saved)
            if update + 1 == killed_after:
                os.kill(os.getpid(), signal.SIGKILL)
    losses, norms = [report.loss for report in reports], [report.grad_norm for report in reports]
    return Outcome(fingerprints, losses, norms, sum(report.retries for report in reports))


def part_of_rank(batch: list[Sample], rank: int, size: int, quantum: int = 2) -> list[Sample]:
    """Return consecutive whole quanta; the ranks have different numbers of them, and the last sample may be alone."""
    num_quanta = -(-len(batch) // quantum)
    bounds = [0, *(num_quanta * (2 * i + 1) // (2 * size) for i in range(1, size)), num_quanta]
    return batch[bounds[rank] * quantum : bounds[rank + 1] * quantum]


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the bits of all parameters."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class shuffled_quanta:  # noqa: N801 - used as a context
    """Run the quanta of all windows inside in another order."""

    def __init__(self, seed: int | None) -> None:
        self._generator = None if seed is None else random.Random(seed)

    def __enter__(self) -> None:
        self._split = batch_windows.split
        if self._generator is not None:
            batch_windows.split = self._shuffled  # type: ignore[assignment]

    def _shuffled(self, *args: Any, **kwargs: Any) -> Any:
        parts = self._split(*args, **kwargs)
        assert self._generator is not None
        return replace(parts, groups=self._generator.sample(list(parts.groups), len(parts.groups)))

    def __exit__(self, *_: object) -> None:
        batch_windows.split = self._split  # type: ignore[assignment]


def train_on_ranks(run: Run, saved: Path | None = None, killed_after: int | None = None) -> Outcome:
    """As `train`, in a process of a group; one thread, as every other process."""
    torch.set_num_threads(1)
    assert os.environ.get("OMP_NUM_THREADS", "1") == "1"
    return train(replace(run, order=dist.get_rank()), saved=saved, killed_after=killed_after)


def train_in_ddp(run: Run) -> Outcome:
    """As `train_on_ranks`, with the model in DistributedDataParallel."""
    torch.set_num_threads(1)
    model = make_model(run.kind)
    wrapped = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(run.seed)
    engine = bigbatch.Engine(
        wrapped,
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        loss_of(run.precision),
        microbatch=4,
        collate=collate,
        max_grad_norm=1.0,
        check=False,
        reproducible=True,
        quantum=2,
    )
    fingerprints, reports = [], []
    for update in range(run.updates):
        reports.append(engine.step(part_of_rank(batch_of(update, run), dist.get_rank(), dist.get_world_size())))
        fingerprints.append(fingerprint(model))
    return Outcome(fingerprints, [report.loss for report in reports], [report.grad_norm for report in reports], 0)


def train_with_half_quanta() -> str:
    """Return the error of ranks whose second one has a part of a quantum."""
    torch.set_num_threads(1)
    engine = make_engine(Run())
    samples = [torch.tensor([1, 2, 3])] * (4, 3, 2)[dist.get_rank()]
    try:
        engine.step(samples)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fail_on_ranks() -> str:
    """Return the errors of ranks of which the first fails in the second pass of the first window."""
    torch.set_num_threads(1)
    model, calls = make_model("llama"), 0
    whole = loss_of("float32")

    def loss_fn(model: nn.Module, microbatch: Any) -> Any:
        nonlocal calls
        calls += 1
        if dist.get_rank() == 0 and calls == 4:
            raise RuntimeError("broken")
        return whole(model, microbatch)

    engine = bigbatch.Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn,
        microbatch=2,
        collate=collate,
        sync=bigbatch.Replicated(model),
        check=False,
        reproducible=True,
        quantum=2,
    )
    try:
        engine.step([torch.tensor([1, 2, 3])] * 6)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def accumulate_on_ranks() -> list[str]:
    """Run windows in a loop of one's own; the ranks have different numbers of micro-batches, the last one none."""
    torch.set_num_threads(1)
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    accumulator = bigbatch.Accumulator(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.1),
        max_grad_norm=0.5,
        sync=bigbatch.Replicated(model) if size > 1 else None,
        reproducible=True,
    )
    found = []
    for update in range(4):
        parts = list(torch.randn(9, 4, generator=torch.Generator().manual_seed(update)).split(2))
        if size > 1:
            parts = [parts[i] for i in ((4, 1, 3), (0, 2))[rank]] if update else (parts[::-1] if rank == 0 else [])
        window = accumulator.window(parts)
        for part in window:
            window.backward(model(part).square().sum(), items=len(part))
        report = window.step()
        found.append(f"{fingerprint(model)} {report.loss!r} {report.grad_norm!r}")
    return found
