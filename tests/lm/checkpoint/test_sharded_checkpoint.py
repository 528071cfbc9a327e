"""Checkpoints written by several ranks load bit-identically on any number of ranks."""

import shutil
from pathlib import Path

import pytest

from bigbatch.lm.checkpoint import read, verify
from lm.checkpoint.sharded_checkpoint_cases import Run, bits_of, load, load_and_save, parts_of, save
from support.checkpoints import RUN_ID, names_in
from support.gloo_processes import run


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple, tuple]:
    """A folder with step-2 of two ranks, and what they had then and after another update."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    first, second = run(save, 2, folder, "fsdp")
    assert first == second
    return folder, *first


def test_two_ranks_resume_bit_identically(two) -> None:
    folder, saved, later = two
    assert run(load, 2, folder, "fsdp") == [(saved, later)] * 2
    assert names_in(folder / "step-2") == {
        "manifest.json",
        "state.json",
        *(f"{part}-rank-{rank}-of-2.safetensors" for part in ("model", "optimizer") for rank in (0, 1)),
    }


def test_two_ranks_load_on_four_and_back(two, tmp_path: Path) -> None:
    folder, saved, _ = two
    copy = shutil.copytree(folder, tmp_path / "checkpoints")
    assert run(load_and_save, 4, copy, "fsdp", 3, timeout_s=180) == [saved] * 4
    assert "model-rank-3-of-4.safetensors" in names_in(copy / "step-3")
    assert run(load_and_save, 2, copy, "fsdp", 4) == [saved] * 2


def test_two_ranks_load_in_one_process(two) -> None:
    folder, saved, _ = two
    whole = Run("plain", 3)
    whole.load_whole(folder / "step-2")
    assert whole.bits() == saved
    assert bits_of({name: t for part in read(folder / "step-2").tensors.values() for name, t in part.items()}) == saved
    filled = Run("plain", 4)
    filled.load(folder / "step-2")
    assert filled.bits() == saved


def test_one_process_loads_on_two_ranks(tmp_path: Path) -> None:
    from bigbatch.lm.checkpoint import write

    plain = Run("plain", 5)
    write(tmp_path, 1, run_id=RUN_ID, **parts_of(plain.state()))
    assert [loaded for loaded, _ in run(load, 2, tmp_path, "fsdp")] == [plain.bits()] * 2


def test_replicated_shards_are_written_once(tmp_path: Path) -> None:
    saved, _ = run(save, 4, tmp_path, "hsdp", timeout_s=180)[0]
    assert verify(tmp_path / "step-2") is None
    num_bytes = sum(len(data) for _, _, data in saved.values())
    files = list((tmp_path / "step-2").glob("*.safetensors"))
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert sum(file.stat().st_size for file in files) == num_bytes + headers
    assert [loaded for loaded, _ in run(load, 2, tmp_path, "fsdp")] == [saved] * 2
