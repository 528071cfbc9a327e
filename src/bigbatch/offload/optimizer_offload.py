"""The optimizers of an update whose state is offloaded."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bigbatch.errors import InputError, WindowStateError, first_line
from bigbatch.offload.host_sums import HostSums
from bigbatch.offload.host_values import host_value, widen
from bigbatch.offload.levels import Offload, check_level, reaches
from bigbatch.offload.narrow_weights import NarrowWeights, find_narrow_weights
from bigbatch.offload.optimizer_trial import check_streamable
from bigbatch.offload.streamed_optimizer import InitState, StreamedOptimizer
from bigbatch.offload.transfers import make_transfers
from bigbatch.offload.weight_probe import read_elsewhere, uncast_weights

if TYPE_CHECKING:
    from torch.optim import Optimizer


class OptimizerOffload:
    """Steps the optimizers of an update with their state in host memory.

    Args:
        optimizers: Each over parameters on one device.
        narrow: Weights that become bfloat16 on the device, or are so since `bigbatch.move_to_device`, with their names.
        level: Of offload.

    Attributes:
        level: As passed.
        streamed: One for each optimizer, in order.
        weights: Those that are bfloat16 on the device.
        sums: The gradient sums, if they are in host memory; else None.

    Raises:
        InputError: One cannot be stepped in parts, or parameters are on several devices or sharded.
    """

    def __init__(self, optimizers: Sequence["Optimizer"], narrow: Mapping[Tensor, str], level: Offload) -> None:
        for optimizer in optimizers:
            check_streamable(optimizer)
        self.level = level
        self.weights = NarrowWeights(narrow, level)
        transfers = make_transfers(optimizers[0].param_groups[0]["params"][0].device)
        self.sums = HostSums(transfers) if reaches(level, "gradients") else None
        self.streamed = [
            StreamedOptimizer(optimizer, transfers, weights=self.weights, sums=self.sums) for optimizer in optimizers
        ]
        self._is_probed = not narrow

    def __deepcopy__(self, memo: dict[int, Any]) -> "OptimizerOffload":
        """Copy it for copied optimizers, whose state then gets host memory of its own; not with narrow weights."""
        parts = [each.optimizer for each in self.streamed]
        if self.weights.names:
            raise InputError(f'an update with offload="{self.level}" cannot be copied: its weights are in host memory.')
        return OptimizerOffload(copy.deepcopy(parts, memo), {}, self.level)

    @property
    def host_bytes(self) -> int:
        """Host memory of the state, and of gradient sums.

        With float32 values that `bigbatch.move_to_device` has left there, except for the largest: that of a weight is
        there twice while it moves to pinned memory.
        """
        waiting = [value.nbytes for value in self.weights.waiting().values()]
        return sum(each.host_bytes for each in self.streamed) + sum(waiting) - max(waiting, default=0)

    @property
    def device_bytes(self) -> int:
        """Memory of the device that an update needs for the state that passes through."""
        return max((each.device_bytes for each in self.streamed), default=0)

    @property
    def window_bytes(self) -> int:
        """Memory of the device that windows need for parts of sums, and for gradients that are not added yet."""
        if self.sums is None:
            return 0
        parameters = (p for each in self.streamed for group in each.optimizer.param_groups for p in group["params"])
        return self.sums.streamer.device_bytes(max((p.nbytes for p in parameters if p.requires_grad), default=0))

    def prepare(self, init_state: InitState) -> None:
        """Move all state to host memory, and create what is missing; arguments and errors are those of each.

        Raises:
            WindowStateError: Other code has written to a weight whose float32 value is in host memory, or the block of
                `wide_weights` is open.
        """
        self.weights.check_narrow()
        self.check_unwritten()
        for each in self.streamed:
            each.prepare(init_state)
        for parameter, value in self.weights.waiting().items():  # no longer in an optimizer
            self.weights.widen(parameter, {parameter: value})
        if self.sums is not None:
            self.sums.prepare([chunk for each in self.streamed for chunk in each.chunks])

    def check_grad(self) -> None:
        """Raise if a gradient cannot be left in ``.grad``, for other code.

        Raises:
            WindowStateError: It cannot.
        """
        if self.sums is not None:
            raise WindowStateError(
                'offload="gradients" keeps gradients in host memory, and in .grad they would be on the device: call '
                'step(), or pass offload="optimizer".'
            )
        if self.weights.narrowed:
            raise WindowStateError(
                'offload="master" keeps weights in bfloat16 on the device, and a gradient in .grad would be rounded to '
                'it: call step(), or pass offload="optimizer".'
            )

    def check_unwritten(self) -> None:
        """Raise if other code has changed a narrow weight.

        Raises:
            WindowStateError: It has.
        """
        self.weights.check_unwritten(self._masters())

    def step(self, optimizer: "Optimizer") -> None:
        """Step one of the optimizers."""
        self._of(optimizer).step()

    def has_begun(self, optimizer: "Optimizer") -> bool:
        """Return whether the last step of an optimizer may have changed a parameter."""
        return self._of(optimizer).has_begun

    def whole(self, tensor: Tensor) -> Tensor:
        """Return the float32 value of a narrow weight, in host memory; any other tensor itself."""
        if tensor not in self.weights.narrowed:
            return tensor
        if (found := host_value(tensor)) is not None:
            return found.value
        chunks = (chunk for each in self.streamed for chunk in each.chunks)
        return next(chunk.masters[tensor] for chunk in chunks if tensor in chunk.masters)

    def refresh(self) -> None:
        """Write the narrow weights after their float32 values have changed."""
        with torch.no_grad():
            self.weights.refresh(self._masters())

    @contextmanager
    def wide_weights(self) -> Iterator[None]:
        """Let the parameters of the model be the float32 values in host memory inside, to be saved."""
        self.check_unwritten()
        with self.weights.wide(self._masters()):
            yield

    @property
    def wants_probe(self) -> bool:
        """Whether it is not known yet how a loss reads the narrow weights."""
        return not self._is_probed

    def probe(self, compute_loss: Callable[[], Tensor], model: nn.Module) -> set[Tensor] | None:
        """Return the narrow weights that a loss reads otherwise than in a linear layer; None if it has no graph.

        A layer that runs outside of autocast to bfloat16, on inputs cast to the dtype of its weight, is another use.

        Args:
            compute_loss: Returns the loss of a few samples, with a graph.
            model: Has the layers.

        Raises:
            InputError: The loss does not run with weights in bfloat16, at level ``"master"``.
        """
        try:
            with uncast_weights(model, self.weights.narrowed) as uncast:
                loss = compute_loss()
        except RuntimeError as error:
            if "dtype" not in str(error):
                raise
            if self.sums is not None:  # without autocast to bfloat16: all weights stay as they are
                return set(self.weights.narrowed)
            raise InputError(
                f'offload="master" keeps weights of linear layers in bfloat16 on the device, and the loss does not '
                f"run with them ({first_line(error)}): compute it under torch.autocast with dtype=torch.bfloat16, or "
                'pass offload="optimizer".'
            ) from error
        return uncast | read_elsewhere(loss, self.weights.narrowed) if loss.requires_grad else None

    def keep_all_wide(self) -> bool:
        """Keep all weights in float32 on the device, where it is unknown how a loss reads them; return whether it can.

        It cannot at level ``"master"``, of which nothing would remain.
        """
        if self.sums is not None:
            self.keep_wide(set(self.weights.names))
        return self.sums is not None

    def keep_wide(self, parameters: set[Tensor]) -> None:
        """Put the float32 values of some narrow weights back on the device for good; `prepare` follows, no `probe`."""
        for parameter in parameters:
            for each in self.streamed:
                each.keep_wide(parameter)
            if parameter in self.weights.names:  # not in a chunk yet
                self.weights.keep_wide(parameter, self.weights.waiting())
        self.weights.close()
        self._is_probed = True

    def _masters(self) -> dict[Tensor, Tensor]:
        in_chunks = {parameter: master for each in self.streamed for parameter, master in each.masters().items()}
        return self.weights.waiting() | in_chunks

    def without_state(self) -> "Optimizer":
        """Return an optimizer over the same parameters whose step needs the memory of these, to predict the peak."""
        parameters = [p for each in self.streamed for group in each.optimizer.param_groups for p in group["params"]]
        return WithoutState(parameters, self.device_bytes + self._largest_chunk_bytes)

    @property
    def _largest_chunk_bytes(self) -> int:
        """For temporary tensors of a step over one chunk, which are about as large as its state."""
        return max((each.largest_chunk_bytes for each in self.streamed), default=0)

    def _of(self, optimizer: "Optimizer") -> StreamedOptimizer:
        return next(each for each in self.streamed if each.optimizer is optimizer)


class WithoutState(torch.optim.Optimizer):
    """An optimizer without state, whose step allocates memory and changes nothing.

    Args:
        parameters: Of its only group.
        step_bytes: What a step allocates, on the device of the first parameter.
    """

    def __init__(self, parameters: Sequence[Tensor], step_bytes: int) -> None:
        super().__init__(parameters, {})
        self.step_bytes = step_bytes

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Allocate memory."""
        torch.empty(self.step_bytes, dtype=torch.uint8, device=self.param_groups[0]["params"][0].device)


