"""The plain values of an engine that its next windows depend on: the size of micro-batches and averages of windows."""

from collections.abc import Mapping
from typing import Any

from bigbatch.accumulation.accumulator import Accumulator
from bigbatch.accumulation.value_checks import check_whole
from bigbatch.engine.microbatch_size import MicrobatchSize
from bigbatch.scaling.noise_scale import NoiseScaleEstimator

REPRODUCIBLE, QUANTUM = "reproducible", "quantum"  # keys of an engine with reproducible=True only
OFFLOAD = "offload"  # in states of earlier versions; levels of offload have the same bits


class EngineProgress:
    """One state of several parts of an engine.

    Args:
        microbatch_size: Its values are keys of the state.
        accumulator: The averages of its noise scale are ``noise``; None if it does not measure them, and those of a
            state are ignored. With ``reproducible=True`` its seed and its scales are ``reproducible``.
        quantum: Samples that are computed together, with ``reproducible=True``.
    """

    def __init__(self, microbatch_size: MicrobatchSize, accumulator: Accumulator, quantum: int | None) -> None:
        self._microbatch_size = microbatch_size
        self._noise = accumulator.noise
        self._reproducible = accumulator.reproducible
        self._quantum = quantum

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        noise = None if self._noise is None else self._noise.state_dict()
        state = {**self._microbatch_size.state_dict(), "noise": noise}
        if self._reproducible is not None:
            state |= {REPRODUCIBLE: self._reproducible.state_dict(), QUANTUM: self._quantum}
        return state

    @property
    def optional_keys(self) -> set[str]:
        """Keys that a state may lack or have in addition; `check_state_dict` decides about them."""
        return {REPRODUCIBLE, QUANTUM, OFFLOAD}

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that `load_state_dict` accepts a state, without changing anything.

        Raises:
            ValueError: A value is missing or invalid, or the state is of an engine with another ``quantum``.
        """
        self._microbatch_size.check_state_dict(state)
        if state.get("noise") is not None:
            NoiseScaleEstimator.check_state_dict(state["noise"])
        if (REPRODUCIBLE in state) != (self._reproducible is not None):
            which, other = ("with", "without") if REPRODUCIBLE in state else ("without", "with")
            raise ValueError(
                f"the state is of an engine {which} reproducible=True, and this one was made {other} it: make it as "
                "that one, since the next updates would have other bits."
            )
        if self._reproducible is None:
            return
        self._reproducible.check_state_dict(state[REPRODUCIBLE])
        if (quantum := check_whole("engine.quantum", state.get(QUANTUM), at_least=1)) != self._quantum:
            raise ValueError(
                f"the state is of an engine with quantum={quantum}, and this one has quantum={self._quantum}: pass "
                f"quantum={quantum}, since the next updates would have other bits."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; averages stay if it has none.

        Raises:
            ValueError: As for `check_state_dict`; nothing is changed then.
        """
        self.check_state_dict(state)
        self._microbatch_size.load_state_dict(state)
        if self._noise is not None and state.get("noise") is not None:
            self._noise.load_state_dict(state["noise"])
        if self._reproducible is not None:
            self._reproducible.load_state_dict(state[REPRODUCIBLE])
