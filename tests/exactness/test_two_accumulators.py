"""Two accumulators do not know of each other: a GAN with both windows open equals two full-batch references."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import bigbatch
from support import full_batch_reference as ref

WRONG = 1e-3


class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
        self.discriminator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def generator_loss(self, noise):
        return F.softplus(-wide(self.discriminator(self.generator(noise)))).sum()

    def discriminator_loss(self, noise, real):
        fake = self.discriminator(self.generator(noise).detach())
        return F.softplus(wide(fake)).sum() + F.softplus(-wide(self.discriminator(real))).sum()


def wide(tensor):
    return tensor.float() if tensor.dtype is torch.bfloat16 else tensor


SIZES = [5, 1, 4, 2]


def gan_setup(dtype):
    torch.manual_seed(0)
    return Gan().to(dtype), torch.randn(12, 2).to(dtype), (torch.randn(12, 3) + 2).to(dtype)


def optimizers(gan):
    return ref.RecordingSGD(gan.generator, lr=1.0), ref.RecordingSGD(gan.discriminator, lr=1.0)


def two_references(gan, noise, real):
    """Full-batch gradients of both losses at the same parameters, in the dtype of the gan."""
    return (
        ref.gradients_of(gan.generator, gan.generator_loss(noise) / len(noise)),
        ref.gradients_of(gan.discriminator, gan.discriminator_loss(noise, real) / (2 * len(noise))),
    )


def mean_of_means(gan, noise, real):
    parts = [two_references(gan, *part) for part in zip(noise.split(SIZES), real.split(SIZES), strict=True)]
    return [
        {name: sum(part[model][name] for part in parts) / len(parts) for name in parts[0][model]} for model in (0, 1)
    ]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_later_graph_through_other_open_window(dtype, bound):
    """The adversarial term of a generator often starts after a warm-up of the reconstruction term."""
    gan, noise, real = gan_setup(dtype)
    warm_up = wide(gan.generator(noise)).square().sum()
    of_generator = ref.gradients_of(gan.generator, (warm_up + gan.generator_loss(noise)) / 24)
    _, of_discriminator = two_references(gan, noise, real)
    recorders = optimizers(gan)
    one, other = (bigbatch.Accumulator(gan, optimizer, noise=True).window() for optimizer in recorders)
    other.backward(gan.discriminator_loss(noise, real), items=24)
    one.backward(wide(gan.generator(noise)).square().sum(), items=12)
    one.backward(gan.generator_loss(noise), items=12)
    other.step()
    one.step()
    assert ref.relative_error(recorders[0].recorded[0], of_generator) <= bound
    assert ref.relative_error(recorders[1].recorded[0], of_discriminator) <= bound


def test_later_graph_leaves_no_gradient_on_others():
    """The second micro-batch is the first that reaches the generator, an embedding table and its own input."""
    gan, noise, real = gan_setup(torch.float64)
    table = nn.Embedding(12, 3).double()
    noise.requires_grad_()
    window = bigbatch.Accumulator(gan, optimizers(gan)[1]).window()
    window.backward(gan.discriminator(real).sum(), items=12)
    fake = gan.generator(noise) + table(torch.arange(12))
    window.backward(gan.discriminator(fake).square().sum(), items=12)
    assert all(leaf.grad is None for leaf in (*gan.generator.parameters(), table.weight, noise))
    assert gan.discriminator[0].weight.grad is not None


def test_foreign_reentrant_checkpoint_makes_window_reject_step():
    gan, noise, real = gan_setup(torch.float64)
    one, other = (bigbatch.Accumulator(gan, optimizer).window() for optimizer in optimizers(gan))
    other.backward(gan.discriminator_loss(noise, real), items=24)
    judged = gan.discriminator(checkpoint(gan.generator, noise.clone().requires_grad_(), use_reentrant=True))
    one.backward(F.softplus(-judged).sum(), items=12)
    with pytest.raises(bigbatch.WindowStateError, match="by another window"):
        other.step()


def test_accumulators_in_two_threads_do_not_mix():
    alone, together = {}, {}
    for seed in (1, 2):
        train_given(ref.make_model(seed), seed, alone)
    threads = [threading.Thread(target=train_given, args=(ref.make_model(seed), seed, together)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        assert all(torch.equal(alone[seed][name], p) for name, p in together[seed].items())


def train_given(model, seed, results):
    engine = bigbatch.Engine(model, torch.optim.AdamW(model.parameters(), lr=0.05), ref.loss_and_items, microbatch=2)
    for batch in ref.batches(20):
        engine.step(batch)
    results[seed] = ref.parameters_of(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_second_window_over_same_parameters_is_rejected(dtype):
    """Both would live in one ``.grad``, or fight for one hook."""
    model, batch = ref.make_model(dtype=dtype), ref.ragged_batch(9)
    window = bigbatch.Accumulator(model, ref.RecordingSGD(model)).window()
    window.backward(ref.loss_and_items(model, batch))

    def go_on():
        second = bigbatch.Accumulator(model, ref.RecordingSGD(model)).window()
        second.backward(ref.loss_and_items(model, batch))
        window.step()

    with pytest.raises(bigbatch.WindowStateError, match="another window over the same parameters"):
        go_on()
