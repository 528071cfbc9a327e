"""Runs of other objectives on several ranks: those of one rank, also with shards and after a stop."""

from pathlib import Path

import pytest

from support.distributed_runs import TIGHT, RunFolder, make_run_folder, max_relative_difference
from support.language_models import examples, metrics, pairs, write_jsonl
from support.rank_faults import signal_in_update
from support.tiers import slow

WORDS = {
    "reward": ("--data", "pairs.jsonl", "--center-rewards-coefficient", "0.01"),
    "dpo": ("--data", "pairs.jsonl"),
    "embedding": ("--data", "examples.jsonl", "--pooling", "last"),
}
MORE = ("--steps", "6", "--checkpoint-every", "2", "--token-budget", "192")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A folder with the data and a run of each objective on one rank."""
    folder = make_run_folder(tmp_path_factory.mktemp("objectives"))
    write_jsonl(folder.folder / "pairs.jsonl", pairs(40))
    write_jsonl(folder.folder / "examples.jsonl", examples(40))
    for name, words in WORDS.items():
        folder.train(f"{name}-alone", 1, "--objective", name, *words, *MORE)
    return folder


@pytest.mark.parametrize(
    ("name", "parallel", "lora"),
    [
        slow("reward", "fsdp", False),
        slow("reward", "fsdp", True),
        ("dpo", "ddp", False),
        slow("dpo", "fsdp", False),
        slow("dpo", "ddp", True),
        slow("embedding", "ddp", False),
        ("embedding", "fsdp", False),
    ],
)
def test_stopped_run_on_ranks_equals_run_on_one(folder: RunFolder, name: str, parallel: str, lora: bool) -> None:
    out, alone = f"{name}-{parallel}-{lora}", f"{name}-alone"
    words = ["--objective", name, *WORDS[name], *MORE, *(["--lora-rank", "2"] if lora else [])]
    if lora:
        alone = f"{name}-alone-lora"
        if not (folder.folder / alone).exists():
            folder.train(alone, 1, *words)
    folder.train(out, 2, *words, "--parallel", parallel, patch=signal_in_update(3), codes=75)
    folder.resume(out, 2)
    rows, expected = metrics(folder.folder / out), metrics(folder.folder / alone)
    assert len(rows) == 6
    for row, other in zip(rows, expected, strict=True):
        names = [key for key in other if "margin" in key or "reward" in key or "loss" in key or key == "grad_norm"]
        assert names
        if row["step"] > 1:  # dpo begins with margins of 0, within rounding
            names += [key for key in other if key.endswith("accuracy")]
        for key in names:
            assert row[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), (row["step"], key)
        assert row["items"] == other["items"]
        assert row["loss"] == pytest.approx(other["loss"], rel=TIGHT)
    assert max_relative_difference(folder.model(out), folder.model(alone)) < TIGHT


def test_reference_is_stored_once_and_read(folder: RunFolder) -> None:
    one, two = (Path(folder.folder / out / "reference.safetensors") for out in ("dpo-alone", "dpo-ddp-False"))
    assert one.stat().st_size == two.stat().st_size
    assert not (folder.folder / "reward-alone" / "reference.safetensors").exists()
