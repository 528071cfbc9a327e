"""A rule keeps the loss curve where its derivation says so, and a wrong one does not; `rescale` changes all or nothing.

The experiments are those of benchmarks/scaling_rules.py, whose bounds docs/explanation/scaling-rules.md derives.
"""

import copy
import functools
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

import bigbatch
from bigbatch.scaling.hyperparameters import changes, rescale, suitable
from bigbatch.scaling.rules import RULES
from support.tiers import slow_except

ROOT = Path(__file__).parents[2]
lab = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "scaling_rules.py")))

ADAPTIVE = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "SparseAdam", "RMSprop")
ALL_SETTINGS = ("lr", "betas", "alpha", "eps", "momentum", "beta2_decay", "weight_decay", "rho")


def make(name="AdamW", *, groups=1, **settings):
    shape = (2, 2) if name == "Muon" else (2,)
    parameters = [{"params": [torch.nn.Parameter(torch.ones(shape))]} for _ in range(groups)]
    return getattr(torch.optim, name)(parameters, **settings)


def settings(optimizer):
    return [{k: copy.deepcopy(v) for k, v in g.items() if k in ALL_SETTINGS} for g in optimizer.param_groups]


def group(optimizer, index=0):
    return optimizer.param_groups[index]


# loss curves -----------------------------------------------------------------------------------------------------


@functools.cache
def base(name):
    return lab.run(lab.EXPERIMENTS[name], 1)


def deviation(name, k, rule=None):
    """The largest relative distance from the curve of k = 1, and the standard error that it may have."""
    return lab.deviation(lab.run(lab.EXPERIMENTS[name], k, rule), base(name))


def allowed(name, k, error):
    return lab.EXPERIMENTS[name].bound(k) + lab.STANDARD_ERRORS * error


@pytest.mark.parametrize("k", [4, 16])
@pytest.mark.parametrize("name", slow_except(lab.EXPERIMENTS, "sqrt", "sde", "adascale"))
def test_matching_rule_keeps_loss_curve(name, k):
    found, error = deviation(name, k)
    assert error < 0.05, "there are copies enough to tell"
    assert found <= allowed(name, k, error)


@pytest.mark.parametrize(
    ("name", "rule"), [(name, rule) for name, made in lab.EXPERIMENTS.items() for rule in made.wrong]
)
def test_other_rule_changes_loss_curve(name, rule):
    found, error = deviation(name, 16, rule)
    assert found > allowed(name, 16, error)


def test_linear_rate_with_adam_is_too_noisy():
    # Where noise dominates, the loss ends in proportion to lr·√batch: √16 = 4 times as high as with the root.
    linear, root = (lab.run(lab.EXPERIMENTS["sqrt"], 16, rule).losses[-1] for rule in ("linear", "sqrt"))
    assert 3 < linear / root < 5


def test_only_linear_rule_diverges_beyond_noise_scale():
    experiment = lab.EXPERIMENTS["adascale"]
    assert lab.run(experiment, lab.BEYOND, "linear").losses[-1] > 10
    assert lab.run(experiment, lab.BEYOND, "adascale").losses[-1] < base("adascale").losses[-1]


def test_update_progress_matches_gain():
    # L falls by the share f·r in one update, and f is what it falls by at the old batch: exact in expectation.
    experiment = lab.EXPERIMENTS["adascale"]
    f = 1 - (1 - lab.GAIN_C * lab.GAIN_X) ** 2 - (lab.GAIN_C * lab.GAIN_X) ** 2 * lab.GAIN_NOISE
    for k in (4, 16, lab.BEYOND):
        optimizer = make("SGD", lr=lab.GAIN_C * lab.GAIN_X)
        rescale(optimizer, k, rule="adascale", noise_scale=experiment.noise_scale, batch=1)
        lr = group(optimizer)["lr"]
        share = 1 - (1 - lr) ** 2 - lr**2 * lab.GAIN_NOISE / k
        assert share == pytest.approx(f * lab.gain(k), rel=1e-12)


