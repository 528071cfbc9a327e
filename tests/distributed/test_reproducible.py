"""Reproducible updates on gloo ranks: the bits of one process, on any number of ranks and across a kill."""

from pathlib import Path

import pytest
import torch

from support import gloo_processes
from support.reproducible_runs import (
    Run,
    accumulate_on_ranks,
    fail_on_ranks,
    train,
    train_in_ddp,
    train_on_ranks,
    train_with_half_quanta,
)
from support.tiers import slow


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("kind", "precision", "size"), [("llama", "bf16", 2), slow("gpt2", "float32", 3), slow("llama", "float32", 4)]
)
def test_ranks_have_bits_of_one_process(kind: str, precision: str, size: int):
    run = Run(kind, precision, updates=5)
    expected = train(run)
    for found in gloo_processes.run(train_on_ranks, size, run, timeout_s=120):
        assert found.same(expected)


def test_ddp_wrapper_has_bits_of_one_process():
    run = Run("gpt2", "bf16", updates=4)
    expected = train(run)
    for found in gloo_processes.run(train_in_ddp, 2, run, timeout_s=120):
        assert found.same(expected)


def test_out_of_memory_on_ranks_changes_no_bit():
    expected = train(Run(updates=4))
    found = gloo_processes.run(train_on_ranks, 2, Run(updates=4, fails=(3, 8, 15)), timeout_s=120)
    assert all(each.same(expected) and each.retries == 3 for each in found)


@pytest.mark.slow
def test_killed_run_continues_on_other_ranks(tmp_path: Path):
    run, saved = Run("gpt2", "bf16", updates=6), tmp_path / "state"
    expected = train(run)
    killed = gloo_processes.attempt(train_on_ranks, 3, run, saved, 4, timeout_s=120)
    assert [outcome.exitcode for outcome in killed] == [-9] * 3
    for found in gloo_processes.run(train_on_ranks, 2, run, saved, timeout_s=120):
        assert found.same(expected.after(3))
    assert train(run, saved=saved).fingerprints == [], "the state after update 6 was saved by the two ranks"


def test_half_a_quantum_is_refused_on_every_rank():
    for message in gloo_processes.run(train_with_half_quanta, 3):
        assert message == (
            "ValueError: rank 1 has 3 samples, which are no whole number of quanta of 2, and rank 2 has the last "
            "samples of the global batch: deal whole quanta to the ranks."
        )


def test_error_between_passes_ends_window_on_all_ranks():
    first, second = gloo_processes.run(fail_on_ranks, 2)
    assert first == "RuntimeError: broken"
    assert second.startswith("RankFailedError: rank 0 failed in the window after update 0")


def test_accumulator_has_bits_of_one_process():
    (alone,) = gloo_processes.run(accumulate_on_ranks, 1)
    for found in gloo_processes.run(accumulate_on_ranks, 2):
        assert found == alone
