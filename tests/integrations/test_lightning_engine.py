"""`Engine.loss` and accumulators inside Lightning and Fabric, and FSDP2 by ModelParallelStrategy."""

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.strategies import DDPStrategy as FabricDDPStrategy
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

import bigbatch
from integrations import lightning_cases as cases
from integrations.accelerate_cases import microbatches
from support import distributed_windows as windows
from support import full_batch_reference as ref
from support.process_pool import Pools

EXACT = 1e-12


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def big_batches() -> list[ref.Batch]:
    """Return the batch of each window of this rank."""
    parts = microbatches(rank(), world())
    return [windows.pad(parts[start : start + cases.STEPS]) for start in range(0, len(parts), cases.STEPS)]


def make_engine(model: Any, loss_fn: Any = ref.loss_and_items) -> bigbatch.Engine:
    sync = bigbatch.Replicated(model) if world() > 1 else None
    return bigbatch.Engine(model, None, loss_fn, microbatch=2, sync=sync, check=False)


class Automatic(cases.Module):
    def on_fit_start(self) -> None:
        self.engine = make_engine(self.net)

    def training_step(self, batch: ref.Batch, batch_idx: int) -> Any:
        return self.engine.loss(batch)


class Manual(Automatic):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: ref.Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.engine.loss(batch))
        optimizer.step()


def train(kind: type[cases.Module]) -> list[float]:
    module = kind()
    loader = torch.utils.data.DataLoader(cases.OwnMicrobatches(big_batches()), batch_size=None)
    cases.fit(module, loader, exact=False, accumulate_grad_batches=1)
    return cases.window_errors(module, world())


@pytest.mark.parametrize("kind", [Automatic, Manual])
@pytest.mark.parametrize("size", [1, 2])
def test_engine_loss_in_training_step_is_exact(pools: Pools, kind: type[cases.Module], size: int):
    for found in [train(kind)] if size == 1 else pools(2).run(train, kind):
        assert len(found) == 3
        assert max(found) <= EXACT


def make_fabric(**settings: Any) -> Fabric:
    if world() > 1:
        strategy = FabricDDPStrategy(cluster_environment=cases.Rank(), process_group_backend="gloo")
        settings.update(devices=world(), strategy=strategy)
    with cases.quiet():
        fabric = Fabric(accelerator="cpu", **{"devices": 1, **settings})
        fabric.launch()
    return fabric


def fabric_loss(how: str) -> list[float]:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fabric = make_fabric(**({"plugins": MixedPrecision("16-mixed", "cpu", scaler)} if how == "16-mixed" else {}))
    model = ref.make_model()
    recorder = windows.GradientRecorder(model)
    if how == "setup":
        model, optimizer = fabric.setup(model, recorder)
    else:
        model, optimizer = fabric.to_device(model), fabric.setup_optimizers(recorder)

    def loss_fn(model: Any, microbatch: ref.Batch) -> Any:
        with fabric.autocast():
            return ref.loss_and_items(model, microbatch)

    engine = make_engine(model, loss_fn)
    for batch in big_batches():
        optimizer.zero_grad()
        fabric.backward(engine.loss(batch))
        if how != "16-mixed":
            fabric.clip_gradients(model, optimizer, max_norm=1e9)
        optimizer.step()
    return cases.errors(recorder.seen, cases.expected_gradients(cases.SIZES, world()))


def fabric_accumulator(*, wraps_optimizer: bool) -> list[float]:
    fabric = make_fabric()
    model = fabric.to_device(ref.make_model())
    recorder = windows.GradientRecorder(model)
    optimizer = fabric.setup_optimizers(recorder) if wraps_optimizer else recorder
    sync = bigbatch.Replicated(model) if world() > 1 else None
    accumulator = bigbatch.Accumulator(model, optimizer, sync=sync)
    for window in accumulator.windows(microbatches(rank(), world()), num_microbatches=cases.STEPS):
        for part in window:
            window.backward(ref.loss_and_items(model, part))
        window.step()
    return cases.errors(recorder.seen, cases.expected_gradients(cases.SIZES, world()))


@pytest.mark.parametrize("how", ["to_device", "16-mixed", "setup"])
def test_engine_loss_under_fabric_is_exact(how: str):
    assert max(fabric_loss(how)) <= EXACT


@pytest.mark.parametrize("how", ["to_device", "16-mixed"])
def test_engine_loss_under_fabric_is_exact_on_ranks(pools: Pools, how: str):
    for found in pools(2).run(fabric_loss, how):
        assert max(found) <= EXACT


@pytest.mark.parametrize("wraps_optimizer", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_accumulator_under_fabric_is_exact(pools: Pools, size: int, wraps_optimizer: bool):
    run = functools.partial(fabric_accumulator, wraps_optimizer=wraps_optimizer)
    for found in [run()] if size == 1 else pools(2).run(run):
        assert max(found) <= EXACT


class Sharded(cases.Module):
    shards = True

    def configure_model(self) -> None:
        if not self.shards:
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net.hidden, self.net.head, self.net):
            fully_shard(layer, mesh=mesh)


class NotSharded(Sharded):
    shards = False


def sharded(kind: type[Sharded] = Sharded) -> list[float] | str:
    class Processes(ModelParallelStrategy):
        def _configure_launcher(self) -> None:
            self.cluster_environment = cases.Rank()

        def _setup_distributed(self) -> None:
            self.cluster_environment = cases.Rank()
            super()._setup_distributed()

    strategy = Processes(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    module = kind()
    try:
        cases.fit(module, strategy=strategy)
    except bigbatch.InputError as error:
        return str(error)
    return cases.window_errors(module, 2)


def test_sharded_module_is_exact(pools: Pools):
    for found in pools(2).run(sharded):
        assert len(found) == 3
        assert max(found) <= EXACT


def test_module_that_is_not_sharded_is_refused(pools: Pools):
    message = (
        "the 2 ranks of the data-parallel mesh do not average gradients: apply fully_shard to the module, over that "
        "mesh, in configure_model."
    )
    assert pools(2).run(sharded, NotSharded) == [message] * 2
