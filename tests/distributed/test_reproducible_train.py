"""`bigbatch train --reproducible` on one rank and on several, stopped, resumed and compared with `bigbatch diff`."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.cli import main
from bigbatch.lm.distributed.ranks import RankContext
from support.distributed_runs import RunFolder
from support.torchrun_ranks import run


def words(out: str, *more: str) -> list[str]:
    settings = ["--data", "data.jsonl", "--model", "dropping", "--max-length", "32", "--steps", "6"]
    settings += ["--global-batch", "9", "--lr", "0.01", "--checkpoint-every", "2", "--validation-fraction", "0.15"]
    return ["train", *settings, "--device", "cpu", "--reproducible", "--out", out, *more]


@pytest.fixture
def reproducible(run_folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(run_folder.folder)
    return run_folder


def launch(folder: RunFolder, size: int, arguments: list[str]) -> None:
    run(arguments, size, folder=folder.folder, alone=size == 1)


def model_bits(name: str) -> bytes:
    return (Path(name) / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_runs_of_any_ranks_and_micro_batch_are_equal(reproducible: RunFolder, capfd: pytest.CaptureFixture[str]):
    launch(reproducible, 1, words("same-alone", "--microbatch", "2"))
    launch(reproducible, 3, words("same-ranks", "--token-budget", "128"))
    capfd.readouterr()
    assert main(["diff", "same-alone", "same-ranks"]) == 0
    assert capfd.readouterr().out == "equal in 6 updates and 28 parameters\n"
    assert model_bits("same-alone") == model_bits("same-ranks")
    launch(reproducible, 2, words("same-resumed", "--microbatch", "4"))
    remove_after(Path("same-resumed"), 2)
    launch(reproducible, 1, ["resume", "same-resumed"])
    assert main(["diff", "same-alone", "same-resumed"]) == 0
    assert model_bits("same-alone") == model_bits("same-resumed")


def remove_after(run: Path, step: int) -> None:
    """Remove the checkpoints after an update, as if the run had been killed before they were written."""
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 5), st.integers(1, 4))
def test_ranks_share_whole_quanta_in_one_order(lengths: list[int], size: int, quantum: int):
    window = list(range(len(lengths)))[::-1]
    shares = [RankContext(size, rank).shard_window(window, lengths, quantum=quantum) for rank in range(size)]
    (whole,) = (RankContext().shard_window(window, lengths, quantum=quantum),)
    assert [sample for share in shares for sample in share] == whole
    assert sorted(whole) == sorted(window)
    used = [share for share in shares if share]
    assert all(len(share) % quantum == 0 for share in used[:-1])
    if len(lengths) >= 8 * size * quantum and len(set(lengths)) == 1:
        assert max(map(len, shares)) - min(map(len, shares)) <= 2 * quantum


def test_function_writes_the_same_fingerprints(reproducible: RunFolder):
    import torch

    import bigbatch.lm

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        settings = {"data": "data.jsonl", "model": "dropping", "max_length": 32, "steps": 3, "global_batch": 9}
        settings |= {"lr": 0.01, "device": "cpu", "reproducible": True}
        for out, more in (("same-api", {"microbatch": 8}), ("same-api-2", {"token_budget": 99})):
            bigbatch.lm.train({**settings, **more, "out": out})
    finally:
        torch.set_num_threads(before)
    assert main(["diff", "same-api", "same-api-2"]) == 0
