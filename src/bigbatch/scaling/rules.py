"""Scaling rules: the new value of each hyper-parameter when the batch size changes, with reason and source.

    parameter group, factor, rule → for each hyper-parameter: old, new, reason, source

k is new batch / old batch, B the old batch, η the learning rate. Write a gradient as G plus noise of covariance Σ/B.
Runs are compared at the same number of *samples*: k updates with B correspond to one update with k·B.

- **linear**: η → k·η. k updates of SGD move by −k·η·G with noise of covariance k·η²·Σ/B; one update with k·B and k·η
  moves by the same −k·η·G with (k·η)²·Σ/(k·B), which is the same noise. Valid while G hardly changes over the k
  updates: k·η·h ≪ 1 for a curvature h. Goyal et al. 2017, arXiv 1706.02677, section 2.1.
- **sqrt**: η → √k·η. Adam divides by √v, and if noise dominates, v is Σ/B: k times the batch alone makes its updates
  √k times as long for the same G, and √k·η contributes the other √k of the linear rule. Malladi et al. 2022.
- **sde**: √k·η, β → 1 − k·(1 − β) for both, ε → ε/√k. The averaging time of β is 1/(1 − β) updates, which is the same
  number of samples if 1 − β is k times as large; ε is compared with √v, which shrinks as 1/√k. Malladi et al. 2022,
  arXiv 2205.10287 (square root scaling rule), from the stochastic differential equation that Adam approximates.
- **half-life**: β2 → β2^k, nothing else. The weight of a squared gradient in v halves after ln ½ / ln β2 updates, and
  after the same number of samples with β2^k. Equals sde to first order in k·(1 − β2), and never leaves the valid range.
  Marek et al. 2025, arXiv 2507.07101, who keep β1, and found that the best η grows more slowly than √k.
- **sqrt+half-life**: both together.
- **adascale**: η → r·η with r = (σ² + μ²) / (σ²/k + μ²), where σ² = trΣ/B and μ² = |G|². With the noise scale
  N = trΣ/|G|² that is k·(N + B)/(N + k·B): k if k·B ≪ N, and never more than (N + B)/B. One update makes the progress
  of r old ones. Johnson et al. 2020, arXiv 2007.05105, section 3 (gain ratio).

No torch: a parameter group is a mapping of numbers.
"""

import math
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

Rule: TypeAlias = Literal["linear", "sqrt", "sde", "half-life", "sqrt+half-life", "adascale", "none"]
RULES: tuple[Rule, ...] = get_args(Rule)

GOYAL = "Goyal et al. 2017, arXiv 1706.02677"
MALLADI = "Malladi et al. 2022, arXiv 2205.10287"
MAREK = "Marek et al. 2025, arXiv 2507.07101"
JOHNSON = "Johnson et al. 2020, arXiv 2007.05105"

_SQRT = ("sqrt", "sde", "sqrt+half-life")
_HALF_LIFE = ("half-life", "sqrt+half-life")
_FOR_SGD = ("linear", "adascale")
_ADAM_VARIANTS = ("NAdam", "RAdam", "Adamax")


class Kind(Enum):
    """How an optimizer depends on the magnitude of the gradient, inferred from the keys of its parameter groups."""

    PLAIN = "multiplies the gradient by the learning rate"
    ADAPTIVE = "divides by a running root mean square with a decay rate as a hyper-parameter"
    NORMALIZED = "normalizes the gradient in another way"
    OTHER = "no rule was derived for it"


SUITABLE: dict[Kind, tuple[Rule, ...]] = {
    Kind.PLAIN: ("linear", "adascale"),
    Kind.ADAPTIVE: ("sqrt", "sde", "half-life", "sqrt+half-life"),
    Kind.NORMALIZED: ("sqrt",),
    Kind.OTHER: (),
}
"""The rules that were derived for a kind of optimizer, or whose derivation carries over."""


class Noise(NamedTuple):
    """Inputs of adascale: the noise scale trΣ/|G|² and the old batch, in the same unit."""

    scale: float
    batch: float


class Adjustment(NamedTuple):
    """One hyper-parameter of a group: old and new value, reason and source."""

    name: str
    old: float
    new: float
    reason: str
    source: str


def kind_of(group: Mapping[str, Any]) -> Kind:
    """Return the kind of an optimizer, from one of its parameter groups."""
    if (len(group.get("betas", ())) == 2 and "eps" in group) or ("alpha" in group and "centered" in group):
        return Kind.ADAPTIVE
    if "beta2_decay" in group or "ns_steps" in group:
        return Kind.NORMALIZED
    return Kind.PLAIN if "momentum" in group and "dampening" in group else Kind.OTHER


def lr_multiplier(factor: float, rule: Rule, noise: Noise | None = None) -> float:
    """Return the factor by which a rule multiplies the learning rate.

    Args:
        factor: New batch / old batch.
        rule: One of `RULES`.
        noise: Required for adascale.
    """
    if rule == "linear":
        return factor
    if rule in _SQRT:
        return math.sqrt(factor)
    if rule == "adascale":
        assert noise is not None, "changes() requires it"
        return factor * (noise.scale + noise.batch) / (noise.scale + factor * noise.batch)
    return 1.0


