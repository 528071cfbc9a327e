"""Small checkpoints that differ at every step, with a file of every kind, and fault injection into disk operations."""

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bigbatch.lm.checkpoint import read, write
from bigbatch.lm.checkpoint.hashed_file import HashedFile

RUN_ID = "a-run"
FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "order.json", "manifest.json"]


def tensors_of(step: int) -> dict[str, dict[str, Tensor]]:
    made = torch.Generator().manual_seed(step)
    return {
        "model": {
            "weight": torch.randn(5, 7, generator=made),
            "bias": torch.randn(3, generator=made).to(torch.bfloat16),
            "seen": torch.tensor(step),
            "none": torch.empty(0, 4),
        },
        "optimizer": {"0/exp_avg": torch.randn(7, 5, generator=made).T, "mask": torch.tensor([True, False])},
    }


def values_of(step: int) -> dict[str, Any]:
    return {
        "state": {"step": step, "loss": 1 / (3 + step), "names": ["für", "日本語"], "big": 2**70 + step},
        "order": [step, step + 1, None, True],
    }


def save(folder: Path, step: int, *, run_id: str = RUN_ID) -> Path:
    return write(folder, step, run_id=run_id, tensors=tensors_of(step), values=values_of(step))


def assert_holds(path: Path, step: int) -> None:
    """Assert that the checkpoint is bit-identical to the one that `save` writes."""
    contents = read(path)
    assert (contents.step, contents.run_id) == (step, RUN_ID)
    assert contents.values == values_of(step)
    assert_same(contents.tensors, tensors_of(step))


def assert_same(found: Any, expected: dict[str, dict[str, Tensor]]) -> None:
    assert {part: set(named) for part, named in found.items()} == {part: set(t) for part, t in expected.items()}
    for part, named in expected.items():
        for name, tensor in named.items():
            other = found[part][name]
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
            assert bits(other) == bits(tensor), name


def bits(tensor: Tensor) -> bytes:
    plain = torch.empty(tensor.numel(), dtype=tensor.dtype)
    return plain.copy_(tensor.detach().reshape(-1)).view(torch.uint8).numpy().tobytes()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest without updating its digest."""
    content = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    change(content)
    (path / "manifest.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class DiskOperations:
    """Counts disk operations and calls ``act`` just before number ``at``; every operation is executed."""

    def __init__(self, patch: pytest.MonkeyPatch, act: Callable[[str], None], at: int = -1) -> None:
        self.seen: list[str] = []
        self._act, self._at = act, at
        for name in ("mkdir", "rename", "unlink", "rmdir", "fsync"):
            patch.setattr(os, name, self._counted(name, getattr(os, name)))
        patch.setattr(HashedFile, "write", self._counted("write", HashedFile.write))
        patch.setattr(Path, "open", self._counted("open", Path.open, only=lambda words: words[1:2] == ("xb",)))

    def _counted(
        self, name: str, real: Callable[..., Any], only: Callable[[tuple[Any, ...]], bool] = lambda words: True
    ) -> Callable[..., Any]:
        def counted(*words: Any, **options: Any) -> Any:
            if only(words):
                self.reach(f"{name} {_described(words[0])}")
            return real(*words, **options)

        return counted

    def reach(self, point: str) -> None:
        self.seen.append(point)
        if len(self.seen) - 1 == self._at:
            self._act(point)


def _described(thing: object) -> str:
    """Return the file name of a path or descriptor."""
    if isinstance(thing, int):
        return Path(f"/proc/self/fd/{thing}").readlink().name
    return Path(thing).name if isinstance(thing, str | os.PathLike) else ""


def no_space(point: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount a tmpfs; skip the test if that is not permitted."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs to mount a tmpfs: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
