"""The peak of a training step, from one forward, backward and update on tensors without data.

    model, optimizer → copies without data → forward, backward, update under a Tracker → Prediction

`torch._subclasses.FakeTensorMode` runs the very operations of the step on shapes alone: a model of 7 billion parameters
takes a second, and no memory. Gradient sums and optimizer state are there from the beginning, as in any but the first
micro-batch. For CUDA on a machine without it, the operations are those of the CPU, counted as CUDA's allocator counts;
docs/explanation/memory.md has both beside what an H200 measured.
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from bigbatch.errors import BigbatchError, first_line
from bigbatch.gradients.gradient_sums import GradientSums, optimizer_parameters
from bigbatch.gradients.loss_totals import as_terms
from bigbatch.memory.allocation_tracker import CUDA_UNIT, AllocationTracker, MemoryCategory, tensors_in

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from bigbatch.types import LossFunction

CUDA_LIBRARIES_BYTES = 64 * 2**20
"""What cuBLAS takes as its workspaces: 32 MiB on Hopper and later for each of the two threads that multiply matrices,
that of forward and that of backward. A quarter of it on earlier cards."""


class PredictionError(BigbatchError, RuntimeError):
    """The step cannot run on tensors without data; the message says what it ran into."""


@dataclass(frozen=True)
class Prediction:
    """What a training step is going to need.

    Attributes:
        peak_bytes: The most that is allocated at any moment of forward, backward and update.
        phase: Where that is: ``"forward"``, ``"backward"`` or ``"update"``.
        parts: The bytes of that moment by what they are for: parameters, gradients, optimizer, activations, loss, and
            for CUDA the workspaces of its libraries.
        phases: The peak in bytes of each phase.
        forward_backward_bytes: The peak of forward and backward without what `bigbatch.Engine` holds besides the
            micro-batch that runs: a copy of the buffers, for when memory runs out, and for CUDA the inputs that come
            next.
        resident_bytes: Of that, what is there between micro-batches: parameters, buffers, gradients, optimizer state,
            and the workspaces.
    """

    peak_bytes: int
    phase: str
    parts: Mapping[str, int] = field(hash=False)
    phases: Mapping[str, int] = field(hash=False)
    forward_backward_bytes: int
    resident_bytes: int


class PeakPredictor:
    """A training step on tensors without data.

        rehearsal = Rehearsal.of(model, optimizer, loss_fn)
        rehearsal.predict(microbatch).peak_bytes

    Args:
        mode: What model and optimizer were made under.
        model: Without data, in the mode and on the device of the training.
        optimizer: Over its parameters; its state is made here where there is none.
        loss_fn: As for `bigbatch.Engine`.
        device: What the prediction is for, where model and optimizer stand in for it on the CPU.

    Attributes:
        state_bytes: What the optimizer's state takes once it is made.
    """

    def __init__(
        self,
        mode: FakeTensorMode,
        model: nn.Module,
        optimizer: "Optimizer",
        loss_fn: "LossFunction",
        *,
        device: torch.device | None = None,
    ) -> None:
        self._mode = mode
        self._model = model
        self._optimizer = optimizer
        self._loss_fn = loss_fn
        self._parameters = optimizer_parameters(optimizer)
        self._runs_on = self._parameters[0].device
        self.device = device or self._runs_on
        self._unit = CUDA_UNIT if self.device.type == "cuda" else None
        with self._failing_clearly(), mode, AllocationTracker(self._runs_on, unit=self._unit) as tracker:
            self._make_state()
            tracker.track(state_of(optimizer), MemoryCategory.OPTIMIZER)
        self.state_bytes = tracker.live_bytes[MemoryCategory.OPTIMIZER]

    @classmethod
    def from_training(
        cls,
        model: nn.Module,
        optimizer: "Optimizer",
        loss_fn: "LossFunction",
        *,
        device: torch.device | None = None,
    ) -> "PeakPredictor":
        """Rehearse with copies of a model and its optimizer, which share nothing with them and hold no data.

        Args:
            model: On any device, ``meta`` included.
            optimizer: Over its parameters.
            loss_fn: As for `bigbatch.Engine`.
            device: Where the step is to run: by default where the parameters are. It need not be there.

        Raises:
            PredictionError: They cannot be copied.
        """
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        runs_on = None if device is None else proxy_device(device)
        copies: dict[int, Any] = {}
        try:
            for tensor in [*model.parameters(), *model.buffers(), *tensors_in(vars(optimizer))]:
                if id(tensor) not in copies:
                    copies[id(tensor)] = _without_data(mode, tensor, runs_on)
                    if tensor.grad is not None:
                        copies[id(tensor.grad)] = None
            twin, optimizer_twin = copy.deepcopy((model, optimizer), copies)
            for name, value in vars(optimizer).items():  # what the optimizers of torch leave out of their copies
                if name not in vars(optimizer_twin) and name != "step":  # a scheduler's, around that of the original
                    setattr(optimizer_twin, name, copy.deepcopy(value, copies))
        except Exception as error:  # whatever a user's module raises when it is copied
            raise PredictionError(f"the model or its optimizer cannot be copied ({first_line(error)})") from error
        return cls(mode, twin, optimizer_twin, loss_fn, device=device)

    def predict(self, microbatch: Any) -> Prediction:
        """Run one micro-batch and the update.

        Args:
            microbatch: What ``loss_fn`` takes; of its tensors, on any device, only shapes and dtypes matter.

        Raises:
            PredictionError: The step needs the data itself.
        """
        with self._running_without_data() as tracker, GradientSums(self._parameters) as sums:
            self._track(tracker, sums)
            held_bytes = tracker.live_bytes.total()
            phases, waiting_bytes = self._differentiate(tracker, sums, microbatch)
            phases["update"] = self._update(tracker, sums)
        libraries = self._libraries_bytes
        phase = max(phases, key=lambda name: phases[name].peak_bytes)
        parts = {part.value: phases[phase].parts[part] for part in MemoryCategory}
        if libraries:
            parts["libraries"] = libraries
        peaks = {name: recorded.peak_bytes + libraries for name, recorded in phases.items()}
        running_bytes = max(peaks["forward"], peaks["backward"]) - waiting_bytes
        return Prediction(peaks[phase], phase, parts, peaks, running_bytes, held_bytes + libraries)

    def predict_update(self) -> int:
        """Give the peak in bytes of an update alone, which no micro-batch matters to."""
        with self._running_without_data() as tracker, GradientSums(self._parameters) as sums:
            self._track(tracker, sums)
            return self._update(tracker, sums).peak_bytes + self._libraries_bytes

    @property
    def _libraries_bytes(self) -> int:
        return CUDA_LIBRARIES_BYTES if self.device.type == "cuda" else 0

    @contextmanager
    def _running_without_data(self) -> Iterator[AllocationTracker]:
        pinned = _attention_without_dropout() if self._runs_on.type != self.device.type else nullcontext()
        with self._failing_clearly(), self._mode, pinned, AllocationTracker(self._runs_on, unit=self._unit) as tracker:
            yield tracker

    def _track(self, tracker: AllocationTracker, sums: GradientSums) -> None:
        """Count what is there before a micro-batch begins."""
        tracker.track([*self._model.parameters(), *self._model.buffers(), *self._parameters], MemoryCategory.PARAMETERS)
        tracker.track(state_of(self._optimizer), MemoryCategory.OPTIMIZER)
        tracker.part = MemoryCategory.GRADIENTS
        sums.fill_missing_with_zeros()

    def _differentiate(
        self, tracker: AllocationTracker, sums: GradientSums, microbatch: Any
    ) -> "tuple[dict[str, _Phase], int]":
        """Run forward and backward; give their peaks, and the bytes of what only waits meanwhile."""
        tracker.part = MemoryCategory.ACTIVATIONS
        held_bytes = tracker.live_bytes.total()
        waiting: list[Any] = [buffer.clone() for buffer in self._model.buffers()]
        if self.device.type == "cuda":
            waiting.append(self._fake_inputs(microbatch))
        waiting_bytes = tracker.live_bytes.total() - held_bytes
        phases = {}
        with _parts_of_the_step(tracker, self._model):
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
                "loss_fn does not use the model that it is given, or none of its parameters that are trained"
            )
        return phases, waiting_bytes

    def _update(self, tracker: AllocationTracker, sums: GradientSums) -> "_Phase":
        tracker.part = MemoryCategory.OPTIMIZER
        tracker.reset_peak()
        gradients = sums.tensors()
        torch.nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, 0.5)
        del gradients
        sums.write_to_grad()
        self._optimizer.step()
        return _Phase.of(tracker)

    def _make_state(self) -> None:
        """Let the optimizer make its state, and count no step."""
        with GradientSums(self._parameters) as sums:
            sums.fill_missing_with_zeros()
            sums.write_to_grad()
            self._optimizer.step()

    def _fake_inputs(self, microbatch: Any) -> Any:
        def stand_in(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return torch.empty(leaf.shape, dtype=leaf.dtype, device=self._runs_on)

        return pytree.tree_map(stand_in, microbatch)

    @contextmanager
    def _failing_clearly(self) -> Iterator[None]:
        try:
            with _quiet_log():
                yield
        except PredictionError:
            raise
        except Exception as error:  # whatever a user's model does with data that is not there
            raise PredictionError(f"the step cannot run without data ({first_line(error)})") from error


def prediction_obstacle(model: nn.Module) -> str | None:
    """Say why a model cannot show without data what it keeps, where that is known; else None."""
    if any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in model.modules()):
        return "it is compiled, and what it keeps is decided when it runs"
    return None


def proxy_device(device: torch.device) -> torch.device:
    """Give where a prediction for a device runs: there, or on the CPU where torch finds no CUDA."""
    return torch.device("cpu") if device.type == "cuda" and not torch.cuda.is_available() else device


@contextmanager
def _attention_without_dropout() -> Iterator[None]:
    """Keep attention on the CPU in one kernel, as it is on CUDA: with dropout the CPU would write out all pairs."""
    functional: Any = nn.functional
    attend = functional.scaled_dot_product_attention

    def pinned(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, **options: Any) -> Any:
        return attend(query, key, value, attn_mask=attn_mask, **options)

    functional.scaled_dot_product_attention = pinned
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attend


@dataclass(frozen=True)
class _Phase:
    peak_bytes: int
    parts: Mapping[MemoryCategory, int]

    @classmethod
    def of(cls, tracker: AllocationTracker) -> "_Phase":
        phase = cls(tracker.peak_bytes, tracker.parts_at_peak.copy())
        tracker.reset_peak()
        return phase


@contextmanager
def _parts_of_the_step(tracker: AllocationTracker, model: nn.Module) -> Iterator[None]:
    """Tell what belongs to the loss from what belongs to the layers, in forward and in backward.

    The outputs of the model, and whatever is computed from them, are the loss's; in backward, so is what nodes of the
    graph allocate that were made after the outputs.
    """
    last_of_model = [-1]

    def after_forward(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
        tensors = tensors_in(outputs)
        tracker.track(tensors, MemoryCategory.LOSS)
        tracker.part = part
        nodes = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
        last_of_model[0] = max((node._sequence_nr() for node in nodes), default=-1)

    def part() -> MemoryCategory:
        node = torch._C._current_autograd_node()
        if node is None or ("AccumulateGrad" not in node.name() and node._sequence_nr() > last_of_model[0]):
            return MemoryCategory.LOSS
        return MemoryCategory.ACTIVATIONS

    tracker.part = MemoryCategory.ACTIVATIONS
    handle = model.register_forward_hook(after_forward)
    try:
        yield
    finally:
        handle.remove()


def state_of(optimizer: "Optimizer") -> list[Tensor]:
    """Give the tensors of an optimizer's state."""
    return tensors_in(optimizer.state)


def _without_data(mode: FakeTensorMode, tensor: Tensor, device: torch.device | None) -> Tensor:
    if device is None or device == tensor.device:
        twin: Tensor = mode.from_tensor(tensor)
        return twin
    shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    twin = FakeTensor(mode, shape, device)
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


@contextmanager
def _quiet_log() -> Iterator[None]:
    """Keep torch from writing a traceback about what becomes a sentence."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