@pytest.mark.parametrize(("rule", "exact"), [("half-life", True), ("sqrt+half-life", True), ("sde", False)])
def test_half_life_keeps_second_moment_memory_in_samples(rule, exact):
    # A squared gradient that was seen 16 samples ago: 16 updates at a batch of 1, and one at 16.
    second_moment = []
    for k in (1, 16):
        optimizer = make("Adam", betas=(0.99, 0.95))
        rescale(optimizer, k, rule=rule)
        parameter = group(optimizer)["params"][0]
        state = {"step": torch.tensor(5.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.ones(2)}
        optimizer.state[parameter] = state
        for _ in range(16 // k):
            parameter.grad = torch.zeros(2)
            optimizer.step()
        second_moment.append(float(state["exp_avg_sq"][0]))
    assert (abs(second_moment[1] / second_moment[0] - 1) < 1e-5) is exact


# equations -------------------------------------------------------------------------------------------------------


def test_each_rule_changes_what_its_paper_changes():
    def after(rule, k=4, **more):
        optimizer = make("AdamW", lr=1e-3, betas=(0.9, 0.99), eps=1e-8)
        rescale(optimizer, k, rule=rule, **more)
        return [group(optimizer)["lr"], *group(optimizer)["betas"], group(optimizer)["eps"]]

    assert after("none") == [1e-3, 0.9, 0.99, 1e-8]
    assert after("linear") == pytest.approx([4e-3, 0.9, 0.99, 1e-8])
    assert after("sqrt") == pytest.approx([2e-3, 0.9, 0.99, 1e-8])
    assert after("sde") == pytest.approx([2e-3, 0.6, 0.96, 5e-9])
    assert after("half-life") == pytest.approx([1e-3, 0.9, 0.99**4, 1e-8])
    assert after("sqrt+half-life") == pytest.approx([2e-3, 0.9, 0.99**4, 1e-8])
    assert after("adascale", noise_scale=6, batch=2) == pytest.approx([1e-3 * 4 * 8 / 14, 0.9, 0.99, 1e-8])
    assert after("sde", k=0.25) == pytest.approx([5e-4, 0.975, 0.9975, 2e-8])


def test_rmsprop_alpha_is_scaled_as_beta2():
    optimizer = make("RMSprop", lr=0.01, alpha=0.99, momentum=0.9)
    rescale(optimizer, 4, rule="sde")
    assert group(optimizer)["alpha"] == pytest.approx(0.96)
    assert group(optimizer)["momentum"] == 0.9


@pytest.mark.parametrize("name", [*ADAPTIVE, "SGD", "Muon", "Adafactor", "Adagrad", "Adadelta", "ASGD", "Rprop"])
def test_every_optimizer_accepts_suitable_rules_and_keeps_rest(name):
    for rule in suitable(make(name)) or ("linear", "sqrt"):
        optimizer = make(name)
        more = {"noise_scale": 10, "batch": 1} if rule == "adascale" else {}
        before = settings(optimizer)
        told = changes(optimizer, 2, rule=rule, **more)
        assert settings(optimizer) == before
        assert rescale(optimizer, 2, rule=rule, **more) == told
        assert (settings(optimizer) != before) == any(change.changed for change in told)
        assert all(change.reason for change in told)
        for key in ("momentum", "beta2_decay", "weight_decay", "rho"):
            assert group(optimizer).get(key) == before[0].get(key)


def test_rule_of_another_optimizer_kind_is_reported():
    linear_on_adam = changes(make("AdamW"), 4, rule="linear")[0]
    assert linear_on_adam.reason.startswith("warning: derived for SGD; AdamW normalizes gradients")
    assert changes(make("SGD"), 4, rule="sqrt")[0].reason.startswith("warning")
    assert changes(make("Adagrad"), 4, rule="sqrt")[0].reason.startswith("warning: no rule was derived for Adagrad")
    assert all("analogy" in changes(make(name), 4, rule="sqrt")[0].reason for name in ("Muon", "Adafactor", "NAdam"))
    assert not changes(make("SGD"), 4, rule="linear")[0].reason.startswith("warning")


def test_unchanged_values_are_reported():
    kept = {change.name: change for change in changes(make("SGD", momentum=0.5), 4, rule="linear")}["momentum"]
    assert not kept.changed
    assert "a half-life of 1 updates, each of 4 times the samples" in kept.reason
    assert "beta2_decay" in [change.name for change in changes(make("Adafactor"), 4, rule="sqrt")]


def test_change_prints_as_line():
    line = str(changes(make("SGD", lr=0.1), 4, rule="linear")[0])
    assert line.startswith("group 0: lr 0.1 → 0.4, 1/k of the updates")
    assert line.endswith("(Goyal et al. 2017, arXiv 1706.02677)")


def test_groups_are_scaled_from_their_own_values():
    optimizer = make("AdamW", groups=2)
    group(optimizer, 1).update(lr=0.5, betas=(0.8, 0.9))
    rescale(optimizer, 4, rule="sde")
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([2e-3, 1.0])
    assert group(optimizer, 1)["betas"] == pytest.approx((0.2, 0.6))


def test_shared_tensors_are_changed_in_place_once():
    rate, beta1, beta2 = torch.tensor(0.5), torch.tensor(0.5), torch.tensor(0.75)
    optimizer = make("Adam", groups=2, lr=rate, betas=(beta1, beta2), capturable=False, foreach=False)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    rescale(optimizer, 4, rule="sqrt+half-life", scheduler=scheduler)
    assert all(g["lr"] is rate and g["betas"][1] is beta2 for g in optimizer.param_groups)
    assert (rate.item(), beta1.item(), beta2.item()) == pytest.approx((1.0, 0.5, 0.75**4))
    assert [float(g["initial_lr"]) for g in optimizer.param_groups] == [1.0, 1.0]


# schedulers ------------------------------------------------------------------------------------------------------


SCHEDULES = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: step / 10 if step < 10 else 1 / step),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 5, gamma=0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 7, eta_min=0.01),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 6, eta_min=0.01),
    "linear": lambda o: lr_scheduler.LinearLR(o, total_iters=12),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 30),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.4, total_steps=30),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.4, step_size_up=5),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=8), lr_scheduler.CosineAnnealingLR(o, 20, eta_min=0.01)], [8]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, total_iters=8), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def rates(make_scheduler, *, at=None, count=25):
    optimizer = make("SGD", groups=2, lr=0.1, momentum=0.9)
    group(optimizer, 1)["lr"] = 0.2
    scheduler = make_scheduler(optimizer)
    seen = []
    for step in range(count):
        if step == at:
            rescale(optimizer, 4, rule="linear", scheduler=scheduler)
            assert scheduler.get_last_lr() == pytest.approx([g["lr"] for g in optimizer.param_groups])
        seen += [g["lr"] for g in optimizer.param_groups]
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("at", [0, 3, 14])
def test_rescaled_rate_survives_later_scheduler_steps(name, at):
    once = rates(SCHEDULES[name])
    expected = once[: 2 * at] + [4 * rate for rate in once[2 * at :]]
    assert rates(SCHEDULES[name], at=at) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_zero_warmup_rate_returns_scaled():
    optimizer = make("SGD", lr=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))
    rescale(optimizer, 4, rule="linear", scheduler=scheduler)
    assert group(optimizer)["lr"] == 0
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert group(optimizer)["lr"] == pytest.approx(0.4)


