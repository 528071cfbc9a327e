"""The evidence is read from the end of metrics.jsonl; the counts of all updates are those of its rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from bigbatch.lm.advice import run_evidence
from bigbatch.lm.advice.run_evidence import count_updates, evidence, read_evidence
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.report.metrics_table import read_columns


def rows(number: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "num_microbatches": 1 + step % 3,
            "sequences": 8,
            "elapsed_s": 0.5,
            "retries": int(step % 7 == 0),
            "skipped": "no items" if step % 5 == 0 else None,
        }
        for step in range(1, number + 1)
    ]


@pytest.mark.parametrize("number", [1, 49, 50, 51, 400])
def test_end_of_file_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(run_evidence, "TAIL_BYTES", 300)
    config = TrainConfig(global_batch=8).resolved()
    (tmp_path / "config.json").write_text(config.model_dump_json())
    lines = "".join(json.dumps(row) + "\n" for row in rows(number))
    (tmp_path / "metrics.jsonl").write_text(f"{lines}damaged\n" + '{"step": 99999, "num')
    assert read_evidence(tmp_path) == evidence(rows(number), config)
    counts = count_updates(read_columns(tmp_path / "metrics.jsonl"))
    applied = [row for row in rows(number) if not row["skipped"]]
    divided = [row for row in applied if row["num_microbatches"] > 1]
    assert (counts.applied, counts.divided) == (len(applied), len(divided))
    assert counts.usable == sum(not row["retries"] for row in divided)
