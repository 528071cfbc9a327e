"""When captured graphs are dropped, on the CPU: captures run their function, and replays do nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigbatch
from bigbatch.execution import cuda_graphs
from bigbatch.execution.cuda_graphs import CudaGraphRunner
from bigbatch.execution.oom_retry import OomRetry

NUM_MEASURED = 9
"""Windows that measure the noise scale at first; then one in 8 does, the others have fused layers."""


class ReplaysNothing:
    """A graph that never changes anything: only when it is captured and dropped is of interest."""

    def replay(self) -> None:
        pass


class Recorder:
    """An engine with a fake of CUDA graphs, and the number of graphs at each forward that is not captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_capturing = False
        self.num_graphs: list[int] = []
        self.fails = False
        monkeypatch.setattr(cuda_graphs, "capture", self.capture)
        monkeypatch.setattr(cuda_graphs, "_only_term", lambda result: tuple(map(torch.as_tensor, result)))
        for module, name in ((torch.cuda, "graph_pool_handle"), (torch.cuda, "Stream"), (torch.cuda, "synchronize")):
            monkeypatch.setattr(module, name, lambda *_: object())
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        self.engine = bigbatch.Engine(model, optimizer, self.loss_fn, microbatch=4, check=False, fuse_gradients=True)
        accumulator, fallback = self.engine.accumulator, self.engine.runner
        assert accumulator.noise is not None
        assert isinstance(fallback, OomRetry)
        accumulator.noise.measure_whole_windows()
        self.runner = self.engine.runner = CudaGraphRunner(accumulator.model, fallback=fallback)

    def capture(self, run: Callable[[], None], *_: Any, **__: Any) -> ReplaysNothing:
        self.is_capturing = True
        try:
            run()
        finally:
            self.is_capturing = False
        return ReplaysNothing()

    def loss_fn(self, model: nn.Module, inputs: Tensor) -> tuple[Tensor, int]:
        if not self.is_capturing:
            self.num_graphs.append(self.runner.num_graphs)
            if self.fails:
                self.fails = False
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return model(inputs).square().sum(), inputs.numel()

    def step(self, times: int = 1) -> list[int]:
        """Run windows of two micro-batches, and return the graphs at each forward that was not captured."""
        self.num_graphs = []
        for _ in range(times):
            self.engine.step(torch.ones(8, 4))
        return self.num_graphs


def test_graphs_are_dropped_before_another_backward_runs_uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory, which only graphs can use, may be what its first micro-batch needs."""
    recorder = Recorder(monkeypatch)
    assert recorder.step(NUM_MEASURED) == [0, 0], "the first window"
    assert recorder.runner.num_graphs == 1
    assert recorder.step() == [0], "the first micro-batch with fused layers"
    assert recorder.step(8) == []
    assert recorder.runner.num_graphs == 2, "both are kept from then on"
    assert recorder.step(16) == []


def test_graphs_are_dropped_when_memory_runs_out_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    recorder.step(3)
    assert recorder.runner.num_graphs == 1
    recorder.fails = True
    with monkeypatch.context() as patch:
        patch.setattr(recorder.runner, "_replay", lambda *_: False)
        assert recorder.step() == [1, 0, 0], "the failed attempt, the second one, and the other micro-batch"
    assert recorder.runner.retries == 1
