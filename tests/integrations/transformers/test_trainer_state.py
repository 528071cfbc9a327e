"""Trials of `exact` and `verify` leave no trace in what a trainer's loss counts, whatever it counts in."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer

from bigbatch.errors import InputError
from bigbatch.integrations.transformers import exact, verify
from bigbatch.integrations.transformers.trainer_state import is_own_object
from bigbatch.trials import object_state
from integrations.transformers import trainer_cases as cases
from support import full_batch_reference as ref


class Meter:
    """Counts, as the meters of many training scripts do."""

    def __init__(self):
        self.count, self.history = 0, []

    def update(self, number):
        self.count += number
        self.history.append(number)


class Slotted:
    __slots__ = ("count",)

    def __init__(self):
        self.count = 0


class Counting(cases.MeanLoss):
    """Counts labels in attributes of many kinds."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.number, self.tensor, self.array = 0, torch.zeros((), dtype=torch.long), np.zeros(1, dtype=np.int64)
        self.meter, self.slotted, self.nested = Meter(), Slotted(), {"meter": Meter(), "tensors": [torch.zeros(1)]}
        self.generator = np.random.default_rng(0)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        number = cases.num_labels(inputs)
        self.number += number
        self.tensor += number
        self.array += number
        self.slotted.count += number
        self.nested["tensors"][0] += number
        self.meter.update(number)
        self.nested["meter"].update(number)
        self.generator.random()
        return super().compute_loss(model, inputs, return_outputs)

    @property
    def counts(self):
        nested = self.nested["meter"].count, int(self.nested["tensors"][0])
        return {self.number, int(self.tensor), int(self.array[0]), self.meter.count, self.slotted.count, *nested}


def total(trainer):
    return sum(cases.num_labels(window) for window in cases.windows(trainer.train_dataset))


def test_every_label_is_counted_once(tmp_path: Path):
    trainer, _ = cases.make(tmp_path, Counting)
    exact(trainer).train()
    assert trainer.counts == {total(trainer)}
    assert sum(trainer.meter.history) == total(trainer)
    draws = np.random.default_rng(0).random(len(trainer.meter.history) + 1)
    assert trainer.generator.random() == draws[-1]


@pytest.mark.parametrize("is_exact", [False, True])
def test_verify_counts_nothing(tmp_path: Path, is_exact: bool):
    trainer, _ = cases.make(tmp_path, Counting)
    if is_exact:
        exact(trainer)
    verify(trainer)
    assert trainer.counts == {0}
    assert trainer.meter.history == []
    assert trainer.generator.random() == np.random.default_rng(0).random()


class CountingLoss:
    """A compute_loss_func with a state."""

    def __init__(self):
        self.count = 0

    def __call__(self, outputs, labels, num_items_in_batch=None):
        self.count += int((labels != ref.IGNORED).sum())
        logits = outputs["logits"].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=ref.IGNORED)

    def method(self, outputs, labels, num_items_in_batch=None):
        return self(outputs, labels)


class WithLogits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = ref.make_model()

    def forward(self, tokens, labels=None):
        return {"logits": self.inner(tokens)}


@pytest.mark.parametrize("kind", ["object", "method", "partial"])
def test_loss_function_with_a_state_counts_once(tmp_path: Path, kind: str):
    loss = CountingLoss()
    function = {"object": loss, "method": loss.method, "partial": functools.partial(loss)}[kind]
    trainer, _ = cases.make(tmp_path, Trainer, model=WithLogits())
    trainer.compute_loss_func = function
    exact(trainer, items=cases.num_labels).train()
    assert loss.count == total(trainer)


