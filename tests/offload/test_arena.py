"""Memory of the device for parts of training state: slots in turn, and all of it for a large part."""

import pytest
import torch

from bigbatch.offload.arena import Arena, Place, arena_bytes
from bigbatch.offload.chunk_sizes import NUM_SLOTS
from bigbatch.offload.transfers import Transfers


class Noting(Transfers):
    """Numbers what is computed, and records the memory that is allocated."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.allocated: list[int] = []

    def device_memory(self, num_bytes: int) -> torch.Tensor:
        self.allocated.append(num_bytes)
        return super().device_memory(num_bytes)

    def computed(self) -> str:
        return "allocated"


def offset(place: Place) -> int:
    return place.memory.storage_offset()


def test_slots_are_used_in_turn() -> None:
    arena = Arena(Noting(), [10, 7, 4], 10)
    places = [arena.place(10) for _ in range(NUM_SLOTS)]
    assert [offset(place) for place in places] == [0, 10, 20]
    assert [list(place.after) for place in places] == [["allocated"]] * NUM_SLOTS
    arena.release(places[0], "copy")
    arena.release(places[1], None)
    assert list(arena.place(4).after) == ["copy"]
    assert list(arena.place(7).after) == []
    assert list(arena.place(7).after) == ["allocated"]


def test_large_part_waits_for_all_slots_and_they_for_it() -> None:
    arena = Arena(Noting(), [10, 31], 10)
    assert not arena.is_small(31)
    for name in ("first", "second", "third"):
        arena.release(arena.place(10), name)
    large = arena.place(31)
    assert (offset(large), len(large.memory)) == (0, 31)
    assert list(large.after) == ["first", "second", "third"]
    arena.release(large, "large")
    assert [list(arena.place(10).after) for _ in range(NUM_SLOTS)] == [["large"]] * NUM_SLOTS


@pytest.mark.parametrize(("sizes", "small"), [([100, 33, 34, 10], {33, 10}), ([100, 20], {20}), ([29, 10], {10})])
def test_slots_fill_the_memory_of_the_largest_part(sizes: list[int], small: set[int]) -> None:
    """Of parts above the size of a slot, those that are at most a third of the largest overlap, too."""
    transfers = Noting()
    arena = Arena(transfers, sizes, 10)
    assert {size for size in sizes if arena.is_small(size)} == small
    assert transfers.allocated == [arena_bytes(sizes, 10)] == [max(30, *sizes)]
    ends = [offset(place) + len(place.memory) for place in (arena.place(max(small)) for _ in range(NUM_SLOTS))]
    assert max(ends) <= transfers.allocated[0]
