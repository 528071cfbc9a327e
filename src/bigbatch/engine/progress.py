"""The plain values of an engine that its next windows depend on: the size of micro-batches and the noise averages."""

from collections.abc import Mapping
from typing import Any

from bigbatch.accumulation.noise_observer import NoiseObserver
from bigbatch.engine.microbatch_size import MicrobatchSize
from bigbatch.scaling.noise_scale import NoiseScaleEstimator


class EngineProgress:
    """One state of several parts of an engine.

    Args:
        microbatch_size: Its values are keys of the state.
        noise: Its averages are ``noise``; None if the engine does not measure them, and those of a state are ignored.
    """

    def __init__(self, microbatch_size: MicrobatchSize, noise: NoiseObserver | None) -> None:
        self._microbatch_size = microbatch_size
        self._noise = noise

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        noise = None if self._noise is None else self._noise.state_dict()
        return {**self._microbatch_size.state_dict(), "noise": noise}

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that `load_state_dict` accepts a state, without changing anything.

        Raises:
            ValueError: A value is missing or invalid.
        """
        self._microbatch_size.check_state_dict(state)
        if state.get("noise") is not None:
            NoiseScaleEstimator.check_state_dict(state["noise"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; averages stay if it has none.

        Raises:
            ValueError: As for `check_state_dict`; nothing is changed then.
        """
        self.check_state_dict(state)
        self._microbatch_size.load_state_dict(state)
        if self._noise is not None and state.get("noise") is not None:
            self._noise.load_state_dict(state["noise"])
