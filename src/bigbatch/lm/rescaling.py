"""``--scale-from`` and ``--lr-rule``: hyper-parameters that were tuned at another global batch.

    config → what the rules would change, as lines → what the one that is named changes, once, in a run that begins

No torch here: what is out of range is told before anything is loaded.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bigbatch.errors import InputError
from bigbatch.scaling_rules import RULES, SUITABLE, Kind, Move, Rule, moves, nearest_factor, out_of_range

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from bigbatch.lm.config import TrainConfig

BETAS = (0.9, 0.95)
EPS = 1e-8
OPTIMIZER = "AdamW"


def batch_factor(config: TrainConfig) -> float:
    """Compute the global batch of a resolved configuration over the one that its hyper-parameters were tuned at."""
    batch = config.global_batch or config.global_batch_tokens
    assert batch is not None, "resolved() gives one of the two"
    return 1.0 if config.scale_from is None else batch / config.scale_from


def complaint(config: TrainConfig) -> str | None:
    """Say why the rule that a resolved configuration names cannot be applied, in the names of its fields; or None."""
    factor = batch_factor(config)
    wrong = _first_problem(config, factor, config.lr_rule)
    if wrong is None:
        return None
    move, problem = wrong
    nearest = nearest_factor(factor, lambda k: _first_problem(config, k, config.lr_rule) is None)
    batch = factor * (config.scale_from or 1)
    scale_from = math.ceil(batch / nearest) if factor > 1 else math.floor(batch / nearest)
    return (
        f"lr_rule {config.lr_rule} at {factor:.6g} times the batch of scale_from would make {move.name} "
        f"{move.new:.4g}, which is {problem}: the nearest scale_from that works is {scale_from}"
    )


def apply_rule(optimizer: Optimizer, config: TrainConfig) -> None:
    """Change the optimizer of a run that begins as its resolved configuration says; before it has a scheduler.

    Raises:
        InputError: A value would be out of range: a run that is begun anew with another batch.
    """
    from bigbatch.scaling import rescale

    if (why := complaint(config)) is not None:
        raise InputError(f"{why.replace('lr_rule', '--lr-rule').replace('scale_from', '--scale-from')}.")
    rescale(optimizer, batch_factor(config), rule=config.lr_rule)


def rule_lines(config: TrainConfig) -> list[str]:
    """Say what the rule of a resolved configuration changes, or where it names none, what each that suits would."""
    if config.scale_from is None:
        return []
    factor = batch_factor(config)
    unit = "tokens" if config.global_batch is None else "sequences"
    batch = config.global_batch or config.global_batch_tokens
    tuned = f"tuned at a global batch of {config.scale_from:,} {unit}, and this one is {batch:,}: k = {factor:.6g}"
    if config.lr_rule != "none":
        return [f"{tuned}; --lr-rule {config.lr_rule} changes", *_rows(config, factor, config.lr_rule)]
    rows = [row for rule in SUITABLE[Kind.ADAPTIVE] for row in _rows(config, factor, rule)]
    return [f"{tuned}; nothing is changed unless --lr-rule names a rule", *rows]


def _moves(config: TrainConfig, factor: float, rule: Rule) -> list[Move]:
    return moves({"lr": config.lr, "betas": BETAS, "eps": EPS}, factor, rule, owner=OPTIMIZER)


def _first_problem(config: TrainConfig, factor: float, rule: Rule) -> tuple[Move, str] | None:
    for move in _moves(config, factor, rule):
        if (problem := out_of_range(move.name, move.old, move.new)) is not None:
            return move, problem
    return None


def _rows(config: TrainConfig, factor: float, rule: Rule) -> list[str]:
    """Write a line for each hyper-parameter that a rule changes."""
    width = max(map(len, RULES))
    if (wrong := _first_problem(config, factor, rule)) is not None:
        return [f"  {rule:<{width}}  not at this k: {wrong[0].name} would be {wrong[0].new:.4g}, {wrong[1]}"]
    changed = [move for move in _moves(config, factor, rule) if move.new != move.old]
    lines = [f"{m.name} {m.old:.4g} → {m.new:.4g}: {m.reason}{f' ({m.source})' * bool(m.source)}" for m in changed]
    lines = lines or ["nothing: the batch is the same"]
    return [f"  {rule if i == 0 else '':<{width}}  {line}" for i, line in enumerate(lines)]
