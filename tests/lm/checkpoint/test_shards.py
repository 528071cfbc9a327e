"""Tensors in pieces: whole again, or refused, whatever is missing, doubled or elsewhere."""

import shutil
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bigbatch.errors import CheckpointError
from bigbatch.lm.checkpoint import read
from bigbatch.lm.checkpoint.integrity import IntegrityError
from bigbatch.lm.checkpoint.safetensors_file import write_tensors
from bigbatch.lm.checkpoint.sharded_reader import read_into
from bigbatch.lm.checkpoint.shards import ShardInfo, join_shards, piece_name, to_header
from bigbatch.lm.checkpoint.writer import complete, write_file
from support.checkpoints import RUN_ID

Pieces = list[tuple[ShardInfo, Tensor]]


@st.composite
def cut(draw: st.DrawFn) -> tuple[Tensor, Pieces]:
    """A tensor of up to 3 dimensions, cut along each of them, in any order."""
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    bounds = [sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=3))}) for length in shape]
    ranges = [list(pairwise(each)) or [(0, 0)] for each in bounds]
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    pieces = [
        (ShardInfo(tuple(shape), tuple(start for start, _ in box)), whole[tuple(slice(*ends) for ends in box)])
        for box in product(*ranges)
    ]
    return whole, draw(st.permutations(pieces))


@given(cut())
@settings(deadline=None)
def test_shards_of_any_split_form_the_tensor(made: tuple[Tensor, Pieces]) -> None:
    whole, pieces = made
    found = join_shards("x", pieces)
    assert found.shape == whole.shape
    assert torch.equal(found, whole)


@given(cut(), st.data())
@settings(deadline=None)
def test_missing_duplicated_or_moved_shard_is_detected(made: tuple[Tensor, Pieces], data: st.DataObject) -> None:
    whole, pieces = made
    assume(len(pieces) > 1 and whole.numel())
    index = data.draw(st.integers(0, len(pieces) - 1))
    place, piece = pieces[index]
    others = pieces[:index] + pieces[index + 1 :]
    dim = data.draw(st.integers(0, whole.dim() - 1))
    for step in (-1, 1):
        moved = tuple(start + step * (axis == dim) for axis, start in enumerate(place.saved_offsets))
        if moved[dim] >= 0:
            with pytest.raises(IntegrityError, match=r"^x has pieces that (overlap|do not belong together)$"):
                join_shards("x", [*others, (ShardInfo(place.shape, moved), piece)])
    same_size = [other for other in others if other[1].shape == piece.shape]
    for other in same_size:  # the volume is right
        with pytest.raises(IntegrityError, match=r"^x has pieces that overlap$"):
            join_shards("x", [*others, other])
    with pytest.raises(IntegrityError, match=r"^x has [\d,]+ elements, and its pieces hold [\d,]+$"):
        join_shards("x", others)
    with pytest.raises(IntegrityError, match=r"^x has"):
        join_shards("x", [*pieces, (place, piece)])
    with pytest.raises(IntegrityError, match=r"^x has pieces that do not belong together$"):
        join_shards("x", [*others, (ShardInfo((*place.shape, 1), place.saved_offsets), piece)])
    with pytest.raises(IntegrityError, match=r"^x has pieces of several dtypes$"):
        join_shards("x", [*others, (place, piece.float())])


def forged(folder: Path, files: dict[str, tuple[dict[str, Tensor], dict[str, str]]]) -> Path:
    """A checkpoint with a manifest that vouches for anything."""
    aside, target = folder / "step-1.partial", folder / "step-1"
    shutil.rmtree(target, ignore_errors=True)
    aside.mkdir()
    stamps = {}
    for file, (tensors, notes) in files.items():
        stamps[file] = write_file(aside / file, lambda to, t=tensors, n=notes: write_tensors(to, t, n))
    complete(aside, target, stamps, step=1, run_id=RUN_ID)
    return target


def of_rank(rank: int, start: int, rows: int, **notes: Any) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
    described = to_header({"x": ShardInfo((4, 2), (start, 0))}) | notes
    return {f"{piece_name('model', rank, 2)}.safetensors": ({"x": torch.full((rows, 2), 1.0 + rank)}, described)}


def test_consistent_forgery_is_read_by_both_readers(tmp_path: Path) -> None:
    path = forged(tmp_path, of_rank(0, 0, 3) | of_rank(1, 3, 1))
    expected = torch.tensor([[1.0, 1], [1, 1], [1, 1], [2, 2]])
    assert torch.equal(read(path).tensors["model"]["x"], expected)
    into = torch.zeros(4, 2)
    read_into(path, {"x": into})
    assert torch.equal(into, expected)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (of_rank(0, 0, 3), "x has 8 elements, and its pieces hold 6"),
        (of_rank(0, 0, 2) | of_rank(1, 1, 2), "x has pieces that overlap"),
        (of_rank(0, 0, 2) | of_rank(1, 3, 2), "x has pieces that do not belong together"),
        (
            of_rank(0, 0, 4, DCP_SHARDING_INFO="{"),
            "model-rank-0-of-2.safetensors has no valid shard metadata",
        ),
        (
            of_rank(0, 0, 4, DCP_SHARDING_INFO='{"x": {"shape": [-1], "saved_offsets": [0, 0]}}'),
            "model-rank-0-of-2.safetensors has no valid shard metadata",
        ),
        (
            {"model.safetensors": next(iter(of_rank(0, 0, 4).values()))},
            "model.safetensors contains shards, but its name is not that of a file of shards",
        ),
    ],
)
def test_incomplete_shards_are_rejected_despite_valid_manifest(
    files: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = forged(tmp_path, files)
    into = torch.zeros(4, 2)
    for reader in (lambda: read(path), lambda: read_into(path, {"x": into})):
        with pytest.raises(CheckpointError) as caught:
            reader()
        assert str(caught.value) == f"checkpoint {path} cannot be used: {said}."
    assert not into.any()


def test_name_in_two_parts_is_rejected(tmp_path: Path) -> None:
    path = forged(tmp_path, {f"{part}.safetensors": ({"x": torch.ones(1)}, {}) for part in ("a", "b")})
    with pytest.raises(CheckpointError, match=r"step-1 cannot be used: x is in two parts of it\.$"):
        read_into(path, {"x": torch.zeros(1)})
