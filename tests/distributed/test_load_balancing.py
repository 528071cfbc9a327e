"""The load-balancing loss counts the experts of all ranks, also with shards, and with ranks without samples."""

from pathlib import Path

import pytest

from distributed import load_balancing_cases as cases
from support import gloo_processes
from support.distributed_runs import TIGHT, RunFolder, make_run_folder, max_relative_difference
from support.expert_models import save_expert_folder
from support.language_models import metrics
from support.tiers import slow

LONG = ("--model", "experts", "--steps", "4")


@pytest.mark.parametrize("first", [slow(14), 22, slow(3)])
def test_uneven_ranks_have_the_gradient_of_the_whole_batch(first: int) -> None:
    for error, loss_error in gloo_processes.run(cases.gradient, 2, first, "global"):
        assert error < 1e-7
        assert loss_error < 1e-6


def test_microbatch_scope_differs_from_the_whole_batch() -> None:
    assert all(error > 1e-3 for error, _ in gloo_processes.run(cases.gradient, 2, 14, "microbatch"))


def test_failed_rank_ends_the_update_of_all() -> None:
    first, second = gloo_processes.run(cases.failure, 2, "fail")
    assert second == ("ArithmeticError", "a fault in a layer")
    assert first == (
        "RankFailedError",
        "rank 1 failed before update 1, while it counted the tokens of each expert: see its message.",
    )


def test_abandoned_window_is_abandoned_by_all() -> None:
    first, second = gloo_processes.run(cases.failure, 2, "abandon")
    assert first == ("WindowAbandonedError", "the window was abandoned by rank 1.")
    assert second[0] == "WindowAbandonedError"


@pytest.fixture(scope="module")
def expert_folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a folder with data, a mixture of experts and its run on one rank."""
    folder = make_run_folder(tmp_path_factory.mktemp("experts"))
    save_expert_folder(Path(folder.folder / "experts"))
    folder.train("alone", 1, *LONG)
    return folder


@pytest.mark.parametrize(
    ("parallel", "more"),
    [
        slow("ddp", ()),
        ("fsdp", ()),
        slow("fsdp", ("--gradient-checkpointing", "full")),
        slow("ddp", ("--lora-rank", "2")),
    ],
)
def test_run_on_ranks_equals_one_rank(expert_folder: RunFolder, parallel: str, more: tuple[str, ...]) -> None:
    out, alone = f"{parallel}{len(more)}{'lora' in ''.join(more)}", "alone"
    if "--lora-rank" in more:
        alone = "alone-lora"
        expert_folder.train(alone, 1, *LONG, *more)
    expert_folder.train(out, 2, *LONG, "--parallel", parallel, *more)
    for row, expected in zip(metrics(expert_folder.folder / out), metrics(expert_folder.folder / alone), strict=True):
        for name in ("loss", "router_aux_loss", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=TIGHT), (row["step"], name)
    assert max_relative_difference(expert_folder.model(out), expert_folder.model(alone)) < TIGHT


@pytest.mark.slow
def test_rank_without_samples_takes_part(expert_folder: RunFolder) -> None:
    words = (*LONG, "--global-batch", "1")
    expert_folder.train("one", 1, *words)
    for parallel in ("ddp", "fsdp"):
        expert_folder.train(f"one-{parallel}", 2, *words, "--parallel", parallel)
        assert max_relative_difference(expert_folder.model(f"one-{parallel}"), expert_folder.model("one")) < TIGHT
