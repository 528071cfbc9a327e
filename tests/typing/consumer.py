"""Code of a user, for type checkers only: it is checked against the installed wheel, and never run.

Each ``type: ignore`` marks a mistake that a checker must find. Without py.typed, or where a name of the package is
``Any``, the comment is unused, which is an error in both checkers.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, assert_type

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch
from bigbatch import lm

Batch = tuple[Tensor, Tensor]


def loss_fn(model: nn.Module, microbatch: Batch) -> tuple[Tensor, int]:
    inputs, targets = microbatch
    return F.mse_loss(model(inputs), targets, reduction="sum"), targets.numel()


def two_terms(model: nn.Module, microbatch: Batch) -> dict[str, tuple[Tensor, Tensor | int]]:
    loss_sum, items = loss_fn(model, microbatch)
    return {"error": (loss_sum, items), "size": (model(microbatch[0]).square().sum(), torch.tensor(items))}


def encode(model: nn.Module, microbatch: Batch) -> tuple[Tensor, Tensor]:
    return model(microbatch[0]), model(microbatch[1])


def contrastive(model: nn.Module, features: tuple[Tensor, Tensor]) -> Tensor:
    queries, passages = features
    return F.cross_entropy(queries @ passages.T, torch.arange(len(queries)))


def with_engine(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Batch]) -> list[float]:
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch="auto", memory="4GiB", scheduler=scheduler)
    losses: list[float] = []
    for batch in batches:
        report = engine.step(batch)
        assert_type(report, bigbatch.WindowReport)
        losses.append(assert_type(report.loss, float))
    assert_type(engine.state_dict(), dict[str, Any])
    bigbatch.Engine(model, [optimizer], two_terms, microbatch=bigbatch.TokenBudget(4096), lengths=lambda batch: [1])
    bigbatch.Engine(model, optimizer, bigbatch.Coupled(encode, contrastive, gather="all"), microbatch=8)
    bigbatch.Engine(model, optimizer, loss_fn, microbatch="largest")  # type: ignore[arg-type]
    bigbatch.Engine(model, optimizer, loss_fn, micro_batch=4)  # type: ignore[call-arg]
    engine.step()  # type: ignore[call-arg]
    return losses


def with_accumulator(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Iterable[Batch]) -> Iterator[float]:
    accumulator = bigbatch.Accumulator(model, optimizer, max_grad_norm=1.0)
    for window in accumulator.windows(loader, num_microbatches=4):
        assert_type(window, bigbatch.Window)
        for inputs, targets in window:
            loss_sum, items = loss_fn(model, (inputs, targets))
            window.backward(loss_sum, items=items)
        assert_type(window.state, bigbatch.WindowState)
        report = window.step()
        yield report.grad_norm
    accumulator.windows(loader, num_microbatches="4")  # type: ignore[arg-type]
    accumulator.windows(loader)  # type: ignore[call-arg]


def with_verify(model: nn.Module, batch: Batch) -> bool:
    verification = bigbatch.verify(model, loss_fn, batch, microbatch=[1, 2], orders=2)
    assert_type(verification, bigbatch.Verification)
    coupled = bigbatch.verify(model, bigbatch.Coupled(encode, contrastive), batch)
    bigbatch.verify(model, loss_fn, batch, microbatch=0.5)  # type: ignore[arg-type]
    bigbatch.Coupled(encode, contrastive, gather="some")  # type: ignore[arg-type]
    return assert_type(verification.exact, bool) and coupled.exact


class Log(lm.Callback):
    def on_validation(self, step: int, loss: float) -> None:
        if loss < 1:
            raise lm.StopTraining(f"{loss} after {step} updates")


def with_trainer(records: list[dict[str, str]], folder: Path) -> Path:
    config = lm.TrainConfig(model="tiny", global_batch=64, out=folder)
    result = lm.train(config, records, callbacks=[Log()])
    assert_type(result, lm.RunResult)
    lm.train(config, records, callback=Log())  # type: ignore[call-arg]
    lm.train(3)  # type: ignore[arg-type]
    return assert_type(result.model_path, Path)


def with_frameworks(trainer: Any, accelerator_settings: dict[str, Any]) -> list[Any]:
    from bigbatch.integrations.accelerate import ExactAccelerator
    from bigbatch.integrations.lightning import ExactAccumulation
    from bigbatch.integrations.sentence_transformers import exact as exact_sentences
    from bigbatch.integrations.transformers import exact, weights

    exact(trainer, microbatch=0.5)  # type: ignore[arg-type]
    exact_sentences(trainer, micro_batch=4)  # type: ignore[call-arg]
    assert callable(weights)
    return [exact(trainer), exact_sentences(trainer), ExactAccelerator(**accelerator_settings), ExactAccumulation()]


def with_errors(engine: bigbatch.Engine, batch: Batch) -> str | None:
    try:
        return engine.step(batch).skipped
    except bigbatch.MemoryLimitError as error:
        return str(error)
    except bigbatch.NoSuchError:  # type: ignore[attr-defined]
        return None
