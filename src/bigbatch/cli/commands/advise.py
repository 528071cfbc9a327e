"""``bigbatch advise``: compare the batch of a run with its gradient noise scale; --branch measures it."""

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bigbatch.cli.console import OutputConsole, make_console, progress_display, quiet_libraries
from bigbatch.cli.exit_codes import DONE
from bigbatch.cli.options import AdviseOptions
from bigbatch.cli.output import wrap
from bigbatch.cli.run_lookup import check_run
from bigbatch.errors import InputError
from bigbatch.lm.advice.batch_advice import advise
from bigbatch.lm.advice.run_evidence import read_evidence
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.text import SAMPLE_NOUNS

if TYPE_CHECKING:
    from bigbatch.lm.advice.branch_experiment import BranchResult

MAX_WIDTH = 100


def run(options: AdviseOptions) -> int:
    """Print the measurements of the run and the advice based on them."""
    check_run(options.run)
    evidence = read_evidence(options.run)
    advice = advise(evidence)
    console = make_console(stderr=options.as_json)
    config, branches = _train_branches(options, console) if options.branch else (None, [])
    if options.as_json:
        print(json.dumps(_finite({**asdict(evidence), **asdict(advice), "branches": [asdict(b) for b in branches]})))
        return DONE
    for sentence in advice.sentences:
        for line in wrap(sentence, min(MAX_WIDTH, console.width)).splitlines():
            console.print(line)
    if config is not None:
        _show(branches, console, noun=SAMPLE_NOUNS[config.objective], unit=config.loss_unit)
    return DONE


def _train_branches(options: AdviseOptions, console: OutputConsole) -> "tuple[TrainConfig, list[BranchResult]]":
    """Return the configuration of the run and the branches from its newest checkpoint."""
    from bigbatch.lm.checkpoint.run_checkpoint import load
    from bigbatch.lm.training.resume import check_facts, stored_config, with_saved_changes

    stored = stored_config(options.run)
    checkpoint, _ = load(options.run)
    if checkpoint is None:
        raise InputError(f"--branch needs a checkpoint, but {options.run} has no whole one.")
    if checkpoint.ranks:
        raise InputError(f"--branch runs in one process, but {options.run} was saved by {len(checkpoint.ranks)} ranks.")
    with progress_display(console) as progress:
        from bigbatch.lm.advice.branch_experiment import MULTIPLES, branch_experiment
        from bigbatch.lm.training.evaluation import seeded
        from bigbatch.lm.training.setup import set_up_training
        from bigbatch.lm.training.trainer import Trainer

        quiet_libraries()
        from bigbatch.lm.data.sampling_order import sampling_order_of

        config = with_saved_changes(stored, checkpoint.facts)
        order_version = sampling_order_of(options.run, checkpoint.facts, has_checkpoint=True)
        setup = set_up_training(config, progress=progress, order_version=order_version)
        trainer = Trainer(setup, checkpoint=checkpoint)
        check_facts(setup.config, checkpoint.facts, trainer.facts, allowed=())
        trainer.prepare(options.run)
        progress(f"training {len(MULTIPLES)} branches from update {checkpoint.progress.step}")
        results = []
        with seeded(setup):
            for branch in branch_experiment(trainer, checkpoint, updates=options.branch_updates):
                results.append(branch)
                progress(f"training {len(MULTIPLES)} branches", len(results), len(MULTIPLES))
    return config, results


def _show(branches: "list[BranchResult]", console: OutputConsole, *, noun: str, unit: str) -> None:
    from bigbatch.lm.advice.branch_experiment import TOLERANCE, conclusion

    console.print("")
    console.print(f"{'batch':>7}{'updates':>8}{'loss':>9}{'penalty':>9}{'±':>7}")
    for branch in branches:
        spread = f"{branch.spread:.4f}" if branch.multiple > 1 else ""
        line = f"{branch.batch:>7,}{branch.updates:>8,}{branch.loss:>9.4f}{branch.penalty:>+9.4f}{spread:>7}"
        console.print(line.rstrip())
    console.print(conclusion(branches, noun=noun, unit=unit))
    console.print(
        f"loss: of the held-out {noun}s, {_in_unit(unit)}; ±: half of the 95 % interval of the penalty over these "
        f"{noun}s, without the chance in training. Every branch is trained on the same samples; at k times the batch: "
        f"learning rate × √k, beta2 to the power k. A penalty up to {TOLERANCE} is ignored."
    )


def _in_unit(unit: str) -> str:
    return unit if unit.startswith("per ") else f"in {unit}"


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by None, since JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
