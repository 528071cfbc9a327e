"""Read the first window of a trainer, and its last one if that is shorter, without advancing its data loader."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset

from bigbatch.errors import InputError
from bigbatch.integrations.transformers.samples import SampleBatch, SampleCollator, copy_samples
from bigbatch.integrations.transformers.trainer_state import collator_state
from bigbatch.integrations.transformers.unit_counts import cut_rows, has_row_for_each_sample
from bigbatch.integrations.transformers.unit_samples import same_batches
from bigbatch.rng import seed_everything


@dataclass(frozen=True)
class WindowData:
    """The data of one window on this rank.

    Attributes:
        name: ``"first"`` or ``"last"``.
        batches: The samples of each micro-batch, or the micro-batches, if the loader collated them.
        is_collated: Whether it did.
    """

    name: str
    batches: Sequence[Any]
    is_collated: bool
    samples: Sequence[Any] = field(init=False)

    def __post_init__(self) -> None:
        samples = list(self.batches) if self.is_collated else [each for batch in self.batches for each in batch]
        object.__setattr__(self, "samples", samples)


def read_windows(trainer: Any) -> list[WindowData]:
    """Return the first window of an epoch, and the last one if the loader shows that it has fewer micro-batches.

    Args:
        trainer: Its class is not that of `exact`; its state is restored by the caller.

    Raises:
        InputError: The loader has no batch.
    """
    steps = trainer.args.gradient_accumulation_steps
    with _loader_of_samples(trainer) as loader:
        sampler = getattr(loader, "batch_sampler", None)
        dataset: Any = getattr(loader, "dataset", None)
        if sampler is None or isinstance(dataset, IterableDataset):
            chosen = {"first": list(islice(iter(loader), steps))}
        else:
            indices = list(sampler)
            collate = loader.collate_fn
            chosen = {"first": [collate([dataset[i] for i in batch]) for batch in indices[:steps]]}
            start = len(indices) // steps * steps or len(indices)
            is_ragged = not start % steps and len(indices) and len(indices[-1]) != len(indices[0])
            if start == len(indices) and is_ragged and len(indices) > steps:
                start -= steps
            if indices[start:]:
                chosen["last"] = [collate([dataset[i] for i in batch]) for batch in indices[start:]]
    if not chosen["first"]:
        raise InputError(f"the train dataloader of {type(trainer).__name__} has no batch: pass a train_dataset.")
    return [_window(name, batches) for name, batches in chosen.items()]


def _window(name: str, batches: Sequence[Any]) -> WindowData:
    if all(isinstance(batch, SampleBatch) for batch in batches):
        return WindowData(name, [batch.samples for batch in batches], is_collated=False)
    return WindowData(name, batches, is_collated=True)


@contextmanager
def _loader_of_samples(trainer: Any) -> Iterator[Any]:
    """Yield a new train dataloader whose batches are not collated; accelerate forgets it on exit."""
    accelerator, collator = trainer.accelerator, trainer.data_collator
    config, state = accelerator.dataloader_config, accelerator.gradient_state
    loaders, dispatch_batches = list(accelerator._dataloaders), config.dispatch_batches
    references = list(state.dataloader_references)
    trainer.data_collator, config.dispatch_batches = SampleCollator(collator), False
    try:
        yield trainer.get_train_dataloader()
    finally:
        trainer.data_collator, config.dispatch_batches = collator, dispatch_batches
        accelerator._dataloaders[:] = loaders
        state.dataloader_references = references


class FixedCollator:
    """A collator whose micro-batches of the same samples are equal.

    One that draws random numbers runs once for all samples of a window, and its rows are cut.

    Args:
        collate: Of the trainer.
        samples: Of the window; not collated.

    Attributes:
        samples: What to pass to it: the samples, or their rows.
        is_cut: Whether rows are cut.
    """

    def __init__(self, collate: Any, samples: Sequence[Any]) -> None:
        self._collate = collate
        self.samples: Sequence[Any] = samples
        self._whole: Any = None
        with collator_state(collate):
            seed_everything(0)
            whole = collate(copy_samples(samples))
            seed_everything(1)
            self.is_cut = not same_batches(whole, collate(copy_samples(samples)))
        if not self.is_cut:
            return
        if not has_row_for_each_sample(whole, len(samples)):
            raise InputError(
                "the data collator draws random numbers, and its micro-batches cannot be cut into samples, so the same "
                "micro-batch cannot be run twice: use a collator without random numbers for verify()."
            )
        self._whole, self.samples = whole, range(len(samples))

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Return a micro-batch of some of `samples`."""
        return cut_rows(self._whole, samples) if self.is_cut else self._collate(copy_samples(samples))
