"""Rescale the hyper-parameters of an optimizer and its schedulers to another batch size.

    optimizer, factor, rule → changes (frozen) → optimizer and schedulers

`bigbatch.scaling.rules` has the equations and sources, docs/explanation/scaling-rules.md the limits of each rule.
"""

import math
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bigbatch.scaling.rules import (
    RULES,
    SUITABLE,
    Kind,
    Noise,
    Rule,
    adjustments,
    kind_of,
    lr_multiplier,
    nearest_factor,
    out_of_range,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

# Learning rates other than ``lr``: in parameter groups (OneCycleLR, SWALR), and in attributes of schedulers.
_GROUP_RATES = ("initial_lr", "max_lr", "min_lr", "swa_lr")
_SCHEDULER_LISTS = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
_SCHEDULER_NUMBERS = ("eta_min",)


@dataclass(frozen=True)
class Change:
    """One hyper-parameter of one parameter group, before and after rescaling.

    Attributes:
        group: Index in ``optimizer.param_groups``.
        name: ``lr``, ``beta1``, ``beta2``, ``alpha``, ``eps``; or one that is kept, such as ``momentum``.
        old: The old value.
        new: The value under the rule; equal to ``old`` if it is kept.
        reason: The reason; starts with ``warning`` if the rule was not derived for this optimizer.
        source: The paper, or an empty string.
    """

    group: int
    name: str
    old: float
    new: float
    reason: str
    source: str

    @property
    def changed(self) -> bool:
        """Whether the value differs."""
        return self.new != self.old

    def __str__(self) -> str:
        value = f"{self.old:.6g} → {self.new:.6g}" if self.changed else f"{self.old:.6g}"
        return f"group {self.group}: {self.name} {value}, {self.reason}{f' ({self.source})' if self.source else ''}"


def suitable(optimizer: "Optimizer") -> tuple[Rule, ...]:
    """Return the rules that were derived for the kind of an optimizer, or that carry over to it."""
    return SUITABLE[kind_of(optimizer.param_groups[0])]


def changes(
    optimizer: "Optimizer",
    factor: float,
    *,
    rule: Rule,
    noise_scale: float | None = None,
    batch: float | None = None,
) -> tuple[Change, ...]:
    """Return the changes that `bigbatch.rescale` would make, without making them.

    Args:
        optimizer: Tuned at the old batch size.
        factor: New batch / old batch; below 1 for a smaller batch.
        rule: As for `bigbatch.rescale`.
        noise_scale: trΣ/|G|², for adascale, in the unit of ``batch``.
        batch: The old batch size, for adascale.

    Returns:
        Each hyper-parameter that the rule changes, and those that it keeps although their meaning in samples changes.

    Raises:
        ValueError: The factor or a resulting value is out of range (the message has the nearest valid factor), or the
            optimizer lacks a hyper-parameter that the rule needs.
    """
    noise = _check(optimizer, factor, rule, noise_scale, batch)
    if rule == "none":
        return ()
    result = _changes(optimizer, factor, rule, noise)
    for change in result:
        if (problem := _problem(change)) is not None:
            nearest = nearest_factor(factor, lambda k: not any(map(_problem, _changes(optimizer, k, rule, noise))))
            other = ', or rule="sqrt+half-life", whose decay rates stay in range' if rule == "sde" else ""
            raise ValueError(
                f'rule="{rule}" with a factor of {factor:.6g} would make {change.name} of group {change.group} '
                f"{change.new:.6g} instead of {change.old:.6g}, which is {problem}. The nearest valid factor is "
                f"{nearest:.6g}{other}."
            )
    return result


def rescale(
    optimizer: "Optimizer",
    factor: float,
    *,
    rule: Rule,
    scheduler: "LRScheduler | Sequence[LRScheduler] | None" = None,
    noise_scale: float | None = None,
    batch: float | None = None,
) -> tuple[Change, ...]:
    """Rescale hyper-parameters that were tuned at one batch size to another, once, by the given rule.

        rescale(optimizer, 4, rule="linear")         SGD:   lr → 4·lr
        rescale(optimizer, 4, rule="sde")            Adam:  lr → 2·lr, β → 1 − 4·(1 − β), eps → eps/2

    With k = ``factor``:

    - ``linear``: lr·k. For SGD (Goyal et al. 2017, arXiv 1706.02677, section 2.1).
    - ``sqrt``: lr·√k. For Adam and other optimizers that normalize gradients, if gradient noise dominates (Malladi et
      al. 2022).
    - ``sde``: lr·√k, 1 − k·(1 − β) for both β or RMSprop's alpha, eps/√k (Malladi et al. 2022, arXiv 2205.10287).
    - ``half-life``: β2^k only, which keeps the half-life of the second moment in samples; β1 and lr are kept (Marek et
      al. 2025, arXiv 2507.07101, who found that the best lr grows more slowly than √k).
    - ``sqrt+half-life``: lr·√k and β2^k.
    - ``adascale``: lr·k·(N + B)/(N + k·B) with the noise scale N = ``noise_scale`` and the old batch B = ``batch``. For
      SGD (Johnson et al. 2020, arXiv 2007.05105, section 3, gain ratio), applied once; valid while N does not change.
    - ``none``: nothing.

    A rule that was derived for another kind of optimizer is applied nevertheless, with a reason that starts with
    ``warning``. Momentum, weight decay and schedules are kept: they count updates. `bigbatch.scaling.changes` returns
    the changes without applying them. No communication: call it on every rank.

    Args:
        optimizer: Tuned at the old batch size; its parameter groups are modified, tensors in place.
        factor: New global batch / old global batch; below 1 for a smaller batch.
        rule: One of the above.
        scheduler: Every scheduler of this optimizer, one or a list: schedulers store learning rates of their own, which
            would be restored at their next step. An empty list if a scheduler was created but is no longer used.
            Schedulers created after this call need not be passed.
        noise_scale: trΣ/|G|², for adascale, in the unit of ``batch`` (`NoiseScale.scale_items` or ``scale_samples``).
        batch: The old global batch size, for adascale.

    Returns:
        Each hyper-parameter that was changed, and those that were kept although their meaning in samples changes.

    Raises:
        ValueError: A value is out of range (the message has the nearest valid factor), the optimizer lacks a
            hyper-parameter that the rule needs, or a scheduler is missing or belongs to another optimizer. Nothing is
            changed then.
    """
    result = changes(optimizer, factor, rule=rule, noise_scale=noise_scale, batch=batch)
    schedulers = _schedulers(scheduler)
    _check_schedulers(optimizer, schedulers, result, passed=scheduler is not None)
    noise = None if noise_scale is None or batch is None else Noise(noise_scale, batch)
    multiplier = lr_multiplier(factor, rule, noise)
    # All values are computed before the first is written: groups may share one tensor as their rate.
    writes = [(place, key, _scaled(place[key], multiplier)) for place, key in _other_rates(optimizer, schedulers)]
    for change in result:
        if change.changed:
            _write_change(optimizer.param_groups[change.group], change)
    if multiplier != 1:
        for place, key, value in writes:
            _write(place, key, value)
    return result


# Computing the changes -----------------------------------------------------------------------------------------------


def _changes(optimizer: "Optimizer", factor: float, rule: Rule, noise: Noise | None) -> tuple[Change, ...]:
    owner = type(optimizer).__name__
    return tuple(
        Change(index, *move)
        for index, group in enumerate(optimizer.param_groups)
        for move in adjustments(group, factor, rule, owner=owner, noise=noise)
    )


def _problem(change: Change) -> str | None:
    return out_of_range(change.name, change.old, change.new)


def _check(
    optimizer: "Optimizer", factor: float, rule: Rule, noise_scale: float | None, batch: float | None
) -> Noise | None:
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}: it must be one of {', '.join(RULES)}.")
    if not _is_positive(factor):
        raise ValueError(f"factor is {factor!r}: it is new batch / old batch, a finite number above 0.")
    if rule != "adascale":
        if noise_scale is not None or batch is not None:
            raise ValueError(
                f'noise_scale and batch have no effect with rule="{rule}": remove them, or pass rule="adascale".'
            )
        _check_decay(optimizer, rule)
        return None
    if noise_scale is None or batch is None:
        raise ValueError(
            'rule="adascale" needs noise_scale= (trΣ/|G|²) and batch= (the old batch size), in the same unit.'
        )
    if not (_is_positive(noise_scale) and _is_positive(batch)):
        raise ValueError(f"noise_scale is {noise_scale!r} and batch {batch!r}: both must be finite numbers above 0.")
    return Noise(noise_scale, batch)


