"""`train` and `resume` on several ranks give the run of one rank, also after a fault on one of them."""

import json
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bigbatch.lm.checkpoint import newest
from bigbatch.lm.runs.lock import RunLock
from support.command_line import files_below
from support.distributed_runs import DROPPING, TIGHT, RunFolder, apart, check_same
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
from support.run_comparison import unlike
from support.torchrun_ranks import Launch, run

# the same run on any number of ranks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "parallel", "more"),
    [
        (4, "ddp", ()),
        (4, "fsdp", ()),
        (4, "hsdp", ()),
        (2, "fsdp", ("--gradient-checkpointing", "full", "--microbatch", "2")),
    ],
)
def test_twenty_updates_on_ranks_are_those_of_one(
    ground: RunFolder, alone: str, size: int, parallel: str, more: tuple[str, ...]
) -> None:
    out = f"{parallel}-{size}"
    words = [*more, "--parallel", parallel]
    local_size = 2 if parallel == "hsdp" else None
    launch = ground.train(out, size, *words, local_size=local_size, patch=ground.noting(out))
    check_same(ground, out, alone)
    assert f" on the first of {size} ranks ({parallel}), on cpu, float64 (affects memory only" in launch.said()
    assert "20 updates in " in launch.said()
    for rank in range(1, size):
        assert launch.said(rank) == "", "only the first rank prints"
    assert [launch.complained(rank) for rank in range(size)] == [""] * size


def test_a_run_that_is_stopped_goes_on_on_other_numbers_of_ranks(ground: RunFolder, alone: str) -> None:
    noting = ground.noting("moved")
    first = ground.train("moved", 4, "--parallel", "fsdp", codes=75, patch=all_of(noting, on({1}, signal_in_update(5))))
    assert "stopped by a signal to another rank after update 5 of 20; the model is saved\n" in first.said()
    assert "\nto continue: bigbatch resume moved\n" in first.said()
    assert apart(ground.model("moved"), ground.model("alone")) > TIGHT
    second = ground.resume(
        "moved", 2, "--parallel", "ddp", codes=75, patch=all_of(noting, on({0}, signal_in_update(10)))
    )
    assert "resuming moved after update 5\n" in second.said()
    assert "stopped by SIGTERM after update 10 of 20; the model is saved\n" in second.said()
    assert second.complained() == "\nstopping after this update, then saving; signal again to stop immediately\n"
    ground.resume("moved", 1, codes=75, patch=all_of(noting, signal_in_update(13)))
    ground.resume("moved", 2, "--parallel", "fsdp", patch=noting)
    check_same(ground, "moved", alone)


def test_there_may_be_more_ranks_than_samples(ground: RunFolder) -> None:
    write_jsonl(ground.folder / "three.jsonl", records(3))
    more = ["--data", "three.jsonl", "--validation-fraction", "0", "--steps", "4"]
    ground.train("three-1", 1, *more)
    for parallel in ("ddp", "fsdp"):
        ground.train(f"three-{parallel}", 4, *more, "--parallel", parallel)
        assert apart(ground.model(f"three-{parallel}"), ground.model("three-1")) < TIGHT


