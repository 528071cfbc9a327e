"""The optimizer that `ExactAccelerator` prepares: its step first ends a window that no `backward` has ended.

step() → end_window(): .grad ×= ranks / items → the step of accelerate's optimizer
"""

from collections.abc import Callable
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer


class WindowOptimizer(AcceleratedOptimizer):  # type: ignore[misc]
    """An ``AcceleratedOptimizer`` that never applies a gradient that is not divided.

    Args:
        prepared: What accelerate prepared.
        end_window: Divides the gradient if a window is open, or raises; does nothing otherwise.
        device_placement: Whether the state of the optimizer is moved to accelerate's device.

    Attributes:
        end_window: As passed; None in a copy, whose parameters are those of no accelerator.
    """

    end_window: Callable[[], None] | None = None

    def __init__(
        self, prepared: AcceleratedOptimizer, end_window: Callable[[], None], *, device_placement: bool
    ) -> None:
        super().__init__(prepared.optimizer, device_placement=device_placement, scaler=prepared.scaler)
        self.end_window = end_window

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "end_window"}

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """As ``AcceleratedOptimizer.step``; a closure may run the last `backward` of the window.

        Raises:
            InputError: The gradient cannot be divided any more, or not on this rank alone.
        """
        end_window = self.end_window
        if end_window is None or not self.gradient_state.sync_gradients:
            super().step(closure)
        elif closure is None:
            end_window()
            super().step()
        else:

            def evaluate() -> Any:
                loss = closure()
                end_window()
                return loss

            super().step(evaluate)
