"""Lightning modules and trainers that record the gradient of each update, on one rank or several."""

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy

from bigbatch.integrations.lightning import ExactAccumulation
from integrations.accelerate_cases import SIZES, STEPS, OwnMicrobatches, errors, expected_gradients, microbatches
from support import distributed_windows as windows
from support import full_batch_reference as ref

for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
    logging.getLogger(name).setLevel(logging.ERROR)


WARNINGS = (  # of Lightning, in every run
    ("`isinstance(treespec, LeafSpec)` is deprecated", FutureWarning),
    ("The 'train_dataloader' does not have many workers", UserWarning),
    ("The 'val_dataloader' does not have many workers", UserWarning),
    ("The number of training batches", UserWarning),  # is below log_every_n_steps
)


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore the warnings that Lightning raises for small data on a CPU."""
    with warnings.catch_warnings():
        for message, category in WARNINGS:
            warnings.filterwarnings("ignore", message=re.escape(message), category=category)
        yield


class Recorder(windows.GradientRecorder):
    """Runs the closure of a step, in which Lightning runs backward and clips, and then keeps the gradients."""

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        super().step()
        return loss


class Module(pl.LightningModule):
    """Trains the model of the reference; returns sums and items, or the mean."""

    def __init__(self, *, exact: bool = True, lr: float = 0.0) -> None:
        super().__init__()
        self.net = ref.make_model()
        self.exact = exact
        self.lr = lr
        self.outputs: list[Any] = []

    def training_step(self, batch: ref.Batch, batch_idx: int) -> Any:
        loss_sum, items = ref.loss_and_items(self.net, batch)
        if not self.exact:
            return ref.loss_mean(self.net, batch) if items else loss_sum
        return {"loss": loss_sum, "items": items}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.recorder = Recorder(self.net, lr=self.lr)
        return self.recorder

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs)


class Rank(LightningEnvironment):
    """This process is a rank of the process group, which exists."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return dist.get_world_size()

    def global_rank(self) -> int:
        return dist.get_rank()

    def local_rank(self) -> int:
        return dist.get_rank()

    def set_world_size(self, size: int) -> None:
        pass

    def set_global_rank(self, rank: int) -> None:
        pass

    def teardown(self) -> None:
        pass


def make_loader(sizes: Sequence[int] = SIZES) -> torch.utils.data.DataLoader:
    """Return a loader over this rank's own micro-batches."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return torch.utils.data.DataLoader(OwnMicrobatches(microbatches(rank, world, sizes)), batch_size=None)


def make_trainer(**settings: Any) -> pl.Trainer:
    """Return a quiet trainer of one epoch on the CPU; over all ranks if there is a process group."""
    if dist.is_initialized():
        world = dist.get_world_size()
        settings.setdefault("strategy", DDPStrategy(cluster_environment=Rank(), process_group_backend="gloo"))
        settings.update(devices=world, use_distributed_sampler=False)
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "accumulate_grad_batches": STEPS,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**defaults, **settings})


def fit(module: pl.LightningModule, loader: Any = None, *, exact: bool = True, **settings: Any) -> pl.Trainer:
    """Train for an epoch, with the callback if it is to be exact."""
    if exact:
        settings.setdefault("callbacks", [ExactAccumulation()])
    with quiet():
        trainer = make_trainer(**settings)
        trainer.fit(module, make_loader() if loader is None else loader)
    return trainer


def window_errors(module: Module, world: int = 1) -> list[float]:
    """Return the error of each update of an epoch against the whole batch."""
    return errors(module.recorder.seen, expected_gradients(SIZES, world))


def run(exact: bool) -> list[float]:
    """Train on the ranks that exist; return the errors."""
    module = Module(exact=exact)
    fit(module, exact=exact)
    return window_errors(module, dist.get_world_size() if dist.is_initialized() else 1)
