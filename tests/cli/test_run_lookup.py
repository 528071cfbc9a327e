"""A misspelled run: only folders that are runs are suggested."""

from pathlib import Path

import pytest

from bigbatch.cli.run_lookup import check_run
from bigbatch.errors import InputError


@pytest.mark.parametrize(
    ("inside", "hint"),
    [("config.json", "did you mean {near}?"), ("notes.txt", "create one with bigbatch train.")],
    ids=["a run", "another folder"],
)
def test_only_runs_are_suggested(tmp_path: Path, inside: str, hint: str) -> None:
    near = tmp_path / "first-run"
    near.mkdir()
    (near / inside).touch()
    with pytest.raises(InputError) as caught:
        check_run(tmp_path / "frist-run")
    assert str(caught.value) == f"run {tmp_path / 'frist-run'} does not exist: {hint.format(near=near)}"