@pytest.mark.parametrize("place", ["attribute", "object"])
def test_large_tensor_that_is_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str):
    monkeypatch.setattr(object_state, "MAX_BYTES", 1024)

    class Large(cases.MeanLoss):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.read, sums = torch.ones(1024), torch.zeros(1024)
            self.sums, self.meter = sums if place == "attribute" else torch.zeros(1), Meter()
            self.meter.sums = sums

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self.meter.sums += self.read
            return super().compute_loss(model, inputs, return_outputs)

    trainer, _ = cases.make(tmp_path, Large)
    with pytest.raises(InputError) as caught:
        verify(trainer)
    where = "the attribute sums" if place == "attribute" else "an object"
    assert str(caught.value) == (
        f"the loss of Large writes to a tensor of 4.0 KiB in {where}, which is too large to be restored after a trial: "
        "keep what it counts in smaller tensors."
    )


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_attributes_of_any_kind_do_not_prevent_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(object_state, "MAX_BYTES", 64)
    trainer, recorder = cases.make(tmp_path, Counting)
    trainer.sparse, trainer.compressed = torch.eye(40).to_sparse(), torch.eye(40).to_sparse_csr()
    trainer.meta, trainer.meter.bank = torch.zeros(400, device="meta"), np.zeros(400)
    with torch.inference_mode():
        trainer.inference = torch.zeros(400)
    trainer.rows = [{"a": [number]} for number in range(20_000)]
    exact(trainer).train()
    assert max(cases.errors(recorder, ref.make_model(), cases.windows(trainer.train_dataset))) <= 1e-12
    assert trainer.counts == {total(trainer)}


def test_long_containers_are_restored_without_their_elements(tmp_path: Path):
    class Appends(cases.MeanLoss):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.history = [0] * 20_000

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self.history.append(cases.num_labels(inputs))
            return super().compute_loss(model, inputs, return_outputs)

    trainer, _ = cases.make(tmp_path, Appends)
    verify(trainer)
    assert len(trainer.history) == 20_000


def test_objects_of_installed_packages_are_not_those_of_the_user():
    assert is_own_object(Meter())
    assert not any(map(is_own_object, (1, "a", [], Path(), torch.zeros(1), np.zeros(1), pytest.raises, print)))


class Masking(cases.MeanLoss):
    """Changes the batches of a window."""

    def get_batch_samples(self, iterator, number, device):
        batches, count = super().get_batch_samples(iterator, number, device)
        for batch in batches:
            batch["labels"][:, :2] = ref.IGNORED
        return batches, count


class Filtering(cases.MeanLoss):
    def get_batch_samples(self, iterator, number, device):
        batches, count = super().get_batch_samples(iterator, number, device)
        return batches[1:], count


class CountingBatches(cases.MeanLoss):
    """Counts by itself, and leaves the batches as they are."""

    def get_batch_samples(self, iterator, number, device):
        batches, _ = super().get_batch_samples(iterator, number, device)
        return [dict(batch) for batch in batches], sum(map(cases.num_labels, batches))


@pytest.mark.parametrize("kind", [Masking, Filtering])
def test_batches_that_are_changed_for_a_window_are_refused(tmp_path: Path, kind):
    trainer, recorder = cases.make(tmp_path, kind)
    with pytest.raises(InputError) as caught:
        exact(trainer, items=cases.num_labels).train()
    assert str(caught.value) == (
        f"get_batch_samples of {kind.__name__} changes the batches of a window, and exact() collates the samples of a "
        "window again, in micro-batches: change them in the data collator, or use weights(trainer, items=...) instead "
        "of exact(trainer)."
    )
    assert recorder.gradients == []


def test_batches_that_are_only_counted_are_exact(tmp_path: Path):
    trainer, recorder = cases.make(tmp_path, CountingBatches)
    exact(trainer, items=cases.num_labels).train()
    assert max(cases.errors(recorder, ref.make_model(), cases.windows(trainer.train_dataset))) <= 1e-12


def test_missing_values_in_a_batch_are_no_change(tmp_path: Path):
    def collate(rows):
        return {**cases.collate(rows), "target": torch.full((len(rows),), float("nan"))}

    trainer, recorder = cases.make(tmp_path, CountingBatches, collator=collate)
    exact(trainer, items=cases.num_labels).train()
    assert max(cases.errors(recorder, ref.make_model(), cases.windows(trainer.train_dataset))) <= 1e-12