def offload_optimizers(
    optimizers: Sequence["Optimizer"], level: Offload, model: nn.Module | None = None
) -> OptimizerOffload | None:
    """Return what steps optimizers at a level of offload; None for ``"none"``.

    Raises:
        InputError: The level does not exist, or is not supported for these optimizers.
    """
    known = [p for each in optimizers for group in each.param_groups for p in group["params"]]
    known += model.parameters() if isinstance(model, nn.Module) else []  # anything else is refused later
    for optimizer in optimizers:
        _check_state(optimizer)
    if check_level(level) == "none":
        widen(known)
        return None
    if not optimizers:
        raise InputError(f"offload={level!r} moves the state of the optimizer, and there is none: pass the optimizer.")
    parameters = [p for each in optimizers for group in each.param_groups for p in group["params"]]
    _check_parameters(parameters)
    narrows = reaches(level, "master")
    if narrows and isinstance(model, nn.parallel.DistributedDataParallel):
        raise InputError(
            f'offload="{level}" changes the dtype of parameters, which DistributedDataParallel does not follow: pass '
            "the model without it, and sync=bigbatch.Replicated(model)."
        )
    narrow = find_narrow_weights(model, parameters) if narrows and model is not None else {}
    if level == "master" and not narrow:
        raise InputError(
            'offload="master" is for float32 weights of torch.nn.Linear layers, each of one layer, and the optimizer '
            'has none: pass offload="optimizer".'
        )
    widen(p for p in known if p not in narrow or not p.requires_grad)
    return OptimizerOffload(optimizers, narrow, level)


def _check_parameters(parameters: Sequence[Tensor]) -> None:
    devices = sorted({str(parameter.device) for parameter in parameters})
    if len(devices) > 1 or not devices[0].startswith(("cuda", "cpu")):
        raise InputError(
            f"offload= copies between host memory and one CUDA device, and the parameters are on {', '.join(devices)}: "
            'move them to one, or leave offload="none".'
        )
    for parameter in parameters:
        if type(parameter) not in (Tensor, torch.nn.Parameter):
            raise InputError(
                f"a parameter of shape {tuple(parameter.shape)} is a {type(parameter).__name__}, and offload= supports "
                'whole, plain parameters only: for a sharded model leave offload="none".'
            )


def _check_state(optimizer: "Optimizer") -> None:
    """Refuse state that an optimizer has made of weights that were rounded already."""
    for parameter, values in optimizer.state.items():
        if host_value(parameter) is not None and any(
            isinstance(value, Tensor) and value.dtype is torch.bfloat16 for value in values.values()
        ):
            raise InputError(
                f"{type(optimizer).__name__} has made its state in bfloat16, of weights that move_to_device() has "
                "rounded: create the optimizer before that call."
            )
