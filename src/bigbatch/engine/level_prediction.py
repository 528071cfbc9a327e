"""Predict the memory of a training step at every level of offload, before its optimizer has any state.

model, optimizer → steps on tensors without data: with all weights in float32, and with narrow ones → peaks of levels
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bigbatch.autotune.fake_tensors import fake_copies, proxy_device
from bigbatch.autotune.peak_prediction import CUDA_LIBRARIES_BYTES, PeakPredictor, PredictionError
from bigbatch.autotune.problem import TuningProblem
from bigbatch.autotune.search import largest_below
from bigbatch.gradients.loss_totals import as_terms
from bigbatch.gradients.sum_store import SumStore
from bigbatch.memory.allocation_tracker import CUDA_UNIT
from bigbatch.offload.costs import ModelState, Placement, placement
from bigbatch.offload.levels import Offload, reaches
from bigbatch.offload.optimizer_offload import WithoutState
from bigbatch.offload.weight_probe import read_elsewhere, uncast_weights

if TYPE_CHECKING:
    from bigbatch.types import LossFunction


class LevelPrediction:
    """The memory of one training step at some levels of offload.

        prediction = LevelPrediction(problem, device, levels=LEVELS, narrow=names)
        prediction.peak_bytes("optimizer", size)

    Args:
        problem: The step; nothing of it is changed.
        device: Device that the step will run on, available or not.
        levels: Levels to predict. Those that differ from the one before in nothing for this loss are left out.
        narrow: Names of weights that may be bfloat16 on the device; those that the loss reads otherwise than in a
            linear layer under autocast are found here.
        integer_sums: As for `PeakPredictor`.

    Attributes:
        levels: Those that are predicted.
        narrow: Those of the names that are bfloat16 from ``"master"`` on.
        state: Training state.

    Raises:
        PredictionError: The step depends on the data, or the model or its optimizer cannot be copied.
    """

    def __init__(
        self,
        problem: TuningProblem,
        device: torch.device,
        *,
        levels: Sequence[Offload],
        narrow: Sequence[str],
        integer_sums: bool = False,
    ) -> None:
        self.problem = problem
        self._device, self._integer_sums = device, integer_sums
        step = problem.model, problem.optimizer, problem.loss_fn
        self._at_none = PeakPredictor.from_training(*step, device=device, integer_sums=integer_sums)
        self.narrow = list(narrow) if any(reaches(level, "master") for level in levels) else []
        if self.narrow:
            self.narrow = self._narrow_in_loss()
        self.levels = [level for level in levels if level != "master" or self.narrow]
        self._predictors: dict[Offload, PeakPredictor] = {"none": self._at_none}
        self._peaks: dict[tuple[Offload, tuple[int, int, int]], int] = {}

    @cached_property
    def state(self) -> ModelState:
        """Training state of the device."""
        model, trained = self.problem.model, [p for p in self.problem.parameters if p.requires_grad]
        others = {*model.parameters(), *model.buffers(), *self.problem.parameters} - set(trained)
        narrow = set(self.narrow)
        return ModelState(
            weight_bytes=sum(p.nbytes for p in trained),
            frozen_bytes=sum(tensor.nbytes for tensor in others),
            sum_bytes=(2 if self._integer_sums else 1) * SumStore.bytes_of(trained),
            state_bytes=self._at_none.state_bytes,
            narrowed=sum(p.numel() for name, p in model.named_parameters() if name in narrow),
            num_trained=sum(p.numel() for p in trained),
            largest=max((p.numel() for p in trained), default=0),
            largest_state_bytes=self._at_none.largest_state_bytes,
        )

    def needs(self, level: Offload) -> Placement:
        """Return the bytes of the training state."""
        return placement(self.state, level)

    def peak_bytes(self, level: Offload, size: int) -> int:
        """Return the largest peak of micro-batches of a size, of the update, and of the time before the first window.

        Args:
            level: One of ``levels``.
            size: In the unit of the problem, at least its longest sample.
        """
        peaks = [self._peak_of_samples(level, rows) for rows in self.problem.worst_cases(size)]
        if level != "none":  # whose update is in the prediction
            needs, libraries = self.needs(level), CUDA_LIBRARIES_BYTES if self._device.type == "cuda" else 0
            peaks += [libraries + needs.start_bytes, libraries + needs.card_bytes + needs.step_bytes]
        return max(peaks)

    def largest_size(self, level: Offload, usable_bytes: int) -> int:
        """Return the largest micro-batch whose peak fits: as many of the longest sample as fit, at least one."""
        longest = self.problem.longest_sample

        def peak_of_rows(rows: int) -> float:
            return self.peak_bytes(level, rows * longest)

        if peak_of_rows(1) > usable_bytes:
            return longest
        return self.problem.usable_size(
            longest * largest_below(peak_of_rows, 1, self.problem.num_samples, usable_bytes)
        )

    def _peak_of_samples(self, level: Offload, rows: Sequence[int]) -> int:
        key = level, (rows[0], len(rows), self.problem.size_of(rows))
        if key not in self._peaks:
            peak_bytes = self._predictor(level).predict(self.problem.peek(rows)).peak_bytes
            self._peaks[key] = peak_bytes - (self._sums_on_device if reaches(level, "gradients") else 0)
        return self._peaks[key]

    @cached_property
    def _sums_on_device(self) -> int:
        """Bytes of the gradient sums, which the predictors hold from the start to the end of a step."""
        unit = CUDA_UNIT if self._device.type == "cuda" else 1
        sizes = (SumStore.bytes_of([p]) for p in self.problem.parameters if p.requires_grad)
        return sum(-(-size // unit) * unit for size in sizes)

    def _predictor(self, level: Offload) -> PeakPredictor:
        if level not in self._predictors:
            narrow = self.narrow if reaches(level, "master") else []
            window_bytes = self.needs(level).window_bytes
            self._predictors[level] = self._without_optimizer(narrow, self.problem.loss_fn, window_bytes=window_bytes)
        return self._predictors[level]

    def _without_optimizer(
        self,
        narrow: Sequence[str],
        loss_fn: "LossFunction",
        *,
        window_bytes: int = 0,
        narrowed: dict[Tensor, str] | None = None,
    ) -> PeakPredictor:
        """Return the predictor of a step whose optimizer state is in host memory; add its narrow weights to a dict."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        original = WithoutState(self.problem.parameters, 0)
        model, (optimizer,) = fake_copies(mode, self.problem.model, [original], proxy_device(self._device))
        with mode:
            replaced = {model.get_parameter(name): _narrow(model, name) for name in narrow}
            parameters = [replaced.get(p, p) for p in optimizer.param_groups[0]["params"]]
            optimizer = WithoutState(parameters, 0)
        if narrowed is not None:
            narrowed.update(zip(replaced.values(), narrow, strict=True))
        return PeakPredictor(
            mode,
            model,
            optimizer,
            loss_fn,
            device=self._device,
            original=self.problem.model,
            copies_bytes=window_bytes,
            integer_sums=self._integer_sums,
        )

    def _narrow_in_loss(self) -> list[str]:
        """Return the names of the weights that the loss of one sample reads in linear layers under autocast only."""
        narrowed: dict[Tensor, str] = {}
        elsewhere: set[Tensor] = set()
        loss_fn = _watched(self.problem.loss_fn, narrowed, elsewhere)
        predictor = self._without_optimizer(self.narrow, loss_fn, narrowed=narrowed)
        try:
            predictor.predict(self.problem.peek(self.problem.worst_cases(self.problem.longest_sample)[0][:1]))
        except PredictionError as error:
            if "dtype" not in str(error):
                raise
            return []  # it does not run with weights in bfloat16: outside of autocast
        return [name for weight, name in narrowed.items() if weight not in elsewhere]


def _narrow(model: nn.Module, name: str) -> Tensor:
    """Put a parameter in bfloat16 in the place of one in float32."""
    place, _, attribute = name.rpartition(".")
    module = model.get_submodule(place)
    wide = getattr(module, attribute)
    narrow = nn.Parameter(torch.empty_like(wide, dtype=torch.bfloat16), requires_grad=wide.requires_grad)
    module.register_parameter(attribute, narrow)
    return narrow


def _watched(
    loss_fn: "LossFunction", weights: Mapping[Tensor, str], elsewhere: set[Tensor]
) -> "Callable[[Any, Any], Any]":
    """Return the loss function, which then adds to a set the weights that it reads otherwise than in linear layers."""

    def watched(model: nn.Module, microbatch: Any) -> Any:
        with uncast_weights(model, weights) as uncast:
            result = loss_fn(model, microbatch)
        loss: Any = sum(loss_sum for loss_sum, _ in as_terms(result).values())
        elsewhere.update(uncast | read_elsewhere(loss, weights))
        return result

    return watched
