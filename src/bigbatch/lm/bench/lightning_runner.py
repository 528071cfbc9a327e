"""Lightning's Trainer with ``accumulate_grad_batches``, from its documentation."""

import importlib
import importlib.util
import tempfile
from collections.abc import Sequence
from typing import Any

from bigbatch.lm.bench.entries import NEEDS
from bigbatch.lm.bench.meter import Meter
from bigbatch.lm.bench.peer import Peer
from bigbatch.lm.bench.shared_model import SharedModel
from bigbatch.lm.bench.workload import Sample


class LightningRunner(Peer):
    """Lightning's Trainer on a module that returns the model's loss. Its construction is not measured."""

    def update(self, stage: SharedModel, samples: Sequence[Sample], meter: Meter) -> None:
        """Fit for one step."""
        lightning = _import()

        class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.model = stage.model

            def training_step(self, batch: Sample, _index: int) -> Any:
                return self.model(**batch).loss

            def configure_optimizers(self) -> Any:
                return stage.optimizer

        class Between(lightning.Callback):  # type: ignore[misc, name-defined]
            def on_train_batch_start(self, _trainer: Any, _module: Any, _batch: Any, batch_idx: int) -> None:
                if batch_idx == 0:
                    meter.start()

            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                if trainer.global_step:
                    meter.stop()

        with tempfile.TemporaryDirectory() as folder:
            trainer = lightning.Trainer(
                max_steps=1,
                accumulate_grad_batches=self.num_microbatches(samples),
                precision="bf16-mixed" if stage.device_spec.precision == "bf16" else "32-true",
                accelerator="gpu" if stage.device.type == "cuda" else "cpu",
                devices=1,
                default_root_dir=folder,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[Between()],
            )
            trainer.fit(Module(), self.loader(stage, samples))


def _import() -> Any:
    """Import Lightning under whichever of its two names is installed."""
    name = next(name for name in NEEDS["lightning"] if importlib.util.find_spec(name))
    return importlib.import_module("lightning.pytorch" if name == "lightning" else name)
