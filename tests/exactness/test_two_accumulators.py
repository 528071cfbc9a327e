"""Two accumulators do not know of each other: a GAN with both windows open equals two full-batch references."""

import contextlib
import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import bigbatch
from exactness import reference as ref

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
@pytest.mark.parametrize("generator_first", [True, False])
def test_two_open_windows_with_interleaved_micro_batches_equal_two_references(dtype, bound, generator_first):
    """In bfloat16 the activations of the reference itself are rounded, to 2⁻⁹ each; four layers deep."""
    gan, noise, real = gan_setup(dtype)
    full = two_references(gan, noise, real)
    naive = mean_of_means(gan, noise, real)
    recorders = optimizers(gan)
    one, other = (bigbatch.Accumulator(gan, optimizer).window() for optimizer in recorders)
    for some_noise, some_real in zip(noise.split(SIZES), real.split(SIZES), strict=True):
        steps = [
            lambda z=some_noise: one.backward(gan.generator_loss(z), items=len(z)),
            lambda z=some_noise, x=some_real: other.backward(gan.discriminator_loss(z, x), items=len(z) + len(x)),
        ]
        for step in steps if generator_first else reversed(steps):
            step()
    for window in (one, other) if generator_first else (other, one):
        assert window.step().skipped is None
    for model in (0, 1):
        assert ref.relative_error(recorders[model].recorded[0], full[model]) <= bound
        assert ref.relative_error(naive[model], full[model]) > max(bound, WRONG)
    assert all(p.grad is None for p in gan.parameters())
    assert ref.hooks_of(gan) == 0


def test_five_updates_of_both_equal_full_batch_training():
    gan, noise, real = gan_setup(torch.float64)
    reference, naive = copy.deepcopy(gan), copy.deepcopy(gan)
    accumulators = [bigbatch.Accumulator(gan, optimizer) for optimizer in optimizers(gan)]
    for _ in range(5):
        windows = (accumulator.windows(range(4), num_microbatches=4) for accumulator in accumulators)
        for one, other in zip(*windows, strict=True):
            for index, same in zip(one, other, strict=True):
                assert index == same
                z, x = noise.split(SIZES)[index], real.split(SIZES)[index]
                other.backward(gan.discriminator_loss(z, x), items=len(x) * 2)
                one.backward(gan.generator_loss(z), items=len(z))
            one.step()
            other.step()
    for copied, gradients in ((reference, two_references), (naive, mean_of_means)):
        for _ in range(5):
            pairs = zip((copied.generator, copied.discriminator), gradients(copied, noise, real), strict=True)
            with torch.no_grad():
                for module, gradient in pairs:
                    for name, p in module.named_parameters():
                        p -= gradient[name]
    assert ref.relative_error(ref.parameters_of(gan), ref.parameters_of(reference)) <= 1e-10
    assert ref.relative_error(ref.parameters_of(naive), ref.parameters_of(reference)) > WRONG


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_window_of_one_leaves_the_gradients_of_the_other_alone(dtype):
    gan, noise, _ = gan_setup(dtype)
    kept = {p: torch.ones_like(p) for p in gan.discriminator.parameters()}
    for p, gradient in kept.items():
        p.grad = gradient
    generator, _ = optimizers(gan)
    accumulator = bigbatch.Accumulator(gan, generator)
    for window in accumulator.windows(noise.split(SIZES), num_microbatches=4):
        for z in window:
            window.backward(gan.generator_loss(z), items=len(z))
        window.step()
    assert all(p.grad is gradient and bool((gradient == 1).all()) for p, gradient in kept.items())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_a_later_micro_batch_that_reaches_the_other_model_leaves_its_gradients_alone(dtype, bound):
    """The adversarial term of a generator often starts after a warm-up of the reconstruction term."""
    gan, noise, real = gan_setup(dtype)
    _, full = two_references(gan, noise, real)
    recorders = optimizers(gan)
    one, other = (bigbatch.Accumulator(gan, optimizer).window() for optimizer in recorders)
    other.backward(gan.discriminator_loss(noise, real), items=24)
    one.backward(wide(gan.generator(noise)).square().sum(), items=12)
    one.backward(gan.generator_loss(noise), items=12)
    one.abort()
    other.step()
    assert ref.relative_error(recorders[1].recorded[0], full) <= bound


def test_a_reentrant_checkpoint_in_one_model_leaves_the_open_window_of_the_other_alone_or_is_refused():
    gan, noise, real = gan_setup(torch.float64)
    _, full = two_references(gan, noise, real)
    recorders = optimizers(gan)
    one, other = (bigbatch.Accumulator(gan, optimizer).window() for optimizer in recorders)
    other.backward(gan.discriminator_loss(noise, real), items=24)
    judged = gan.discriminator(checkpoint(gan.generator, noise.clone().requires_grad_(), use_reentrant=True))
    with contextlib.suppress(ValueError, RuntimeError):
        one.backward(F.softplus(-judged).sum(), items=12)
    one.abort()
    other.step()
    assert ref.relative_error(recorders[1].recorded[0], full) <= 1e-12


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
def test_a_second_open_window_over_the_same_parameters_is_refused_not_silently_wrong(dtype):
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
