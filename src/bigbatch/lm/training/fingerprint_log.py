"""Write fingerprints of gradients and parameters after every update of a reproducible run.

Two passes over the parameters and two over the gradients, and 16 bytes in the file for each parameter tensor.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from bigbatch.engine.engine import Engine
from bigbatch.errors import BigbatchError, os_reason
from bigbatch.lm.files import open_regular
from bigbatch.lm.runs.directory import as_line
from bigbatch.lm.runs.file_names import FINGERPRINTS
from bigbatch.lm.runs.fingerprints import begin_fingerprints
from bigbatch.lm.training.callbacks import MetricsRow, TrainerCallback
from bigbatch.lm.training.fingerprints import GradientFingerprints, as_text, checksums
from bigbatch.lm.training.setup import TrainingSetup


class FingerprintCallback:
    """Passes all events on, after it has written the fingerprints of an update.

    Args:
        callback: Receives the events.
        setup: Of the run.
        gradients: The gradient hook of its engine.
        folder: The run directory.
        done: Updates at the checkpoint that the run resumes from; 0 for a new run.

    Raises:
        BigbatchError: The file cannot be written.
    """

    def __init__(
        self,
        callback: TrainerCallback,
        setup: TrainingSetup,
        gradients: GradientFingerprints,
        folder: Path,
        *,
        done: int,
    ) -> None:
        self._callback = callback
        named = [(name, p) for name, p in setup.model.named_parameters() if p.requires_grad]
        self._parameters = [parameter for _, parameter in named]
        self._gradients = gradients
        self._path = folder / FINGERPRINTS
        setting = {
            "quantum": setup.config.quantum_in_use,
            "num_threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": str(setup.device_spec),
        }
        try:
            begin_fingerprints(folder, [name for name, _ in named], setting, done=done)
        except OSError as error:
            raise BigbatchError(f"{self._path} cannot be written: {os_reason(error)}.") from error

    def on_update(self, row: MetricsRow) -> None:
        """Write the fingerprints of an update."""
        line = {
            "step": row["step"],
            "gradients": self._gradients.take(self._parameters),
            "parameters": as_text(checksums(self._parameters)),
        }
        try:
            with open_regular(self._path, "ab") as file:
                file.write(as_line(line))
        except OSError as error:
            raise BigbatchError(f"{self._path} cannot be written: {os_reason(error)}.") from error
        self._callback.on_update(row)

    def on_validation(self, step: int, loss: float) -> None:
        """Pass the event on."""
        self._callback.on_validation(step, loss)

    def on_evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Pass the event on."""
        self._callback.on_evaluation(step, losses)

    def on_validation_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass the event on."""
        self._callback.on_validation_metrics(step, metrics)

    def on_sample(self, step: int, text: str) -> None:
        """Pass the event on."""
        self._callback.on_sample(step, text)


def with_fingerprints(
    callback: TrainerCallback, setup: TrainingSetup, engine: Engine, folder: Path, *, done: int
) -> TrainerCallback:
    """Return a callback that also writes fingerprints, on the first rank of a reproducible run."""
    hook = engine.accumulator.update.gradient_hook
    if not isinstance(hook, GradientFingerprints):
        return callback
    return FingerprintCallback(callback, setup, hook, folder, done=done)
