"""A micro-batch that was timed while the machine was busy is chosen again."""

from pathlib import Path
from typing import Any

import pytest

from bigbatch.autotune.choice import MicrobatchChoice, Trial
from bigbatch.autotune.time_model import TimeModel
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.training.setup import set_up_training
from bigbatch.lm.training.speed_watch import MOST_CHOICES, UPDATES, SpeedWatch
from bigbatch.lm.training.trainer import Trainer
from support.language_models import RecordingCallback, records, save_model_folder, write_jsonl


def choice_of(per_s: float, *, unit: str = "tokens", size: int = 64) -> MicrobatchChoice:
    timing = TimeModel(((size, size / per_s),))
    return MicrobatchChoice(size, 32, unit, 10**6, 2 * 10**6, per_s, size, (Trial(size, per_s),), timing)


def row(tokens_per_s: float | None, **more: Any) -> dict[str, Any]:
    return {"tokens_per_s": tokens_per_s, "skipped": None, **more}


def factors(rows: list[dict[str, Any]], choice: MicrobatchChoice) -> list[float | None]:
    watch = SpeedWatch()
    return [watch.times_faster(each, choice) for each in rows]


def test_faster_updates_call_for_new_choice() -> None:
    assert factors([row(300.0)] * UPDATES, choice_of(100.0)) == [None] * (UPDATES - 1) + [3.0]


@pytest.mark.parametrize(
    "rows",
    [
        [row(140.0)] * 3 * UPDATES,
        [row(10.0)] * 3 * UPDATES,
        [row(None)] * 3 * UPDATES,
        [row(300.0, retries=1), row(300.0, skipped="non-finite")] * 3 * UPDATES,
        [row(300.0), row(90.0), row(90.0)] * UPDATES,
    ],
    ids=["as fast", "slower", "no clock", "repeated", "single ones"],
)
def test_other_updates_keep_choice(rows: list[dict[str, Any]]) -> None:
    assert factors(rows, choice_of(100.0)) == [None] * len(rows)


def test_number_of_choices_is_limited() -> None:
    found = factors([row(300.0)] * 10 * UPDATES, choice_of(100.0))
    assert sum(factor is not None for factor in found) == MOST_CHOICES


def test_choice_in_samples_is_kept() -> None:
    assert factors([row(300.0)] * UPDATES, choice_of(100.0, unit="samples")) == [None] * UPDATES


def test_run_chooses_again_and_says_so(tmp_path: Path) -> None:
    data, model = write_jsonl(tmp_path / "data.jsonl", records(40)), save_model_folder(tmp_path / "base")
    config = TrainConfig(
        data=str(data), model=str(model), device="cpu", global_batch=8, steps=UPDATES + 1, max_length=32, lr=1e-3
    )
    setup = set_up_training(config)
    directory = RunDirectory.create(tmp_path / "run", setup.config.model_dump(mode="json"))
    trainer, notes = Trainer(setup), []
    trainer.engine.set_microbatch(choice_of(1e-3))  # as on a machine that stood still
    trainer.run(directory, callback=RecordingCallback(), on_note=notes.append)
    assert trainer.engine.choice is not None
    assert trainer.engine.choice.per_s > 1
    assert notes[0].startswith("updates are ")
    assert notes[0].endswith(
        " times as fast as the micro-batch was timed, when the machine was busy: choosing it again"
    )
    assert notes[1].startswith("at most ")