# a rank dies, and torchrun starts them again ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parallel", "rank", "patch", "where", "restart"),
    [
        ("ddp", 1, kill_in_window(6), "after update 3", (1, 1)),
        ("ddp", 0, kill_at_checkpoint(2), "after update 3", (0, 1)),
        ("fsdp", 0, kill_in_window(2), "from the beginning (no checkpoint)", (1, 1)),
        ("fsdp", 1, kill_at_checkpoint(2), "after update 3", (1, 0)),
    ],
)
def test_a_killed_rank_leaves_no_trace_once_torchrun_has_started_all_again(
    ground: RunFolder, undisturbed: dict[str, Path], parallel: str, rank: int, patch: Any, where: str, restart: Any
) -> None:
    """Agents of several machines count restarts for themselves."""
    out = f"killed-{parallel}-{rank}"
    words = [*DROPPING, "--parallel", parallel]
    codes = [1, 1]
    codes[rank] = -signal.SIGKILL
    launch = ground.train(out, 2, *words, codes=codes, patch=on({rank}, patch), max_restarts=2)
    other = launch.complained(1 - rank)
    assert re.fullmatch(
        r"bigbatch train: [^\n]*(has lost another rank|another rank cannot be reached)[^\n]*\.\n", other
    )
    again = ground.train(out, 2, *words, restart=restart, max_restarts=2)
    assert f"resuming {out} {where}\n" in again.said()
    assert unlike(ground.folder / out, undisturbed[parallel]) == []
    finished = ground.train(out, 2, *words, restart=restart, max_restarts=2)
    assert finished.said().endswith(f"{out} is already finished: all 8 updates are done, the model is saved\n")


def test_a_run_of_one_rank_is_found_again_too(ground: RunFolder) -> None:
    words = ground.words("one", *DROPPING)
    run(words, 1, folder=ground.folder, patch=kill_in_window(6), codes=-signal.SIGKILL, max_restarts=1)
    again = run(words, 1, folder=ground.folder, restart=1, max_restarts=1)
    assert "resuming one after update 3\n" in again.said()
    assert len(metrics(ground.folder / "one")) == 8


def test_a_rank_that_raises_something_ends_the_others_with_a_sentence(ground: RunFolder) -> None:
    launch = ground.train("failing", 2, *DROPPING, codes=1, patch=on({1}, fail_in_window(2)))
    assert launch.complained(1).endswith("ArithmeticError: something of its own\n")
    assert launch.complained(0) == (
        "bigbatch train: rank 1 failed in the window after update 1, and it changed nothing on any rank: see what was "
        "said there. A window that ends without its step() has failed, too.\n"
    )


def test_a_stuck_rank_is_given_up_with_the_stacks_and_the_run_goes_on(
    ground: RunFolder, undisturbed: dict[str, Path]
) -> None:
    words = ground.words("stuck", *DROPPING, "--timeout-s", "10")
    with Launch(words, 2, folder=ground.folder, patch=on({1}, signal_in_window(6, signal.SIGSTOP))) as launch:
        launch.wait_until(lambda: not launch.processes[0].is_alive())
        assert launch.processes[0].exitcode == 1
        assert launch.processes[1].is_alive()
    assert launch.complained().startswith("Timeout (0:00:10)!\nThread 0x")
    assert re.search(r'File ".*vote.*|File ".*sync\.py", line \d+ in gather', launch.complained())
    ground.resume("stuck", 2)
    assert unlike(ground.folder / "stuck", undisturbed["ddp"]) == []


# memory runs out on one rank -------------------------------------------------------------------------------------


def test_whole_models_go_on_when_memory_runs_out_on_one_rank(ground: RunFolder, alone: str) -> None:
    ground.train("oom-ddp", 2, patch=all_of(ground.noting("oom-ddp"), on({1}, out_of_memory(4))))
    check_same(ground, "oom-ddp", alone)
    assert ground.budgets("oom-ddp", 0) == [64] * 20
    assert ground.budgets("oom-ddp", 1) == [64] * 4 + [59] * 16


