"""Trainers on several ranks: functions that ranks run in test_ranks.py."""

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.distributed.tensor import DTensor
from transformers import Trainer

import bigbatch
from bigbatch.integrations.transformers import exact
from integrations.conftest import FRAMEWORK_WARNINGS, ignored
from integrations.transformers import trainer_cases as cases
from support import full_batch_reference as ref

STEPS = 3


@contextmanager
def launched() -> Iterator[Path]:
    """Make this process a rank as torchrun would have started it, without state of earlier trainers; yield a folder."""
    rank, world = dist.get_rank(), dist.get_world_size()
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": 1}
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {name: str(value) for name, value in variables.items()}))
        stack.enter_context(patch.dict(os.environ, {"MASTER_ADDR": "localhost"}))
        for reset in (partial(AcceleratorState._reset_state, reset_partial_state=True), GradientState._reset_state):
            reset()
            stack.callback(reset)
        stack.enter_context(ignored(FRAMEWORK_WARNINGS))
        yield Path(stack.enter_context(tempfile.TemporaryDirectory()))


def windows_of(rows: list[Any], size: int, steps: int = STEPS, world: int = 2) -> list[list[Any]]:
    """Return the samples of each update over all ranks: batches of the loader go to ranks in turn."""
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    per_rank = [batches[rank::world] for rank in range(world)]
    number = max(len(own) for own in per_rank)
    return [
        [row for own in per_rank for batch in own[start : start + steps] for row in batch]
        for start in range(0, number, steps)
    ]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Recorder(cases.Recorder):
    """Records whole gradients and weights by the names of the bare model."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        bare = getattr(model, "module", model)
        self.gradients.append({n: whole(p.grad).clone() for n, p in bare.named_parameters() if p.grad is not None})
        self.weights.append({n: whole(w).detach().clone() for n, w in bare.state_dict().items()})


class GathersMetrics(cases.MeanLoss):
    """Gathers a tensor of the samples of each micro-batch, and a sum."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs)
        self.accelerator.gather(inputs["tokens"][:, 0])
        self.accelerator.gather_for_metrics(loss.detach())
        return loss