def adjustments(
    group: Mapping[str, Any], factor: float, rule: Rule, *, owner: str, noise: Noise | None = None
) -> list[Adjustment]:
    """Compute the hyper-parameters of one parameter group under a rule, without a range check.

    Args:
        group: A parameter group of an optimizer.
        factor: New batch / old batch.
        rule: One of `RULES`.
        owner: Name of the optimizer, for the reasons.
        noise: Required for adascale.

    Returns:
        The hyper-parameters that the rule changes, and those that it keeps although their meaning in samples changes.
    """
    kind = kind_of(group)
    lr = float(group["lr"])
    result = [Adjustment("lr", lr, lr * lr_multiplier(factor, rule, noise), *_about_lr(kind, rule, owner))]
    for name, value in _decay_rates(group).items():
        result.append(Adjustment(name, value, *_decay(name, value, factor, rule)))
    eps = group.get("eps")
    if rule == "sde" and isinstance(eps, int | float):
        why = "ε/√k: the same ratio to √v, which becomes 1/√k as large"
        result.append(Adjustment("eps", float(eps), eps / math.sqrt(factor), why, MALLADI))
    return result + _kept(group, factor)


def _decay_rates(group: Mapping[str, Any]) -> dict[str, float]:
    """Return the decay rates of the running averages by name: ``beta1`` and ``beta2``, or ``alpha`` of RMSprop."""
    if kind_of(group) is not Kind.ADAPTIVE:
        return {}
    if "betas" not in group:
        return {"alpha": float(group["alpha"])}
    return {f"beta{i}": float(beta) for i, beta in enumerate(group["betas"], start=1)}


def out_of_range(name: str, old: float, new: float) -> str | None:
    """Return why a new value of a hyper-parameter is invalid; None if it is valid."""
    if name in ("beta1", "beta2", "alpha"):
        if not new >= 0:
            return "below 0"
        return "not below 1" if new >= 1 else None
    if not math.isfinite(new):
        return "not finite"
    return "0" if new == 0 != old else None


def nearest_factor(factor: float, works: Callable[[float], bool]) -> float:
    """Return the valid factor nearest to an invalid one, by bisection between that and 1.

    Args:
        factor: The invalid factor, above 0.
        works: Whether a factor is valid: true from 1 to some limit, false beyond.

    Returns:
        The limit, rounded towards 1 to five digits.
    """
    good, bad = 0.0, math.log(factor)
    for _ in range(100):
        middle = (good + bad) / 2
        good, bad = (middle, bad) if works(math.exp(middle)) else (good, middle)
    limit = math.exp(good)
    digits = 4 - math.floor(math.log10(limit))
    nearest = round(limit, digits)
    step = 10.0**-digits if factor > 1 else -(10.0**-digits)
    return nearest if works(nearest) else round(nearest - step, digits)


def _decay(name: str, value: float, factor: float, rule: Rule) -> tuple[float, str, str]:
    if rule == "sde":
        why = "1 − k·(1 − β): averages over the same number of samples"
        return value - (factor - 1) * (1 - value), why, MALLADI
    if rule in _HALF_LIFE and name != "beta1":
        return value**factor, "β^k: the same half-life in samples", MAREK
    if rule in _HALF_LIFE:
        return value, "kept: the rule preserves the half-life of the second moment only", MAREK
    return value, "kept: the rule changes the learning rate only; the average covers k times as many samples", ""


def _about_lr(kind: Kind, rule: Rule, owner: str) -> tuple[str, str]:
    if rule == "half-life":
        return "kept: the rule changes the second moment only; the best lr was found to grow more slowly than √k", MAREK
    if rule == "none":
        return "kept: rule none changes nothing", ""
    if rule == "linear":
        why = "1/k of the updates, each k times as long: the same distance and noise for the same number of samples"
    elif rule == "adascale":
        why = "the gain: one update makes the progress of as many old ones as their noise allows"
    else:
        why = "gradients are divided by their RMS, which noise makes 1/√k as large: a factor of √k remains"
    source = {"linear": GOYAL, "adascale": JOHNSON}.get(rule, MALLADI)
    if kind is Kind.OTHER:
        return f"warning: no rule was derived for {owner}; lr is multiplied without justification", source
    if (kind is Kind.NORMALIZED or owner in _ADAM_VARIANTS) and rule in _SQRT:
        return f"{why}; derived for Adam, applied to {owner} by analogy", source
    if (kind is Kind.PLAIN) != (rule in _FOR_SGD):
        if kind is Kind.PLAIN:
            return (
                f"warning: derived for optimizers that normalize gradients, which {owner} does not: use linear",
                source,
            )
        return f"warning: derived for SGD; {owner} normalizes gradients: use sqrt", source
    return why, source


def _kept(group: Mapping[str, Any], factor: float) -> list[Adjustment]:
    """Return the hyper-parameters that every rule keeps although their meaning in samples changes."""
    result = []
    momentum = group.get("momentum", 0)
    if momentum:
        samples = f"a half-life of {_half_life(momentum):.3g} updates, each of {factor:.4g} times the samples"
        why = f"kept: {samples}; while short compared with the run, it only scales lr"
        result.append(Adjustment("momentum", momentum, momentum, why, ""))
    if "beta2_decay" in group:
        why = "kept: Adafactor's second moment decays with the number of updates, at any batch size"
        result.append(Adjustment("beta2_decay", group["beta2_decay"], group["beta2_decay"], why, ""))
    return result


def _half_life(decay: float) -> float:
    return math.log(0.5) / math.log(decay) if 0 < decay < 1 else math.inf
