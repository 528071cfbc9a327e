"""Detect code that changes gradients or parameters of an open window: a sum of its micro-batches would be wrong.

    reset → check → backward → record → check → backward → record → … → check_end → update

After each backward the ``.grad`` of every parameter and the version of every sum are recorded; before the next one they
must be the same. Both are read on the host: no device is waited for. Once every parameter has a sum, only versions are
read for each micro-batch: a ``.grad`` that was replaced is noticed because the backward does not change the version of
the recorded one. A write through ``p.grad.data`` has no version and is not seen. Nor has the step of an optimizer with
``fused=True``: one that a hook calls is seen by the values of the parameter, within its first gradient of each window.

Long because every kind of write is detected here.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any, NoReturn, TypeAlias
from weakref import WeakMethod, ref

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bigbatch.errors import WindowStateError

# Each sum of a list of parameters and its version at that time; None where there was none yet.
SumVersions: TypeAlias = tuple[list[Tensor | None], list[int | None]]

_GRAD, _VERSION, _DTYPE = attrgetter("grad"), attrgetter("_version"), attrgetter("dtype")
_REMEDY = (
    "Remove the code that does this: a window clears the gradients when it opens and when it ends, and nothing else "
    "may write to them in between."
)


class ForeignWrites:
    """Records the gradients of a window after each backward, and refuses changes by other code.

    Args:
        parameters: Of the window.
        parameters_are_wrapped: Whether sums may be replaced within a backward, as under FSDP.

    Attributes:
        sums: The sum of each parameter when it was recorded last; None where there was none.
        versions: Their versions at that time. Neither list is changed later: the next record makes others.
    """

    def __init__(self, parameters: tuple[Tensor, ...], *, parameters_are_wrapped: bool) -> None:
        self._parameters = parameters
        self._parameters_are_wrapped = parameters_are_wrapped
        self._guards: list[_HookGuard] = []
        self.reset()

    def reset(self) -> None:
        """Start with no gradients and no sums, and drop all references to them."""
        self._grads: list[Tensor | None] = [None] * len(self._parameters)
        self.sums = self._grads
        self.versions: list[int | None] = [None] * len(self._parameters)
        self._are_in_place = False  # whether all later backwards add to the same tensors
        self._adds_grads = False  # whether backwards move .grad to other sums: what is in it would be added
        self._saw_backward = False
        self._dtypes: list[torch.dtype] = []
        self._parameter_versions: list[int] = []  # at the first backward

    def begin(self) -> None:
        """Record the parameters before the first backward."""
        self._dtypes = list(map(_DTYPE, self._parameters))
        if not self._parameters_are_wrapped:
            self._parameter_versions = list(map(_VERSION, self._parameters))

    def note_backward(self) -> None:
        """Record that a backward of other code reached a parameter whose ``.grad`` is moved away."""
        self._saw_backward = True

    def record(self, float32_sums: Mapping[Tensor, Tensor], *, can_replace: bool = False) -> None:
        """Accept gradients and sums as they are now.

        Args:
            float32_sums: Those that are not stored in ``.grad``.
            can_replace: Whether the next backward may store other tensors in ``.grad``.
        """
        grads = self._grads = list(map(_GRAD, self._parameters))
        self.sums = grads
        self._adds_grads = bool(float32_sums)
        if float32_sums:
            self.sums = [float32_sums.get(p, grad) for p, grad in zip(self._parameters, grads, strict=True)]
        self._are_in_place = not (can_replace or self._parameters_are_wrapped) and all(
            total is not None and not total.is_sparse for total in self.sums
        )
        self.versions = self._read_versions()

    def record_backward(self, float32_sums: Mapping[Tensor, Tensor], *, can_replace: bool) -> int:
        """Accept what a backward added; return to how many parameters it did.

        Args:
            float32_sums: As for `record`.
            can_replace: As for `record`.

        Raises:
            WindowStateError: A ``.grad`` was replaced by other code: the backward did not add to the recorded one.
        """
        if self._are_in_place and not can_replace:
            before, self.versions = self.versions, list(map(_VERSION, self.sums))
            num_added: int = sum(self.versions) - sum(before)  # type: ignore[arg-type]
            if num_added != len(before) and not self._has_recorded_grads():  # usually each parameter is added to once
                self._refuse()
            return num_added
        sums, versions = self.sums, self.versions
        self.record(float32_sums, can_replace=can_replace)
        pairs = zip(sums, versions, self.sums, self.versions, strict=True)
        return sum(total is not old or version != old_version for old, old_version, total, version in pairs)

    def check(self) -> None:
        """Raise if gradients are not as they were recorded.

        Raises:
            WindowStateError: They were changed by other code.
        """
        if self._are_in_place:
            if list(map(_VERSION, self.sums)) != self.versions or self._saw_backward:
                self._refuse()
            if self._adds_grads and not self._has_recorded_grads():
                self._refuse()
        elif self._read_versions() != self.versions or self._saw_backward or not self._has_recorded_grads():
            self._refuse()

    def end_first_backward(self) -> None:
        """Raise if the first backward changed parameters.

        Raises:
            WindowStateError: It did.
        """
        if not self._parameter_versions or list(map(_VERSION, self._parameters)) == self._parameter_versions:
            return
        for index, before in enumerate(self._parameter_versions):
            if self._parameters[index]._version != before:
                raise WindowStateError(
                    f"the backward of a window changed {self._name(index)}, as an optimizer that is fused into "
                    "backward does. The weights have moved: remove its hooks, and start again from a checkpoint."
                )

    def check_end(self) -> None:
        """Raise if gradients or dtypes are not as they were recorded, and warn if parameters are not.

        A parameter may be written without a change, as by a model that limits one in every forward: not an error.

        Raises:
            WindowStateError: They were changed by other code.
        """
        self.check()
        if not self._has_recorded_grads():
            self._refuse()
        if self._parameter_versions and list(map(_VERSION, self._parameters)) != self._parameter_versions:
            self._warn_of_written_parameters()
        if not self._dtypes or (dtypes := list(map(_DTYPE, self._parameters))) == self._dtypes:
            return
        index = next(i for i, dtype in enumerate(dtypes) if dtype != self._dtypes[i])
        raise WindowStateError(
            f"{self._name(index)}, was {_short(self._dtypes[index])} at the first backward of the window and is "
            f"{_short(dtypes[index])} now. Convert the model between two windows."
        )

    def _warn_of_written_parameters(self) -> None:
        written = [i for i, before in enumerate(self._parameter_versions) if self._parameters[i]._version != before]
        more = f", and {len(written) - 1} more" if len(written) > 1 else ""
        warnings.warn(
            f"{self._name(written[0])}{more}, was written to after the first backward of a window and before its "
            "end, by another optimizer, by load_state_dict() or by an in-place operation: if its value changed, the "
            "micro-batches of the window used different weights. Write to parameters between two windows.",
            stacklevel=2,
        )

    def guard_hooks(self, parameters: Iterable[Tensor]) -> list[RemovableHandle]:
        """Check from now on that post-accumulate hooks of other code on these parameters only read.

        Raises:
            WindowStateError: Torch has fused an optimizer into the backward of a parameter.
        """
        handles: list[RemovableHandle] = []
        for parameter in parameters:
            hooks = parameter._post_accumulate_grad_hooks
            is_fused = "_in_backward_optimizers" in parameter.__dict__  # set by torch.distributed.optim
            if hooks or is_fused:
                handles += self._guard(parameter, hooks or {}, is_fused)
        return handles

    def _guard(self, parameter: Tensor, hooks: dict[Any, Any], is_fused: bool) -> list[RemovableHandle]:
        name = self._name(next(i for i, p in enumerate(self._parameters) if p is parameter))
        if is_fused:
            raise WindowStateError(
                f"_apply_optimizer_in_backward was called for {name}: its optimizer would step before the "
                "gradient of the window is complete. Make a model without it, and let the window's step() call the "
                "optimizer."
            )
        if all(isinstance(hook, WindowHook) for hook in hooks.values()):
            return []
        guard = _HookGuard(name)
        self._guards.append(guard)  # hooks reference it weakly
        first = on_accumulated(parameter, WindowHook(guard.before, parameter))
        for key in [key for key in hooks if key != first.id]:  # hooks run in the order of this dictionary
            hooks[key] = hooks.pop(key)
        return [first, on_accumulated(parameter, WindowHook(guard.after, parameter))]

    def _has_recorded_grads(self) -> bool:
        return all(map(is_, map(_GRAD, self._parameters), self._grads))

    def _read_versions(self) -> list[int | None]:
        if self._are_in_place:
            return list(map(_VERSION, self.sums))
        return [None if total is None else total._version for total in self.sums]

    def _refuse(self) -> NoReturn:
        when = "since its last backward" if self._dtypes else "before its first backward"
        versions = self._read_versions()
        changed = [
            index
            for index, parameter in enumerate(self._parameters)
            if parameter.grad is not self._grads[index] or versions[index] != self.versions[index]
        ]
        which = f" The first that differs is that of {self._name(changed[0])}." if changed else ""
        raise WindowStateError(
            f"the gradients of this window were changed {when}, by optimizer.zero_grad(), by clipping, by a hook, by a "
            f"backward of your own or by another window over the same parameters.{which} {_REMEDY}"
        )

    def _name(self, index: int) -> str:
        return f"parameter {index + 1} of {len(self._parameters)}, of shape {tuple(self._parameters[index].shape)}"


def check_same_parameters(before: Sequence[Tensor], now: Sequence[Tensor]) -> None:
    """Raise a WindowStateError if the parameters of an optimizer are not those that it had when the window opened."""
    if len(before) != len(now) or not all(map(is_, before, now)):
        raise WindowStateError(
            f"the optimizer had {len(before)} parameters when the window opened and has {len(now)} now, not all the "
            "same ones. Call add_param_group between two windows."
        )


class WindowHook:
    """A hook of a window, which hooks of other code are distinguished from.

    Args:
        method: Receives the parameter or its gradient. Referenced weakly: a window that is dropped needs no hook.
        parameter: What ``method`` receives; by default what torch passes, which hooks of other code may have replaced.
    """

    def __init__(self, method: "Callable[[Tensor], None]", parameter: Tensor | None = None) -> None:
        self._method: WeakMethod[Any] = WeakMethod(method)
        self._parameter = None if parameter is None else ref(parameter)

    def __call__(self, tensor: Tensor) -> None:  # noqa: D102 - as the class
        if (method := self._method()) is not None:
            method(tensor if self._parameter is None else self._parameter())

    @staticmethod
    def remove(handles: Iterable[RemovableHandle]) -> None:
        """Remove hooks by their handles; no-op for those that were removed."""
        for handle in handles:
            handle.remove()


class _HookGuard:
    """Checks that the hooks between its two calls neither change a parameter nor its gradient.

    Args:
        name: Of the parameter, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._grad: Tensor | None = None
        self._versions: tuple[int | None, int] = (None, 0)
        self._copy: Tensor | None = None  # of the parameter, within its first gradient
        self._is_first = True

    def before(self, parameter: Tensor) -> None:
        """Record a parameter before other hooks see it."""
        self._grad = parameter.grad
        self._versions = None if self._grad is None else self._grad._version, parameter._version
        if self._is_first:
            self._copy = parameter.detach().clone()

    def after(self, parameter: Tensor) -> None:
        """Check it after other hooks have seen it; raises WindowStateError."""
        recorded, self._grad = self._grad, None
        copy, self._copy = self._copy, None
        grad_version, version = self._versions
        if parameter._version != version or (copy is not None and _differ(parameter, copy)):
            if copy is not None:
                with torch.no_grad():
                    parameter.copy_(copy)
            moved = "It has been restored" if copy is not None else "It has moved: start again from a checkpoint"
            raise WindowStateError(
                f"a hook on {self._name}, changed it within backward, as an optimizer that is fused into backward "
                f"does, when the gradient of the window was not complete. {moved}; remove the hook, and let the "
                "window's step() call the optimizer."
            )
        if parameter.grad is not recorded or (recorded is not None and recorded._version != grad_version):
            raise WindowStateError(
                f"a hook on {self._name}, changed its gradient within backward, when that of the window was not "
                "complete. Remove the hook: inside a window, hooks may only read gradients."
            )
        self._is_first = False


def _differ(parameter: Tensor, copy: Tensor) -> bool:
    """Return whether values differ: fused optimizers change no version. Waits for the device."""
    if type(copy) is not Tensor or (copy.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    return not torch.allclose(parameter.detach(), copy, rtol=0.0, atol=0.0, equal_nan=True)


def on_accumulated(parameter: Tensor, hook: WindowHook) -> RemovableHandle:
    """Call a hook with a leaf after its gradient was added to ``.grad``."""
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return handle


def on_gradient(parameter: Tensor, hook: WindowHook) -> RemovableHandle:
    """Call a hook with the whole gradient of a leaf, before it is added."""
    handle: RemovableHandle = parameter.register_hook(hook)  # type: ignore[no-untyped-call]
    return handle


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
