"""``--scale-from`` and ``--lr-rule``: scale hyperparameters that were tuned at another global batch.

No torch here: a value out of range is reported before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bigbatch.errors import InputError
from bigbatch.lm.config.optimizer_settings import TITLES, group_keys
from bigbatch.scaling.rules import RULES, SUITABLE, Adjustment, Rule, adjustments, kind_of, nearest_factor, out_of_range

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True)
class BatchScaling:
    """Scaling of hyperparameters from the global batch at which they were tuned to that of this run.

    Attributes:
        lr: Learning rate at the tuned batch.
        batch: Global batch of this run, in ``unit``.
        unit: ``"sequences"`` or ``"tokens"``.
        tuned_at: Global batch at which ``lr`` was tuned, in ``unit``; None for that of this run.
        rule: Scaling rule; ``"none"`` changes nothing.
        optimizer: Name of the optimizer.
        settings: Its other hyperparameters.
    """

    lr: float
    batch: int
    unit: str
    tuned_at: int | None
    rule: Rule
    optimizer: str
    settings: Mapping[str, float]

    @property
    def factor(self) -> float:
        """Global batch of this run divided by the one at which the hyperparameters were tuned."""
        return 1.0 if self.tuned_at is None else self.batch / self.tuned_at

    def problem(self) -> str | None:
        """Return why the rule cannot be applied, in the names of the settings; None if it can."""
        found = self._first_problem(self.factor, self.rule)
        if found is None:
            return None
        adjustment, problem = found
        nearest = nearest_factor(self.factor, lambda k: self._first_problem(k, self.rule) is None)
        scale_from = math.ceil(self.batch / nearest) if self.factor > 1 else math.floor(self.batch / nearest)
        return (
            f"lr_rule {self.rule} at {self.factor:.6g} times the batch of scale_from would make {adjustment.name} "
            f"{adjustment.new:.4g}, which is {problem}: the nearest scale_from that works is {scale_from}"
        )

    def apply(self, optimizer: Optimizer) -> None:
        """Apply the rule to the hyperparameters of an optimizer, before a scheduler is created for it.

        Raises:
            InputError: A value would be out of range.
        """
        from bigbatch.scaling.hyperparameters import rescale

        if (why := self.problem()) is not None:
            raise InputError(f"{why.replace('lr_rule', '--lr-rule').replace('scale_from', '--scale-from')}.")
        rescale(optimizer, self.factor, rule=self.rule)

    def lines(self) -> list[str]:
        """Return the changes that the rule makes; without a rule, those that each suitable rule would make."""
        if self.tuned_at is None:
            return []
        tuned = f"tuned at a global batch of {self.tuned_at:,} {self.unit}, now {self.batch:,}: k = {self.factor:.6g}"
        if self.rule != "none":
            return [f"{tuned}; --lr-rule {self.rule} changes", *self._rows(self.rule)]
        rows = [row for rule in self._suitable if rule != "adascale" for row in self._rows(rule)]
        if not rows:
            return [f"{tuned}; no scaling rule was derived for {TITLES[self.optimizer]}, so nothing changes"]
        return [f"{tuned}; not applied unless selected by --lr-rule", *rows]

    @property
    def _keys(self) -> dict[str, object]:
        return group_keys(self.optimizer, self.settings, self.lr)

    @property
    def _suitable(self) -> tuple[Rule, ...]:
        return SUITABLE[kind_of(self._keys)]

    def _adjustments(self, factor: float, rule: Rule) -> list[Adjustment]:
        return adjustments(self._keys, factor, rule, owner=TITLES[self.optimizer])

    def _first_problem(self, factor: float, rule: Rule) -> tuple[Adjustment, str] | None:
        for adjustment in self._adjustments(factor, rule):
            if (problem := out_of_range(adjustment.name, adjustment.old, adjustment.new)) is not None:
                return adjustment, problem
        return None

    def _rows(self, rule: Rule) -> list[str]:
        """Return a line for each hyperparameter that a rule changes."""
        width = max(map(len, RULES))
        if (found := self._first_problem(self.factor, rule)) is not None:
            adjustment, problem = found
            outcome = f"not applicable at this k: {adjustment.name} would be {adjustment.new:.4g}, {problem}"
            return [f"  {rule:<{width}}  {outcome}"]
        changed = [a for a in self._adjustments(self.factor, rule) if a.new != a.old]
        lines = [f"{a.name} {a.old:.4g} → {a.new:.4g}: {a.reason}{f' ({a.source})' * bool(a.source)}" for a in changed]
        lines = lines or ["no change: the batch is the same"]
        return [f"  {rule if i == 0 else '':<{width}}  {line}" for i, line in enumerate(lines)]
