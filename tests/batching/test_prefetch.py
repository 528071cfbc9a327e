"""The feed where nothing is fetched ahead: it gives what the split gives, when it is asked and not before."""

import gc

import pytest
import torch
from torch import Tensor

from bigbatch.batching.prefetch import Prefetcher, _is_plain_host_tensor, _pin
from bigbatch.batching.split import split, split_into

CPU = torch.device("cpu")


def column(samples: int, *shape: int) -> Tensor:
    return torch.arange(samples * max(1, torch.Size(shape).numel())).reshape(samples, *shape)


@pytest.mark.parametrize("groups", [[], [[4, 0]], [[3], [1, 2, 0], [4]]])
def test_every_microbatch_equals_split(groups: list[list[int]]) -> None:
    parts = split_into({"a": column(5, 2), "b": [column(5), None]}, groups, device=CPU)
    with Prefetcher(parts) as feed:
        taken = [feed.take(rows) for rows in parts.groups]
    assert [(part["a"].tolist(), part["b"][0].tolist()) for part in taken] == [
        (column(5, 2)[rows].tolist(), rows) for rows in groups
    ]


def test_non_tensors_pass_through_unchanged() -> None:
    def collate(samples: list[str]) -> tuple[object, ...]:
        return torch.tensor([len(sample) for sample in samples]), samples, len(samples), None, {"first": samples[0]}

    parts = split(["a", "bb", "ccc"], 2, device=CPU, collate=collate)
    with Prefetcher(parts) as feed:
        first, second = (feed.take(rows) for rows in parts.groups)
    assert first[0].tolist() == [1, 2]
    assert first[1:] == (["a", "bb"], 2, None, {"first": "a"})
    assert second[0].tolist() == [3]
    assert second[1:] == (["ccc"], 1, None, {"first": "ccc"})


def test_cpu_microbatch_is_collated_lazily_and_not_kept() -> None:
    alive: list[int] = []

    class Part(list):
        def __init__(self, samples: list[int]) -> None:
            super().__init__(samples)
            alive.append(samples[0])

        def __del__(self) -> None:
            alive.remove(self[0])

    parts = split(list(range(6)), 2, device=CPU, collate=lambda samples: {"part": Holder(Part(samples))})
    with Prefetcher(parts) as feed:
        for rows in parts.groups:
            part = feed.take(rows)
            assert alive == [rows[0]]
            del part
            gc.collect()
            assert alive == []


class Holder:
    """No pytree: a leaf that holds something."""

    def __init__(self, held: object) -> None:
        self.held = held


def test_cpu_microbatches_are_views_of_batch() -> None:
    batch = column(6, 2)
    parts = split(batch, 3, device=CPU)
    with Prefetcher(parts) as feed:
        pointers = {feed.take(rows).untyped_storage().data_ptr() for rows in parts.groups}
    assert pointers == {batch.untyped_storage().data_ptr()}


def test_any_rows_can_be_taken_repeatedly() -> None:
    parts = split(column(5), 3, device=CPU)
    with Prefetcher(parts) as feed:
        for rows in [parts.groups[0], range(2), range(2, 3), parts.groups[0], parts.groups[1], [4, 1]]:
            assert feed.take(rows).tolist() == list(rows)
    assert feed.take(range(1, 4)).tolist() == [1, 2, 3]


def test_collate_error_comes_from_its_rows() -> None:
    def collate(samples: list[int]) -> Tensor:
        if 3 in samples:
            raise ValueError("no three")
        return torch.tensor(samples)

    parts = split(list(range(6)), 2, device=CPU, collate=collate)
    with Prefetcher(parts) as feed:
        assert feed.take(parts.groups[0]).tolist() == [0, 1]
        with pytest.raises(ValueError, match="no three"):
            feed.take(parts.groups[1])
        assert feed.take(parts.groups[2]).tolist() == [4, 5]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is pinned memory")
def test_tensor_without_pinned_memory_is_copied_directly() -> None:
    tensor = torch.ones(3)
    assert _pin(tensor) is tensor


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        (torch.ones(3), True),
        (torch.tensor(1), True),
        (torch.ones(4, 4).t()[1:3], True),
        (torch.ones(1).expand(5), True),
        (torch.ones(3, requires_grad=True), False),
        (torch.nn.Parameter(torch.ones(3), requires_grad=False), False),
        (torch.ones(3).to_sparse(), False),
        (torch.ones(3, device="meta"), False),
        (None, False),
        ("text", False),
        (3, False),
    ],
)
def test_only_plain_host_tensors_are_prefetched(leaf: object, expected: bool) -> None:
    assert _is_plain_host_tensor(leaf) is expected