def test_plateau_scheduler_scales_its_floor():
    optimizer = make("SGD", lr=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1, min_lr=0.05)
    rescale(optimizer, 4, rule="linear", scheduler=scheduler)
    for loss in (1.0, 2.0, 3.0):
        scheduler.step(loss)
    assert group(optimizer)["lr"] == pytest.approx(0.2)


def test_missing_scheduler_is_rejected_before_rate_is_undone():
    optimizer = make("AdamW")
    lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    before = settings(optimizer)
    with pytest.raises(ValueError, match="Pass scheduler=, or scheduler=\\[\\] if it is no longer used"):
        rescale(optimizer, 4, rule="sqrt")
    assert settings(optimizer) == before
    rescale(optimizer, 4, rule="half-life")  # moves no rate
    rescale(optimizer, 4, rule="sqrt", scheduler=[])
    assert group(optimizer)["lr"] == group(optimizer)["initial_lr"] == pytest.approx(2e-3)


def test_schedulers_that_undo_scaling_are_rejected():
    optimizer = make("Adam")
    foreign = lr_scheduler.LambdaLR(make("Adam"), lambda step: 1.0)
    with pytest.raises(ValueError, match="belongs to another optimizer"):
        rescale(optimizer, 4, rule="sqrt", scheduler=foreign)
    cycling = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    with pytest.raises(ValueError, match="cycle_momentum=False"):
        rescale(optimizer, 4, rule="sde", scheduler=cycling)
    rescale(optimizer, 4, rule="sqrt+half-life", scheduler=cycling)


# range -----------------------------------------------------------------------------------------------------------


