"""Precision: what the narrow dtypes cost, each against a derived bound."""

import copy

import pytest
import torch
import torch.nn.functional as F

import bigbatch
from support import full_batch_reference as ref

NARROW = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}  # largest relative error of one rounding to nearest


def loss_in_float32(model, batch):
    logits = model(batch["tokens"]).flatten(0, 1).float()
    return F.cross_entropy(logits, batch["labels"].flatten(), ignore_index=ref.IGNORED, reduction="sum"), ref.count(
        batch
    )


def narrow_setup(dtype, microbatches=128, width=32):
    torch.manual_seed(0)
    model = ref.TokenModel(width).to(dtype)
    batch = ref.ragged_batch(microbatches * 2, seed=1)
    return model, batch, ref.cut(batch, 2)


def sum_of_micro_gradients(model, parts):
    """The same micro-gradients, in their narrow dtype, summed in float64 and divided once."""
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for part in parts:
        for name, gradient in ref.gradients_of(model, loss_in_float32(model, part)[0]).items():
            total[name] += gradient.double()
    items = sum(map(ref.count, parts))
    return {name: tensor / items for name, tensor in total.items()}


def accumulated_by_torch(model, parts):
    """What ``.grad`` makes of them."""
    for part in parts:
        loss_in_float32(model, part)[0].backward()
    items = sum(map(ref.count, parts))
    found = {name: p.grad.double() / items for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def accumulated_by_bigbatch(model, parts):
    optimizer = ref.RecordingSGD(model)
    accumulator = bigbatch.Accumulator(model, optimizer)
    ref.run_windows(accumulator, parts, num_microbatches=len(parts), loss_fn=loss_in_float32)
    return optimizer.recorded[0]


@pytest.mark.parametrize("dtype", NARROW)
def test_sum_of_128_narrow_gradients_rounds_once(dtype):
    """A float32 sum of 128 is off by at most 128 · 2⁻²⁴ ≈ 1e-5 of Σ|g|, and the cast back rounds once.

    One rounding is at most 2⁻⁹ = 0.2 % of each element in bfloat16, so of the norm too: within the 0.3 % promised.
    """
    model, _, parts = narrow_setup(dtype)
    reference = sum_of_micro_gradients(model, parts)
    ours = ref.relative_error(accumulated_by_bigbatch(model, parts), reference)
    naive = ref.relative_error(accumulated_by_torch(model, parts), reference)
    print(f"\n{dtype}: 128 micro-batches, relative error {ours:.2e} here, {naive:.2e} in .grad")
    assert ours <= NARROW[dtype] + 1e-4
    assert ours <= 0.003
    assert naive > (0.008 if dtype is torch.bfloat16 else 0.001)
    assert naive > 3 * ours


def test_bf16_sums_are_more_accurate_than_grad():
    """Against the float64 model with the same parameters; bfloat16 forwards and backwards dominate what is left."""
    model, batch, parts = narrow_setup(torch.bfloat16)
    true = ref.full_gradient(copy.deepcopy(model).double(), batch)
    ours = ref.relative_error(accumulated_by_bigbatch(model, parts), true)
    naive = ref.relative_error(accumulated_by_torch(model, parts), true)
    print(f"\nagainst the float64 model: {ours:.2e} here, {naive:.2e} in .grad")
    assert ours < naive
    assert ours < 0.01


def test_thousand_equal_gradients_do_not_stall():
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    optimizer = ref.RecordingSGD(model)
    inputs = torch.full((1000, 1), 0.001, dtype=torch.bfloat16)
    engine = bigbatch.Engine(model, optimizer, lambda m, x: (m(x).sum(), len(x)), microbatch=1)
    engine.step(inputs)
    assert optimizer.recorded[0]["weight"].item() == pytest.approx(0.001, rel=2**-8)
    for row in inputs.split(1):
        model(row).sum().backward()
    assert model.weight.grad.item() / 1000 < 0.0006


def test_mixed_bf16_and_float32_parameters_sum_in_float32():
    torch.manual_seed(0)
    model = ref.TokenModel(16)
    model.hidden.to(torch.bfloat16)

    def forward(module, batch):
        hidden = module.hidden(module.norm(module.embedding(batch["tokens"])).bfloat16()).float()
        logits = module.head(hidden.tanh()).flatten(0, 1)
        loss = F.cross_entropy(logits, batch["labels"].flatten(), ignore_index=ref.IGNORED, reduction="sum")
        return loss, ref.count(batch)

    batch = ref.ragged_batch(64)
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for part in ref.cut(batch, 1):
        if ref.count(part):
            for name, gradient in ref.gradients_of(model, forward(model, part)[0]).items():
                total[name] += gradient.double() / ref.count(batch)
    optimizer = ref.RecordingSGD(model)
    bigbatch.Engine(model, optimizer, forward, microbatch=1).step(batch)
    recorded = optimizer.recorded[0]
    assert {name: g.dtype for name, g in recorded.items()} == {n: p.dtype for n, p in model.named_parameters()}
    wide = [name for name in recorded if not name.startswith("hidden")]
    assert ref.relative_error({n: recorded[n] for n in wide}, {n: total[n] for n in wide}) <= 1e-5
    assert ref.relative_error(recorded, total) <= 2**-9 + 1e-4


def test_bf16_updates_clip_on_float32_norm():
    model, _, parts = narrow_setup(torch.bfloat16)
    reference = sum_of_micro_gradients(model, parts)
    norm = torch.nn.utils.get_total_norm(list(reference.values())).item()
    optimizer = ref.RecordingSGD(model)
    (report,) = ref.run_windows(
        bigbatch.Accumulator(model, optimizer, max_grad_norm=norm / 2),
        parts,
        num_microbatches=len(parts),
        loss_fn=loss_in_float32,
    )
    assert report.grad_norm == pytest.approx(norm, rel=1e-5)
    half = {name: tensor / 2 for name, tensor in reference.items()}
    assert ref.relative_error(optimizer.recorded[0], half) <= 2**-9 + 1e-4


def test_sparse_bf16_gradients_sum_in_float32():
    torch.manual_seed(0)
    model = torch.nn.Embedding(10, 4, sparse=True, dtype=torch.bfloat16)
    tokens = torch.randint(10, (16, 3))
    total = torch.zeros(10, 4, dtype=torch.float64)
    for row in tokens:
        total += ref.gradients_of(model, model(row).float().square().sum())["weight"].to_dense().double() / 48
    optimizer = ref.RecordingSGD(model)
    bigbatch.Engine(model, optimizer, lambda m, x: (m(x).float().square().sum(), x.numel()), microbatch=1).step(tokens)
    found = {"weight": optimizer.recorded[0]["weight"].to_dense()}
    assert ref.relative_error(found, {"weight": total}) <= 2**-9 + 1e-4


def autocast_loss(dtype, gain=1.0):
    def loss_fn(model, batch):
        with torch.autocast("cpu", dtype=dtype):
            logits = model(batch["tokens"]).flatten(0, 1) * gain
        loss = F.cross_entropy(logits.float(), batch["labels"].flatten(), ignore_index=ref.IGNORED, reduction="sum")
        return loss, ref.count(batch)

    return loss_fn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_autocast_windows_differ_only_by_rounding(dtype, size):
    """Activations are rounded to 2⁻⁸ or 2⁻¹¹ alike in every cut; float32 parameters sum in float32."""
    model, batch = ref.make_model(dtype=torch.float32), ref.ragged_batch(16)
    loss, items = autocast_loss(dtype)(model, batch)
    full = ref.gradients_of(model, loss / items)
    optimizer = ref.RecordingSGD(model)
    bigbatch.Engine(model, optimizer, autocast_loss(dtype), microbatch=size).step(batch)
    bound = 4 * NARROW[dtype]
    assert ref.relative_error(optimizer.recorded[0], full) <= bound
    naive = [autocast_loss(dtype)(model, part) for part in ref.cut(batch, size)]
    mean_of_means = torch.stack([loss / items for loss, items in naive if items]).mean()
    assert ref.relative_error(ref.gradients_of(model, mean_of_means), full) > 3 * bound


def scaler(**settings):
    return torch.amp.GradScaler("cpu", **{"init_scale": 2.0**14, **settings})


class Regression(torch.nn.Module):
    """One float16 product whose gradient is as large as there are items."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)

    def forward(self, inputs):
        with torch.autocast("cpu", dtype=torch.float16):
            return self.linear(inputs)


def regression_loss(model, inputs):
    return (model(inputs).float() - 1).sum(), inputs.shape[0]


@pytest.mark.parametrize("size", [1000, 4096])
@pytest.mark.parametrize("use_engine", [True, False])
def test_fp16_sums_over_many_items_do_not_overflow(size, use_engine):
    """A scaled sum over 4,000 items is beyond 65,504 where the scaled mean is far below; plain sums overflow."""
    torch.manual_seed(0)
    model, inputs = Regression(), torch.rand(4096, 4)
    full = ref.gradients_of(model, model(inputs).double().mean())

    plain_scaler, plain = scaler(), torch.optim.SGD(model.parameters(), lr=0.0)
    for part in inputs.split(size):
        plain_scaler.scale(regression_loss(model, part)[0]).backward()
    plain_scaler.unscale_(plain)
    assert not all(torch.isfinite(p.grad).all() for p in model.parameters()), "the data must overflow in a plain loop"
    plain.zero_grad()

    optimizer, ours = ref.RecordingSGD(model), scaler()
    if use_engine:
        report = bigbatch.Engine(model, optimizer, regression_loss, microbatch=size, scaler=ours).step(inputs)
    else:
        accumulator = bigbatch.Accumulator(model, optimizer, scaler=ours)
        parts = inputs.split(size)
        (report,) = ref.run_windows(accumulator, parts, num_microbatches=len(parts), loss_fn=regression_loss)
    assert report.skipped is None
    assert ours.get_scale() == 2.0**14
    assert ref.relative_error(optimizer.recorded[0], full) <= 2**-10
    assert report.grad_norm == pytest.approx(torch.nn.utils.get_total_norm(list(full.values())).item(), rel=2**-10)


def test_fp16_gradients_keep_values_lost_without_scaling():
    model = torch.nn.Linear(1, 1, bias=False)

    def loss_fn(module, inputs):
        with torch.autocast("cpu", dtype=torch.float16):
            return module(inputs).float().sum() * 1e-6, len(inputs)

    optimizer = ref.RecordingSGD(model)
    inputs = torch.full((8, 1), 0.01)
    bigbatch.Engine(model, optimizer, loss_fn, microbatch=2, scaler=scaler()).step(inputs)
    bigbatch.Engine(model, optimizer, loss_fn, microbatch=2).step(inputs)
    scaled, unscaled = (recorded["weight"].item() for recorded in optimizer.recorded)
    assert scaled == pytest.approx(1e-8, rel=2**-9)
    assert abs(unscaled / 1e-8 - 1) > 0.05


@pytest.mark.parametrize("first", [1, 3])
def test_fp16_scaling_ignores_first_microbatch(first):
    torch.manual_seed(0)
    model, inputs = torch.nn.Linear(3, 1).double(), torch.randn(12, 3).double()
    full = ref.gradients_of(model, model(inputs).square().mean())
    optimizer = ref.RecordingSGD(model)
    accumulator = bigbatch.Accumulator(model, optimizer, scaler=scaler())
    window = accumulator.window()
    for part in torch.split(inputs, [first, 12 - first - 2, 2]):
        window.backward(model(part).square().sum(), items=len(part))
    window.step()
    assert ref.relative_error(optimizer.recorded[0], full) <= 1e-12


def test_fp16_scaling_accepts_fractional_item_weights():
    torch.manual_seed(0)
    model, inputs = torch.nn.Linear(3, 1).double(), torch.randn(6, 3).double()
    weights = torch.tensor([0.1, 0.2, 3, 4, 5, 6]).double()[:, None]
    full = ref.gradients_of(model, (weights * model(inputs).square()).sum() / weights.sum())
    optimizer = ref.RecordingSGD(model)

    def loss_fn(module, batch):
        return (batch[1] * module(batch[0]).square()).sum(), batch[1].sum()

    bigbatch.Engine(model, optimizer, loss_fn, microbatch=2, scaler=scaler()).step((inputs, weights))
    assert ref.relative_error(optimizer.recorded[0], full) <= 1e-12


def test_found_inf_skips_window_and_lowers_scale():
    model, inputs = Regression(), torch.rand(64, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    ours = scaler(init_scale=2.0**60)
    engine = bigbatch.Engine(model, optimizer, regression_loss, microbatch=16, scaler=ours, scheduler=scheduler)
    before = ref.parameters_of(model)
    report = engine.step(inputs)
    assert report.skipped == "non-finite gradient"
    assert report.step == 0
    assert report.loss == pytest.approx(regression_loss(model, inputs)[0].item() / 64, rel=1e-3)
    assert ours.get_scale() == 2.0**59
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())
    assert scheduler.last_epoch == 0
    assert all(torch.equal(before[name], p) for name, p in ref.parameters_of(model).items())
    while (report := engine.step(inputs)).skipped:
        assert report.step == 0
    assert report.step == 1
    assert scheduler.last_epoch == 1


def test_scale_grows_once_per_window():
    model, inputs = Regression(), torch.rand(64, 4)
    ours = scaler(init_scale=4.0, growth_interval=3)
    engine = bigbatch.Engine(model, ref.RecordingSGD(model), regression_loss, microbatch=4, scaler=ours)
    scales = []
    for _ in range(6):
        engine.step(inputs)
        scales.append(ours.get_scale())
    assert scales == [4, 4, 8, 8, 8, 16]


def test_window_without_items_keeps_scale():
    model = Regression()
    ours = scaler(growth_interval=1)
    engine = bigbatch.Engine(model, ref.RecordingSGD(model), lambda m, x: (m(x).sum(), 0), microbatch=4, scaler=ours)
    assert engine.step(torch.rand(8, 4)).skipped == "no items"
    assert ours.get_scale() == 2.0**14


def test_disabled_scaler_has_no_effect():
    batch = ref.ragged_batch(9)
    results = []
    for ours in (None, scaler(enabled=False)):
        model = ref.make_model()
        ref.step_by_engine(model, torch.optim.AdamW(model.parameters()), batch, 2, scaler=ours, max_grad_norm=0.1)
        results.append(ref.parameters_of(model))
    assert all(torch.equal(results[0][name], p) for name, p in results[1].items())


def test_ten_scaled_clipped_updates_equal_full_batch_training():
    def make(module):
        return torch.optim.AdamW(module.parameters(), lr=0.05)

    full = ref.train_reference(ref.make_model(), make, ref.batches(10), max_grad_norm=0.25)
    model = ref.make_model()
    engine = bigbatch.Engine(
        model, make(model), ref.loss_and_items, microbatch=2, max_grad_norm=0.25, scaler=scaler(growth_interval=2)
    )
    reports = [engine.step(batch) for batch in ref.batches(10)]
    assert [report.grad_norm for report in reports] == pytest.approx(full.grad_norms, rel=1e-10)
    assert ref.relative_error(ref.parameters_of(model), full.parameters) <= 1e-10


def test_overlapping_windows_can_share_a_scaler():
    """An overflow in one window lowers the scale under the other, whose gradients carry the old one."""
    torch.manual_seed(0)
    one, other, inputs = torch.nn.Linear(2, 1).double(), torch.nn.Linear(2, 1).double(), torch.randn(4, 2).double()
    shared = scaler()
    optimizer = ref.RecordingSGD(other)
    window = bigbatch.Accumulator(one, ref.RecordingSGD(one), scaler=shared).window()
    other_window = bigbatch.Accumulator(other, optimizer, scaler=shared).window()
    other_window.backward(other(inputs).square().sum(), items=4)
    window.backward(one(inputs).sum() * float("inf"), items=4)
    assert window.step().skipped == "non-finite gradient"
    other_window.step()
    full = ref.gradients_of(other, other(inputs).square().mean())
    assert ref.relative_error(optimizer.recorded[0], full) <= 1e-12


def test_scaler_works_after_failed_window():
    model = torch.nn.Linear(3, 1)
    told = [5]
    engine = bigbatch.Engine(
        model,
        ref.RecordingSGD(model),
        lambda m, x: {"square": (m(x).square().sum(), len(x))},
        microbatch=3,
        count_items=lambda x: {"square": told[0]},
        scaler=scaler(),
    )
    with pytest.raises(ValueError, match=r"count_items returned 5 items for the term 'square'.*had 9"):
        engine.step(torch.randn(9, 3))
    told[0] = 9
    assert engine.step(torch.randn(9, 3)).skipped is None


def test_narrow_parameters_with_scaler_are_rejected():
    model = torch.nn.Linear(1, 1, dtype=torch.float16)
    with pytest.raises(TypeError, match=r"a GradScaler is for float16 autocast over float32 parameters.*float16"):
        bigbatch.Accumulator(model, torch.optim.SGD(model.parameters()), scaler=scaler())


def test_fp16_parameter_sums_stay_finite_with_finite_mean():
    model = torch.nn.Linear(1, 1, dtype=torch.float16)
    inputs = torch.ones(100_000, 1, dtype=torch.float16)
    mean = ref.gradients_of(model, model(inputs).float().mean())
    assert all(torch.isfinite(gradient).all() for gradient in mean.values())
    optimizer = ref.RecordingSGD(model)
    engine = bigbatch.Engine(model, optimizer, lambda m, x: (m(x).float().sum(), len(x)), microbatch=100_000)
    assert engine.step(inputs).skipped is None
    assert [g.item() for g in optimizer.recorded[0].values()] == pytest.approx([1, 1], rel=2**-10)
