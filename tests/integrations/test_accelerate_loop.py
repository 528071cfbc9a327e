"""What stays accelerate's around exact windows: clipping, scaler, scheduler, checkpoints; and other ways of use."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import bigbatch
from bigbatch.integrations.accelerate import ExactAccelerator
from integrations import accelerate_cases as cases
from support import distributed_windows as windows
from support import full_batch_reference as ref
from support.process_pool import Pools

EXACT = 1e-12


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    with cases.fresh_state():
        yield


def make(
    steps: int = cases.STEPS, **settings: Any
) -> tuple[ExactAccelerator, nn.Module, Any, windows.GradientRecorder]:
    accelerator = ExactAccelerator(cpu=True, gradient_accumulation_steps=steps, **settings)
    model = ref.make_model()
    recorder = windows.GradientRecorder(model, lr=0.1)
    return accelerator, *accelerator.prepare(model, recorder), recorder


def full(parts: list[ref.Batch]) -> dict[str, Tensor]:
    return ref.full_gradient(ref.make_model(), windows.pad(parts))


@pytest.mark.parametrize(
    "convert",
    [int, float, np.int64, np.float32, torch.tensor, lambda n: torch.tensor([n]), lambda n: torch.tensor(n).float()],
)
def test_items_of_any_number_type_count(convert: Any):
    accelerator, model, optimizer, recorder = make()
    parts = cases.microbatches()[:3]
    for part in parts:
        with accelerator.accumulate(model):
            loss_sum, items = ref.loss_and_items(model, part)
            accelerator.backward(loss_sum, items=convert(items))
            optimizer.step()
    assert ref.relative_error(recorder.seen[0], full(parts)) <= EXACT
    assert accelerator.bigbatch_report is not None
    assert accelerator.bigbatch_report.items == sum(map(ref.count, parts))
    assert accelerator.bigbatch_report.num_microbatches == 3


def test_report_has_mean_loss_of_window():
    accelerator, model, _, _ = make()
    assert accelerator.bigbatch_report is None
    parts = cases.microbatches()[:3]
    for part in parts:
        with accelerator.accumulate(model):
            loss_sum, items = ref.loss_and_items(model, part)
            accelerator.backward(loss_sum, items=items)
    assert accelerator.bigbatch_report is not None
    expected = ref.loss_mean(model, windows.pad(parts)).item()
    assert accelerator.bigbatch_report.loss == pytest.approx(expected, rel=EXACT)


def test_clip_and_scheduler_see_divided_gradient():
    accelerator, model, optimizer, recorder = make()
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.StepLR(recorder, 1, gamma=0.5))
    loader = cases.make_loader()
    norms = []
    for part in loader:
        with accelerator.accumulate(model):
            loss_sum, items = ref.loss_and_items(model, part)
            accelerator.backward(loss_sum, items=items)
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.1).item())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    parts = cases.microbatches()
    trained = ref.train_reference(
        ref.make_model(),
        lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
        [windows.pad(parts[start : start + 3]) for start in (0, 3, 6)],
        max_grad_norm=0.1,
        make_scheduler=lambda sgd: torch.optim.lr_scheduler.StepLR(sgd, 1, gamma=0.5),
    )
    assert norms == pytest.approx(trained.grad_norms, rel=EXACT)
    assert ref.relative_error(ref.parameters_of(model), trained.parameters) <= EXACT


def test_grad_scaler_gets_range_of_a_mean():
    accelerator, model, optimizer, recorder = make()
    accelerator.scaler = optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    largest = []
    model.head.register_full_backward_hook(
        lambda module, grad_input, grad_output: largest.append(grad_output[0].abs().max())
    )
    parts = cases.microbatches()[:6]
    optimizer = accelerator.prepare_optimizer(recorder)
    for part in parts:
        with accelerator.accumulate(model):
            loss_sum, items = ref.loss_and_items(model, part)
            accelerator.backward(loss_sum, items=items)
            optimizer.step()
            optimizer.zero_grad()
    assert max(largest[:3]) > 500  # sums, scaled
    assert max(largest[3:]) < 100
    reference = ref.train_reference(
        ref.make_model(),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
        [windows.pad(parts[:3]), windows.pad(parts[3:])],
    )
    assert ref.relative_error(ref.parameters_of(model), reference.parameters) <= EXACT


def test_overflow_skips_update():
    accelerator, model, optimizer, recorder = make()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = accelerator.prepare_optimizer(recorder)
    before = ref.parameters_of(model)
    for index, part in enumerate(cases.microbatches()[:3]):
        with accelerator.accumulate(model):
            loss_sum, items = ref.loss_and_items(model, part)
            accelerator.backward(loss_sum * (float("inf") if index == 1 else 1.0), items=items)
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.step_was_skipped
    assert not recorder.seen
    assert all(torch.equal(before[name], value) for name, value in ref.parameters_of(model).items())


def test_window_without_items_has_zero_gradient():
    accelerator, model, optimizer, recorder = make()
    part = ref.ragged_batch(3)
    part["labels"][:] = ref.IGNORED
    for _ in range(3):
        with accelerator.accumulate(model):
            accelerator.backward(ref.loss_and_items(model, part)[0], items=0)
            optimizer.step()
    assert all(not gradient.any() for gradient in recorder.seen[0].values())
    assert accelerator.bigbatch_report is not None
    assert np.isnan(accelerator.bigbatch_report.loss)


def test_window_may_span_epochs():
    accelerator, model, optimizer, recorder = make(steps=5)
    accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    for _ in range(5):
        for part in cases.make_loader(sizes=(3, 1)):
            with accelerator.accumulate(model):
                loss_sum, items = ref.loss_and_items(model, part)
                accelerator.backward(loss_sum, items=items)
                if not recorder.seen:
                    optimizer.step()
                optimizer.zero_grad()
    first, second = cases.microbatches(sizes=(3, 1))
    assert ref.relative_error(recorder.seen[0], full([first, second, first, second, first])) <= EXACT


def test_two_models_share_a_window():
    accelerator, model, _, _ = make()
    head = nn.Linear(ref.VOCABULARY, 1).double()
    together = nn.ModuleList([model, head])
    optimizer = torch.optim.SGD(together.parameters(), lr=0.0)
    accelerator.free_memory()
    model, head, prepared = accelerator.prepare(model, head, optimizer)

    def loss(part: ref.Batch) -> Tensor:
        return head(model(part["tokens"])).square().sum()

    parts = cases.microbatches()[:3]
    for part in parts:
        with accelerator.accumulate(model, head):
            accelerator.backward(loss(part), items=len(part["tokens"]))
    found = {name: p.grad.clone() for name, p in together.named_parameters()}
    expected = ref.gradients_of(together, loss(windows.pad(parts)) / sum(len(part["tokens"]) for part in parts))
    assert ref.relative_error(found, expected) <= EXACT
    prepared.step()


def test_without_items_is_stock():
    def gradients(kind: type[Accelerator]) -> list[dict[str, Tensor]]:
        with cases.fresh_state():
            accelerator = kind(cpu=True, gradient_accumulation_steps=3)
            model = ref.make_model()
            recorder = windows.GradientRecorder(model, lr=0.1)
            model, optimizer = accelerator.prepare(model, recorder)
            for part in cases.make_loader():
                with accelerator.accumulate(model):
                    accelerator.backward(ref.loss_mean(model, part))
                    optimizer.step()
                    optimizer.zero_grad()
            return recorder.seen

    for stock, ours in zip(gradients(Accelerator), gradients(ExactAccelerator), strict=True):
        assert all(torch.equal(stock[name], ours[name]) for name in stock)


def test_saved_state_continues_the_same(tmp_path: Path):
    def train(epochs: int, folder: Path | None, load: Path | None) -> dict[str, Tensor]:
        with cases.fresh_state():
            accelerator = ExactAccelerator(cpu=True, gradient_accumulation_steps=3)
            model = ref.make_model()
            model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
            if load is not None:
                accelerator.load_state(str(load))
            for _ in range(epochs):
                for part in cases.make_loader():
                    with accelerator.accumulate(model):
                        loss_sum, items = ref.loss_and_items(model, part)
                        accelerator.backward(loss_sum, items=items)
                        optimizer.step()
                        optimizer.zero_grad()
            if folder is not None:
                accelerator.save_state(str(folder))
            return ref.parameters_of(model)

    once = train(2, None, None)
    train(1, tmp_path / "state", None)
    twice = train(1, None, tmp_path / "state")
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("use", ["accumulator", "engine loss", "engine loss stock"])
def test_core_works_on_prepared_model(pools: Pools, world: int, use: str):
    for found in [_core(use)] if world == 1 else pools(2).run(_core, use):
        assert max(found) <= EXACT


def _core(use: str) -> list[float]:
    with cases.fresh_state():
        kind = Accelerator if use == "engine loss stock" else ExactAccelerator
        accelerator = kind(cpu=True)
        rank, world = accelerator.process_index, accelerator.num_processes
        model = accelerator.prepare(ref.make_model())
        recorder = windows.GradientRecorder(model)
        optimizer = accelerator.prepare(recorder)
        parts = cases.microbatches(rank, world)
        if use == "accumulator":
            accumulator = bigbatch.Accumulator(model, optimizer)
            for window in accumulator.windows(parts, num_microbatches=cases.STEPS):
                for part in window:
                    window.backward(ref.loss_and_items(model, part))
                window.step()
        else:
            engine = bigbatch.Engine(model, None, ref.loss_and_items, microbatch=2, check=False)
            for start in range(0, len(parts), cases.STEPS):
                accelerator.backward(engine.loss(windows.pad(parts[start : start + cases.STEPS])))
                optimizer.step()
                optimizer.zero_grad()
        return cases.errors(recorder.seen, cases.expected_gradients(cases.SIZES, world))