def short_and_long(rows: cases.Samples, size: int) -> cases.Samples:
    """Order samples so that the first of two ranks has the shorter ones."""
    ordered = sorted(rows, key=lambda row: len(row["tokens"]))
    halves = ordered[: len(rows) // 2], ordered[len(rows) // 2 :]
    return [row for start in range(0, len(rows) // 2, size) for half in halves for row in half[start : start + size]]


def train(
    rows: list[Any],
    size: int,
    *,
    kind: type[Trainer] = cases.MeanLoss,
    model: Callable[[], nn.Module] = ref.make_model,
    arguments: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[list[float], int, list[int]]:
    """Train, and return errors, micro-batches of this rank in the last window, and those of both."""
    with launched() as folder:
        trainer, _ = cases.make(
            folder,
            kind,
            model(),
            rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=STEPS,
            ddp_backend="gloo",
            **(arguments or {}),
        )
        recorder = Recorder()
        trainer.add_callback(recorder)
        exact(trainer, **settings).train()
        report = trainer.bigbatch_report
        parts = [cases.collate(part) for part in windows_of(rows, size)]
        errors = cases.errors(recorder, ref.make_model(), parts)
        return errors, report.num_microbatches, list(report.ranks.num_microbatches)


def ddp(number: int, size: int, even: bool, budget: int | None, gathers: bool, auto: bool) -> Any:
    """Train under DDP."""
    settings: dict[str, Any] = {} if auto else {"items": cases.num_labels}
    if budget is not None:
        settings |= {
            "microbatch": bigbatch.TokenBudget(budget),
            "lengths": lambda rows: [len(row["tokens"]) for row in rows],
        }
    rows = cases.samples(number)
    return train(
        rows if budget is None else short_and_long(rows, size),
        size,
        kind=GathersMetrics if gathers else cases.MeanLoss,
        arguments={"accelerator_config": {"even_batches": even}},
        **settings,
    )


class RunsOut(GathersMetrics):
    """Memory runs out on the first rank, in its second and third loss that is not a trial."""

    num_losses = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs)
        if model.training and not bigbatch.is_trial():
            self.num_losses += 1
            if dist.get_rank() == 0 and self.num_losses in (2, 3):
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss


def out_of_memory(auto: bool) -> Any:
    """Train under DDP with a rank whose memory runs out, or with micro-batches chosen for an amount of memory."""
    lengths = {"lengths": lambda rows: [len(row["tokens"]) for row in rows]}
    settings = {"memory": "8GiB", **lengths} if auto else {"items": cases.num_labels}
    return train(cases.samples(48), 4, kind=GathersMetrics if auto else RunsOut, **settings)


def uneven_updates() -> str:
    """Train where one rank has an update less."""
    try:
        ddp(28, 4, False, None, False, False)
    except bigbatch.InputError as error:
        return str(error)
    return ""


def dispatched() -> str:
    """Return the refusal of dispatched batches."""
    with launched() as folder:
        trainer, _ = cases.make(folder, ddp_backend="gloo", accelerator_config={"dispatch_batches": True})
        try:
            exact(trainer)
        except bigbatch.InputError as error:
            return str(error)
    return ""


def fsdp(budget: int | None, auto: bool) -> Any:
    """Train a model that FSDP2 shards."""
    settings: dict[str, Any] = {} if auto else {"items": cases.num_labels}
    if budget is not None:
        settings |= {
            "microbatch": bigbatch.TokenBudget(budget),
            "lengths": lambda rows: [len(row["tokens"]) for row in rows],
        }
    config = {"fsdp_version": 2, "auto_wrap_policy": "NO_WRAP", "state_dict_type": "FULL_STATE_DICT"}
    with patch.dict(os.environ):
        return train(
            short_and_long(cases.samples(48), 4), 4, arguments={"fsdp": True, "fsdp_config": config}, **settings
        )


def with_trl(kind: str, budget: int) -> tuple[list[float], list[int], list[dict[str, float]], dict[str, float]]:
    """Train a trainer of TRL.

    Returns:
        Errors, micro-batches of both ranks in the last window, the logs, and the metrics of the first window that a
        stock trainer appends for its samples in one piece.
    """
    from integrations.transformers import trl_cases as trl

    rows = trl.dataset(kind, 48)
    order = sorted(range(48), key=lambda index: sum(len(text) for text in rows[index].values()))
    halves = order[:24], order[24:]
    rows = rows.select([i for start in range(0, 24, 4) for half in halves for i in half[start : start + 4]])
    with launched() as folder:
        trainer, _ = trl.make(folder, kind, rows, ddp_backend="gloo")
        recorder = Recorder()
        trainer.add_callback(recorder)
        exact(trainer, microbatch=bigbatch.TokenBudget(budget), lengths=lambda samples: list(map(_num_tokens, samples)))
        trainer.train()
        micro_batches = list(trainer.bigbatch_report.ranks.num_microbatches)
        parts = [trainer.data_collator(part) for part in windows_of([dict(row) for row in trainer.train_dataset], 4)]
        stock, _ = trl.make(folder, kind, rows, ddp_backend="gloo")
        errors = cases.errors(
            recorder, stock.model, parts, lambda _, batch: stock.compute_loss(stock.model.train(), dict(batch))
        )
        whole = {name: values[0] for name, values in stock._metrics["train"].items()}
    return errors, micro_batches, trainer.state.log_history[:-1], whole


def _num_tokens(row: Any) -> int:
    return sum(len(value) for name, value in row.items() if name.endswith("ids"))


def repeated() -> list[str]:
    """Return the warnings of a dataset that does not fill the last batches."""
    with launched() as folder, warnings.catch_warnings(record=True) as caught:
        trainer, _ = cases.make(folder, dataset=cases.samples(30), ddp_backend="gloo")
        exact(trainer).get_train_dataloader()
    return [str(each.message) for each in caught if "count twice" in str(each.message)]


class OwnLoader(cases.MeanLoss):
    """Collates in its loader: batches of one row on the second rank, with a size that differs in each window."""

    def get_train_dataloader(self):
        rows = cases.samples(14)
        size = 2 - dist.get_rank()
        batches = [rows[start : start + size] for start in range(0, size * STEPS, size)]
        return [cases.collate(batch) for batch in batches]


def uncuttable() -> str:
    """Return the refusal of batches that one rank cannot cut into rows."""
    with launched() as folder:
        trainer, _ = cases.make(folder, OwnLoader, gradient_accumulation_steps=STEPS, ddp_backend="gloo")
        try:
            exact(trainer).train()
        except bigbatch.InputError as error:
            return str(error)
    return ""


class ReducesMetrics(cases.MeanLoss):
    """Adds up a metric over ranks by itself."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs)
        all_reduce(loss.detach().clone())
        return loss


class ReducesCount(Trainer):
    """Divides by the number of labels of all ranks, as DDP then averages."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        count = (inputs["labels"] != ref.IGNORED).sum()
        mean = ref.loss_mean(model, inputs)
        total = count.clone()
        all_reduce(total)
        return mean * count * dist.get_world_size() / total


class ReducesCountByAccelerator(Trainer):
    """The same by accelerate."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        count = (inputs["labels"] != ref.IGNORED).sum()
        total = self.accelerator.reduce(count, "sum")
        return ref.loss_mean(model, inputs) * count / total * self.accelerator.num_processes


def reduces(kind: type[Trainer], number: int, even: bool, budget: int | None, auto: bool) -> Any:
    """Train under DDP with a loss that calls collectives; return the refusal, or errors and micro-batches."""
    settings: dict[str, Any] = {} if auto else {"items": cases.num_labels}
    if budget is not None:
        settings |= {
            "microbatch": bigbatch.TokenBudget(budget),
            "lengths": lambda rows: [len(row["tokens"]) for row in rows],
        }
    arguments = {"accelerator_config": {"even_batches": even}}
    try:
        return train(cases.samples(number), 4, kind=kind, arguments=arguments, **settings)
    except bigbatch.InputError as error:
        return str(error)