def test_range_error_names_value_and_nearest_factor():
    with pytest.raises(
        ValueError, match=r"would make beta1 of group 0 -0\.6 instead of 0\.9, which is below 0"
    ) as caught:
        changes(make("AdamW"), 16, rule="sde")
    assert "The nearest valid factor is 10, or rule=" in str(caught.value)


@pytest.mark.parametrize("factor", [0, -1, math.nan, math.inf, "4", True, None])
def test_factor_is_finite_and_positive(factor):
    with pytest.raises(ValueError, match="new batch / old batch, a finite number above 0"):
        rescale(make(), factor, rule="sqrt")


def test_mismatched_arguments_are_rejected():
    with pytest.raises(ValueError, match="it must be one of linear, sqrt"):
        changes(make(), 4, rule="square")
    with pytest.raises(ValueError, match=r'SGD has none\. Pass rule="linear"'):
        changes(make("SGD"), 4, rule="sde")
    with pytest.raises(ValueError, match="needs noise_scale="):
        changes(make("SGD"), 4, rule="adascale")
    with pytest.raises(ValueError, match="both must be finite numbers above 0"):
        changes(make("SGD"), 4, rule="adascale", noise_scale=0, batch=1)
    with pytest.raises(ValueError, match='have no effect with rule="linear"'):
        changes(make("SGD"), 4, rule="linear", noise_scale=1)


thoroughly = hypothesis_settings(max_examples=100, deadline=None)
betas = st.floats(0, 0.99999)
factors = st.floats(1e-3, 1e3)
rules = st.sampled_from(RULES)


def noise(rule, batch=3.0):
    return {"noise_scale": 40.0, "batch": batch} if rule == "adascale" else {}


@thoroughly
@given(rule=rules, name=st.sampled_from(["AdamW", "RMSprop", "SGD"]), lr=st.floats(0, 10), beta=betas)
def test_factor_of_one_changes_nothing(rule, name, lr, beta):
    own = {"AdamW": {"betas": (beta, beta)}, "RMSprop": {"alpha": beta}, "SGD": {"momentum": beta}}[name]
    optimizer = make(name, lr=lr, **own)
    if name == "SGD" and rule in ("sde", "half-life", "sqrt+half-life"):
        return
    before = settings(optimizer)
    assert not any(change.changed for change in rescale(optimizer, 1, rule=rule, **noise(rule)))
    assert settings(optimizer) == before


@thoroughly
@given(rule=rules, a=st.floats(0.05, 8), b=st.floats(0.05, 8), beta=st.floats(0.99, 0.999))
def test_two_batch_changes_compose(rule, a, b, beta):
    twice, once = make("AdamW", betas=(beta, beta)), make("AdamW", betas=(beta, beta))
    rescale(twice, a, rule=rule, **noise(rule))
    rescale(twice, b, rule=rule, **noise(rule, batch=3.0 * a))
    rescale(once, a * b, rule=rule, **noise(rule))
    for key in ("lr", "betas", "eps"):
        assert group(twice)[key] == pytest.approx(group(once)[key], rel=1e-9)


@thoroughly
@given(factor=st.floats(1e-300, 1e300), beta1=betas, beta2=betas, rule=rules)
def test_out_of_range_factor_changes_nothing(factor, beta1, beta2, rule):
    optimizer = make("AdamW", betas=(beta1, beta2))
    before = settings(optimizer)
    try:
        rescale(optimizer, factor, rule=rule, **noise(rule))
    except ValueError as error:
        assert settings(optimizer) == before
        nearest = float(str(error).partition("nearest valid factor is ")[2].rstrip(".").partition(",")[0])
        assert min(1, factor) <= nearest <= max(1, factor)
        rescale(optimizer, nearest, rule=rule, **noise(rule))
        further = math.exp(math.log(nearest) + 1e-3 * math.copysign(1, math.log(factor)))
        with pytest.raises(ValueError, match="nearest valid factor"):
            changes(make("AdamW", betas=(beta1, beta2)), further, rule=rule, **noise(rule))
    after = group(optimizer)
    assert 0 <= after["betas"][0] < 1
    assert 0 <= after["betas"][1] < 1
    assert 0 < after["lr"] < math.inf


def test_rescale_is_public():
    assert bigbatch.rescale is rescale


def test_figure_shows_every_experiment_of_benchmark():
    drawn = (ROOT / "docs" / "explanation" / "scaling-rules.svg").read_text(encoding="utf-8")
    assert lab.STYLE in drawn
    assert all(experiment.title in drawn for experiment in lab.EXPERIMENTS.values())