def test_sharded_models_begin_again_smaller_when_memory_runs_out_on_one_rank(ground: RunFolder, alone: str) -> None:
    words = ["--parallel", "fsdp"]
    patch = all_of(ground.noting("oom-fsdp"), on({1}, out_of_memory(9)))
    launch = ground.train("oom-fsdp", 2, *words, codes=[1, 76], patch=patch, max_restarts=1)
    assert re.fullmatch(
        r"bigbatch train: memory ran out in a micro-batch of \d+ samples \(CUDA out of memory. Tried to allocate 2.00 "
        r"GiB\) on rank 1\. Restart the run with torchrun --max-restarts or bigbatch resume oom-fsdp: it resumes from "
        r"its last checkpoint with micro-batches of 51 tokens\.\n",
        launch.complained(1),
    )
    assert "has lost another rank" in launch.complained(0)
    assert json.loads((ground.folder / "oom-fsdp" / "smaller.json").read_text()) == {"size": 51, "unit": "tokens"}
    assert len(metrics(ground.folder / "oom-fsdp")) == 8
    ground.train("oom-fsdp", 2, *words, restart=1, max_restarts=1, patch=ground.noting("oom-fsdp"))
    assert ground.budgets("oom-fsdp", 0) == ground.budgets("oom-fsdp", 1) == [64] * 9 + [51] * 14
    check_same(ground, "oom-fsdp", alone)


# signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_update_is_given_up_on_all_ranks_and_leaves_no_trace(
    ground: RunFolder, undisturbed: dict[str, Path], parallel: str
) -> None:
    """A scheduler signals every process, and torchrun passes the signal on: the second is no other."""
    out = f"given-up-{parallel}"
    patch = on({1}, signal_in_window(6, twice=True))
    launch = ground.train(
        out, 2, *DROPPING, "--parallel", parallel, "--grace-s", "0", "--microbatch", "1", codes=75, patch=patch
    )
    assert "stopped by a signal to another rank after update 5 of 8; the model is saved\n" in launch.said(), (
        launch.said()
    )
    assert len(metrics(ground.folder / out)) == 5
    ground.resume(out, 2)
    ground.train(f"{out}-not", 2, *DROPPING, "--parallel", parallel, "--microbatch", "1")
    assert unlike(ground.folder / out, ground.folder / f"{out}-not") == []


# lines -----------------------------------------------------------------------------------------------------------


def test_a_line_is_about_all_ranks(ground: RunFolder) -> None:
    more = ["--steps", "4", "--validation-fraction", "0"]
    words = [word for word in ground.words("clocked", *more) if word != "--deterministic"]
    run(words, 3, folder=ground.folder, patch=ground.noting("clocked"))
    ground.train("unclocked", 3, *more)
    rows, others = metrics(ground.folder / "clocked"), metrics(ground.folder / "unclocked")
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


def refused(ground: RunFolder, words: list[str], size: int = 3, **how: Any) -> str:
    """The one sentence of all ranks; nothing is written, and nothing changes."""
    shutil.rmtree(ground.folder / "refusals", ignore_errors=True)
    before = {path: (ground.folder / path).stat().st_mtime_ns for path in files_below(ground.folder)}
    launch = run(words, size, folder=ground.folder, codes=2, **how)
    said = [launch.complained(rank) for rank in range(size)]
    after = files_below(ground.folder)
    assert {path for path in after if not path.startswith("out-")} == {p for p in before if not p.startswith("out-")}
    (sentence,) = [text for text in said if text]
    assert re.fullmatch(r"bigbatch (train|resume): [^\n]+[.?]\n", sentence), sentence
    return sentence.partition(": ")[2].rstrip("\n").replace(f"{ground.folder}/", "")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--global-bach", "3"], "unknown flag --global-bach: did you mean --global-batch?"),
        (["--data", "datta.jsonl"], "there is no file or folder 'datta.jsonl'. Did you mean data.jsonl?"),
        (
            ["--parallel", "hsdp"],
            "--parallel hsdp is not supported here: it replicates shards over machines, and this run has one machine. "
            "Use --parallel fsdp.",
        ),
        (
            ["--parallel", "fsdp", "--async-checkpoint"],
            "--async-checkpoint is not supported with --parallel fsdp, where every rank writes its shards. Remove it.",
        ),
        (
            ["--parallel", "fsdp", "--memory", "1GiB"],
            "--memory limits --microbatch auto and cannot be combined with --token-budget 64. Remove one of them.",
        ),
        (
            ["--out", "data.jsonl/run"],
            "--out data.jsonl/run cannot be written: data.jsonl is a file.",
        ),
        (
            ["--warmup-steps", "30"],
            "--warmup-steps is more than --steps: the learning rate would never reach its peak.",
        ),
    ],
)
def test_what_all_ranks_refuse_is_said_once_and_nothing_is_written(
    ground: RunFolder, more: list[str], sentence: str
) -> None:
    assert refused(ground, ground.words("refused", *more)) == sentence


