"""How the processes of a run find those that were started together with them, and nobody who came before.

a store with the words of earlier processes → each asks, the first answers, each confirms → a part of it that is empty

torchrun keeps its store when it starts processes again. What the lost ones wrote there, such as the addresses that
they listened at, would be taken for that of the new ones; how often they were started does not tell them apart, since
each machine counts for itself.
"""

import time
import uuid
from collections.abc import Callable

from torch.distributed.distributed_c10d import PrefixStore, Store

PAUSE_S = 0.02  # between two looks into the store
PREFIX = "bigbatch"


def fresh_store(store: Store, rank: int, size: int, *, timeout_s: float) -> Store:
    """Give a part of a store that only the processes see that were started with this one. Collective.

        rank r: asks with a number of its own → the first answers it with the name of the part → r confirms the name

    An answer to another number is one of an earlier process, and so is a confirmation of another name.

    Args:
        store: That all of them see, whatever is in it.
        rank: Of this process.
        size: How many there are.
        timeout_s: Seconds to wait for the others.

    Raises:
        TimeoutError: They do not come.
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
