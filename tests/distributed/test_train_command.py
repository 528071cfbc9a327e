"""`train` and `resume` on several ranks give the run of one rank, also after a fault on one of them."""

import json
import os
import re
import shutil
import signal
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bigbatch.cli import shared_output
from bigbatch.lm.checkpoint import newest
from bigbatch.lm.runs.lock import RunLock
from support.command_line import files_below
from support.distributed_runs import DROPPING, TIGHT, RunFolder, assert_same_run, max_relative_difference
from support.language_models import metrics, records, write_jsonl
from support.rank_faults import (
    all_of,
    fail_in_window,
    kill_at_checkpoint,
    kill_in_window,
    on,
    out_of_memory,
    signal_in_update,
    signal_in_window,
)
from support.run_comparison import differing_results
from support.tiers import slow
from support.torchrun_ranks import Launch, run

# the same run on any number of ranks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "parallel", "more"),
    [
        slow(4, "ddp", ()),
        slow(4, "fsdp", ()),
        slow(4, "hsdp", ()),
        (2, "fsdp", ("--gradient-checkpointing", "full", "--microbatch", "2")),
    ],
)
def test_twenty_updates_on_ranks_equal_one_rank(
    run_folder: RunFolder, alone: str, size: int, parallel: str, more: tuple[str, ...]
) -> None:
    out = f"{parallel}-{size}"
    words = [*more, "--parallel", parallel]
    local_size = 2 if parallel == "hsdp" else None
    launch = run_folder.train(out, size, *words, local_size=local_size, patch=run_folder.noting(out))
    assert_same_run(run_folder, out, alone)
    assert f" on the first of {size} ranks ({parallel}), on cpu, float64 (affects memory only" in launch.stdout()
    assert "20 updates in " in launch.stdout()
    for rank in range(1, size):
        assert launch.stdout(rank) == "", "only the first rank prints"
    assert [launch.stderr(rank) for rank in range(size)] == [""] * size


@pytest.mark.slow
def test_stopped_run_resumes_on_other_rank_counts(run_folder: RunFolder, alone: str) -> None:
    noting = run_folder.noting("moved")
    first = run_folder.train(
        "moved", 4, "--parallel", "fsdp", codes=75, patch=all_of(noting, on({1}, signal_in_update(5)))
    )
    assert "stopped by a signal to another rank after update 5 of 20; the model is saved\n" in first.stdout()
    assert "\nto continue: bigbatch resume moved\n" in first.stdout()
    assert max_relative_difference(run_folder.model("moved"), run_folder.model("alone")) > TIGHT
    second = run_folder.resume(
        "moved", 2, "--parallel", "ddp", codes=75, patch=all_of(noting, on({0}, signal_in_update(10)))
    )
    assert "resuming moved after update 5\n" in second.stdout()
    assert "stopped by SIGTERM after update 10 of 20; the model is saved\n" in second.stdout()
    assert second.stderr() == "\nstopping after this update, then saving; signal again to stop immediately\n"
    run_folder.resume("moved", 1, codes=75, patch=all_of(noting, signal_in_update(13)))
    run_folder.resume("moved", 2, "--parallel", "fsdp", patch=noting)
    assert_same_run(run_folder, "moved", alone)


@pytest.mark.slow
def test_more_ranks_than_samples_are_supported(run_folder: RunFolder) -> None:
    write_jsonl(run_folder.folder / "three.jsonl", records(3))
    more = ["--data", "three.jsonl", "--validation-fraction", "0", "--steps", "2"]
    run_folder.train("three-1", 1, *more)
    for parallel in ("ddp", "fsdp"):
        run_folder.train(f"three-{parallel}", 4, *more, "--parallel", parallel)
        assert max_relative_difference(run_folder.model(f"three-{parallel}"), run_folder.model("three-1")) < TIGHT


