"""Hyper-parameters for another batch: what a rule would change, and the change.

optimizer, factor, rule → changes (frozen) → optimizer and scheduler

`bigbatch.scaling.rules` has the equations with their sources, docs/explanation/scaling-rules.md where each one ends.
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

# Learning rates beside ``lr`` that schedulers keep in the groups (OneCycleLR, SWALR), and in themselves.
_GROUP_RATES = ("initial_lr", "max_lr", "min_lr", "swa_lr")
_SCHEDULER_LISTS = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
_SCHEDULER_NUMBERS = ("eta_min",)


@dataclass(frozen=True)
class Change:
    """One hyper-parameter of one parameter group, before and after.

    Attributes:
        group: Its index in ``optimizer.param_groups``.
        name: ``lr``, ``beta1``, ``beta2``, ``alpha``, ``eps``; or one that is kept, such as ``momentum``.
        old: Its value.
        new: The value that the rule gives it; the same where it is kept.
        reason: Why, or that it is a warning.
        source: The paper, or nothing.
    """

    group: int
    name: str
    old: float
    new: float
    reason: str
    source: str

    @property
    def changed(self) -> bool:
        """Whether it is changed, rather than kept."""
        return self.new != self.old

    def __str__(self) -> str:
        value = f"{self.old:.6g} → {self.new:.6g}" if self.changed else f"{self.old:.6g}"
        return f"group {self.group}: {self.name} {value}, {self.reason}{f' ({self.source})' if self.source else ''}"


def suitable(optimizer: "Optimizer") -> tuple[Rule, ...]:
    """Give the rules that were derived for such an optimizer, or that carry over to it."""
    return SUITABLE[kind_of(optimizer.param_groups[0])]


def changes(
    optimizer: "Optimizer",
    factor: float,
    *,
    rule: Rule,
    noise_scale: float | None = None,
    batch: float | None = None,
) -> tuple[Change, ...]:
    """Say what `bigbatch.rescale` would change, and change nothing.

    Args:
        optimizer: As tuned at the old batch.
        factor: New batch / old batch; below 1 for a smaller one.
        rule: As for `bigbatch.rescale`.
        noise_scale: trΣ/|G|², for adascale, in the unit of ``batch``.
        batch: The old batch, for adascale.

    Returns:
        Each hyper-parameter that the rule moves, and those that it keeps although one could expect otherwise.

    Raises:
        ValueError: The factor, or a value that it leads to, is out of range, with the nearest factor that works; or the
            rule needs what the optimizer has not.
    """
    noise = _check(optimizer, factor, rule, noise_scale, batch)
    if rule == "none":
        return ()
    found = _changes(optimizer, factor, rule, noise)
    for change in found:
        if (problem := _problem(change)) is not None:
            nearest = nearest_factor(factor, lambda k: not any(map(_problem, _changes(optimizer, k, rule, noise))))
            other = ', or rule="sqrt+half-life", whose decay rates stay in range' if rule == "sde" else ""
            raise ValueError(
                f'rule="{rule}" with a factor of {factor:.6g} would make {change.name} of group {change.group} '
                f"{change.new:.6g} instead of {change.old:.6g}, which is {problem}. The nearest factor that works is "
                f"{nearest:.6g}{other}."
            )
    return found


def rescale(
    optimizer: "Optimizer",
    factor: float,
    *,
    rule: Rule,
    scheduler: "LRScheduler | Sequence[LRScheduler] | None" = None,
    noise_scale: float | None = None,
    batch: float | None = None,
) -> tuple[Change, ...]:
    """Move hyper-parameters that were tuned at one batch to another, once, by the rule that is named.

        rescale(optimizer, 4, rule="linear")         SGD:   lr → 4·lr
        rescale(optimizer, 4, rule="sde")            Adam:  lr → 2·lr, β → 1 − 4·(1 − β), eps → eps/2

    With k the factor:

    - ``linear``: lr·k. For SGD (Goyal et al. 2017, arXiv 1706.02677).
    - ``sqrt``: lr·√k. For optimizers that divide by the size of their gradients, where noise dominates these.
    - ``sde``: lr·√k, 1 − k·(1 − β) for both β or RMSprop's alpha, eps/√k (Malladi et al. 2022, arXiv 2205.10287).
    - ``half-life``: β2^k alone, so that the second moment forgets after as many samples as before; β1 and lr are kept
      (Marek et al. 2025, arXiv 2507.07101, whose best lr grew more slowly than √k).
    - ``sqrt+half-life``: lr·√k and β2^k.
    - ``adascale``: lr·k·(N + B)/(N + k·B) with the noise scale N = ``noise_scale`` and the old batch B = ``batch``. For
      SGD (Johnson et al. 2020, arXiv 2007.05105, their gain), held for as long as N is that; beyond N there is no gain.
    - ``none``: nothing.

    A rule that was derived for another kind of optimizer is applied as it is, and its reason begins with ``warning``.
    Momentum, weight decay and schedules are kept: they count in updates. `bigbatch.scaling.changes` only tells.

    Args:
        optimizer: As tuned at the old batch; its groups are changed. Tensors are written in place.
        factor: New batch / old batch; below 1 for a smaller one.
        rule: One of the above.
        scheduler: Every scheduler of this optimizer: it keeps learning rates of its own, which would come back at its
            next step. An empty list where one was made and is not used any more. Schedulers made later need nothing.
        noise_scale: trΣ/|G|², for adascale, in the unit of ``batch``.
        batch: The old batch, for adascale.

    Returns:
        What was changed, and what was kept although one could expect otherwise.

    Raises:
        ValueError: Something is out of range (the nearest factor that works is in the message), the rule needs what the
            optimizer has not, or a scheduler is missing or another optimizer's. Nothing is changed then.
    """
    found = changes(optimizer, factor, rule=rule, noise_scale=noise_scale, batch=batch)
    schedulers = _schedulers(scheduler)
    _check_schedulers(optimizer, schedulers, found, given=scheduler is not None)
    noise = None if noise_scale is None or batch is None else Noise(noise_scale, batch)
    multiplier = lr_multiplier(factor, rule, noise)
    # All values are computed before the first is written: one tensor may be the rate of several groups.
    writes = [(place, key, _scaled(place[key], multiplier)) for place, key in _other_rates(optimizer, schedulers)]
    for change in found:
        if change.changed:
            _write_change(optimizer.param_groups[change.group], change)
    if multiplier != 1:
        for place, key, value in writes:
            _write(place, key, value)
    return found


# what would change -----------------------------------------------------------------------------------------------


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
                f'noise_scale and batch do nothing with rule="{rule}": leave them out, or pass "adascale".'
            )
        _check_decay(optimizer, rule)
        return None
    if noise_scale is None or batch is None:
        raise ValueError('rule="adascale" needs noise_scale= (trΣ/|G|²) and batch= (the old one), in one unit.')
    if not (_is_positive(noise_scale) and _is_positive(batch)):
        raise ValueError(f"noise_scale is {noise_scale!r} and batch {batch!r}: both must be finite numbers above 0.")
    return Noise(noise_scale, batch)


def _check_decay(optimizer: "Optimizer", rule: Rule) -> None:
    adaptive = any(kind_of(group) is Kind.ADAPTIVE for group in optimizer.param_groups)
    if rule in ("sde", "half-life", "sqrt+half-life") and not adaptive:
        own = suitable(optimizer)
        raise ValueError(
            f'rule="{rule}" moves the decay rate of a second moment, and {type(optimizer).__name__} has none. '
            f'Pass rule="{own[0] if own else "none"}".'
        )


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and math.isfinite(value)


# the change ------------------------------------------------------------------------------------------------------


def _write_change(group: dict[str, Any], change: Change) -> None:
    if change.name in ("beta1", "beta2"):
        betas = list(group["betas"])
        _write(betas, int(change.name[-1]) - 1, change.new)
        group["betas"] = tuple(betas)
    else:
        _write(group, change.name, change.new)


def _write(place: MutableMapping[str, Any] | list[Any], key: Any, value: float) -> None:
    if hasattr(place[key], "fill_"):
        place[key].fill_(value)  # the same tensor: compiled steps and CUDA graphs hold on to it
    else:
        place[key] = value


def _scaled(value: Any, multiplier: float) -> float:
    return float(value) * multiplier


def _other_rates(optimizer: "Optimizer", schedulers: "list[LRScheduler]") -> list[tuple[Any, Any]]:
    """List where learning rates stand beside ``lr``, each place once: schedulers share lists with one another."""
    places: list[tuple[Any, Any]] = [(g, key) for g in optimizer.param_groups for key in _GROUP_RATES if key in g]
    lists: dict[int, list[Any]] = {}
    for scheduler in schedulers:
        own = vars(scheduler)
        lists |= {id(own[name]): own[name] for name in _SCHEDULER_LISTS if isinstance(own.get(name), list)}
        places += [(own, name) for name in _SCHEDULER_NUMBERS if name in own]
    return places + [(rates, i) for rates in lists.values() for i in range(len(rates))]


def _schedulers(given: "LRScheduler | Sequence[LRScheduler] | None") -> "list[LRScheduler]":
    if given is None:
        return []
    tops = given if isinstance(given, Sequence) else [given]
    return [scheduler for top in tops for scheduler in _with_inner(top)]


def _with_inner(scheduler: Any) -> "Iterator[LRScheduler]":
    """Give a scheduler and those that SequentialLR and ChainedScheduler are made of."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _with_inner(inner)


def _check_schedulers(
    optimizer: "Optimizer", schedulers: "list[LRScheduler]", found: tuple[Change, ...], *, given: bool
) -> None:
    for scheduler in schedulers:
        owner = getattr(scheduler, "optimizer", optimizer)
        if owner.param_groups is not optimizer.param_groups:
            raise ValueError("the scheduler belongs to another optimizer: pass the one that was made from this.")
    moved = {change.name for change in found if change.changed}
    # torch's schedulers replace the optimizer's step by one with this mark; state that was loaded has no such step.
    if "lr" in moved and not given and hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise ValueError(
            "a scheduler was made for this optimizer and would put the old learning rate back. "
            "Pass scheduler=, or scheduler=[] if it is not used any more."
        )
    if "beta1" in moved and any(getattr(scheduler, "cycle_momentum", False) for scheduler in schedulers):
        raise ValueError(
            "the scheduler cycles beta1 and would put it back. Make it with cycle_momentum=False, or pass "
            'rule="sqrt+half-life", which keeps beta1.'
        )
