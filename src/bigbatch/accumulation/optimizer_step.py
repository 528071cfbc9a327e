"""The step of an update: optimizers, then schedulers. It ends whole, or says that the update is torn.

guard → signals deferred → optimizer.step() of each → counted → scheduler.step() of each

Long because every way in which a step can fail is decided here.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakMethod, finalize

import torch
from torch import Tensor

from bigbatch.accumulation.step_evidence import StepEvidence, StepSnapshot
from bigbatch.errors import MemoryLimitError, TornUpdateError, WindowStateError, first_line
from bigbatch.memory.usage import is_out_of_memory
from bigbatch.signal_deferral import DeferredSignals

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from bigbatch.offload.optimizer_offload import OptimizerOffload


class OptimizerStep:
    """Steps optimizers and schedulers together, once per update.

    While a window holds gradients, any other call of ``optimizer.step()`` raises. SIGINT and SIGTERM that arrive during
    the step are handled after it. If the step fails after it changed something, the update is torn: later steps raise
    `TornUpdateError` until `reset`.

    Args:
        optimizers: Over different parameters.
        schedulers: Stepped after the optimizers.
        offload: Steps the optimizers with their state in host memory; None to step them as they are.

    Attributes:
        num_steps: Updates applied so far.
        torn: Which part of the last update failed, in a sentence; None if none did.
        require_closure: Optimizers whose step needs a closure.
    """

    def __init__(
        self,
        optimizers: Sequence["Optimizer"],
        schedulers: Sequence["LRScheduler"],
        offload: "OptimizerOffload | None" = None,
    ) -> None:
        self._offload = offload
        self.optimizers = tuple(optimizers)
        self.schedulers = tuple(schedulers)
        self.num_steps = 0
        self.torn: str | None = None
        self._evidence = StepEvidence()
        self._called: set[int] = set()  # hooked optimizers whose step ran in the current update
        self._was_evaluated = False  # whether the current optimizer called its closure
        self._is_stepping = False
        self._epochs: list[int | None] = []  # of the schedulers after the last update
        self._has_warned = False
        self.require_closure = [optimizer for optimizer in self.optimizers if _requires_closure(optimizer)]
        self._holds_gradients: WeakMethod[Callable[[], bool]] | None = None
        self._hooked = [_hook_before_step(optimizer, WeakMethod(self._on_step)) for optimizer in self.optimizers]
        finalize(self, _remove_all, [handle for _, handle in self._hooked])

    def __deepcopy__(self, memo: dict[int, Any]) -> "OptimizerStep":
        parts = copy.deepcopy((self.optimizers, self.schedulers, self._offload), memo)
        copied = OptimizerStep(*parts)
        copied.reset(self.num_steps, torn=self.torn)
        return copied

    def set_offload(self, offload: "OptimizerOffload | None") -> None:
        """Step the optimizers in another way from the next update on."""
        self._offload = offload

    def guard(self, holds_gradients: Callable[[], bool]) -> None:
        """Reject foreign steps from now on while a window holds gradients.

        Args:
            holds_gradients: A method of the open window; it is referenced weakly.
        """
        self._holds_gradients = WeakMethod(holds_gradients)
        self._is_stepping = False
        for scheduler, epoch in zip(self.schedulers, self._epochs, strict=False):
            if epoch is not None and getattr(scheduler, "last_epoch", None) == epoch + 1:
                self._warn_of_foreign_step(scheduler)

    def _warn_of_foreign_step(self, scheduler: "LRScheduler") -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{type(scheduler).__name__}.step() was called by other code since the last update, and each update "
                "calls it: the schedule is ahead of the updates. Remove the call, or leave scheduler= out.",
                stacklevel=2,
            )

    def check_not_torn(self) -> None:
        """Raise if the last update is torn.

        Raises:
            TornUpdateError: It is.
        """
        if self.torn is not None:
            raise TornUpdateError(self.torn)

    def check_between_windows(self, call: str) -> None:
        """Raise if a window holds gradients: they belong to no state, and to the parameters as they are.

        Args:
            call: The method that needs this, for the message.

        Raises:
            WindowStateError: One does.
        """
        if self._window_holds_gradients():
            raise WindowStateError(
                f"{call}() was called while a window holds gradients, which no state contains. Call it between two "
                "windows: after window.step() or window.abort(), and not inside loss_fn."
            )

    def _window_holds_gradients(self) -> bool:
        holds_gradients = None if self._holds_gradients is None else self._holds_gradients()
        return holds_gradients is not None and holds_gradients()

    def reset(self, num_steps: int, *, torn: str | None = None) -> None:
        """Continue to count after ``num_steps`` updates, with a model and optimizers that were restored."""
        self.num_steps = num_steps
        self.torn = torn
        self._epochs = []

    def run(
        self, *, grad_norm: float, loss: Callable[[], float], evaluate_again: Callable[[], Tensor] | None = None
    ) -> None:
        """Step every optimizer and every scheduler.

        Args:
            grad_norm: 2-norm of the gradient in ``.grad``, before clipping.
            loss: Returns the loss of the window, for LBFGS.
            evaluate_again: Computes the loss and the gradient of the same window again, for optimizers that need a
                closure; None if that is not possible.

        Raises:
            MemoryLimitError: Memory ran out within an optimizer's step.
            TornUpdateError: The update failed after it had begun.
            TypeError: An optimizer needs a closure, and ``evaluate_again`` is None.
            WindowStateError: An optimizer's step did nothing.
        """
        with DeferredSignals() as deferred, deferred:
            self._run(grad_norm, loss, evaluate_again)

    def _run(self, grad_norm: float, loss: Callable[[], float], evaluate_again: Callable[[], Tensor] | None) -> None:
        done: list[Any] = []
        before: StepSnapshot | None = None
        part: Any = None
        number = self.num_steps + 1
        try:
            for optimizer in self.optimizers:
                before = self._evidence.snapshot(optimizer)
                part = optimizer
                self._step(before, loss, evaluate_again)
                self._check_moved(before, grad_norm)
                done.append(optimizer)
            part = None
            self.num_steps = number
            for scheduler in self.schedulers:
                part = scheduler
                scheduler.step()
                done.append(scheduler)
            self._epochs = [getattr(scheduler, "last_epoch", None) for scheduler in self.schedulers]
        except BaseException as error:
            if any(part is each for each in done):  # interrupted between two parts
                part = None
            if not done and (part is None or (before is not None and self._is_unchanged(before))):
                _raise_unchanged(error, part)
            if len(done) < len(self.optimizers) or part is not None:
                self._raise_torn(error, number, done, part)
            self.num_steps = number
            for scheduler in self.schedulers[len(done) - len(self.optimizers) :]:
                scheduler.step()
            raise

    def _step(
        self, before: StepSnapshot, loss: Callable[[], float], evaluate_again: Callable[[], Tensor] | None
    ) -> None:
        """Call ``step`` in the way that the optimizer needs."""
        optimizer = before.optimizer
        self._called.clear()
        self._was_evaluated = False
        self._is_stepping = True
        try:
            if isinstance(optimizer, torch.optim.LBFGS):
                value = torch.tensor(loss())
                optimizer.step(lambda: value)  # type: ignore[no-untyped-call]
            elif optimizer in self.require_closure:
                self._step_with_closure(optimizer, evaluate_again)
            else:
                self._step_without_closure(before, evaluate_again)
        finally:
            self._is_stepping = False

    def _is_unchanged(self, before: StepSnapshot) -> bool:
        """Return whether it is certain that a step has changed nothing."""
        return before.unchanged if self._offload is None else not self._offload.has_begun(before.optimizer)

    def _step_without_closure(self, before: StepSnapshot, evaluate_again: Callable[[], Tensor] | None) -> None:
        if self._offload is not None:
            self._offload.step(before.optimizer)
            return
        try:
            before.optimizer.step()
            return
        except Exception as error:
            if not _asks_for_closure(error) or before.versions_changed or before.state_changed or before.values_changed:
                raise
        self._step_with_closure(before.optimizer, evaluate_again)

    def _step_with_closure(self, optimizer: "Optimizer", evaluate_again: Callable[[], Tensor] | None) -> None:
        if evaluate_again is None:
            raise TypeError(
                f"{type(optimizer).__name__}.step() needs a closure that computes the gradient again, and the "
                "micro-batches of this window are no longer available. Use bigbatch.Engine in a single process and "
                "without cuda_graphs, which runs the window again, or another optimizer."
            )

        def closure() -> Tensor:
            self._was_evaluated = True
            with torch.enable_grad():
                return evaluate_again()

        optimizer.step(closure)  # type: ignore[arg-type]

    def _check_moved(self, before: StepSnapshot, grad_norm: float) -> None:
        """Raise if the step of an optimizer did nothing, as that of a wrapper that skips steps."""
        optimizer = before.optimizer
        index = self.optimizers.index(optimizer)
        target, handle = self._hooked[index]
        ran = handle is None or id(target) in self._called
        if ran and (self._was_evaluated or self._evidence.moved(before, grad_norm=grad_norm)):
            return
        inner = "" if target is optimizer or target is None else f" (a wrapper of {type(target).__name__})"
        raise WindowStateError(
            f"{type(optimizer).__name__}.step(){inner} returned without an update: no parameter changed. A window "
            "needs an optimizer that steps at every call: pass the optimizer itself instead of its wrapper, and do not "
            "run windows inside accelerator.accumulate()."
        )

    def _raise_torn(self, error: BaseException, number: int, done: list[Any], part: Any) -> NoReturn:
        """Record that the update is torn, and raise."""
        names = " and ".join(f"{type(each).__name__}.step()" for each in done)
        finished = f"{names} finished, and " if done else ""
        failed = (
            f"{type(part).__name__}.step() did not finish" if part is not None else "the next optimizer did not start"
        )
        how = f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
        self.torn = (
            f"update {number} is torn: {finished}{failed} ({how}), so parameters, "
            "optimizer state and schedule may not belong together. Load a checkpoint: load_state_dict() of the engine, "
            "or of the model, optimizer and scheduler with a new Accumulator."
        )
        if part in self.optimizers and _is_oom(error):
            consequence = "some parameters may be updated and others not. Return to a checkpoint, and leave"
            raise MemoryLimitError(_oom_message(part, error, consequence)) from error
        raise TornUpdateError(self.torn) from error

    def _on_step(self, optimizer: "Optimizer") -> None:
        """Handle the start of a step of an optimizer, from anywhere."""
        if self._is_stepping:
            self._called.add(id(optimizer))
            return
        if self._window_holds_gradients():
            raise WindowStateError(
                f"{type(optimizer).__name__}.step() was called while a window holds undivided gradients. Remove the "
                "call: window.step() steps the optimizer, once."
            )


def _raise_unchanged(error: BaseException, optimizer: Any) -> NoReturn:
    """Raise the error of an update that changed nothing."""
    if _is_oom(error):
        raise MemoryLimitError(_oom_message(optimizer, error, "nothing was updated. Leave")) from error
    raise error


def _is_oom(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and is_out_of_memory(error)


def _oom_message(optimizer: Any, error: BaseException, consequence: str) -> str:
    return (
        f"memory ran out within the step of {type(optimizer).__name__} ({first_line(error)}): {consequence} more "
        "memory for the step: train fewer parameters or in lower precision, or pass fused=True or foreach=False to the "
        "optimizer if it accepts them."
    )


def _asks_for_closure(error: Exception) -> bool:
    return "closure" in str(error).lower() or (isinstance(error, TypeError) and "NoneType" in str(error))


def _requires_closure(optimizer: "Optimizer") -> bool:
    """Return whether ``step`` has a parameter without default."""
    try:
        inspect.signature(type(optimizer).step).bind(optimizer)  # a scheduler wraps the method of the instance
        return False
    except TypeError:
        return True
    except ValueError:  # no signature
        return False


def _hook_before_step(optimizer: Any, hook: "WeakMethod[Any]") -> tuple[Any, Any]:
    """Call a hook before each step of an optimizer; of the inner one if it is a wrapper without hooks.

    Returns:
        The optimizer that is hooked, and the handle; None for both if neither supports hooks.
    """
    target = optimizer
    while isinstance(target, torch.optim.Optimizer):

        def call(stepping: Any, _args: Any, _kwargs: Any) -> None:
            if (method := hook()) is not None:
                method(stepping)

        if "_optimizer_step_pre_hooks" in vars(target):  # its own, not those of an inner one that it delegates to
            return target, target.register_step_pre_hook(call)
        target = getattr(target, "optimizer", None)
    return None, None


def _remove_all(handles: Sequence[Any]) -> None:
    for handle in handles:
        if handle is not None:
            handle.remove()
