"""Predict the peak memory of a training step from one forward, backward and update on fake tensors.

    model, optimizer → fake copies → forward, backward, update under an AllocationTracker → Prediction

`torch._subclasses.FakeTensorMode` runs the operations of the step on shapes only: a model of 7 billion parameters takes
a second and no memory. Gradient sums and optimizer state exist from the start, as in all but the first window. For CUDA
on a machine without it, the operations are those of the CPU, with sizes rounded as CUDA's allocator rounds;
docs/explanation/memory.md compares both with measurements on an H200.

Long because every phase of a step is predicted here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bigbatch.accumulation.optimizer_checks import as_optimizers
from bigbatch.accumulation.optimizer_update import trained_parameters
from bigbatch.autotune.fake_tensors import PredictionError as PredictionError
from bigbatch.autotune.fake_tensors import (
    attention_without_dropout,
    errors_as_prediction_errors,
    fake_copies,
    loss_tracked_separately,
    proxy_device,
)
from bigbatch.autotune.repeated_operations import RepeatedOperations
from bigbatch.batching.batch_types import flatten
from bigbatch.gradients.gradient_sums import GradientSums
from bigbatch.gradients.loss_totals import as_terms
from bigbatch.gradients.sum_store import PassingSums, SumStore
from bigbatch.memory.allocation_tracker import CUDA_UNIT, AllocationTracker, MemoryCategory, tensors_in
from bigbatch.preserve import module_state_preserved
from bigbatch.trials.loss_modules import modules_used_by

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from bigbatch.types import LossFunction

CUDA_LIBRARIES_BYTES = 64 * 2**20
"""cuBLAS workspaces: 32 MiB on Hopper and later for each of the two threads that run matrix products, one for forward
and one for backward. A quarter of that on earlier GPUs."""


@dataclass(frozen=True)
class Prediction:
    """Predicted memory of a training step on one device, in bytes.

    Attributes:
        peak_bytes: Peak of forward, backward and update.
        phase: The phase of the peak: ``"forward"``, ``"backward"`` or ``"update"``.
        parts: Bytes at the peak by category: parameters, gradients, optimizer, activations, loss, and on CUDA
            ``libraries``, their workspaces.
        phases: Peak of each phase.
        forward_backward_bytes: Peak of forward and backward without what `bigbatch.Engine` allocates in addition to the
            running micro-batch: a copy of the buffers, for retries after out-of-memory errors, and on CUDA the
            prefetched inputs of the next micro-batch.
        resident_bytes: The part of it that stays allocated between micro-batches: parameters, buffers, gradients,
            optimizer state, and workspaces.
    """

    peak_bytes: int
    phase: str
    parts: Mapping[str, int] = field(hash=False)
    phases: Mapping[str, int] = field(hash=False)
    forward_backward_bytes: int
    resident_bytes: int


class PeakPredictor:
    """A training step on fake tensors, run once per prediction.

        predictor = PeakPredictor.from_training(model, optimizer, loss_fn)
        predictor.predict(microbatch).peak_bytes

    Args:
        mode: The mode of the fake tensors of ``model`` and ``optimizer``.
        model: With fake tensors, in the training mode and on the device of the training, or its proxy.
        optimizer: Over the parameters of ``model``, or several; their state is created here if there is none.
        loss_fn: As for `bigbatch.Engine`.
        device: Device that the prediction is for; by default that of the fake tensors.
        original: The model that ``model`` is a copy of: its attributes are restored, should ``loss_fn`` run it.
        copies_bytes: Memory of the copies of weights that windows hold in addition.
        integer_sums: Whether gradients are summed in int64, as with ``reproducible=True``.
        keeps_sums: Whether gradient sums are on the device.

    Attributes:
        device: Device that the prediction is for.
        state_bytes: Bytes of the optimizer state.
    """

    def __init__(
        self,
        mode: FakeTensorMode,
        model: nn.Module,
        optimizer: "Optimizer | Sequence[Optimizer] | None",
        loss_fn: "LossFunction",
        *,
        device: torch.device | None = None,
        original: nn.Module | None = None,
        copies_bytes: int = 0,
        integer_sums: bool = False,
        keeps_sums: bool = True,
    ) -> None:
        self._has_integer_sums, self._make_store = integer_sums, SumStore if keeps_sums else PassingSums
        self._mode, self._repeated = mode, RepeatedOperations(mode)
        self._model = model
        self._optimizers = as_optimizers(optimizer)
        self._loss_fn = loss_fn
        self._modules = [model, *modules_used_by(loss_fn), *([] if original is None else [original])]
        self._parameters = trained_parameters(model, self._optimizers)
        self._fake_device = self._parameters[0].device
        self.device = device or self._fake_device
        self._unit = CUDA_UNIT if self.device.type == "cuda" else None
        self._added_by_update: Mapping[MemoryCategory, int] | None = None
        with errors_as_prediction_errors(), mode, self._tracker() as tracker:
            self._create_state()
            self._copies = torch.empty(copies_bytes, dtype=torch.uint8, device=self._fake_device)
            tracker.track(state_of(optimizer), MemoryCategory.OPTIMIZER)
        self.state_bytes = tracker.live_bytes[MemoryCategory.OPTIMIZER]

    @classmethod
    def from_training(
        cls,
        model: nn.Module,
        optimizer: "Optimizer | Sequence[Optimizer] | None",
        loss_fn: "LossFunction",
        *,
        device: torch.device | None = None,
        copies_bytes: int = 0,
        integer_sums: bool = False,
        keeps_sums: bool = True,
    ) -> "PeakPredictor":
        """Build a predictor from fake copies of a model and its optimizer; the originals are not modified.

        Args:
            model: On any device, ``meta`` included.
            optimizer: Over the parameters of ``model``; or several.
            loss_fn: As for `bigbatch.Engine`.
            device: Device that the step will run on, available or not; by default that of the parameters.
            copies_bytes: As for the class.
            integer_sums: As for the class.
            keeps_sums: As for the class.

        Raises:
            PredictionError: The model or the optimizer cannot be copied, or its state cannot be created without data.
        """
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        copies = fake_copies(mode, model, as_optimizers(optimizer), None if device is None else proxy_device(device))
        return cls(
            mode,
            *copies,
            loss_fn,
            device=device,
            original=model,
            copies_bytes=copies_bytes,
            integer_sums=integer_sums,
            keeps_sums=keeps_sums,
        )

    def predict(self, microbatch: Any) -> Prediction:
        """Predict the peak of one micro-batch and the update.

        Calls ``loss_fn`` once, with a copy of the model and inputs without data; inside, `is_trial` returns True.

        Args:
            microbatch: The argument of ``loss_fn``, on any device; only shapes and dtypes of its tensors matter.

        Raises:
            PredictionError: The step depends on the data.
        """
        with self._running_without_data() as tracker, self._sums() as sums:
            self._track(tracker, sums)
            wider = self._wider_part_of_sums()
            resident_bytes = tracker.live_bytes.total()
            phases, engine_bytes = self._differentiate(tracker, sums, microbatch)
            del wider  # integers are converted to float32 before the update
            phases["update"] = self._update(tracker, sums)
        libraries = self._libraries_bytes
        phase = max(phases, key=lambda name: phases[name].peak_bytes)
        parts = {part.value: phases[phase].parts[part] for part in MemoryCategory}
        if libraries:
            parts["libraries"] = libraries
        peaks = {name: recorded.peak_bytes + libraries for name, recorded in phases.items()}
        forward_backward_bytes = max(peaks["forward"], peaks["backward"]) - engine_bytes
        return Prediction(peaks[phase], phase, parts, peaks, forward_backward_bytes, resident_bytes + libraries)

    def _sums(self) -> GradientSums:
        return GradientSums(self._parameters, store=self._make_store())

    @property
    def largest_state_bytes(self) -> int:
        """Bytes of the optimizer state of the parameter with most of it."""
        states = [tensors_in(state) for each in self._optimizers for state in each.state.values()]
        return max((sum(tensor.numel() * tensor.element_size() for tensor in tensors) for tensors in states), default=0)

    def predict_update(self) -> int:
        """Predict the peak of the update alone in bytes, which does not depend on the micro-batch."""
        with self._running_without_data() as tracker, self._sums() as sums:
            self._track(tracker, sums)
            return self._update(tracker, sums).peak_bytes + self._libraries_bytes

    @property
    def _libraries_bytes(self) -> int:
        return CUDA_LIBRARIES_BYTES if self.device.type == "cuda" else 0

    @contextmanager
    def _running_without_data(self) -> Iterator[AllocationTracker]:
        is_proxy = self._fake_device.type != self.device.type
        with (
            module_state_preserved(*self._modules, parameters=False),
            errors_as_prediction_errors(),
            self._mode,
            attention_without_dropout() if is_proxy else nullcontext(),
            self._tracker() as tracker,
        ):
            yield tracker

    def _tracker(self) -> AllocationTracker:
        return AllocationTracker(self._fake_device, unit=self._unit, run=self._repeated)

    def _track(self, tracker: AllocationTracker, sums: GradientSums) -> None:
        """Track what is allocated before the micro-batch starts."""
        resident = [*self._model.parameters(), *self._model.buffers(), *self._parameters, self._copies]
        tracker.track(resident, MemoryCategory.PARAMETERS)
        tracker.track(state_of(self._optimizers), MemoryCategory.OPTIMIZER)
        tracker.set_category(MemoryCategory.GRADIENTS)
        sums.fill_missing_with_zeros()

    def _wider_part_of_sums(self) -> list[Tensor]:
        """Return tensors of the bytes by which sums in int64 exceed those in float32."""
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        return [torch.empty_like(p, dtype=torch.float32) for p in trained] if self._has_integer_sums else []

    def _differentiate(
        self, tracker: AllocationTracker, sums: GradientSums, microbatch: Any
    ) -> "tuple[dict[str, _Phase], int]":
        """Run forward and backward; return their peaks, and the bytes of buffer copies and prefetched inputs."""
        tracker.set_category(MemoryCategory.ACTIVATIONS)
        resident_bytes = tracker.live_bytes.total()
        engine_tensors: list[Any] = [buffer.clone() for buffer in self._model.buffers()]
        if self.device.type == "cuda":
            engine_tensors.append(self._fake_inputs(microbatch))
        engine_bytes = tracker.live_bytes.total() - resident_bytes
        phases = {}
        with loss_tracked_separately(tracker, self._model):
            tracker.reset_peak()
            terms = as_terms(self._loss_fn(self._model, self._fake_inputs(microbatch)))
            loss = reduce(add, (loss_sum for loss_sum, _ in terms.values()))
            phases["forward"] = _Phase.of(tracker)
            del terms
            versions = sums.snapshot_versions()
            sums.backward(loss)
            del loss
            phases["backward"] = _Phase.of(tracker)
        if len(sums.unchanged_since(versions)) == sum(p.requires_grad for p in self._parameters):
            raise PredictionError(
                "loss_fn does not use the model that it is passed, or no parameter of it that is trained"
            )
        return phases, engine_bytes

    def _update(self, tracker: AllocationTracker, sums: GradientSums) -> "_Phase":
        """Return the peak of the update: what is live now, and what an update adds, which is computed once."""
        live = tracker.live_bytes.copy()
        if self._added_by_update is None:
            peak = self._run_update(tracker, sums)
            self._added_by_update = {part: peak.parts[part] - live[part] for part in MemoryCategory}
        parts = {part: live[part] + added for part, added in self._added_by_update.items()}
        return _Phase(sum(parts.values()), parts)

    def _run_update(self, tracker: AllocationTracker, sums: GradientSums) -> "_Phase":
        tracker.set_category(MemoryCategory.OPTIMIZER)
        tracker.reset_peak()
        gradients = sums.tensors()
        torch.nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, 0.5)
        del gradients
        sums.write_to_grad()
        for optimizer in self._optimizers:
            optimizer.step()
        return _Phase.of(tracker)

    def _create_state(self) -> None:
        """Create the optimizer state by a step with zero gradients."""
        with self._sums() as sums:
            sums.fill_missing_with_zeros()
            sums.write_to_grad()
            for optimizer in self._optimizers:
                optimizer.step()

    def _fake_inputs(self, microbatch: Any) -> Any:
        leaves, structure = flatten(microbatch)
        empty = partial(torch.empty, device=self._fake_device)
        fakes = (empty(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return structure.unflatten(fakes)


def prediction_obstacle(model: nn.Module) -> str | None:
    """Return why the activations of a model cannot be predicted; None if no reason is known."""
    if any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in model.modules()):
        return "it is compiled, so the saved activations are known only when it runs"
    return None


@dataclass(frozen=True)
class _Phase:
    peak_bytes: int
    parts: Mapping[MemoryCategory, int]

    @classmethod
    def of(cls, tracker: AllocationTracker) -> "_Phase":
        phase = cls(tracker.peak_bytes, tracker.parts_at_peak.copy())
        tracker.reset_peak()
        return phase


def state_of(optimizer: "Optimizer | Sequence[Optimizer] | None") -> list[Tensor]:
    """Return the tensors in the state of an optimizer, or of several."""
    return [tensor for each in as_optimizers(optimizer) for tensor in tensors_in(each.state)]
