"""The rate of the link between host memory and a device, measured while both directions are busy."""

import time

import torch

from bigbatch.errors import MemoryLimitError
from bigbatch.offload.chunk_sizes import SUM_SLOT_BYTES
from bigbatch.offload.transfers import Transfers, make_transfers

NUM_COPIES = 8  # in each direction, after one that is not timed: 256 MiB, 10 ms at 26 GB/s


def measure_link_rate(device: torch.device) -> float | None:
    """Return bytes per second in each direction, between pinned memory and a device; None if memory is too short.

    Takes 64 MiB on each side meanwhile, and on CUDA about 0.1 s, most of it to pin memory. Waits for the device.
    """
    try:
        return _measure(make_transfers(device), SUM_SLOT_BYTES)
    except (MemoryLimitError, torch.OutOfMemoryError):
        return None


def _measure(transfers: Transfers, num_bytes: int) -> float:
    host = [transfers.host_memory(num_bytes).zero_() for _ in range(2)]
    on_device = [transfers.device_memory(num_bytes) for _ in range(2)]
    free = [transfers.computed()]

    def copy(times: int) -> float:
        started_s = time.perf_counter()
        for _ in range(times):
            transfers.to_device(on_device[0], host[0], after=free)
            transfers.to_host(host[1], on_device[1])
        transfers.finish()
        return time.perf_counter() - started_s

    try:
        copy(1)
        return NUM_COPIES * num_bytes / copy(NUM_COPIES)
    finally:
        transfers.finish()  # also after an error: what is freed is no longer written to