# a rank dies, and torchrun starts them again ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parallel", "rank", "patch", "where", "restart"),
    [
        ("ddp", 1, kill_in_window(6), "after update 3", (1, 1)),
        slow("ddp", 0, kill_at_checkpoint(2), "after update 3", (0, 1)),
        slow("fsdp", 0, kill_in_window(2), "from the beginning (no checkpoint)", (1, 1)),
        slow("fsdp", 1, kill_at_checkpoint(2), "after update 3", (1, 0)),
    ],
)
def test_killed_rank_leaves_result_unchanged_after_restart(
    run_folder: RunFolder,
    uninterrupted: dict[str, Path],
    parallel: str,
    rank: int,
    patch: Any,
    where: str,
    restart: Any,
) -> None:
    """Agents of several machines count restarts for themselves."""
    out = f"killed-{parallel}-{rank}"
    words = [*DROPPING, "--parallel", parallel]
    codes = [1, 1]
    codes[rank] = -signal.SIGKILL
    launch = run_folder.train(out, 2, *words, codes=codes, patch=on({rank}, patch), max_restarts=2)
    other = launch.stderr(1 - rank)
    assert re.fullmatch(
        r"bigbatch train: [^\n]*(has lost another rank|another rank cannot be reached)[^\n]*\.\n", other
    )
    again = run_folder.train(out, 2, *words, restart=restart, max_restarts=2)
    assert f"resuming {out} {where}\n" in again.stdout()
    assert differing_results(run_folder.folder / out, uninterrupted[parallel]) == []
    finished = run_folder.train(out, 2, *words, restart=restart, max_restarts=2)
    assert finished.stdout().endswith(f"{out} is already finished: all 8 updates are done, the model is saved\n")


def test_single_rank_run_is_found_on_restart(run_folder: RunFolder) -> None:
    words = run_folder.words("one", *DROPPING)
    run(words, 1, folder=run_folder.folder, patch=kill_in_window(6), codes=-signal.SIGKILL, max_restarts=1)
    again = run(words, 1, folder=run_folder.folder, restart=1, max_restarts=1)
    assert "resuming one after update 3\n" in again.stdout()
    assert len(metrics(run_folder.folder / "one")) == 8


def test_rank_error_ends_other_ranks_with_sentence(run_folder: RunFolder) -> None:
    launch = run_folder.train("failing", 2, *DROPPING, codes=1, patch=on({1}, fail_in_window(2)))
    assert launch.stderr(1).endswith("ArithmeticError: something of its own\n")
    assert launch.stderr(0) == (
        "bigbatch train: rank 1 failed in the window after update 1, which changed nothing on any rank: see the error "
        "there. A window that ends without its step() has failed, too.\n"
    )


def test_stuck_rank_dumps_stacks_and_run_resumes(run_folder: RunFolder, uninterrupted: dict[str, Path]) -> None:
    words = run_folder.words("stuck", *DROPPING, "--timeout-s", "10")
    with Launch(words, 2, folder=run_folder.folder, patch=on({1}, signal_in_window(6, signal.SIGSTOP))) as launch:
        launch.wait_until(lambda: not launch.processes[0].is_alive())
        assert launch.processes[0].exitcode == 1
        assert launch.processes[1].is_alive()
    assert launch.stderr().startswith("Timeout (0:00:10)!\nThread 0x")
    assert re.search(r'File ".*vote.*|File ".*sync\.py", line \d+ in gather', launch.stderr())
    run_folder.resume("stuck", 2)
    assert differing_results(run_folder.folder / "stuck", uninterrupted["ddp"]) == []


# memory runs out on one rank -------------------------------------------------------------------------------------


def test_replicated_models_continue_after_oom_on_one_rank(run_folder: RunFolder, alone: str) -> None:
    run_folder.train("oom-ddp", 2, patch=all_of(run_folder.noting("oom-ddp"), on({1}, out_of_memory(4))))
    assert_same_run(run_folder, "oom-ddp", alone)
    assert run_folder.budgets("oom-ddp", 0) == [64] * 20
    assert run_folder.budgets("oom-ddp", 1) == [64] * 4 + [59] * 16