def _check_decay(optimizer: "Optimizer", rule: Rule) -> None:
    adaptive = any(kind_of(group) is Kind.ADAPTIVE for group in optimizer.param_groups)
    if rule in ("sde", "half-life", "sqrt+half-life") and not adaptive:
        rules = suitable(optimizer)
        raise ValueError(
            f'rule="{rule}" changes the decay rate of a second moment, but {type(optimizer).__name__} has none. '
            f'Pass rule="{rules[0] if rules else "none"}".'
        )


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and math.isfinite(value)


# Applying the changes ------------------------------------------------------------------------------------------------


def _write_change(group: dict[str, Any], change: Change) -> None:
    if change.name in ("beta1", "beta2"):
        betas = list(group["betas"])
        _write(betas, int(change.name[-1]) - 1, change.new)
        group["betas"] = tuple(betas)
    else:
        _write(group, change.name, change.new)


def _write(place: MutableMapping[str, Any] | list[Any], key: Any, value: float) -> None:
    if hasattr(place[key], "fill_"):
        place[key].fill_(value)  # in place: compiled steps and CUDA graphs reference this tensor
    else:
        place[key] = value


def _scaled(value: Any, multiplier: float) -> float:
    return float(value) * multiplier


def _other_rates(optimizer: "Optimizer", schedulers: "list[LRScheduler]") -> list[tuple[Any, Any]]:
    """Return the locations of learning rates other than ``lr``, each once: schedulers may share lists."""
    places: list[tuple[Any, Any]] = [(g, key) for g in optimizer.param_groups for key in _GROUP_RATES if key in g]
    lists: dict[int, list[Any]] = {}
    for scheduler in schedulers:
        state = vars(scheduler)
        lists |= {id(state[name]): state[name] for name in _SCHEDULER_LISTS if isinstance(state.get(name), list)}
        places += [(state, name) for name in _SCHEDULER_NUMBERS if name in state]
    return places + [(rates, i) for rates in lists.values() for i in range(len(rates))]


