"""Pools of ranks, one of each size for all tests of a session."""

from collections.abc import Callable, Iterator

import pytest

from distributed.pool import Pool

Pools = Callable[[int], Pool]


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """Give the pool of so many ranks."""
    made: dict[int, Pool] = {}

    def pool_of(size: int) -> Pool:
        if size not in made:
            made[size] = Pool(size)
        return made[size]

    yield pool_of
    for pool in made.values():
        pool.close()
