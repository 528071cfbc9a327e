"""The predicted memory of a run next to the measured one, in the same scope.

GPU: measured = allocations of torch            expected = predicted tensors
CPU: measured = the whole process               expected = the process without tensors + predicted tensors
"""

from dataclasses import dataclass
from typing import Self

from bigbatch.lm.report.axes import number
from bigbatch.lm.report.run_reader import Run


@dataclass(frozen=True)
class MemoryPrediction:
    """Memory of a run in bytes.

    Attributes:
        measured_bytes: The measured peak.
        tensor_bytes: The predicted peak of parameters, gradients, optimizer state and activations; None if the
            micro-batch was set, not chosen.
        process_bytes: On the CPU, the process before the first update without its tensors; None if it is not known.
        is_on_cuda: Whether the measured peak is that of tensors alone.
    """

    measured_bytes: float
    tensor_bytes: float | None
    process_bytes: float | None
    is_on_cuda: bool

    @classmethod
    def of(cls, run: Run) -> Self:
        """Read the figures of a run that has measured its memory."""
        process_bytes = positive({"": run.last_event_value("process_bytes")}, "")
        measured_bytes = run.columns.highest("peak_bytes") or 0.0
        return cls(measured_bytes, positive(run.choice, "peak_bytes"), process_bytes, run.is_on_cuda)

    @property
    def expected_bytes(self) -> float | None:
        """The prediction of what was measured; of the tensors alone if the memory of the process is not known."""
        if self.tensor_bytes is None or self.is_on_cuda:
            return self.tensor_bytes
        return self.tensor_bytes + (self.process_bytes or 0.0)

    @property
    def label(self) -> str:
        """Name of the expected bytes."""
        if self.is_on_cuda:
            return "predicted"
        return "predicted tensors only" if self.process_bytes is None else "process and predicted tensors"

    def describe(self, of: str) -> str:
        """Return sentences that compare measured and expected memory; ``of`` names the run among others."""
        word = f"The measured peak{of} is {number(self.measured_bytes, 'bytes')}"
        if self.tensor_bytes is None or self.expected_bytes is None:
            return f"{word}; there is no prediction, because the micro-batch was set."
        tensors = number(self.tensor_bytes, "bytes")
        off = self.measured_bytes / self.expected_bytes - 1
        share = f"{number(abs(off), 'share')} {'more' if off >= 0 else 'less'} than"
        if self.is_on_cuda:
            return f"{word}, {share} the predicted {tensors}."
        if self.process_bytes is None:
            return (
                f"{word}: on the CPU this is the whole process with Python and libraries. The prediction of {tensors} "
                "covers only its tensors: parameters, gradients, optimizer state and activations."
            )
        process = number(self.process_bytes, "bytes")
        return (
            f"{word} for the whole process, {share} the expected {number(self.expected_bytes, 'bytes')}: {process} of "
            f"Python, libraries and data before the first update, and a predicted {tensors} of tensors. The measured "
            "peak includes the search for the micro-batch."
        )


def positive(values: object, key: str) -> float | None:
    """Return a finite number above 0 from a mapping that may hold anything; None without one."""
    value = values.get(key) if hasattr(values, "get") else None
    return float(value) if type(value) in (int, float) and 0 < value < 1e300 else None  # type: ignore[operator, arg-type]