def _schedulers(scheduler: "LRScheduler | Sequence[LRScheduler] | None") -> "list[LRScheduler]":
    if scheduler is None:
        return []
    outer = scheduler if isinstance(scheduler, Sequence) else [scheduler]
    return [each for outermost in outer for each in _with_inner(outermost)]


def _with_inner(scheduler: Any) -> "Iterator[LRScheduler]":
    """Yield a scheduler and the inner ones of SequentialLR and ChainedScheduler."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _with_inner(inner)


def _check_schedulers(
    optimizer: "Optimizer", schedulers: "list[LRScheduler]", changes_made: tuple[Change, ...], *, passed: bool
) -> None:
    for scheduler in schedulers:
        owner = getattr(scheduler, "optimizer", optimizer)
        if owner.param_groups is not optimizer.param_groups:
            raise ValueError(
                "the scheduler belongs to another optimizer: pass the one that was created with this optimizer."
            )
    changed = {change.name for change in changes_made if change.changed}
    # torch's schedulers wrap the optimizer's step and mark it; keys such as initial_lr may come from loaded state.
    if "lr" in changed and not passed and hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise ValueError(
            "a scheduler was created for this optimizer and would restore the old learning rate. "
            "Pass scheduler=, or scheduler=[] if it is no longer used."
        )
    if "beta1" in changed and any(getattr(scheduler, "cycle_momentum", False) for scheduler in schedulers):
        raise ValueError(
            "the scheduler cycles beta1 and would restore it. Create it with cycle_momentum=False, or pass "
            'rule="sqrt+half-life", which keeps beta1.'
        )
