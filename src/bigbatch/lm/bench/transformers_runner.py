"""transformers' Trainer: one update from a data set that is exactly the batch."""

import dataclasses
import tempfile
from collections.abc import Sequence
from typing import Any

from bigbatch.lm.bench.meter import Meter
from bigbatch.lm.bench.peer import Peer, liger_obstacle, pad
from bigbatch.lm.bench.shared_model import SharedModel
from bigbatch.lm.bench.workload import Sample


class TransformersDefault(Peer):
    """The Trainer with default options. Its construction and the loading of the batch are not measured."""

    def options(self, stage: SharedModel) -> dict[str, Any]:
        """Return the options in addition to the micro-batch."""
        return {}

    def update(self, stage: SharedModel, samples: Sequence[Sample], meter: Meter) -> None:
        """Train for one step."""
        import transformers

        class Between(transformers.TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                meter.start()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                meter.stop()

        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                folder,
                max_steps=1,
                per_device_train_batch_size=self.samples,
                gradient_accumulation_steps=self.num_microbatches(samples),
                max_grad_norm=0.0,
                lr_scheduler_type="constant",
                bf16=stage.device_spec.precision == "bf16",
                use_cpu=stage.device.type == "cpu",
                dataloader_pin_memory=stage.device.type == "cuda",
                remove_unused_columns=False,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                **self.options(stage),
            )
            arguments._n_gpu = min(1, arguments.n_gpu)  # otherwise it uses all visible GPUs
            trainer = transformers.Trainer(
                stage.model,
                arguments,
                train_dataset=list(samples),
                data_collator=pad,
                optimizers=(stage.optimizer, None),
                callbacks=[Between()],
            )
            trainer.train()


class TransformersCheckpointing(TransformersDefault):
    """The Trainer with activation checkpointing."""

    def options(self, stage: SharedModel) -> dict[str, Any]:
        """Return the options in addition to the micro-batch."""
        return _checkpointing()


class TransformersTuned(TransformersDefault):
    """The Trainer with every option that saves time or memory."""

    def options(self, stage: SharedModel) -> dict[str, Any]:
        """Return the options in addition to the micro-batch."""
        obstacle = liger_obstacle(stage.device)
        self.notes = ["Liger Kernel was used" if obstacle is None else f"Liger Kernel was not used: {obstacle}"]
        return {
            **_checkpointing(),
            "train_sampling_strategy": "group_by_length",
            "use_liger_kernel": obstacle is None,
        }


def _checkpointing() -> dict[str, Any]:
    """Return the checkpointing arguments; their names changed after transformers 5.17, and the old ones warn."""
    import transformers

    names = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