def test_sharded_models_restart_smaller_after_oom(run_folder: RunFolder, alone: str) -> None:
    words = ["--parallel", "fsdp"]
    patch = all_of(run_folder.noting("oom-fsdp"), on({1}, out_of_memory(9)))
    launch = run_folder.train("oom-fsdp", 2, *words, codes=[1, 76], patch=patch, max_restarts=1)
    assert re.fullmatch(
        r"bigbatch train: memory ran out in a micro-batch of \d+ samples \(CUDA out of memory. Tried to allocate 2.00 "
        r"GiB\) on rank 1\. Restart the run with torchrun --max-restarts or bigbatch resume oom-fsdp: it resumes from "
        r"its last checkpoint with micro-batches of 51 tokens\.\n",
        launch.stderr(1),
    )
    assert "has lost another rank" in launch.stderr(0)
    assert json.loads((run_folder.folder / "oom-fsdp" / "smaller.json").read_text()) == {"size": 51, "unit": "tokens"}
    assert len(metrics(run_folder.folder / "oom-fsdp")) == 8
    run_folder.train("oom-fsdp", 2, *words, restart=1, max_restarts=1, patch=run_folder.noting("oom-fsdp"))
    assert run_folder.budgets("oom-fsdp", 0) == run_folder.budgets("oom-fsdp", 1) == [64] * 9 + [51] * 14
    assert_same_run(run_folder, "oom-fsdp", alone)


# signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["ddp", slow("fsdp")])
def test_abandoned_update_leaves_no_change_on_any_rank(
    run_folder: RunFolder, uninterrupted: dict[str, Path], parallel: str
) -> None:
    """A scheduler signals every process, and torchrun passes the signal on: the second is no other."""
    out = f"given-up-{parallel}"
    patch = on({1}, signal_in_window(6, twice=True))
    launch = run_folder.train(
        out, 2, *DROPPING, "--parallel", parallel, "--grace-s", "0", "--microbatch", "1", codes=75, patch=patch
    )
    assert "stopped by a signal to another rank after update 5 of 8; the model is saved\n" in launch.stdout(), (
        launch.stdout()
    )
    assert len(metrics(run_folder.folder / out)) == 5
    run_folder.resume(out, 2)
    run_folder.train(f"{out}-not", 2, *DROPPING, "--parallel", parallel, "--microbatch", "1")
    assert differing_results(run_folder.folder / out, run_folder.folder / f"{out}-not") == []


# lines -----------------------------------------------------------------------------------------------------------


def test_metrics_row_covers_all_ranks(run_folder: RunFolder) -> None:
    more = ["--steps", "4", "--validation-fraction", "0"]
    words = [word for word in run_folder.words("clocked", *more) if word != "--deterministic"]
    run(words, 3, folder=run_folder.folder, patch=run_folder.noting("clocked"))
    run_folder.train("unclocked", 3, *more)
    rows, others = metrics(run_folder.folder / "clocked"), metrics(run_folder.folder / "unclocked")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row, other in zip(rows, others, strict=True):
        assert row["ranks"] == other["ranks"] == 3
        assert row["num_microbatches"] >= 3
        assert row["slowest_rank"] in (0, 1, 2)
        assert 0 <= row["slowest_share"] < 1
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["elapsed_s"])
        assert row["peak_bytes"] is None or row["peak_bytes"] > 0
        clocks = ("slowest_rank", "slowest_share", "tokens_per_s", "elapsed_s", "peak_bytes")
        assert [other[name] for name in clocks] == [None] * 5
        assert {**row, **dict.fromkeys(clocks)} == other


# what ranks refuse together --------------------------------------------------------------------------------------


