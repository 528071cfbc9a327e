"""Processes of launchers: those that torchrun did not start, and what a stopped run says about restarts."""

from pathlib import Path

import pytest

from bigbatch.cli.next_steps import lines_to_continue
from bigbatch.cli.torchrun import process_group
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig


def test_process_of_another_launcher_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    expected = (
        r"^the environment sets WORLD_SIZE=2, but torchrun did not start this process: start the processes of a run "
        r"with torchrun, or unset WORLD_SIZE to train with one process\.$"
    )
    with pytest.raises(InputError, match=expected), process_group(TrainConfig()):
        pass


def test_single_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with process_group(TrainConfig()) as ranks:
        assert ranks.size == 1


@pytest.mark.parametrize("restarts", ["0", "3"])
def test_stopped_run_says_that_torchrun_may_start_it_again(monkeypatch: pytest.MonkeyPatch, restarts: str):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    more = (
        ["torchrun may start it again: to end the run, send the signal to torchrun itself"] if restarts == "3" else []
    )
    assert lines_to_continue(Path("runs/a b")) == ["to continue: bigbatch resume 'runs/a b'", *more]
