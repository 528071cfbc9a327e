"""Lines are read in blocks by pyarrow, and what is no line of ours as Python reads it: the result is the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bigbatch.lm.report import metrics_table
from bigbatch.lm.report.metrics_table import NUMBERS, Columns, read_columns

VALUES = st.one_of(
    st.none(), st.floats(allow_nan=False), st.integers(-(2**70), 2**70), st.booleans(), st.text(max_size=3)
)
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "step": st.one_of(st.integers(-2, 12), st.just(2**70), st.just(1.5), st.none()),
        "loss": VALUES,
        "retries": st.integers(0, 3),
        "skipped": st.one_of(st.none(), st.sampled_from(["", "no items", "é"]), st.booleans()),
        "other": VALUES,
    },
)
LINES = st.lists(
    st.one_of(
        ROWS.map(json.dumps), st.sampled_from(["", "{", "[1]", '{"step": 3} {"step": 4}', '{"step": 1, "loss": NaN}'])
    ),
    max_size=12,
)


def content(found: Columns) -> Any:
    columns = {name: np.asarray(found[name]).tolist() for name in NUMBERS if found.has(name)}
    return found.steps.tolist(), found.skipped, found.num_unreadable, found.num_bytes, str(columns)


@settings(deadline=None)
@given(lines=LINES)
@example(lines=["", '{"step": 3} {"step": 4}'])
@example(lines=[" ", '{"step": 3}{"step": 4}'])
@example(lines=['{"step": 1, "other": {}', ', "loss": 2}', '{"step": 3} {"step": 4}'])
@example(lines=['{"step": 1, "other":', '{"step": 2}}', '{"step": 3} {"step": 4} {"step": 5}'])
def test_arrow_and_python_read_the_same(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines) + '{"step": 99', encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        fast = content(read_columns(path))
        patch.setattr(metrics_table, "_parsed_by_arrow", lambda data: None)
        assert content(read_columns(path)) == fast


def test_blocks_are_joined_and_last_line_of_step_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": step / 7, "skipped": "no items" if step % 5 == 0 else None} for step in range(200)]
    again = [{"step": 5, "loss": 9.0, "skipped": None}, {"step": 7, "loss": 8.0, "skipped": "again"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in (*rows, *again)))
    whole = content(read_columns(path))
    monkeypatch.setattr(metrics_table, "BLOCK_BYTES", 100)
    found = read_columns(path)
    assert content(found) == whole
    assert found["loss"][5] == 9.0
    assert [skip.step for skip in found.skipped] == [0, 7, *range(10, 200, 5)]
    assert found.num_bytes == path.stat().st_size


def test_finite_values_come_with_their_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 4}\n')
    steps, values = read_columns(path).finite("loss")
    assert (steps.tolist(), values.tolist()) == ([1, 3], [2.0, 4.0])
    assert [len(part) for part in Columns().finite("loss")] == [0, 0]