def refused(run_folder: RunFolder, words: list[str], size: int = 3, **how: Any) -> str:
    """The one sentence of all ranks; nothing is written, and nothing changes."""
    shutil.rmtree(run_folder.folder / "refusals", ignore_errors=True)
    before = {path: (run_folder.folder / path).stat().st_mtime_ns for path in files_below(run_folder.folder)}
    launch = run(words, size, folder=run_folder.folder, codes=2, **how)
    said = [launch.stderr(rank) for rank in range(size)]
    after = files_below(run_folder.folder)
    assert {path for path in after if not path.startswith("out-")} == {p for p in before if not p.startswith("out-")}
    (sentence,) = [text for text in said if text]
    assert re.fullmatch(r"bigbatch (train|resume): [^\n]+[.?]\n", sentence), sentence
    return sentence.partition(": ")[2].rstrip("\n").replace(f"{run_folder.folder}/", "")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--global-bach", "3"], "unknown flag --global-bach: did you mean --global-batch?"),
        slow(["--data", "datta.jsonl"], "there is no file or folder 'datta.jsonl'. Did you mean data.jsonl?"),
        slow(
            ["--parallel", "hsdp"],
            "--parallel hsdp is not supported here: it replicates shards over machines, and this run has one machine. "
            "Use --parallel fsdp.",
        ),
        slow(
            ["--parallel", "fsdp", "--async-checkpoint"],
            "--async-checkpoint is not supported with --parallel fsdp, where every rank writes its shards. Remove it.",
        ),
        slow(
            ["--parallel", "fsdp", "--memory", "1GiB"],
            "--memory limits --microbatch auto and cannot be combined with --token-budget 64. Remove one of them.",
        ),
        (
            ["--out", "data.jsonl/run"],
            "--out data.jsonl/run cannot be written: data.jsonl is a file.",
        ),
        slow(
            ["--warmup-steps", "30"],
            "--warmup-steps is more than --steps: the learning rate would never reach its peak.",
        ),
    ],
)
def test_error_of_all_ranks_is_printed_once(run_folder: RunFolder, more: list[str], sentence: str) -> None:
    assert refused(run_folder, run_folder.words("refused", *more)) == sentence


def test_restartable_run_needs_a_name(run_folder: RunFolder) -> None:
    words = [word for word in run_folder.words("refused") if word not in ("--out", "refused")]
    assert refused(run_folder, words, max_restarts=1) == (
        "torchrun may restart this run, and a restart must find the same directory: pass --out."
    )


def test_existing_run_is_rejected_once(run_folder: RunFolder, alone: str) -> None:
    assert refused(run_folder, run_folder.words(alone)) == (
        "--out alone holds another run: name a new or empty folder, or continue it: bigbatch resume alone."
    )


def test_run_in_use_is_rejected_once(run_folder: RunFolder, alone: str) -> None:
    with RunLock(run_folder.folder / alone):
        assert refused(run_folder, ["resume", alone]).startswith("alone is in use by process ")


def test_missing_run_is_rejected_once(run_folder: RunFolder) -> None:
    assert refused(run_folder, ["resume", "nowhere"]) == ("run nowhere does not exist: create one with bigbatch train.")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--data", "datta.jsonl"], "ranks 1, 2: there is no file or folder 'datta.jsonl'. Did you mean data.jsonl?"),
        slow(["--lr"], "ranks 1, 2: --lr needs a value: --lr X."),
        (
            ["--lr", "0.02"],
            "rank 1 differs from rank 0 (--lr 0.02, not 0.01). Use the same settings, data, model and versions on "
            "every machine.",
        ),
        slow(
            ["--data", "others/data.jsonl"],
            "rank 1 differs from rank 0 (--data others/data.jsonl, not data.jsonl). Use the same settings, data, model "
            "and versions on every machine.",
        ),
    ],
)
def test_settings_differing_by_rank_are_reported_once(run_folder: RunFolder, more: list[str], sentence: str) -> None:
    (run_folder.folder / "others").mkdir(exist_ok=True)
    write_jsonl(run_folder.folder / "others" / "data.jsonl", records(41))
    other = run_folder.words("refused", *more)
    assert refused(run_folder, run_folder.words("refused"), words_of={1: other, 2: other}) == sentence


