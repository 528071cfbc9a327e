"""What windows with ``reproducible=True`` depend on besides model and optimizer; it belongs to the state of a run."""

from collections.abc import Mapping
from typing import Any

import torch

from bigbatch.accumulation.value_checks import check_keys, check_whole, damaged
from bigbatch.gradients.gradient_scales import GradientScales


class ReproducibleState:
    """Seed, number of windows and scales of the gradient sums.

    Args:
        device: Of the parameters. On the CPU the number of threads decides how sums round, and belongs to the state.

    Attributes:
        scales: Of the gradient sums.
        seed: From which every quantum is seeded: `torch.initial_seed` of the first rank when the first window opens;
            None before that.
        num_windows: Windows that ended, applied or skipped.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cpu = device.type == "cpu"
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
        """Check that `load_state_dict` accepts a state, without changing anything.

        Raises:
            ValueError: It is damaged, or was made on the CPU with another number of threads.
        """
        found = check_keys("reproducible", state, ("seed", "num_windows", "num_threads", "scales"))
        if found["seed"] is not None:
            check_whole("reproducible.seed", found["seed"])
        check_whole("reproducible.num_windows", found["num_windows"])
        check_whole("reproducible.num_threads", found["num_threads"], at_least=1)
        try:
            GradientScales.check_state_dict(found["scales"])
        except ValueError:
            raise damaged("reproducible.scales", "is not a list of windows with exponents and num_quanta") from None
        if self._is_cpu and found["num_threads"] != (now := torch.get_num_threads()):
            raise ValueError(
                f"the state was made with {found['num_threads']} threads in each process, and this process has {now}, "
                f"with which sums round differently: call torch.set_num_threads({found['num_threads']}), or set "
                f"OMP_NUM_THREADS={found['num_threads']}."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: As for `check_state_dict`; nothing is changed then.
        """
        self.check_state_dict(state)
        self.seed, self.num_windows = state["seed"], state["num_windows"]
        self.scales.load_state_dict(state["scales"])
