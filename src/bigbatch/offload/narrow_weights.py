"""Weights that are bfloat16 on the device, and whose float32 values, the master weights, live in host memory.

under autocast     F.linear(x, weight) = F.linear(x.bfloat16(), weight.bfloat16()): the same bits from either weight
in the update      the master weight takes the place of the weight, for the step of the optimizer
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bigbatch.errors import WindowStateError
from bigbatch.offload.host_values import differs, forget, host_value, mark
from bigbatch.offload.levels import Offload
from bigbatch.offload.state_chunk import StateChunk


class NarrowWeights:
    """The weights of a model that are bfloat16 on the device.

    Args:
        names: Those that may become so, or are so since `bigbatch.move_to_device`, with their names.
        level: Of offload, for messages.

    Attributes:
        names: As passed; without those that `keep_wide` has removed.
        narrowed: Those that are bfloat16 now.
    """

    def __init__(self, names: Mapping[Tensor, str], level: Offload = "master") -> None:
        self.names, self._level = dict(names), level
        self.narrowed: dict[Tensor, tuple[int, int]] = {}  # with what `mark` returned after the last write of ours
        self._waiting: set[Tensor] = set()  # those whose value is where `move_to_device` has left it
        for parameter in names:
            if (found := host_value(parameter)) is not None:
                self.narrowed[parameter] = found.mark
                self._waiting.add(parameter)
        self._overwritten: dict[Tensor, Tensor] = {}  # whether the last step found other values, 0-d bool
        self._hidden: dict[Tensor, Tensor] = {}  # the narrow values while `wide` shows others
        self._gradients: Mapping[Tensor, Tensor] = {}

    def dtype_of(self, parameter: Tensor) -> torch.dtype:
        """Return the dtype in which the optimizer sees a parameter."""
        return torch.float32 if parameter in self.narrowed else parameter.dtype

    def waiting(self) -> dict[Tensor, Tensor]:
        """Return the values that are where `bigbatch.move_to_device` has left them, by parameter; errors as below."""
        return {parameter: self._waiting_value(parameter) for parameter in self._waiting}

    def _waiting_value(self, parameter: Tensor) -> Tensor:
        """Return the value of one of them.

        Raises:
            WindowStateError: Another engine has moved it.
        """
        if (found := host_value(parameter)) is None:
            raise WindowStateError(
                f"the float32 value of the weight {self.names[parameter]} was left in host memory by move_to_device(), "
                "and another engine has taken it: use one engine for a model."
            )
        return found.value

    def add_waiting(self, chunk: StateChunk) -> None:
        """Let a chunk hold the values of its parameters that `bigbatch.move_to_device` has left in host memory."""
        chunk.masters.update({p: self._waiting_value(p) for p in chunk.parameters if p in self._waiting})

    def add_masters(self, chunk: StateChunk) -> None:
        """Let a chunk hold the values of those of its parameters that are to be narrowed."""
        for parameter in chunk.parameters:
            is_wide = parameter not in self.narrowed and parameter.dtype is torch.float32
            if parameter in self.names and parameter not in chunk.masters and parameter.requires_grad and is_wide:
                chunk.masters[parameter] = parameter.data

    def narrow(self, chunk: StateChunk) -> None:
        """Convert the parameters of a chunk whose values are in its host memory."""
        for parameter in chunk.masters:
            self._free(parameter)
            if parameter not in self.narrowed:
                parameter.data = parameter.data.to(torch.bfloat16)
                self.narrowed[parameter] = mark(parameter)

    def check_unwritten(self, masters: Mapping[Tensor, Tensor]) -> None:
        """Raise if other code has changed a narrow weight: the next update would overwrite it.

        Memory that was written to or replaced may hold the same values again, as after weights were exchanged for an
        evaluation. What was written through ``.data`` is found in the next update, when both values are on the device.

        Args:
            masters: The float32 values, in host memory.

        Raises:
            WindowStateError: It has.
        """
        for parameter, known in self.narrowed.items():
            if mark(parameter) != known and parameter not in self._hidden:
                master = masters[parameter]
                if differs(parameter.data.to(master.device), master):
                    raise WindowStateError(
                        f"the weight {self.names[parameter]} was written to by other code, and with "
                        f'offload="{self._level}" '
                        "its value in float32 is in host memory, which the next update would write back: change "
                        "weights with engine.load_state_dict(), or before the engine is made."
                    )
                self.narrowed[parameter] = mark(parameter)
        found, self._overwritten = self._overwritten, {}
        if found and any(torch.stack(list(found.values())).tolist()):
            self._overwritten = {parameter: each for parameter, each in found.items() if each}
            raise WindowStateError(
                f"the weight {self.names[next(iter(self._overwritten))]} was written to through .data by other code, "
                f'and with offload="{self._level}" the last update has continued from its value in float32 in host '
                "memory: return to a checkpoint with engine.load_state_dict(), and change weights in no other way."
            )

    def check_narrow(self) -> None:
        """Raise inside of `wide`, where a window would compute with other weights than it updates.

        Raises:
            WindowStateError: It is inside.
        """
        if self._hidden:
            raise WindowStateError("whole_weights() is open: leave its block before the next window.")

    def hand_over(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """Use these float32 gradients of narrow weights in the next steps."""
        self._gradients = gradients

    def has_gradient(self, parameter: Tensor) -> bool:
        """Return whether the next step updates a parameter."""
        return parameter.grad is not None or parameter in self._gradients

    @contextmanager
    def stepping(self, masters: Mapping[Tensor, Tensor], gradients: Mapping[Tensor, Tensor] | None) -> Iterator[None]:
        """Put master weights, on the device, and float32 gradients in place of narrow ones; then narrow the result.

        Args:
            masters: On the device.
            gradients: On the device; None for those of `hand_over`.
        """
        gradients = self._gradients if gradients is None else gradients
        before = {parameter: parameter.data for parameter in masters}
        try:
            for parameter, master in masters.items():
                self._overwritten[parameter] = differs(parameter.data, master)
                parameter.data = master
                parameter.grad = gradients.get(parameter)
            yield
            for parameter, narrow in before.items():
                if parameter.data_ptr() != masters[parameter].data_ptr():  # the optimizer has replaced it
                    masters[parameter].copy_(parameter.data)
                narrow.copy_(masters[parameter])
        finally:
            for parameter, narrow in before.items():
                parameter.grad = None
                parameter.data = narrow
                self.narrowed[parameter] = mark(parameter)

    @contextmanager
    def wide(self, masters: Mapping[Tensor, Tensor], device: torch.device | None = None) -> Iterator[None]:
        """Put master weights in place of narrow weights, to be read: those in host memory, or copies on a device."""
        before = {p: p.data for p in masters if p in self.narrowed and p not in self._hidden}
        self._hidden.update(before)
        try:
            for parameter in before:
                master = masters[parameter]
                parameter.data = master if device is None else master.to(device)
            yield
        finally:
            for parameter, narrow in before.items():
                parameter.data = narrow
                del self._hidden[parameter]

    def refresh(self, masters: Mapping[Tensor, Tensor]) -> None:
        """Write narrow weights after their master weights have changed."""
        self._overwritten.clear()
        for parameter, master in masters.items():
            if parameter not in self.narrowed:
                continue
            if parameter in self._hidden:
                self._hidden[parameter].copy_(master)
                continue
            if parameter.dtype is not torch.bfloat16:  # other code has converted it
                parameter.data = parameter.data.to(torch.bfloat16)
            parameter.data.copy_(master)
            self.narrowed[parameter] = mark(parameter)

    def widen(self, parameter: Tensor, masters: dict[Tensor, Tensor]) -> None:
        """Put the float32 value of a weight back on the device."""
        if parameter in self.narrowed:
            del self.narrowed[parameter]
            parameter.data = masters[parameter].to(parameter.device, copy=True)
        self._free(parameter)
        self._overwritten.pop(parameter, None)
        masters.pop(parameter, None)

    def keep_wide(self, parameter: Tensor, masters: dict[Tensor, Tensor]) -> None:
        """Put the float32 value of a weight back on the device, for good."""
        del self.names[parameter]
        self.widen(parameter, masters)

    def _free(self, parameter: Tensor) -> None:
        """Free the value that `move_to_device` has left in host memory: it is elsewhere now."""
        if parameter in self._waiting:
            self._waiting.remove(parameter)
            forget(parameter)

    def close(self) -> None:
        """Narrow no others than those that are or were narrow: how a loss reads these is known."""
        self.names = {parameter: name for parameter, name in self.names.items() if parameter in self.narrowed}


def find_narrow_weights(model: nn.Module, parameters: Sequence[Tensor]) -> dict[Tensor, str]:
    """Return the weights that a linear layer alone has, of those that an optimizer updates, with their names.

    The layer is exactly an ``nn.Linear``, and its weight a float32 parameter that no other module shares and no hook of
    other code waits for; or one that `bigbatch.move_to_device` has rounded.
    """
    trained = set(parameters)
    owners: dict[Tensor, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[parameter] = owners.get(parameter, 0) + 1
    return {
        module.weight: f"{name}.weight".lstrip(".")
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module.weight in trained
        and type(module.weight) is nn.Parameter
        and (module.weight.dtype is torch.float32 or host_value(module.weight) is not None)
        and owners[module.weight] == 1
        and not module.weight._backward_hooks
        and not module.weight._post_accumulate_grad_hooks
    }
