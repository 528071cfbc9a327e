"""Over random losses and windows, a unit that is accepted weights every cut rightly; the others are refused."""

import random

import pytest
import torch
from torch.nn import functional as F

from bigbatch.errors import InputError
from bigbatch.integrations.transformers.units import UnitFinder
from support import tiny_trainers as tiny
from support.tiers import slow_except

NUM_WINDOWS = 4


def token_losses(model, inputs, *, shift):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    labels = inputs["labels"]
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none"), labels.ne(tiny.IGNORED)


def over_shifted_labels(model, inputs):
    losses, valid = token_losses(model, inputs, shift=True)
    return losses.sum() / valid.sum()


def over_labels(model, inputs):
    losses, valid = token_losses(model, inputs, shift=False)
    return losses.sum() / valid.sum()


def over_attention(model, inputs):
    return token_losses(model, inputs, shift=True)[0].sum() / inputs["attention_mask"].sum()


def over_positions(model, inputs):
    return token_losses(model, inputs, shift=False)[0].mean()


def over_shifted_positions(model, inputs):
    return token_losses(model, inputs, shift=True)[0].mean()


def over_means_of_samples(model, inputs):
    losses, valid = token_losses(model, inputs, shift=True)
    return (losses.sum(1) / valid.sum(1).clamp(min=1)).mean()


def over_sums_of_samples(model, inputs):
    return token_losses(model, inputs, shift=True)[0].sum(1).mean()


def over_the_longest(model, inputs):
    losses, valid = token_losses(model, inputs, shift=True)
    return losses.sum() / valid.sum(1).max()


def in_two_units(model, inputs):
    return over_shifted_labels(model, inputs) + over_means_of_samples(model, inputs)


RIGHT = {
    over_shifted_labels: lambda inputs: inputs["labels"][:, 1:].ne(tiny.IGNORED).sum(),
    over_labels: lambda inputs: inputs["labels"].ne(tiny.IGNORED).sum(),
    over_attention: lambda inputs: inputs["attention_mask"].sum(),
    over_positions: lambda inputs: inputs["labels"].numel(),
    over_shifted_positions: lambda inputs: inputs["labels"][:, 1:].numel(),
    over_means_of_samples: lambda inputs: len(inputs["labels"]),
    over_sums_of_samples: lambda inputs: len(inputs["labels"]),
}
PADDED = (over_positions, over_shifted_positions)  # refused where padding differs
NONE = (over_the_longest, in_two_units)


def window(numbers):
    """Return samples of a random kind: ragged, of one length, with a prompt, with few labels."""
    low, high = numbers.choice([(3, 14), (5, 5), (8, 8), (20, 40)])
    samples = tiny.token_samples(
        numbers.choice([1, 2, 3, 8]),
        prompt=numbers.choice([0, 1, 2]),
        low=low,
        high=high,
        seed=numbers.randrange(10**6),
    )
    if numbers.random() < 0.3:
        for sample in samples:
            sample["labels"] = [tiny.IGNORED if numbers.random() < 0.5 else label for label in sample["labels"]]
    return samples


def shares(count, batches):
    counts = torch.tensor([float(count(batch)) for batch in batches])
    return counts / counts.sum()


@pytest.mark.parametrize("seed", range(1))
@pytest.mark.parametrize(
    "loss",
    slow_except([*RIGHT, *NONE], over_shifted_labels, over_sums_of_samples, in_two_units),
    ids=lambda loss: loss.__name__,
)
def test_no_unit_is_wrong(loss, seed):
    numbers = random.Random(f"{loss.__name__} {seed}")
    model = numbers.choice([tiny.gpt2, tiny.llama])().to(numbers.choice([torch.float64, torch.float32]))
    trainer = tiny.trainer_of(model, [None], per_device_train_batch_size=numbers.choice([1, 2, 4]))
    finder = UnitFinder(trainer, tiny.collate_tokens, lambda model, inputs, _: loss(model, inputs))
    for _ in range(NUM_WINDOWS):
        samples = window(numbers)
        try:
            unit = finder.unit(samples)
        except InputError:
            assert loss in NONE or loss in PADDED
            return
        if unit.name == "undetermined":
            assert len(samples) == 1 or not torch.isfinite(loss(model, tiny.collate_tokens(samples[:1])))
            continue
        batches = [tiny.collate_tokens(samples[start : start + 2]) for start in range(0, len(samples), 2)]
        if loss in NONE:  # as long as samples are of one length, all units are right
            assert len({len(sample["input_ids"]) for sample in samples}) == 1
        else:
            right = shares(RIGHT[loss], batches)
            assert not right.isfinite().all() or torch.allclose(shares(unit.count, batches), right, rtol=0, atol=1e-4)
