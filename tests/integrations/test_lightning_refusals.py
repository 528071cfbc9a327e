"""Settings of Lightning that ExactAccumulation cannot make exact raise, and the message names the call to make."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import strategies

import bigbatch
from bigbatch.integrations.lightning import ExactAccumulation
from integrations import lightning_cases as cases
from support import full_batch_reference as ref
from support.command_line import completed
from support.forked_processes import script
from support.tiers import slow

RETURN = (
    'return {"loss": loss_sum, "items": n}, the undivided sum of the item losses and their number. A loss of '
    "engine.loss(batch) needs no ExactAccumulation()."
)
AHEAD = (
    "Count the items of the window ahead, over all ranks, and return loss_sum * accumulate_grad_batches * world_size / "
    "count from training_step."
)


class Returning(cases.Module):
    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def training_step(self, batch: ref.Batch, batch_idx: int) -> Any:
        return self.change(super().training_step(batch, batch_idx))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda output: output["loss"], "a Tensor"),
        (lambda output: {"loss": output["loss"]}, "a dictionary without 'items'"),
        (lambda output: (output["loss"], output["items"]), "a tuple"),
    ],
)
def test_step_without_items_is_refused(change: Any, what: str):
    with pytest.raises(bigbatch.InputError) as raised:
        cases.fit(Returning(change))
    assert str(raised.value) == f"training_step of Returning returned {what}: {RETURN}"


@pytest.mark.parametrize(
    ("items", "error", "words"),
    [
        (-3, ValueError, "are -3: they must be a finite count, 0 or more."),
        (float("nan"), ValueError, "are nan: they must be a finite count, 0 or more."),
        ("3", TypeError, "are a str: they must be a number or a 0-d tensor."),
    ],
)
def test_invalid_counts_are_refused(items: Any, error: type[Exception], words: str):
    with pytest.raises(error) as raised:
        cases.fit(Returning(lambda output: {**output, "items": items}))
    assert words in str(raised.value)


def test_manual_optimization_is_refused():
    module = cases.Module()
    module.automatic_optimization = False
    with pytest.raises(bigbatch.InputError) as raised:
        cases.fit(module, accumulate_grad_batches=1)
    assert str(raised.value) == (
        "Module has automatic_optimization=False, where Lightning accumulates nothing: remove ExactAccumulation(), and "
        "call self.manual_backward(engine.loss(batch)) with a bigbatch.Engine."
    )


class Unknown(pl.strategies.Strategy):
    pass


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (strategies.DeepSpeedStrategy, "DeepSpeed keeps gradients outside of .grad"),
        (
            strategies.FSDPStrategy,
            "FSDP version 1 keeps gradients outside of .grad (FSDP2 by ModelParallelStrategy is supported)",
        ),
        (strategies.XLAStrategy, "XLA reduces gradients after backward"),
        (Unknown, "it is not known to leave averaged gradients in .grad"),
    ],
)
def test_other_strategies_are_refused(kind: type, reason: str):
    with cases.quiet():
        trainer = cases.make_trainer()
    trainer.strategy.__class__ = type(kind.__name__, (kind,), {"__abstractmethods__": frozenset()})
    with pytest.raises(bigbatch.InputError) as raised:
        ExactAccumulation().setup(trainer, cases.Module(), "fit")
    assert str(raised.value) == f"ExactAccumulation() does not support {kind.__name__}, since {reason}. {AHEAD}"


def test_model_averaging_is_refused():
    with cases.quiet():
        trainer = cases.make_trainer(strategy=strategies.DDPStrategy(model_averaging_period=2))
    with pytest.raises(bigbatch.InputError, match="since with model averaging, ranks do not average gradients"):
        ExactAccumulation().setup(trainer, cases.Module(), "fit")


def test_two_callbacks_are_refused():
    with pytest.raises(bigbatch.InputError, match="more than one ExactAccumulation"):
        cases.fit(cases.Module(), callbacks=[ExactAccumulation(), ExactAccumulation()])


class TwiceRunning(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        closure()
        loss = closure()
        super().step()
        return loss


def test_closure_that_runs_twice_is_refused():
    class Twice(cases.Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return TwiceRunning(self.net.parameters(), lr=0.1)

    with pytest.raises(bigbatch.InputError) as raised:
        cases.fit(Twice())
    assert str(raised.value) == (
        "a micro-batch was added to a gradient that is divided already, in a window of accumulate_grad_batches=3: the "
        "optimizer runs its closure several times, or gradients are not zeroed. Set accumulate_grad_batches=1, or use "
        "a bigbatch.Engine with the optimizer, which runs the whole window again."
    )
    cases.fit(Twice(), accumulate_grad_batches=1)


SCRIPT = """
import logging, sys, warnings
warnings.simplefilter("ignore")
{before}
import pytorch_lightning as pl
import torch
from torch import nn
from bigbatch.integrations.lightning import Callback, ExactAccumulation

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1).double()

    def training_step(self, batch, batch_idx):
        return {{"loss": self.layer(batch).sum(), "items": len(batch)}}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

data = [torch.randn(n, 3, dtype=torch.float64) for n in (5, 2, 3)]
module = Module()
before = module.layer.weight.detach().clone()
trainer = pl.Trainer(
    accelerator="cpu", accumulate_grad_batches=3, max_epochs=1, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[ExactAccumulation()],
)
trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
error = (before - module.layer.weight - torch.cat(data).mean(0)).abs().max().item()
print(Callback.__module__.partition(".")[0], error)
"""


@pytest.mark.parametrize(
    ("before", "package"), [("", "lightning"), slow('sys.modules["lightning"] = None', "pytorch_lightning")]
)
def test_trainer_of_pytorch_lightning_is_exact(before: str, package: str, tmp_path: Path):
    run = completed(script, SCRIPT.format(before=before), folder=tmp_path)
    assert run.returncode == 0, run.stderr
    found, error = run.stdout.split()[-2:]
    assert found == package
    assert float(error) <= 1e-12
