"""``--scale-from`` and ``--lr-rule``: hyperparameters that were tuned at another global batch.

No torch here: a value out of range is reported before anything is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bigbatch.errors import InputError
from bigbatch.scaling.rules import RULES, SUITABLE, Adjustment, Kind, Rule, adjustments, nearest_factor, out_of_range

if TYPE_CHECKING:
    from torch.optim import Optimizer

BETAS = (0.9, 0.95)
EPS = 1e-8
OPTIMIZER = "AdamW"


@dataclass(frozen=True)
class BatchScaling:
    """Scale AdamW's hyperparameters from the global batch that they were tuned at to the one of this run.

    Attributes:
        lr: Learning rate at the tuned batch.
        batch: Global batch of this run, in ``unit``.
        unit: ``"sequences"`` or ``"tokens"``.
        tuned_at: Global batch that ``lr`` was tuned at, in ``unit``; None for this one.
        rule: How to scale; ``"none"`` changes nothing.
    """

    lr: float
    batch: int
    unit: str
    tuned_at: int | None
    rule: Rule

    @property
    def factor(self) -> float:
        """The global batch of this run divided by the one that the hyperparameters were tuned at."""
        return 1.0 if self.tuned_at is None else self.batch / self.tuned_at

    def problem(self) -> str | None:
        """Return why the rule cannot be applied, in the names of the settings; None if it can."""
        wrong = self._first_problem(self.factor, self.rule)
        if wrong is None:
            return None
        move, problem = wrong
        nearest = nearest_factor(self.factor, lambda k: self._first_problem(k, self.rule) is None)
        scale_from = math.ceil(self.batch / nearest) if self.factor > 1 else math.floor(self.batch / nearest)
        return (
            f"lr_rule {self.rule} at {self.factor:.6g} times the batch of scale_from would make {move.name} "
            f"{move.new:.4g}, which is {problem}: the nearest scale_from that works is {scale_from}"
        )

    def apply(self, optimizer: Optimizer) -> None:
        """Change the hyperparameters of an optimizer by the rule, before a scheduler is made for it.

        Raises:
            InputError: A value would be out of range.
        """
        from bigbatch.scaling.hyperparameters import rescale

        if (why := self.problem()) is not None:
            raise InputError(f"{why.replace('lr_rule', '--lr-rule').replace('scale_from', '--scale-from')}.")
        rescale(optimizer, self.factor, rule=self.rule)

    def lines(self) -> list[str]:
        """Say what the rule changes; without a rule, what each suitable one would change."""
        if self.tuned_at is None:
            return []
        tuned = (
            f"tuned at a global batch of {self.tuned_at:,} {self.unit}, and this one is {self.batch:,}: "
            f"k = {self.factor:.6g}"
        )
        if self.rule != "none":
            return [f"{tuned}; --lr-rule {self.rule} changes", *self._rows(self.rule)]
        rows = [row for rule in SUITABLE[Kind.ADAPTIVE] for row in self._rows(rule)]
        return [f"{tuned}; nothing is changed unless --lr-rule names a rule", *rows]

    def _moves(self, factor: float, rule: Rule) -> list[Adjustment]:
        return adjustments({"lr": self.lr, "betas": BETAS, "eps": EPS}, factor, rule, owner=OPTIMIZER)

    def _first_problem(self, factor: float, rule: Rule) -> tuple[Adjustment, str] | None:
        for move in self._moves(factor, rule):
            if (problem := out_of_range(move.name, move.old, move.new)) is not None:
                return move, problem
        return None

    def _rows(self, rule: Rule) -> list[str]:
        """Return a line for each hyperparameter that a rule changes."""
        width = max(map(len, RULES))
        if (wrong := self._first_problem(self.factor, rule)) is not None:
            return [f"  {rule:<{width}}  not at this k: {wrong[0].name} would be {wrong[0].new:.4g}, {wrong[1]}"]
        changed = [move for move in self._moves(self.factor, rule) if move.new != move.old]
        lines = [f"{m.name} {m.old:.4g} → {m.new:.4g}: {m.reason}{f' ({m.source})' * bool(m.source)}" for m in changed]
        lines = lines or ["nothing: the batch is the same"]
        return [f"  {rule if i == 0 else '':<{width}}  {line}" for i, line in enumerate(lines)]
