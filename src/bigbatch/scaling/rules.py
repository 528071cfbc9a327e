"""What each rule does to each hyper-parameter when the batch changes, as numbers and with its reason and source.

    parameter group, factor, rule → for each hyper-parameter: old, new, why, by whom

k is new batch / old batch, B the old batch, η the learning rate. Write a gradient as G plus noise of covariance Σ/B.
Comparing runs at the same number of *samples* means that k updates with B stand beside one update with k·B.

- **linear**: η → k·η. k updates of SGD move by −k·η·G with the noise of covariance k·η²·Σ/B; one update with k·B and
  k·η moves by the same −k·η·G with (k·η)²·Σ/(k·B), which is the same noise. As long as G hardly changes in between,
  which is k·η·h ≪ 1 for a curvature h. Goyal et al. 2017, arXiv 1706.02677, section 2.1.
- **sqrt**: η → √k·η. Adam divides by √v, and where noise dominates v is Σ/B: k times the batch alone makes its
  updates √k times as long for the same G, so that √k more gives the k of the linear rule.
- **sde**: √k·η, β → 1 − k·(1 − β) for both, ε → ε/√k. The same, with the rest of Adam: the memory of β is 1/(1 − β)
  updates, or as many samples as before where 1 − β is k times as large; and ε stands beside √v, which shrinks as
  1/√k. Malladi et al. 2022, arXiv 2205.10287, from the stochastic differential equation that Adam approximates.
- **half-life**: β2 → β2^k, nothing else. A squared gradient loses half of its weight in v after ln ½ / ln β2 updates,
  and after the same number of samples if β2^k. To first order in k·(1 − β2) it is what sde does, and it never leaves
  the range. Marek et al. 2025, arXiv 2507.07101, who keep β1, and found the best η to grow more slowly than √k.
- **sqrt+half-life**: the two together.
- **adascale**: η → r·η with r = (σ² + μ²) / (σ²/k + μ²), where σ² = trΣ/B and μ² = |G|². With the noise scale
  N = trΣ/|G|² that is k·(N + B)/(N + k·B): k where k·B ≪ N, and never more than (N + B)/B. One update is worth r of
  the old ones. Johnson et al. 2020, arXiv 2007.05105, section 3.

No torch here: a group is a mapping of numbers.
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
_LIKE_ADAM = ("NAdam", "RAdam", "Adamax")


class Kind(Enum):
    """What an optimizer does with the size of a gradient, told from what its groups hold."""

    PLAIN = "multiplies the gradient by the learning rate"
    ADAPTIVE = "divides by a running root mean square with a decay rate that is a hyper-parameter"
    NORMALIZED = "divides by the size of its gradients in another way"
    OTHER = "something that no rule was derived for"


SUITABLE: dict[Kind, tuple[Rule, ...]] = {
    Kind.PLAIN: ("linear", "adascale"),
    Kind.ADAPTIVE: ("sqrt", "sde", "half-life", "sqrt+half-life"),
    Kind.NORMALIZED: ("sqrt",),
    Kind.OTHER: (),
}
"""The rules that were derived for a kind, or whose derivation carries over."""


class Noise(NamedTuple):
    """What adascale is told: the noise scale trΣ/|G|² and the old batch, in one unit."""

    scale: float
    batch: float


class Adjustment(NamedTuple):
    """One hyper-parameter of a group before and after, and why."""

    name: str
    old: float
    new: float
    reason: str
    source: str


def kind_of(group: Mapping[str, Any]) -> Kind:
    """Tell the kind of an optimizer from one of its groups."""
    if (len(group.get("betas", ())) == 2 and "eps" in group) or ("alpha" in group and "centered" in group):
        return Kind.ADAPTIVE
    if "beta2_decay" in group or "ns_steps" in group:
        return Kind.NORMALIZED
    return Kind.PLAIN if "momentum" in group and "dampening" in group else Kind.OTHER


def lr_multiplier(factor: float, rule: Rule, noise: Noise | None = None) -> float:
    """Compute what a rule multiplies the learning rate by.

    Args:
        factor: New batch / old batch.
        rule: Any of them.
        noise: For adascale.
    """
    if rule == "linear":
        return factor
    if rule in _SQRT:
        return math.sqrt(factor)
    if rule == "adascale":
        assert noise is not None, "changes() asks for it"
        return factor * (noise.scale + noise.batch) / (noise.scale + factor * noise.batch)
    return 1.0


def adjustments(
    group: Mapping[str, Any], factor: float, rule: Rule, *, owner: str, noise: Noise | None = None
) -> list[Adjustment]:
    """Compute what a rule makes of one parameter group, in and out of range.

    Args:
        group: Its hyper-parameters, as an optimizer keeps them.
        factor: New batch / old batch.
        rule: Any of them.
        owner: What the optimizer is called.
        noise: For adascale.

    Returns:
        The moves that the rule makes, and those hyper-parameters that one could expect to move and that it keeps.
    """
    kind = kind_of(group)
    lr = float(group["lr"])
    found = [Adjustment("lr", lr, lr * lr_multiplier(factor, rule, noise), *_about_lr(kind, rule, owner))]
    for name, value in _decay_rates(group).items():
        found.append(Adjustment(name, value, *_decay(name, value, factor, rule)))
    eps = group.get("eps")
    if rule == "sde" and isinstance(eps, int | float):
        why = "it keeps its share beside the gradients' size"
        found.append(Adjustment("eps", float(eps), eps / math.sqrt(factor), why, MALLADI))
    return found + _kept(group, factor)


def _decay_rates(group: Mapping[str, Any]) -> dict[str, float]:
    """Give the decay rates of a group's running means by name: ``beta1`` and ``beta2``, or ``alpha`` of RMSprop."""
    if kind_of(group) is not Kind.ADAPTIVE:
        return {}
    if "betas" not in group:
        return {"alpha": float(group["alpha"])}
    return {f"beta{i}": float(beta) for i, beta in enumerate(group["betas"], start=1)}


