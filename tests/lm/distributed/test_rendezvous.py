"""Processes that meet in a store where others have met before."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore, Store

from bigbatch.lm.distributed.rendezvous import fresh_store


def meeting(store: Store, size: int = 3) -> list[Store]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: fresh_store(store, rank, size, timeout_s=60), range(size)))


def test_ranks_of_one_rendezvous_share_store_prefix() -> None:
    parts = meeting(HashStore())
    parts[1].set("address", b"here")
    assert [part.get("address") for part in parts] == [b"here"] * 3


def test_keys_of_earlier_rendezvous_are_invisible() -> None:
    store = HashStore()
    for number in range(3):
        parts = meeting(store)
        assert not any(part.check(["address"]) for part in parts), f"meeting {number} finds what another one wrote"
        for part in parts:
            part.set("address", b"there")


def test_early_leaver_is_not_counted_next_time() -> None:
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fresh_store, store, 0, 3, timeout_s=0.2)
        second = pool.submit(fresh_store, store, 1, 3, timeout_s=60)
        second.result()
        with pytest.raises(TimeoutError, match=re.escape("rank 0 has waited 0.2 s for rank 2")):
            first.result()
    parts = meeting(store)
    parts[2].set("address", b"here")
    assert [part.get("address") for part in parts] == [b"here"] * 3


def test_timeout_names_the_missing_rank() -> None:
    with pytest.raises(TimeoutError, match=re.escape("rank 2 has waited 0.1 s for rank 0")):
        fresh_store(HashStore(), 2, 3, timeout_s=0.1)
