"""The accumulation window: one rank's micro-batches between two updates, and what may be done with it when.

    EMPTY ──backward──▶ ACCUMULATING ──step──▶ CLOSED
      └───────step / abort───────┴────abort───▶ ABORTED

This file holds the states alone. What a backward or an update does is handed in as a `PendingUpdate`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from bigbatch.errors import WindowStateError

if TYPE_CHECKING:
    from bigbatch.types import Items
    from bigbatch.window_report import WindowReport


class WindowState(Enum):
    """Where a window stands."""

    EMPTY = "empty"
    ACCUMULATING = "accumulating"
    CLOSED = "closed"
    ABORTED = "aborted"


class Transaction(Protocol):
    """What a window does to the model: add a micro-batch, apply the total, or undo."""

    def add(self, loss_sum: Any, items: "Items | None") -> None:
        """Add the gradient of one micro-batch."""

    def apply(self) -> "WindowReport":
        """Divide, clip and update, once."""

    def discard(self) -> None:
        """Drop what was added."""


class Window:
    """One accumulation window: iterate over its micro-batches, then call `step` once.

        for inputs, labels in window:
            loss_sum = F.mse_loss(model(inputs), labels, reduction="sum")
            window.backward(loss_sum, items=labels.numel())
        report = window.step()

    Made by `Accumulator.windows` or `Accumulator.window`, not by hand.
    """

    def __init__(self, microbatches: Iterator[Any], pending: Transaction) -> None:
        self._microbatches = microbatches
        self._pending = pending
        self._state = WindowState.EMPTY
        self._num_microbatches = 0

    def set_microbatches(self, microbatches: Iterable[Any]) -> None:
        """Set what iterating over the window gives. For `Accumulator`, not for loops."""
        self._microbatches = iter(microbatches)

    def __iter__(self) -> Iterator[Any]:
        while self.is_open:
            try:
                microbatch = next(self._microbatches)
            except StopIteration:
                return
            except BaseException:
                self.abort()  # other ranks wait to hear of it
                raise
            yield microbatch

    @property
    def state(self) -> WindowState:
        """EMPTY, ACCUMULATING, CLOSED or ABORTED."""
        return self._state

    @property
    def is_open(self) -> bool:
        """Whether the window still takes micro-batches."""
        return self._state in (WindowState.EMPTY, WindowState.ACCUMULATING)

    @property
    def num_microbatches(self) -> int:
        """Micro-batches that this window has taken so far."""
        return self._num_microbatches

    def backward(self, loss_sum: "Any | Mapping[str, tuple[Any, Items]]", *, items: "Items | None" = None) -> None:
        """Add the gradient of one micro-batch to the window.

        Args:
            loss_sum: 0-d tensor, the **sum** of the item losses of this micro-batch; or a mapping
                ``name → (loss_sum, items)`` for a loss of several terms.
            items: How many items that sum runs over (tokens, samples, pixels), 0 included: a number or a 0-d
                tensor. Left out with a mapping, which brings its own.

        A micro-batch with no item adds nothing, whatever its loss is (a mean over nothing is 0/0).

        Raises:
            ValueError: The loss is not a 0-d sum that depends on the parameters, or the items are not a count. Like
                any error of the backward itself, this aborts the window.
            WindowStateError: The window is closed or aborted.
        """
        self.run(self._pending.add, loss_sum, items)

    def run(self, add: Callable[..., None], *arguments: Any) -> None:
        """Let ``add`` bring in one micro-batch; whatever it raises aborts the window. For `Engine`, not for loops."""
        self._require_open("backward")
        self._state = WindowState.ACCUMULATING
        try:
            add(*arguments)
        except BaseException:
            self.abort()  # a backward that failed half-way has added to some parameters and not to others
            raise
        self._num_microbatches += 1

    def step(self) -> "WindowReport":
        """Divide the sums by the items, clip, update once, clear, and report.

        A window without any item, or whose gradient is not finite, changes no parameter, no optimizer state and no
        schedule; ``report.skipped`` says so.

        Raises:
            WindowStateError: The window is closed or aborted.
        """
        self._require_open("step")
        try:
            report = self._pending.apply()
        except BaseException:
            self.abort()
            raise
        self._state = WindowState.CLOSED
        return report

    def abort(self) -> None:
        """Drop the window: its gradients are cleared and nothing is updated. Does nothing on a finished one."""
        if self.is_open:
            self._state = WindowState.ABORTED
            self._pending.discard()

    def _require_open(self, call: str) -> None:
        if not self.is_open:
            raise WindowStateError(
                f"window.{call}() was called on a window that is {self._state.value}. "
                "A window ends with its step() or abort(); take the next one from the accumulator."
            )
