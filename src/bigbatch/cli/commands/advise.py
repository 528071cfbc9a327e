"""``bigbatch advise``: how the batch of a run stands to its gradient noise, in plain words; measured by --branch."""

import json
import math
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bigbatch.cli.console import make_console, progress_display, quiet_libraries
from bigbatch.cli.exit_codes import DONE
from bigbatch.cli.options import AdviseOptions
from bigbatch.cli.run_lookup import check_run
from bigbatch.errors import InputError
from bigbatch.lm.advice.batch_advice import advise, read_evidence

if TYPE_CHECKING:
    from rich.console import Console

    from bigbatch.lm.advice.branch_experiment import BranchResult

WIDEST = 100


def run(options: AdviseOptions) -> int:
    """Say what the run has measured and what follows from it."""
    check_run(options.run)
    found = read_evidence(options.run)
    advice = advise(found)
    console = make_console(stderr=options.as_json)
    branched = _branch(options, console) if options.branch else []
    if options.as_json:
        print(json.dumps(_finite({**asdict(found), **asdict(advice), "branches": [asdict(b) for b in branched]})))
        return DONE
    for sentence in advice.sentences:
        width = min(WIDEST, console.width)
        console.print(textwrap.fill(sentence, width, subsequent_indent="  ", break_on_hyphens=False))
    if branched:
        _show(branched, console)
    return DONE


def _branch(options: AdviseOptions, console: "Console") -> "list[BranchResult]":
    from bigbatch.lm.checkpoint.manager import load
    from bigbatch.lm.training.resume import stored_config, with_saved_changes

    checkpoint, _ = load(options.run)
    if checkpoint is None:
        raise InputError(f"--branch begins at a checkpoint, and {options.run} has none that is whole.")
    if checkpoint.ranks:
        raise InputError(f"--branch runs in one process, and {options.run} was saved by {len(checkpoint.ranks)} ranks.")
    with progress_display(console) as progress:
        from bigbatch.lm.advice.branch_experiment import MULTIPLES, branch_experiment
        from bigbatch.lm.training.evaluation import seeded
        from bigbatch.lm.training.setup import set_up_training
        from bigbatch.lm.training.trainer import Trainer

        quiet_libraries()
        setup = set_up_training(with_saved_changes(stored_config(options.run), checkpoint.facts), progress=progress)
        trainer = Trainer(setup, checkpoint=checkpoint)
        progress(f"training {len(MULTIPLES)} branches from update {checkpoint.progress.step}")
        found = []
        with seeded(setup):
            for branch in branch_experiment(trainer, checkpoint, updates=options.branch_updates):
                found.append(branch)
                progress(f"training {len(MULTIPLES)} branches", len(found), len(MULTIPLES))
    return found


def _show(found: "list[BranchResult]", console: "Console") -> None:
    from bigbatch.lm.advice.branch_experiment import TOLERANCE, largest_without_penalty

    console.print(f"\n{'batch':>8}{'updates':>9}{'held-out loss':>15}{'penalty':>9}")
    for branch in found:
        console.print(f"{branch.batch:>8,}{branch.updates:>9,}{branch.loss:>15.4f}{branch.penalty:>+9.4f}")
    good = largest_without_penalty(found)
    open_end = " or more" if good is found[-1] else ""
    console.print(
        f"the largest batch without loss penalty here: {good.batch:,} sequences{open_end} (the same samples, the rate "
        f"times √k, beta2 to the power k; {TOLERANCE} nats count as the same)"
    )


def _finite(value: Any) -> Any:
    """Make null of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
