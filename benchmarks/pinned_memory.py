"""Time to allocate pinned host memory, by who writes its pages first and by their size; the rate of copies in it.

    python benchmarks/pinned_memory.py [--gib 6] [--rounds 3] [--out FILE]                               # CUDA
    python benchmarks/pinned_memory.py --copies --gib 96                   # is all of a large memory equally fast?

Each row allocates ``--gib`` in buffers of 256 MiB, as many as offload makes for the layers of a model, and frees them.
*registered* lets cudaHostRegister make the pages, one after the other; *written first* writes one byte of each page
with torch's threads before; *huge* asks for pages of 2 MiB as well; *allocator* is torch's own for pinned memory, whose
buffers are powers of two; *bigbatch* is what offload uses. In a virtual machine the first round is the slowest: the
host has not given it the memory yet.

``--copies`` allocates ``--gib`` once, and copies each eighth of it in both directions at once: the rate of the first,
measured with little memory, is what predictions of offload use for all.
"""

import argparse
import mmap
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bigbatch.offload.transfers import CudaTransfers

BUFFER_BYTES = 256 * 2**20
PAGE_BYTES = mmap.PAGESIZE


def registered(num_bytes: int, *, written: bool, huge: bool = False) -> tuple[Tensor, Callable[[], None]]:
    """Return pinned memory, and how to free it."""
    pages = mmap.mmap(-1, num_bytes)
    if huge:
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    if written:
        memory[::PAGE_BYTES].zero_()
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), num_bytes, 0))
    return memory, lambda: torch.cuda.check_error(runtime.cudaHostUnregister(memory.data_ptr()))


def rates(transfers: CudaTransfers, gib: float) -> list[float]:
    """Return bytes per second in each direction, for each eighth of so much pinned memory."""
    buffers = [transfers.host_memory(BUFFER_BYTES) for _ in range(max(16, round(gib * 2**30 / BUFFER_BYTES)))]
    on_device = [transfers.device_memory(BUFFER_BYTES) for _ in range(2)]
    found = []
    for part in range(8):
        own = buffers[part * len(buffers) // 8 : (part + 1) * len(buffers) // 8]
        half = len(own) // 2
        start_s = time.perf_counter()
        for source, target in zip(own[:half], own[half:], strict=False):
            transfers.to_device(on_device[0], source)
            transfers.to_host(target, on_device[1])
        transfers.finish()
        found.append(half * BUFFER_BYTES / (time.perf_counter() - start_s))
    return found


def main() -> None:
    """Print one line for each way, or the rates of the copies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=6.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    transfers = CudaTransfers(device)
    if options.copies:
        print(
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.gib:g} GiB, GB/s in each direction:"
        )
        print("  ".join(f"{rate / 1e9:.1f}" for rate in rates(transfers, options.gib)))
        return

    def allocator(num_bytes: int) -> tuple[Tensor, Callable[[], None]]:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True), lambda: None

    ways: dict[str, Callable[[int], tuple[Tensor, Callable[[], None]]]] = {
        "registered": lambda num_bytes: registered(num_bytes, written=False),
        "written first": lambda num_bytes: registered(num_bytes, written=True),
        "huge": lambda num_bytes: registered(num_bytes, written=True, huge=True),
        "allocator": allocator,
        "bigbatch": lambda num_bytes: (transfers.host_memory(num_bytes), lambda: None),
    }
    torch.zeros(1, device=device)
    empty_cache = getattr(torch.accelerator, "empty_host_cache", None) or torch._C._host_emptyCache  # before torch 2.12
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, make in ways.items():
            start_s = time.perf_counter()
            buffers = [make(BUFFER_BYTES) for _ in range(max(1, round(options.gib * 2**30 / BUFFER_BYTES)))]
            seconds[name].append(time.perf_counter() - start_s)
            for _, free in buffers:
                free()
            del buffers
            empty_cache()
    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{options.gib:g} GiB in buffers of 256 MiB; seconds a GiB",
        f"{'':14} {'median':>8}   rounds",
    ]
    for name, found in seconds.items():
        of_gib = [second / options.gib for second in found]
        lines.append(f"{name:14} {statistics.median(of_gib):>8.3f}   " + "  ".join(f"{each:.3f}" for each in of_gib))
    print("\n".join(lines))
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