def test_a_run_that_may_be_started_again_needs_a_name(ground: RunFolder) -> None:
    words = [word for word in ground.words("refused") if word not in ("--out", "refused")]
    assert refused(ground, words, max_restarts=1) == (
        "torchrun may restart this run, and a restart must find the same directory: pass --out."
    )


def test_a_run_that_is_there_is_refused_once(ground: RunFolder, alone: str) -> None:
    assert refused(ground, ground.words(alone)) == (
        "--out alone holds another run: name a new or empty folder, or continue it: bigbatch resume alone."
    )


def test_a_run_that_is_in_use_is_refused_once(ground: RunFolder, alone: str) -> None:
    with RunLock(ground.folder / alone):
        assert refused(ground, ["resume", alone]).startswith("alone is in use by process ")


def test_a_run_that_is_not_there_is_refused_once(ground: RunFolder) -> None:
    assert refused(ground, ["resume", "nowhere"]) == (
        "nowhere is no run: nowhere/config.json cannot be read (no such file or directory)."
    )


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--data", "datta.jsonl"], "ranks 1, 2: there is no file or folder 'datta.jsonl'. Did you mean data.jsonl?"),
        (["--lr"], "ranks 1, 2: --lr needs a value: --lr X."),
        (
            ["--lr", "0.02"],
            "rank 1 differs from rank 0 (--lr 0.02, not 0.01). Use the same settings, data, model and versions on "
            "every machine.",
        ),
        (
            ["--data", "others/data.jsonl"],
            "rank 1 differs from rank 0 (--data others/data.jsonl, not data.jsonl). Use the same settings, data, model "
            "and versions on every machine.",
        ),
    ],
)
def test_what_some_ranks_read_otherwise_is_said_once(ground: RunFolder, more: list[str], sentence: str) -> None:
    (ground.folder / "others").mkdir(exist_ok=True)
    write_jsonl(ground.folder / "others" / "data.jsonl", records(41))
    other = ground.words("refused", *more)
    assert refused(ground, ground.words("refused"), words_of={1: other, 2: other}) == sentence


def elsewhere(folder: Path, _rank: int) -> None:
    os.chdir(folder)


@pytest.mark.parametrize(
    ("kind", "what"), [("data", "the samples differ"), ("model", "the parameters of the models differ")]
)
def test_other_data_or_another_model_under_the_same_name_is_refused(ground: RunFolder, kind: str, what: str) -> None:
    other = ground.folder / "others" / kind
    other.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ground.folder / ("dropping" if kind == "model" else "plain"), other / "plain", dirs_exist_ok=True)
    write_jsonl(other / "data.jsonl", records(41 if kind == "data" else 40))
    words = ground.words(str(ground.folder / "refused"))
    assert refused(ground, words, patch=on({2}, partial(elsewhere, other))) == (
        f"rank 2 differs from rank 0 ({what}). Use the same settings, data, model and versions on every machine."
    )


def test_ranks_that_find_other_checkpoints_are_refused(ground: RunFolder, alone: str) -> None:
    copy = ground.folder / "others" / "checkpoints" / alone
    shutil.copytree(ground.folder / alone, copy)
    path, _ = newest(copy / "checkpoints")
    assert path is not None
    shutil.rmtree(path)
    assert refused(ground, ["resume", alone], patch=on({1}, partial(elsewhere, copy.parent))) == (
        "rank 1 finds step-18 in alone, but rank 0 finds step-20: the run directory must be on a file system shared by "
        "all machines."
    )
