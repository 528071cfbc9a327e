"""What windows with ``reproducible=True`` depend on besides model and optimizer; it belongs to the state of a run."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from bigbatch.accumulation.value_checks import check_keys, check_whole, damaged
from bigbatch.gradients.gradient_scales import GradientScales


class ReproducibleState:
    """Seed, number of windows and scales of the gradient sums.

    Attributes:
        scales: Of the gradient sums.
        seed: From which every quantum is seeded: `torch.initial_seed` of the first rank when the first window opens;
            None before that.
        num_windows: Windows that ended, applied or skipped.
    """

    def __init__(self) -> None:
        self.scales = GradientScales()
        self.seed: int | None = None
        self.num_windows = 0

    def start(self, seed: int) -> int:
        """Return the seed of the run: ``seed`` if none was set."""
        if self.seed is None:
            self.seed = seed
        return self.seed

    def end_window(self) -> None:
        """Count a window."""
        self.num_windows += 1

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "seed": self.seed,
            "num_windows": self.num_windows,
            "num_threads": torch.get_num_threads(),
            "scales": self.scales.state_dict(),
        }

    def check_state_dict(self, state: Any) -> None:
        """Raise ValueError if `load_state_dict` does not accept a state; change nothing."""
        found = check_keys("reproducible", state, ("seed", "num_windows", "num_threads", "scales"))
        if found["seed"] is not None:
            check_whole("reproducible.seed", found["seed"])
        check_whole("reproducible.num_windows", found["num_windows"])
        check_whole("reproducible.num_threads", found["num_threads"], at_least=1)
        try:
            GradientScales.check_state_dict(found["scales"])
        except ValueError:
            raise damaged("reproducible.scales", "is not a list of windows with exponents and num_quanta") from None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; warns if it was made with another number of threads.

        Raises:
            ValueError: It is damaged; nothing is changed then.
        """
        self.check_state_dict(state)
        self.seed, self.num_windows = state["seed"], state["num_windows"]
        self.scales.load_state_dict(state["scales"])
        if state["num_threads"] != (now := torch.get_num_threads()):
            warnings.warn(
                f"the state was made with {state['num_threads']} threads for each process, and this process has {now}: "
                f"sums of the CPU round differently. Call torch.set_num_threads({state['num_threads']}) for the same "
                "bits.",
                stacklevel=2,
            )
