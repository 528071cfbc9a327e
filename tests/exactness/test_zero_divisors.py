"""Micro-batches whose divisor is 0: a loss there counts, and a mean over nothing adds nothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch
from support import full_batch_reference as ref

BOUND = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def detector(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def images(dtype=torch.float64):
    """Eight images with 5 anchors each; every second one has no object, and the first two have none."""
    generator = torch.Generator().manual_seed(1)
    targets = (torch.rand(8, 5, 3, generator=generator) < 0.2).to(dtype)
    targets[[0, 1, 3, 5, 7]] = 0
    targets[2, 0, 0] = 1
    return torch.randn(8, 5, 4, generator=generator, dtype=torch.float64).to(dtype), targets


def over_positives(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the loss of all anchors, divided by the number of positive ones."""
    inputs, targets = batch
    losses = F.binary_cross_entropy_with_logits(model(inputs).float(), targets.float(), reduction="none")
    return (losses * (0.25 + targets)).sum(), targets.sum().long()


def double(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    inputs, targets = batch
    losses = F.binary_cross_entropy_with_logits(model(inputs), targets, reduction="none")
    return (losses * (0.25 + targets)).sum(), targets.sum()


def reference(model, loss_fn, batch):
    loss, items = loss_fn(model, batch)
    return ref.gradients_of(model, loss / items), (loss / items).item()


@pytest.mark.parametrize("microbatch", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", BOUND)
def test_microbatch_without_positives_counts(dtype, microbatch):
    model = detector(dtype)
    loss_fn = double if dtype is torch.float64 else over_positives
    full, loss = reference(model, loss_fn, images(dtype))
    optimizer = ref.RecordingSGD(model)
    report = bigbatch.Engine(model, optimizer, loss_fn, microbatch=microbatch).step(images(dtype))
    assert ref.relative_error(optimizer.recorded[0], full) <= BOUND[dtype]
    assert report.loss == pytest.approx(loss, rel=BOUND[dtype])


@pytest.mark.parametrize("microbatch", [1, 3, 8])
def test_term_without_positives_counts(microbatch):
    model = detector()

    def loss_fn(model, batch):
        return {"class": double(model, batch), "size": (model(batch[0]).square().sum(), batch[0].numel())}

    losses = [loss / items for loss, items in loss_fn(model, images()).values()]
    full = ref.gradients_of(model, sum(losses))
    optimizer = ref.RecordingSGD(model)
    engine = bigbatch.Engine(
        model,
        optimizer,
        loss_fn,
        microbatch=microbatch,
        count_items=lambda batch: {"class": batch[1].sum(), "size": batch[0].numel()},
    )
    report = engine.step(images())
    assert ref.relative_error(optimizer.recorded[0], full) <= 1e-12
    assert report.terms["class"].loss == pytest.approx(losses[0].item(), rel=1e-12)


def test_term_with_total_zero_is_left_out_of_update():
    model = detector()
    inputs, targets = images()[0], torch.zeros(8, 5, 3, dtype=torch.float64)

    def loss_fn(model, batch):
        return {"class": double(model, batch), "size": (model(batch[0]).square().sum(), len(batch[0]))}

    full = ref.gradients_of(model, model(inputs).square().sum() / 8)
    optimizer = ref.RecordingSGD(model)
    count = {"class": 0, "size": 8}
    engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch=3, count_items=lambda _: count)
    report = engine.step((inputs, targets))
    assert ref.relative_error(optimizer.recorded[0], full) <= 1e-12
    assert math.isnan(report.terms["class"].loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_window_with_total_zero_is_skipped(dtype):
    model = detector(dtype)
    before = ref.parameters_of(model)
    optimizer = ref.RecordingSGD(model)
    window = bigbatch.Accumulator(model, optimizer).window()
    for part in images(dtype)[0].split(4):
        window.backward(model(part).float().square().sum(), items=0)
    report = window.step()
    assert (report.skipped, report.items, report.step) == ("no items", 0, 0)
    assert not optimizer.recorded
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("reduction", ["mean", "division"])
def test_mean_over_nothing_adds_nothing(reduction):
    """Both are 0/0; the gradient of the division is NaN, that of the mean is 0."""
    model = detector()
    inputs, labels = images()[0].flatten(0, 1), torch.arange(40) % 3
    labels[:20] = -100

    def mean(logits, labels):
        if reduction == "mean":
            return F.cross_entropy(logits, labels)
        return F.cross_entropy(logits, labels, reduction="sum") / (labels != -100).sum()

    full = ref.gradients_of(model, F.cross_entropy(model(inputs), labels))
    optimizer = ref.RecordingSGD(model)
    window = bigbatch.Accumulator(model, optimizer).window()
    for part, of_part in zip(inputs.split(10), labels.split(10), strict=True):
        items = (of_part != -100).sum()
        loss = mean(model(part), of_part)
        window.backward(loss * items if items else loss, items=items)
    report = window.step()
    assert report.skipped is None
    assert math.isfinite(report.loss)
    assert ref.relative_error(optimizer.recorded[0], full) <= 1e-12


def test_infinite_loss_without_items_skips_window():
    model = detector()
    window = bigbatch.Accumulator(model, ref.RecordingSGD(model)).window()
    window.backward(model(images()[0]).sum(), items=4)
    window.backward(model(images()[0]).abs().sum() / torch.zeros((), dtype=torch.float64), items=0)
    assert window.step().skipped == "non-finite gradient"


def test_verify_agrees_without_positives():
    report = bigbatch.verify(detector(), double, images(), microbatch=[1, 2])
    assert "exact: every cut gives the full-batch gradient" in str(report)


@pytest.mark.gpu
@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_cuda_agrees_with_cpu_without_positives(on_device, cuda_graphs):
    model = detector(torch.float32).cuda()
    full, _ = reference(model, over_positives, [tensor.cuda() for tensor in images(torch.float32)])
    optimizer = ref.RecordingSGD(model, lr=0.0)

    def loss_fn(model, batch):
        loss, items = over_positives(model, batch)
        return loss, items.to(torch.uint8) if on_device else int(items)

    engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch=2, cuda_graphs=cuda_graphs)
    for _ in range(3):
        report = engine.step(images(torch.float32))
        assert report.items == images()[1].sum()
        assert ref.relative_error(optimizer.recorded[-1], full) <= 2e-5


@pytest.mark.gpu
def test_cuda_mean_over_nothing_adds_nothing():
    model = detector(torch.float32).cuda()
    inputs = images(torch.float32)[0].flatten(0, 1).cuda()
    labels = (torch.arange(40) % 3).cuda()
    full = ref.gradients_of(model, F.cross_entropy(model(inputs), labels))
    for count in (lambda _: 0, lambda labels: (labels != -100).sum().to(torch.uint8)):
        optimizer = ref.RecordingSGD(model, lr=0.0)
        window = bigbatch.Accumulator(model, optimizer).window()
        window.backward(F.cross_entropy(model(inputs), labels, reduction="sum"), items=40)
        nothing = torch.full_like(labels, -100)
        window.backward(F.cross_entropy(model(inputs), nothing), items=count(nothing))
        report = window.step()
        assert report.skipped is None
        assert math.isfinite(report.loss)
        assert ref.relative_error(optimizer.recorded[0], full) <= 2e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.float32])
def test_cuda_counts_of_any_width_add_up(dtype):
    model = nn.Linear(1, 1).cuda()
    optimizer = ref.RecordingSGD(model, lr=0.0)
    window = bigbatch.Accumulator(model, optimizer).window()
    for _ in range(300):
        window.backward(model(torch.ones(1, 1, device="cuda")).sum() * 100, items=torch.tensor(100, dtype=dtype).cuda())
    report = window.step()
    assert report.items == 30_000
    assert optimizer.recorded[0]["bias"].item() == pytest.approx(1)
