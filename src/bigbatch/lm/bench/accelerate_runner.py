"""accelerate's ``accumulate`` loop, from its guide to gradient accumulation."""

from collections.abc import Sequence

from bigbatch.lm.bench.meter import Meter
from bigbatch.lm.bench.peer import Peer
from bigbatch.lm.bench.shared_model import SharedModel
from bigbatch.lm.bench.workload import Sample


class AccelerateRunner(Peer):
    """The loop of the guide, with the loss of the model."""

    def update(self, stage: SharedModel, samples: Sequence[Sample], meter: Meter) -> None:
        """Run the loop until its first step."""
        import accelerate

        accelerator = accelerate.Accelerator(
            gradient_accumulation_steps=self.num_microbatches(samples),
            mixed_precision="bf16" if stage.device_spec.precision == "bf16" else "no",
            cpu=stage.device.type == "cpu",
        )
        model, optimizer, loader = accelerator.prepare(stage.model, stage.optimizer, self.loader(stage, samples))
        meter.start()
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        meter.stop()
