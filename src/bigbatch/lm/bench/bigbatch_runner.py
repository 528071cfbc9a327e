"""How this package takes its update. Nothing else in here knows."""

import time
from typing import Any

from torch.optim import Optimizer

from bigbatch.autotune.choice import MicrobatchChoice
from bigbatch.engine.engine import Engine
from bigbatch.lm.bench.meter import Meter
from bigbatch.lm.bench.shared_model import SharedModel
from bigbatch.lm.bench.workload import Workload, shift
from bigbatch.lm.config.field_types import CheckpointingMode
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.model.causal_attention import use_causal_attention
from bigbatch.lm.model.setup import ModelSetup, set_up_model
from bigbatch.lm.training.autotune import describe, take, tune

WARM_UPDATES = 2  # one that runs operation by operation, one that records


def set_up(model: Any, workload: Workload) -> ModelSetup:
    """Arrange a model as `bigbatch train` would.

    Args:
        model: On its device. It is changed.
        workload: Tells precision and lengths.
    """
    config = TrainConfig(model=workload.name, max_length=workload.longest).resolved()  # adapters are there already
    return set_up_model(model, config, workload.machine(), pad_id=0, longest=workload.longest)


def make_engine(run: ModelSetup, optimizer: Optimizer, memory: str | None) -> Engine:
    """Make the engine as `bigbatch train` would.

    Args:
        run: How the model is run.
        optimizer: Of the model, with its states.
        memory: What the process may use; None for what is free.

    Returns:
        An engine that takes lists of samples, each position of which has its label, and chooses its micro-batch.
    """
    return Engine(
        run.model,
        optimizer,
        run.loss_fn,
        microbatch="auto",
        memory=memory,
        collate=run.collate,
        lengths=lambda samples: [len(sample["input_ids"]) for sample in samples],
        layout=run.layout,
        cuda_graphs=run.uses_cuda_graphs,
    )


class BigbatchRunner:
    """The engine as a contestant: arranges the model and chooses in its first turn, and keeps to that in the others."""

    def __init__(self) -> None:
        self._run: ModelSetup | None = None
        self._chosen: tuple[CheckpointingMode, MicrobatchChoice] | None = None
        self.notes: list[str] = []

    def turn(self, stage: SharedModel, meter: Meter) -> None:
        """Take whole updates to warm up, then the one that counts."""
        samples = shift(stage.samples)
        started_s = time.perf_counter()
        if self._run is None:
            self._run = set_up(stage.model, stage.workload)
        elif self._run.layout == "packed":
            use_causal_attention(stage.model)  # the stage has put the model's own back
        run = self._run
        engine = make_engine(run, stage.optimizer, stage.memory)
        if self._chosen is None:
            self._chosen = tune(engine, run.layers, samples, modes=True)
            elapsed_s = time.perf_counter() - started_s
            level, choice = self._chosen
            self.notes += [f"chosen once, in {elapsed_s:.1f} s that are not counted: {choice}{describe(level)}"]
            self.notes += run.notes
        else:
            take(engine, run.layers, *self._chosen)
        stage.forget_peak()  # of the sizes that were tried
        for _ in range(WARM_UPDATES):
            engine.step(samples)
        stage.reset()
        meter.start()
        report = engine.step(samples)
        meter.stop()
        engine.release_cuda_graphs()
        if report.retries:
            self.notes.append(f"ran out of memory and went on with smaller micro-batches, {report.retries} times")
        if engine.runner.disabled_reason is not None:
            self.notes.append(f"no CUDA graphs: {engine.runner.disabled_reason}")
