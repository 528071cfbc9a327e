"""The accumulation window of a user's own loop: one rank's micro-batches between two updates."""

import warnings
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from bigbatch.accumulation.pending_update import PendingUpdate
from bigbatch.accumulation.reproducible_update import ReproducibleUpdate
from bigbatch.accumulation.window_content import WindowState
from bigbatch.errors import WindowStateError
from bigbatch.types import Items
from bigbatch.window_report import WindowReport

_SECOND_TIME = (
    "the graph of this loss, or a part of it, was differentiated before, and its tensors were freed. Pass "
    "retain_graph=True to the earlier backward (of a window, or of an earlier step of truncated backpropagation), or "
    "detach() what comes from it; for several optimizers of one loss, pass all of them to one accumulator: "
    "Accumulator(model, [a, b])."
)


class Window:
    """One accumulation window: iterate over its micro-batches, then call `step` once.

        for inputs, labels in window:
            loss_sum = F.mse_loss(model(inputs), labels, reduction="sum")
            window.backward(loss_sum, items=labels.numel())
        report = window.step()                  # or window.finish(), if other code updates the weights

    As a context manager, it is dropped if an error is raised inside, and must be stepped or aborted before its end:

        with accumulator.window() as window:
            window.backward(loss_sum, items=items)
            report = window.step()

    Made by `Accumulator.windows` or `Accumulator.window`, not by hand.
    """

    def __init__(self, pending: PendingUpdate) -> None:
        self._pending = pending
        self._microbatches = pending.microbatches()
        self._counts = True  # whether the micro-batch that was yielded last counts
        self._num_drawn = 0
        self._is_in_loop = False  # over its micro-batches; False after a break
        self._ended_in_loop = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Drop an open window.

        Raises:
            WindowStateError: The block ended without error, and the window was neither stepped nor aborted.
        """
        if not self.is_open:
            return
        self.abort()
        if error is None:
            raise WindowStateError(
                f"the with block of a window ended with {self.num_microbatches} micro-batches that were not applied. "
                "Call window.step() at its end, or window.abort() to drop them."
            )

    def __iter__(self) -> Iterator[Any]:
        while self._pending.is_open:
            try:
                microbatch = next(self._microbatches)
            except StopIteration:
                if (again := self._another_pass()) is None:
                    return
                self._microbatches = again
                continue
            except BaseException:
                self.abort()  # the other ranks wait for this one
                raise
            self._counts = microbatch.counts
            self._num_drawn, self._is_in_loop = self._num_drawn + 1, True
            try:
                yield microbatch.content
            finally:
                self._is_in_loop = False

    def _another_pass(self) -> Iterator[Any] | None:
        """Return the micro-batches once more if a reproducible window needs them; else None."""
        if not isinstance(self._pending, ReproducibleUpdate):
            return None
        try:
            return None if self._pending.end_pass() else self._pending.microbatches()
        except BaseException:
            self.abort()
            raise

    @property
    def state(self) -> WindowState:
        """EMPTY, ACCUMULATING, CLOSED, ABORTED or TORN."""
        return self._pending.state

    @property
    def is_open(self) -> bool:
        """Whether the window accepts micro-batches."""
        return self._pending.is_open

    @property
    def num_microbatches(self) -> int:
        """Micro-batches added so far on this rank, without padding."""
        return self._pending.num_microbatches

    def backward(
        self,
        loss_sum: "Any | Mapping[str, tuple[Any, Items]]",
        *,
        items: "Items | None" = None,
        retain_graph: bool = False,
    ) -> None:
        """Add the gradient of one micro-batch to the window.

        Args:
            loss_sum: 0-d tensor, the **sum** of the item losses of this micro-batch; or a mapping
                ``name → (loss_sum, items)`` for a loss of several terms.
            items: Local items that the sum runs over (tokens, samples, pixels), 0 included: a number or a 0-d tensor.
                Leave out with a mapping, which contains them.
            retain_graph: As for ``loss.backward``: whether a later micro-batch differentiates this graph again, as in
                truncated backpropagation through time.

        The gradient of every micro-batch counts, also of one with 0 items: a divisor may count something else than
        the items of the sum, such as positives. Only a loss that is NaN with 0 items, a mean over nothing, adds
        nothing. If 0 items are a tensor on a device, whose value is not read, such a NaN is left out of the reported
        loss, and its gradient is added: 0 for `F.cross_entropy` without a label that counts, NaN for a division by
        the count.

        Raises:
            ValueError: The loss is not a 0-d sum that depends on the parameters, or the items are not a count. Like
                any error of the backward itself, this aborts the window.
            WindowStateError: The window is closed or aborted; or other code changed its gradients, on any parameter,
                since it opened or since its last backward; or a hook changed a parameter within this backward; or the
                graph of the loss was differentiated before.
        """
        if self._pending.state is not WindowState.ACCUMULATING:
            self._require_open("backward")
        result: Any = loss_sum if items is None else (loss_sum, items)
        try:
            self._pending.add(result, counts=self._counts, retain_graph=retain_graph)
        except BaseException as error:
            self.abort()  # a backward that failed half-way has added to some parameters and not to others
            if isinstance(error, RuntimeError) and "backward through the graph a second time" in str(error):
                raise WindowStateError(_SECOND_TIME) from error
            raise

    def step(self) -> WindowReport:
        """Divide the sums by the items, clip, update once, clear the gradients, and report. Collective over ranks.

        A window whose items add up to 0, or whose gradient is not finite, changes no parameter, no optimizer state and
        no schedule; ``report.skipped`` says so.

        Raises:
            TornUpdateError: The update failed after it had begun; the message says which part finished.
            WindowStateError: The window is closed or aborted; or other code changed its gradients, the dtype of its
                parameters, or the parameters of the optimizer.
        """
        self._require_open("step")
        self._ended_in_loop = self._is_in_loop
        try:
            return self._pending.apply()
        except BaseException:
            self.abort()
            raise

    def finish(self) -> WindowReport:
        """Leave the finished gradient in ``.grad`` and close the window: `step` without optimizer and scheduler.

            report = window.finish()
            if report.skipped is None:
                optimizer.step()

        The sums are reduced over ranks, divided by the items and clipped, and ``gradient_hook`` is called. The gradient
        has the dtype of its parameter, and stays until the next window of the accumulator opens or other code clears
        it. It is NaN if the loss or the gradient of the window is not finite, so that a GradScaler skips it, and None
        for a window without items; ``report.skipped`` is the reason. ``report.step`` is the number of updates by
        `step`. Collective over ranks.

        Raises:
            NonFiniteError: The loss or the gradient is not finite, and ``nonfinite`` is ``"raise"``.
            WindowStateError: As for `step`.
        """
        self._require_open("finish")
        self._ended_in_loop = self._is_in_loop
        try:
            return self._pending.finish()
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Drop the window: gradients are cleared and nothing is updated. No-op for a finished window."""
        self._pending.discard()

    def _require_open(self, call: str) -> None:
        if not self.is_open:
            raise WindowStateError(
                f"window.{call}() was called on a window that is {self.state.value}. A window ends with its step(), "
                "finish() or abort(); take the next one from the accumulator."
            )


class EarlyEnds:
    """Warns, once, of windows that are ended within the loop over their micro-batches, although there are more.

    Args:
        num_microbatches: Of one window.
    """

    def __init__(self, num_microbatches: int) -> None:
        self._num_microbatches = num_microbatches
        self._after: int | None = None
        self._has_warned = False

    def note(self, window: Window) -> None:
        """Note whether the window that has ended had all of its micro-batches."""
        if window._ended_in_loop and window._num_drawn < self._num_microbatches:
            self._after = self._after or window._num_drawn

    def warn(self) -> None:
        """Warn if a window was ended early; call when there is another micro-batch."""
        if self._after is None or self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            f"a window of {self._num_microbatches} micro-batches was ended after {self._after}, and there were more: "
            "its step() or finish() is within the loop over its micro-batches, so that updates have fewer than "
            "num_microbatches. Call it after that loop; to end a window early on purpose, leave that loop by break.",
            stacklevel=3,  # the loop over the windows
        )
