"""Rendezvous of the processes that were started together, in a store that earlier processes have written to.

a store with keys of earlier processes → each rank asks, rank 0 answers, each confirms → a new prefix of the store

torchrun reuses its store when it restarts processes. Keys of the lost processes, such as their addresses, would be read
as those of the new ones. The restart count does not distinguish them, because each machine counts for itself.
"""

import time
import uuid
from collections.abc import Callable

from torch.distributed.distributed_c10d import PrefixStore, Store

PAUSE_S = 0.02  # between two reads of the store
PREFIX = "bigbatch"


def fresh_store(store: Store, rank: int, size: int, *, timeout_s: float) -> Store:
    """Return a prefix of a store that is new to the processes started together. Collective.

        rank r: writes a random number → rank 0 answers it with the prefix → rank r confirms the prefix

    An answer to another number, or a confirmation of another prefix, is from an earlier process and is ignored.

    Args:
        store: Shared by all ranks; may contain any keys.
        rank: Rank of this process.
        size: Number of ranks.
        timeout_s: Seconds to wait for the other ranks.

    Raises:
        TimeoutError: A rank does not answer in time.
    """
    store = PrefixStore(PREFIX, store)
    name = _gathered(store, size, timeout_s) if rank == 0 else _answered(store, rank, timeout_s)
    return PrefixStore(name, store)


def _gathered(store: Store, size: int, timeout_s: float) -> str:
    name = uuid.uuid4().hex
    answered: dict[int, str] = {}
    missing = set(range(1, size))

    def all_confirmed() -> bool:
        for rank in sorted(missing):
            if (asked := _read(store, f"asked/{rank}")) and answered.get(rank) != asked:
                store.set(f"answered/{rank}", asked + name)
                answered[rank] = asked
            if store.check([f"confirmed/{name}/{rank}"]):
                missing.discard(rank)
        return not missing

    if not _until(all_confirmed, timeout_s):
        raise TimeoutError(
            f"rank 0 has waited {timeout_s:g} s for {', '.join(f'rank {rank}' for rank in sorted(missing))}"
        )
    return name


def _answered(store: Store, rank: int, timeout_s: float) -> str:
    number = uuid.uuid4().hex
    store.set(f"asked/{rank}", number)
    answer = ""

    def has_come() -> bool:
        nonlocal answer
        answer = _read(store, f"answered/{rank}")
        return answer.startswith(number)

    if not _until(has_come, timeout_s):
        raise TimeoutError(f"rank {rank} has waited {timeout_s:g} s for rank 0")
    name = answer.removeprefix(number)
    store.set(f"confirmed/{name}/{rank}", "")
    return name


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _until(happened: Callable[[], bool], timeout_s: float) -> bool:
    end_s = time.monotonic() + timeout_s
    while not happened():
        if time.monotonic() > end_s:
            return False
        time.sleep(PAUSE_S)
    return True
