"""In-place writes to batches are noticed, and copies keep them from the batch."""

import dataclasses

import pytest
import torch
from transformers import BatchEncoding

from bigbatch.batching.split import BatchWrites, draw, split, split_into

CPU = torch.device("cpu")


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    label: int


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: (None, x),
        lambda x: {"x": [x], "name": "a"},
        lambda x: BatchEncoding({"x": x}),
        lambda x: [Sample(x, 1)],
    ],
)
def test_write_to_a_view_is_found(make):
    x = torch.ones(4, 3)
    writes = BatchWrites(make(x))
    x.exp()
    assert not writes.found
    x[1:2].mul_(2)
    assert writes.found


def test_batch_without_tensors_was_not_written():
    assert not BatchWrites([1, "a", None]).found


def test_inference_tensors_are_ignored():
    with torch.inference_mode():
        x = torch.ones(4)
    assert not BatchWrites({"x": x}).found


@pytest.mark.parametrize(
    "cut", [lambda x: split(x, 2, device=CPU), lambda x: split_into(x, [[2, 0], [1, 3]], device=CPU)]
)
def test_copied_microbatches_keep_the_batch(cut):
    batch = {"x": torch.arange(4.0), "scale": torch.tensor(3.0)}
    parts = cut(batch).copied()
    for rows in parts.groups:
        part = parts.take(rows)
        part["x"].zero_()
        part["scale"].zero_()
        assert parts.take(rows)["x"].tolist() == [float(row) for row in rows]
    assert batch["x"].tolist() == [0, 1, 2, 3]
    assert batch["scale"].item() == 3
    assert not parts.was_written


def test_leaves_that_were_copied_are_not_copied_again():
    parts = split((torch.zeros(4), torch.zeros(4)), 2, device=CPU).copied()
    leaves, structure = parts.gather([0, 1])
    first, second = parts.assemble(leaves, structure, copied={0: leaves[0]}.keys())
    assert first is leaves[0]
    assert second is not leaves[1]


def test_split_notices_writes_to_its_views():
    x = torch.ones(4, 2)
    parts = split(x, 2, device=CPU)
    first = parts.take(parts.groups[0])
    assert first.data_ptr() == x.data_ptr()
    assert not parts.was_written
    first.add_(1)
    assert parts.was_written


def test_draw_refuses_reused_tensors():
    buffer = torch.zeros(2)

    def loader(clones):
        for value in range(3):
            buffer.fill_(value)
            yield {"x": buffer.clone() if clones else buffer}

    assert [part["x"][0].item() for part in draw(loader(True))] == [0, 1, 2]
    assert draw([buffer, buffer]) == [buffer, buffer]  # the same values twice
    with pytest.raises(ValueError, match="written to tensors that it had yielded before, and the 3 micro-batches"):
        draw(loader(False))