def out_of_range(name: str, old: float, new: float) -> str | None:
    """Say what is wrong with a new value of a hyper-parameter; None for nothing."""
    if name in ("beta1", "beta2", "alpha"):
        if not new >= 0:
            return "below 0"
        return "not below 1" if new >= 1 else None
    if not math.isfinite(new):
        return "beyond what a number can be"
    return "0" if new == 0 != old else None


def nearest_factor(factor: float, works: Callable[[float], bool]) -> float:
    """Find the factor nearest to one that does not work, between that and 1, which does.

    Args:
        factor: Above 0.
        works: True at 1, and from there to some limit.

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
        why = "1 − k·(1 − β), a memory of as many samples as before"
        return value - (factor - 1) * (1 - value), why, MALLADI
    if rule in _HALF_LIFE and name != "beta1":
        return value**factor, "β^k, a half-life of as many samples as before", MAREK
    if rule in _HALF_LIFE:
        return value, "kept: the half-life is held for the second moment alone", MAREK
    return value, "kept: the rule is about the learning rate; its memory becomes k times as many samples", ""


def _about_lr(kind: Kind, rule: Rule, owner: str) -> tuple[str, str]:
    if rule == "half-life":
        return "kept: the rule is about the second moment; the best rate was found to grow more slowly than √k", MAREK
    if rule == "none":
        return "kept: nothing was asked for", ""
    if rule == "linear":
        why = "1/k of the updates, each k times as long: the same way, with the same noise, for as many samples"
    elif rule == "adascale":
        why = "one update is worth as many of the old ones as the noise in them lets it"
    else:
        why = "gradients are divided by their own size, which noise makes 1/√k as large: √k of the k is left to do"
    source = {"linear": GOYAL, "adascale": JOHNSON}.get(rule, MALLADI)
    if kind is Kind.OTHER:
        return f"warning: no rule was derived for {owner}, this is the bare multiplication", source
    if (kind is Kind.NORMALIZED or owner in _LIKE_ADAM) and rule in _SQRT:
        return f"{why}; derived for Adam, and taken over to {owner} by analogy", source
    if (kind is Kind.PLAIN) != (rule in _FOR_SGD):
        if kind is Kind.PLAIN:
            return f"warning: for division by the size of gradients, which {owner} does not do: linear suits it", source
        return f"warning: a rule of SGD; {owner} divides by the size of its gradients: sqrt suits it", source
    return why, source


def _kept(group: Mapping[str, Any], factor: float) -> list[Adjustment]:
    """Name what stays although its meaning in samples changes."""
    found = []
    momentum = group.get("momentum", 0)
    if momentum:
        samples = f"a half-life of {_half_life(momentum):.3g} updates, each of {factor:.4g} times the samples"
        found.append(
            Adjustment("momentum", momentum, momentum, f"kept: {samples}; short beside the run, it scales lr", "")
        )
    if "beta2_decay" in group:
        why = "kept: Adafactor's second moment forgets by the number of updates, at whatever batch"
        found.append(Adjustment("beta2_decay", group["beta2_decay"], group["beta2_decay"], why, ""))
    return found


def _half_life(decay: float) -> float:
    return math.log(0.5) / math.log(decay) if 0 < decay < 1 else math.inf
