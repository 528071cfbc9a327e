"""bigbatch as a contestant: model setup, tuning and engine of `bigbatch train`."""

import time
from typing import Any

from bigbatch.autotune.choice import MicrobatchChoice
from bigbatch.batching.plan import TokenBudget
from bigbatch.engine.engine import Engine
from bigbatch.lm.bench.meter import Meter
from bigbatch.lm.bench.shared_model import SharedModel
from bigbatch.lm.bench.workload import Sample, Workload, shift
from bigbatch.lm.config.field_types import CheckpointingMode
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import resolve_device
from bigbatch.lm.model.causal_attention import Kernel, kernel_of, use_causal_attention
from bigbatch.lm.model.setup import ModelSetup, set_up_model
from bigbatch.lm.training.autotune import apply_choice, describe, tune
from bigbatch.lm.training.engine_factory import make_engine

WARM_UPDATES = 2  # one eager update, one that captures CUDA graphs


def set_up(model: Any, workload: Workload, **settings: Any) -> ModelSetup:
    """Set up a model as `bigbatch train` does.

    Args:
        model: On its device. It is changed.
        workload: Provides precision and lengths.
        settings: Of `TrainConfig`, other than the defaults.
    """
    # the workload adds adapters itself
    config = TrainConfig(model=workload.name, max_length=workload.longest, **settings).resolved()
    precision = settings.get("precision", workload.precision)
    device_spec = resolve_device(workload.device, precision)
    return set_up_model(model, config, device_spec, pad_id=0, longest=workload.longest)


class BigbatchRunner:
    """The engine as a contestant: sets up the model and tunes in its first turn, and reuses both in later turns.

    Args:
        tokens: Tokens of a micro-batch, without activation checkpointing; None to choose them.
        settings: Of `TrainConfig`, other than the defaults.
    """

    def __init__(self, *, tokens: int | None = None, **settings: Any) -> None:
        self._tokens = tokens
        self._settings = settings
        self._model_setup: ModelSetup | None = None
        self._kernel: Kernel = "torch"
        self._chosen: tuple[CheckpointingMode, MicrobatchChoice] | None = None
        self.notes: list[str] = []
        self.first_update_s: float | None = None

    def turn(self, stage: SharedModel, meter: Meter) -> None:
        """Warm up with whole updates, then run the measured one."""
        samples = shift(stage.samples)
        started_s = time.perf_counter()
        if self._model_setup is None:
            stage.progress("bigbatch: trying attention, packed rows and compiled layers on the model")
            settings = {"memory": stage.memory, **self._settings}
            self._model_setup = set_up(stage.model, stage.workload, **settings)
            self._kernel = kernel_of(stage.model)
        else:  # the model is reset between turns
            if self._model_setup.layout == "packed":
                use_causal_attention(stage.model, self._kernel)
            if self._model_setup.fp8 is not None:
                self._model_setup.fp8.install(stage.model)
        model_setup = self._model_setup
        engine = self._make_engine(stage, model_setup, samples, started_s)
        stage.reset_peak()  # excludes tuning
        for _ in range(WARM_UPDATES):
            engine.step(samples)
            if self.first_update_s is None:
                stage.synchronize()
                self.first_update_s = time.perf_counter() - started_s
        stage.reset()
        meter.start()
        report = engine.step(samples)
        meter.stop()
        engine.release_cuda_graphs()
        if report.retries:
            self.notes.append(f"ran out of memory {report.retries} times and retried with smaller micro-batches")
        if engine.runner.disabled_reason is not None:
            self.notes.append(f"no CUDA graphs: {engine.runner.disabled_reason}")

    def _make_engine(
        self, stage: SharedModel, model_setup: ModelSetup, samples: list[Sample], started_s: float
    ) -> Engine:
        """Create the engine of a turn with the micro-batch that was set or chosen; choose it in the first turn."""
        layers = model_setup.layers
        if self._tokens is not None:
            if layers is not None:
                layers.set_checkpointing("none")  # and compiled again
            return make_engine(model_setup, stage.optimizer, microbatch=TokenBudget(self._tokens))
        engine = make_engine(model_setup, stage.optimizer, memory=stage.memory)
        if self._chosen is not None:
            apply_choice(engine, layers, *self._chosen)
            return engine
        stage.progress("bigbatch: choosing the micro-batch")
        self._chosen = tune(engine, layers, samples, modes=True)
        elapsed_s = time.perf_counter() - started_s
        mode, choice = self._chosen
        self.notes += [f"tuned once, in {elapsed_s:.1f} s that are not counted: {choice}{describe(mode)}"]
        self.notes += model_setup.notes
        return engine
