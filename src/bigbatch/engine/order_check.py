"""Check that the gradient of a batch is the same bits in random orders of its quanta, on a user's model and loss.

window of the batch, quanta in order → gradient        windows of the same batch, quanta shuffled → the same bits?
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigbatch.batching.split import Split
from bigbatch.distributed.gradient_sync import Microbatch, never
from bigbatch.engine.batch_windows import BatchSplitter, open_window
from bigbatch.engine.engine import Engine
from bigbatch.verification.first_window import FirstWindowCheck


@dataclass(frozen=True)
class OrderCheck:
    """Result of `check_orders`.

    Attributes:
        num_samples: Samples of the batch.
        quantum: Samples that are computed together.
        num_orders: Random orders that were compared with the order of the batch.
        differing: Parameters whose gradient differs in any of them, by name.
    """

    num_samples: int
    quantum: int
    num_orders: int
    differing: tuple[str, ...]

    def __str__(self) -> str:
        of = f"gradient of {self.num_samples} samples in quanta of {self.quantum}"
        if not self.differing:
            return f"{of}: the same bits in {self.num_orders} random orders"
        return (
            f"{of}: NOT reproducible, {len(self.differing)} parameters depend on the order of the quanta, such as "
            f"{self.differing[0]}: a module keeps state between micro-batches, or a kernel is not deterministic"
        )


def check_orders(engine: Engine, batch: Any, *, num_orders: int) -> OrderCheck:
    """Compare the bits of gradients; call it inside `bigbatch.preserve.preserved`. Parameters do not change.

    Args:
        engine: With ``reproducible=True``, of a single process.
        batch: As for `Engine.step`.
        num_orders: At least 1.
    """
    generator = random.Random(0)
    _gradients(engine, batch, None)  # finds the scales
    reference = _gradients(engine, batch, None)
    differing: dict[str, None] = {}
    for _ in range(num_orders):
        for name, gradient in _gradients(engine, batch, generator).items():
            if not torch.equal(gradient, reference[name]):
                differing[name] = None
    assert engine.quantum is not None, "reproducible"
    return OrderCheck(_splitter(engine).samples(batch).num_samples, engine.quantum, num_orders, tuple(differing))


def _gradients(engine: Engine, batch: Any, generator: random.Random | None) -> dict[str, Tensor]:
    accumulator = engine.accumulator
    state = accumulator.reproducible
    assert state is not None, "reproducible"
    state.load_state_dict({**state.state_dict(), "num_windows": 0})  # the same random numbers in each window
    with open_window(
        batch,
        accumulator,
        engine.runner,
        _splitter(engine),
        engine.microbatch_size,
        loss_fn=engine.loss_fn,
        count_items=engine.count_items,
        first_window=FirstWindowCheck(engine.model, enabled=False, evaluates=False, names_norms=False),
        fused=engine.fused,
        should_stop=never,
    ) as (pending, parts):
        for rows in _in_order(parts, generator):
            engine.runner.run(Microbatch(rows), pending)
        engine.runner.end(pending)
        pending.finish()
    names: dict[Tensor, str] = {parameter: name for name, parameter in engine.sync.module.named_parameters()}
    return {
        names.get(p, f"parameter {index + 1}"): p.grad
        for index, p in enumerate(accumulator.update.parameters())
        if p.grad is not None
    }


def _in_order(parts: Split, generator: random.Random | None) -> Sequence[Sequence[int]]:
    return parts.groups if generator is None else generator.sample(list(parts.groups), len(parts.groups))


def _splitter(engine: Engine) -> BatchSplitter:
    return BatchSplitter(
        engine.accumulator, engine.quantum, collate=engine.collate, batch_dim=engine.batch_dim, lengths=engine.lengths
    )
