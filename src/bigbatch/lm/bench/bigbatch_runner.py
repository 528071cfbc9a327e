"""How this package takes its update. Nothing else in here knows."""

import time
from typing import Any

from bigbatch.autotune.choice import MicrobatchChoice
from bigbatch.lm.bench.meter import Meter
from bigbatch.lm.bench.shared_model import SharedModel
from bigbatch.lm.bench.workload import Workload, shift
from bigbatch.lm.config.field_types import CheckpointingMode
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.model.causal_attention import use_causal_attention
from bigbatch.lm.model.setup import ModelSetup, set_up_model
from bigbatch.lm.training.autotune import apply_choice, describe, tune
from bigbatch.lm.training.engine_factory import make_engine

WARM_UPDATES = 2  # one that runs operation by operation, one that records


def set_up(model: Any, workload: Workload) -> ModelSetup:
    """Arrange a model as `bigbatch train` would.

    Args:
        model: On its device. It is changed.
        workload: Tells precision and lengths.
    """
    config = TrainConfig(model=workload.name, max_length=workload.longest).resolved()  # adapters are there already
    return set_up_model(model, config, workload.machine(), pad_id=0, longest=workload.longest)


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
        engine = make_engine(run, stage.optimizer, memory=stage.memory)
        if self._chosen is None:
            self._chosen = tune(engine, run.layers, samples, modes=True)
            elapsed_s = time.perf_counter() - started_s
            level, choice = self._chosen
            self.notes += [f"chosen once, in {elapsed_s:.1f} s that are not counted: {choice}{describe(level)}"]
            self.notes += run.notes
        else:
            apply_choice(engine, run.layers, *self._chosen)
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
        if engine.graph_runner is not None and engine.graph_runner.disabled_reason is not None:
            self.notes.append(f"no CUDA graphs: {engine.graph_runner.disabled_reason}")
