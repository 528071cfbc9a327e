"""What stays Lightning's around exact windows: clipping, precision, schedules, validation, checkpoints."""

import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import Tensor

import bigbatch
from bigbatch.integrations.lightning import ExactAccumulation
from integrations import lightning_cases as cases
from integrations.accelerate_cases import microbatches
from support import distributed_windows as windows
from support import full_batch_reference as ref

EXACT = 1e-12


def windows_of(sizes: list[int]) -> list[ref.Batch]:
    """Return the batch of each window of an epoch, with these numbers of micro-batches."""
    parts = iter(microbatches())
    return [windows.pad([next(parts) for _ in range(size)]) for size in sizes]


def trained(batches: list[ref.Batch], **settings: Any) -> ref.Trained:
    return ref.train_reference(
        ref.make_model(), lambda module: torch.optim.SGD(module.parameters(), lr=0.1), batches, **settings
    )


def test_gradient_clipping_sees_divided_gradient():
    module = cases.Module(lr=0.1)
    cases.fit(module, gradient_clip_val=0.1)
    expected = trained(windows_of([3, 3, 2]), max_grad_norm=0.1)
    assert min(expected.grad_norms) > 0.1
    assert ref.relative_error(ref.parameters_of(module.net), expected.parameters) <= EXACT


def test_grad_scaler_gets_range_of_a_mean():
    module = cases.Module(lr=0.1)
    largest: list[Tensor] = []
    module.net.head.register_full_backward_hook(lambda layer, into, out: largest.append(out[0].abs().max()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    cases.fit(module, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], gradient_clip_val=0.1)
    expected = trained(windows_of([3, 3, 2]), max_grad_norm=0.1)
    assert ref.relative_error(ref.parameters_of(module.net), expected.parameters) <= EXACT
    assert max(largest[:3]) > 500  # sums, scaled
    assert max(largest[3:]) < 100


def test_overflow_skips_update():
    class Overflowing(cases.Module):
        def training_step(self, batch: ref.Batch, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            return {**output, "loss": output["loss"] * (float("inf") if batch_idx == 4 else 1.0)}

    module = Overflowing(lr=0.1)
    cases.fit(module, plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))])
    first, _, third = windows_of([3, 3, 2])
    assert len(module.recorder.seen) == 2
    assert ref.relative_error(ref.parameters_of(module.net), trained([first, third]).parameters) <= EXACT


def test_bfloat16_autocast_is_near():
    module = cases.Module()
    module.net.float()
    cases.fit(module, precision="bf16-mixed")
    assert max(cases.window_errors(module)) <= 0.02


def test_accumulation_may_change_by_epoch():
    module = cases.Module(lr=0.1)
    callbacks = [GradientAccumulationScheduler({0: 2, 1: 5}), ExactAccumulation()]
    cases.fit(module, callbacks=callbacks, accumulate_grad_batches=1, max_epochs=2)
    expected = trained([*windows_of([2, 2, 2, 2]), *windows_of([5, 3])])
    assert ref.relative_error(ref.parameters_of(module.net), expected.parameters) <= EXACT


@pytest.mark.parametrize("skipped", [[0], [1], [2], [3, 4], [7], [0, 1, 2]])
def test_skipped_microbatches_do_not_count(skipped: list[int]):
    class Skipping(cases.Module):
        def training_step(self, batch: ref.Batch, batch_idx: int) -> Any:
            return None if batch_idx in skipped else super().training_step(batch, batch_idx)

    module = Skipping()
    with cases.quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`training_step` returned `None`")  # once per process
        cases.fit(module)
    parts = [None if index in skipped else part for index, part in enumerate(microbatches())]
    for found, start in zip(module.recorder.seen, (0, 3, 6), strict=True):
        kept = [part for part in parts[start : start + 3] if part is not None]
        if kept:
            assert ref.relative_error(found, ref.full_gradient(module.net, windows.pad(kept))) <= EXACT
        else:
            assert all(not gradient.any() for gradient in found.values())


def test_validation_inside_a_window_changes_nothing():
    class Validating(cases.Module):
        validated = 0

        def validation_step(self, batch: ref.Batch, batch_idx: int) -> None:
            self.validated += 1
            loss_sum = self.training_step(batch, batch_idx)["loss"]
            assert loss_sum == ref.loss_and_items(self.net, batch)[0]

    module = Validating()
    with cases.quiet():
        trainer = cases.make_trainer(callbacks=[ExactAccumulation()], val_check_interval=2, limit_val_batches=2)
        trainer.fit(module, cases.make_loader(), cases.make_loader())
    assert module.validated == 10
    assert max(cases.window_errors(module)) <= EXACT


def test_epoch_that_ends_early_drops_its_window():
    class Stopping(cases.Module):
        def on_train_batch_start(self, batch: ref.Batch, batch_idx: int) -> int | None:
            return -1 if batch_idx == 4 and self.current_epoch == 0 else None

    module = Stopping()
    cases.fit(module, max_epochs=2)
    first, *all_three = windows_of([3]) + windows_of([3, 3, 2])
    expected = [ref.full_gradient(module.net, batch) for batch in (first, *all_three)]
    assert max(cases.errors(module.recorder.seen, expected)) <= EXACT