def elsewhere(folder: Path, _rank: int) -> None:
    os.chdir(folder)


@pytest.mark.parametrize(
    ("kind", "what"), [("data", "the samples differ"), ("model", "the parameters of the models differ")]
)
def test_changed_data_or_model_is_rejected(run_folder: RunFolder, kind: str, what: str) -> None:
    other = run_folder.folder / "others" / kind
    other.mkdir(parents=True, exist_ok=True)
    shutil.copytree(
        run_folder.folder / ("dropping" if kind == "model" else "plain"), other / "plain", dirs_exist_ok=True
    )
    write_jsonl(other / "data.jsonl", records(41 if kind == "data" else 40))
    words = run_folder.words(str(run_folder.folder / "refused"))
    assert refused(run_folder, words, patch=on({2}, partial(elsewhere, other))) == (
        f"rank 2 differs from rank 0 ({what}). Use the same settings, data, model and versions on every machine."
    )


def test_ranks_with_different_checkpoints_are_rejected(run_folder: RunFolder, alone: str) -> None:
    copy = run_folder.folder / "others" / "checkpoints" / alone
    shutil.copytree(run_folder.folder / alone, copy)
    path, _ = newest(copy / "checkpoints")
    assert path is not None
    shutil.rmtree(path)
    assert refused(run_folder, ["resume", alone], patch=on({1}, partial(elsewhere, copy.parent))) == (
        "rank 1 finds step-18 in alone, but rank 0 finds step-20: the run directory must be on a file system shared by "
        "all machines."
    )


def away(run_folder: RunFolder) -> Path:
    """Return another working directory, with the data and the model."""
    other = run_folder.folder / "others" / "away"
    other.mkdir(parents=True, exist_ok=True)
    shutil.copytree(run_folder.folder / "plain", other / "plain", dirs_exist_ok=True)
    shutil.copy(run_folder.folder / "data.jsonl", other)
    return other


@pytest.mark.skipif(
    not Path("/proc/self/cwd").exists(), reason="needs /proc, whose cwd is another one for each process"
)
def test_ranks_that_do_not_share_a_disk_are_refused(run_folder: RunFolder) -> None:
    words = run_folder.words("/proc/self/cwd/unshared")
    patch = all_of(impatient, on({2}, partial(elsewhere, away(run_folder))))
    assert refused(run_folder, words, patch=patch) == (
        f"rank 2: {socket.gethostname()} does not see the files of rank 0 in /proc/self/cwd, where "
        "/proc/self/cwd/unshared would be: --out must be on a file system that all machines share."
    )


def impatient(_rank: int) -> None:
    shared_output.PATIENCE_S = 0.5


def test_ranks_with_other_run_directories_are_refused(run_folder: RunFolder) -> None:
    assert refused(run_folder, run_folder.words("refused"), words_of={1: run_folder.words("others/refused")}) == (
        "rank 1: --out is others/refused, and refused on rank 0: pass the same flags to every rank."
    )


def test_relative_run_directory_is_that_of_the_first_rank(run_folder: RunFolder) -> None:
    steps = ["--steps", "2", "--parallel", "fsdp"]
    run_folder.train("relative", 2, *steps, patch=on({1}, partial(elsewhere, away(run_folder))))
    run_folder.train("usual", 2, *steps)
    assert differing_results(run_folder.folder / "relative", run_folder.folder / "usual") == []
    assert not (away(run_folder) / "relative").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_gpus_are_reported_once(run_folder: RunFolder) -> None:
    sentence = refused(run_folder, run_folder.words("refused", "--device", "cuda"))
    assert re.fullmatch(r"--device cuda is not available: .*CUDA.*; use --device cpu\.", sentence), sentence