class ResumableLoader:
    """Micro-batches, from the one after the last that was drawn before a checkpoint."""

    def __init__(self) -> None:
        self.position = 0

    def __len__(self) -> int:
        return len(cases.SIZES)

    def __iter__(self) -> Iterator[ref.Batch]:
        self.position %= len(self)
        for part in microbatches()[self.position :]:
            self.position += 1
            yield part

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class SaveOnce(pl.Callback):
    """Saves a checkpoint after a micro-batch of the first epoch."""

    def __init__(self, path: Path, batch_idx: int) -> None:
        self.path, self.batch_idx = path, batch_idx

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch_idx and not trainer.current_epoch and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("saved_after", [2, 3])
def test_checkpoint_inside_an_epoch_continues(tmp_path: Path, saved_after: int):
    def train(**settings: Any) -> cases.Module:
        module = cases.Module(lr=0.1)
        with cases.quiet():
            saving = SaveOnce(tmp_path / "state.ckpt", saved_after)
            trainer = cases.make_trainer(callbacks=[ExactAccumulation(), saving], max_epochs=2)
            trainer.fit(module, ResumableLoader(), **settings)
        return module

    once = train()
    again = train(ckpt_path=tmp_path / "state.ckpt", weights_only=False)
    assert len(again.recorder.seen) == 5
    if saved_after == 2:  # between two windows
        for name, parameter in ref.parameters_of(once.net).items():
            assert torch.equal(parameter, ref.parameters_of(again.net)[name])
    else:  # Lightning does not save gradients: the window has the micro-batches that ran again
        module = cases.Module()
        module.net.load_state_dict(saved_parameters(tmp_path / "state.ckpt"))
        expected = ref.full_gradient(module.net, windows.pad(microbatches()[4:6]))
        assert ref.relative_error(again.recorder.seen[0], expected) <= EXACT


def saved_parameters(path: Path) -> dict[str, Tensor]:
    """Return the parameters of a checkpoint."""
    state = torch.load(path, weights_only=False)["state_dict"]
    return {name.removeprefix("net."): value for name, value in state.items()}


def test_report_and_log_have_mean_loss_of_window():
    callback = ExactAccumulation(log="loss")
    module = cases.Module()
    logged = []

    class Reading(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if callback.report is not None and (not logged or logged[-1][0] is not callback.report):
                logged.append((callback.report, float(trainer.callback_metrics["loss"])))

    cases.fit(module, callbacks=[callback, Reading()])
    for (report, metric), batch in zip(logged, windows_of([3, 3, 2]), strict=True):
        assert report.items == ref.count(batch)
        assert report.loss == pytest.approx(ref.loss_mean(module.net, batch).item(), rel=EXACT)
        assert metric == pytest.approx(report.loss, rel=1e-6)  # Lightning logs float32


def test_outputs_have_loss_sum_and_items():
    module = cases.Module()
    cases.fit(module)
    for output, part in zip(module.outputs, microbatches(), strict=True):
        loss_sum, items = ref.loss_and_items(module.net, part)
        assert output["items"] == items
        assert output["loss"].item() == pytest.approx(loss_sum.item(), rel=EXACT)


def test_training_step_is_restored():
    module = cases.Module()
    cases.fit(module)
    assert "training_step" not in vars(module)
    with pytest.raises(KeyError):
        cases.fit(module, torch.utils.data.DataLoader(cases.OwnMicrobatches([{}, {}]), batch_size=None))
    assert "training_step" not in vars(module)
    cases.fit(module)
    assert max(cases.window_errors(module)) <= EXACT


def test_decorated_step_with_dataloader_iter():
    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def decorated(*args: Any) -> Any:
            return function(*args)

        return decorated

    class Iterating(cases.Module):
        @decorate
        def training_step(self, dataloader_iter: Iterator[Any]) -> Any:
            batch, batch_idx, _ = next(dataloader_iter)
            return cases.Module.training_step(self, batch, batch_idx)

    module = Iterating()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*`dataloader_iter`")
        cases.fit(module, accumulate_grad_batches=1)
        # Lightning zeroes the gradient of such a step at other micro-batches than it begins a window with
        with pytest.raises(bigbatch.InputError, match="or gradients are not zeroed"):
            cases.fit(Iterating())
    expected = [ref.full_gradient(module.net, part) for part in microbatches()]
    assert max(cases.errors(module.recorder.seen, expected)) <= EXACT


@pytest.mark.slow
def test_compiled_module_is_exact():
    module = cases.Module()
    compiled = torch.compile(module, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")  # by dynamo
        cases.fit(compiled)
    assert max(cases.window_errors(module)) <= EXACT


def test_learning_rate_finder_trains_with_means():
    module = cases.Module(lr=0.1)
    with cases.quiet():
        trainer = cases.make_trainer(callbacks=[ExactAccumulation()], accumulate_grad_batches=1)
        with pytest.warns(UserWarning, match="Lightning runs training_step without its callbacks"):
            Tuner(trainer).lr_find(module, cases.make_loader(), num_training=4)
    for found, part in zip(module.recorder.seen, microbatches(), strict=False):
        assert ref.relative_error(found, ref.full_gradient(ref.make_model(), part)) < 10  # not the sum


def test_window_without_items_has_zero_gradient():
    parts = microbatches()[:3]
    for part in parts:
        part["labels"][:] = ref.IGNORED
    module = cases.Module()
    cases.fit(module, torch.utils.data.DataLoader(cases.OwnMicrobatches(parts), batch_size=None))
    assert all(not gradient.any() for gradient in module.recorder.seen[0].values())
