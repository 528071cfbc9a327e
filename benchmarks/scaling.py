"""Cost of gradient synchronization by ranks and micro-batches: measured on two processes, simulated beyond.

    python benchmarks/scaling.py [--rounds 6]         # under a minute; writes docs/explanation/scaling.svg as well

Two gloo processes of one thread each measure, in alternation: an all-reduce by size, the vote, the copies into and out
of buckets, a forward and backward, the update; and whole updates by `bigbatch.Engine` under `bigbatch.Replicated`, by
DDP with ``no_sync`` and by DDP at every micro-batch. A time is that of the slower rank; the tables have the median and
the minimum of the rounds. The former are the parameters of the model (equations in docs/explanation/scaling.md), which
is then compared with the latter.

Then come networks that were **not** measured: nominal bandwidths, with the micro-batch of a 494 million parameter model
that was measured on one NVIDIA H200 (docs/explanation/speed.md). Overlap is assumed to be perfect, so its gains are
upper bounds.
"""

import argparse
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch
from bigbatch.distributed import buckets
from bigbatch.distributed.window_vote import RankVote, from_numbers, to_numbers

FIGURE = Path(__file__).parents[1] / "docs" / "explanation" / "scaling.svg"
RANKS = (1, 2, 4, 8, 16, 32, 64)
COUNTS = (1, 2, 4, 8, 16, 32)  # of micro-batches per rank
HOST = 8  # GPUs of one host, between which HSDP shards
SMALL = 0.05  # share of an update below which communication is considered negligible


# model -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """Link between each pair of ranks, the same for all pairs.

    Attributes:
        bandwidth: Bytes per second of one rank in one direction.
        latency_s: Of one collective between two ranks; it grows with log2 of the ranks.
    """

    bandwidth: float
    latency_s: float

    def all_gather(self, ranks: int, num_bytes: float, collectives: int) -> float:
        """Return the seconds of an all-gather of shards; a reduce-scatter takes the same time."""
        if ranks == 1:
            return 0.0
        return (ranks - 1) / ranks * num_bytes / self.bandwidth + collectives * self.latency_s * math.log2(ranks)

    def all_reduce(self, ranks: int, num_bytes: float, collectives: int) -> float:
        """Return the seconds of a ring all-reduce, which sends each byte 2 (r − 1) / r times."""
        if ranks == 1:
            return 0.0
        return 2 * (ranks - 1) / ranks * num_bytes / self.bandwidth + collectives * self.latency_s * math.log2(ranks)


@dataclass(frozen=True)
class Machine:
    """Parameters of the time model of an update.

    Attributes:
        name: Of its tables.
        network: Between all ranks.
        inner: Between the ranks of one host; used by HSDP only.
        num_parameters: Of the model; gradients are reduced in float32.
        forward_s: Of one micro-batch.
        backward_s: Of one micro-batch.
        update_s: Division, norm and optimizer, once.
        copy_s: Of all gradients into buckets and out again, once.
        vote_s: Between two ranks, with what the host does around it.
        layers: In which FSDP gathers and scatters.
        ddp_bucket_bytes: Of the buckets that DDP overlaps.
        gathered_bytes: Of one parameter as FSDP gathers it.
    """

    name: str
    network: Network
    inner: Network
    num_parameters: float
    forward_s: float
    backward_s: float
    update_s: float
    copy_s: float
    vote_s: float
    layers: int
    ddp_bucket_bytes: float = 25 * 2**20
    gathered_bytes: int = 4

    @property
    def gradient_bytes(self) -> float:
        """Bytes of one all-reduce."""
        return 4 * self.num_parameters

    @property
    def microbatch_s(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_s


def overlapped(compute_s: float, communication_s: float, pieces: int) -> float:
    """Return the seconds of overlapped compute and communication: the last piece is sent after compute ends."""
    return max(compute_s + communication_s / pieces, communication_s + compute_s / pieces)


def crossing_s(machine: Machine, ranks: int) -> float:
    """Return the seconds that bigbatch spends on synchronization: vote, copies, all-reduce."""
    if ranks == 1:
        return 0.0
    num_buckets = math.ceil(machine.gradient_bytes / buckets.BUCKET_BYTES)
    reduce_s = machine.network.all_reduce(ranks, machine.gradient_bytes, num_buckets)
    return machine.vote_s * math.log2(ranks) + machine.copy_s + reduce_s


def bigbatch_s(machine: Machine, ranks: int, count: int) -> float:
    """One all-reduce of the sums, after all micro-batches and the vote."""
    return count * machine.microbatch_s + crossing_s(machine, ranks) + machine.update_s


def _synchronised_s(machine: Machine, ranks: int) -> float:
    pieces = math.ceil(machine.gradient_bytes / machine.ddp_bucket_bytes)
    reduce_s = machine.network.all_reduce(ranks, machine.gradient_bytes, pieces)
    return machine.forward_s + overlapped(machine.backward_s, reduce_s, pieces)


def ddp_s(machine: Machine, ranks: int, count: int) -> float:
    """DDP as it comes: an all-reduce within every backward."""
    return count * _synchronised_s(machine, ranks) + machine.update_s


def no_sync_s(machine: Machine, ranks: int, count: int) -> float:
    """DDP with ``no_sync``: within the last backward."""
    return (count - 1) * machine.microbatch_s + _synchronised_s(machine, ranks) + machine.update_s


def _sharded_s(machine: Machine, network: Network, ranks: int, *, reduces: bool, beside_s: float = 0.0) -> float:
    """Seconds of one micro-batch under FSDP2; ``beside_s`` of other communication in its backward."""
    gather_s = network.all_gather(ranks, machine.gathered_bytes * machine.num_parameters, machine.layers)
    scatter_s = network.all_gather(ranks, machine.gradient_bytes, machine.layers) if reduces else 0.0
    forward_s = overlapped(machine.forward_s, gather_s, machine.layers)
    return forward_s + overlapped(machine.backward_s, gather_s + scatter_s + beside_s, machine.layers)


def fsdp_every_s(machine: Machine, ranks: int, count: int) -> float:
    """FSDP2, ``SyncPolicy.EVERY``: two all-gathers and a reduce-scatter a micro-batch."""
    return count * _sharded_s(machine, machine.network, ranks, reduces=True) + machine.update_s / ranks


def fsdp_last_s(machine: Machine, ranks: int, count: int) -> float:
    """FSDP2, ``SyncPolicy.LAST``: two all-gathers a micro-batch, one reduce-scatter, in the last."""
    rest_s = (count - 1) * _sharded_s(machine, machine.network, ranks, reduces=False)
    return rest_s + _sharded_s(machine, machine.network, ranks, reduces=True) + machine.update_s / ranks


def hsdp_s(machine: Machine, ranks: int, count: int) -> float:
    """HSDP, ``SyncPolicy.SHARD``: shards within a host, an all-reduce of them between hosts with the last."""
    shards = min(ranks, HOST)
    reduce_s = machine.network.all_reduce(ranks // shards, machine.gradient_bytes / shards, machine.layers)
    rest_s = (count - 1) * _sharded_s(machine, machine.inner, shards, reduces=True)
    last_s = _sharded_s(machine, machine.inner, shards, reduces=True, beside_s=reduce_s)
    return rest_s + last_s + machine.update_s / shards


WAYS: dict[str, Callable[[Machine, int, int], float]] = {
    "bigbatch": bigbatch_s,
    "DDP, no_sync": no_sync_s,
    "DDP, every": ddp_s,
    "FSDP2, last": fsdp_last_s,
    "FSDP2, every": fsdp_every_s,
    "HSDP": hsdp_s,
}


def enough(machine: Machine, ranks: int) -> int:
    """Return the fewest micro-batches per rank from which synchronization is below 5 % of an update."""
    compute_s = crossing_s(machine, ranks) * (1 - SMALL) / SMALL - machine.update_s
    return max(1, math.floor(compute_s / machine.microbatch_s) + 1)


def to_win(machine: Machine, ranks: int, count: int) -> float:
    """Return the share of an update that perfect overlap with the last backward would save; negative if it costs."""
    return 1 - no_sync_s(machine, ranks, count) / bigbatch_s(machine, ranks, count)


W_TOKENS, W_TOKENS_PER_S, W_MICROBATCH, W_UPDATE_S = (
    92_493,
    121_733,
    12_288,
    0.006,
)  # one H200, docs/explanation/speed.md
W_MICROBATCH_S = (W_TOKENS / W_TOKENS_PER_S - W_UPDATE_S) / (W_TOKENS / W_MICROBATCH)
W_PARAMETERS = 494.0e6
NVLINK = Network(300e9, 20e-6)
NOMINAL = [
    Machine(
        name=name,
        network=network,
        inner=NVLINK,
        num_parameters=W_PARAMETERS,
        forward_s=W_MICROBATCH_S / 3,  # by floating-point operations
        backward_s=W_MICROBATCH_S * 2 / 3,
        update_s=W_UPDATE_S,
        copy_s=2 * 4 * W_PARAMETERS * 2 / 4.3e12,  # in and out; copy bandwidth of an H200, read + write
        vote_s=0.5e-3,
        layers=25,
        gathered_bytes=2,
    )
    for name, network in {
        "NVLink, 300 GB/s": NVLINK,
        "400 Gbit/s a GPU": Network(50e9, 50e-6),
        "25 Gbit/s a GPU": Network(3.125e9, 50e-6),
    }.items()
]


# measurement -----------------------------------------------------------------------------------------------------

WIDTH, DEPTH, ROWS = 1024, 8, 32
SIZES = (2**14, 2**17, 2**20, 2**22, 2**23, 25 * 2**20)  # bytes
CHECKED = (1, 2, 4, 8)
SHARE = "forward's share"
OVERLAP = "bigbatch, overlap"  # of the reduction with the last backward
BLOCK = 4  # micro-batches timed together
DDP_BUCKET_MIB = 8  # larger buckets leave nothing to overlap in a model this small


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)))


def _loss(model: nn.Module, rows: Tensor) -> tuple[Tensor, int]:
    return F.mse_loss(model(rows), rows, reduction="sum"), len(rows)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)


def _engine(model: nn.Module, sync: bigbatch.Replicated) -> bigbatch.Engine:
    return bigbatch.Engine(model, _sgd(model), _loss, microbatch=ROWS, sync=sync, noise=False, nonfinite="raise")


class _Lab:
    """Timings of one rank by name."""

    def __init__(self) -> None:
        self.data = torch.randn(max(CHECKED) * ROWS, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
        self.alone = _model()
        self.alone_optimizer = _sgd(self.alone)
        replica = _model()
        self.sync = bigbatch.Replicated(replica, overlap=False)
        self.engine = _engine(replica, self.sync)
        overlapped = _model()
        self.overlapped = _engine(overlapped, bigbatch.Replicated(overlapped, overlap=True))
        self.ddp = nn.parallel.DistributedDataParallel(_model(), bucket_cap_mb=DDP_BUCKET_MIB)
        self.ddp_optimizer = _sgd(self.ddp)
        self.buffers = {size: torch.zeros(size // 4) for size in SIZES}

    def round(self) -> dict[str, float]:
        """Time everything once."""
        times = {f"all-reduce {size}": self._time(lambda b=b: dist.all_reduce(b)) for size, b in self.buffers.items()}
        times["vote"] = self._time(self._vote)
        times["micro-batch"], times[SHARE] = self._microbatches()
        times["copies"] = self._time(self._copies)
        times["update"] = self._time(self._update)
        for count in CHECKED:
            rows = self.data[: count * ROWS]
            times[f"bigbatch {count}"] = self._time(lambda rows=rows: self.engine.step(rows))
            times[f"{OVERLAP} {count}"] = self._time(lambda rows=rows: self._by_overlap(rows))
            times[f"DDP, no_sync {count}"] = self._time(lambda rows=rows: self._by_ddp(rows, every=False))
            times[f"DDP, every {count}"] = self._time(lambda rows=rows: self._by_ddp(rows, every=True))
        return times

    def _time(self, work: Callable[[], Any]) -> float:
        dist.barrier()
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def _vote(self) -> None:
        reached = [True] * DEPTH
        from_numbers(self.sync.all_gather(to_numbers(RankVote(), {"loss": (1.0, 1.0)}, reached)), DEPTH)

    def _microbatches(self) -> tuple[float, float]:
        """Return the seconds of one micro-batch, and the share of the forward in them."""
        dist.barrier()
        start, forward_s = time.perf_counter(), 0.0
        for rows in self.data[: BLOCK * ROWS].split(ROWS):
            before = time.perf_counter()
            loss, _ = _loss(self.alone, rows)
            forward_s += time.perf_counter() - before
            loss.backward()
        whole_s = time.perf_counter() - start
        return whole_s / BLOCK, forward_s / whole_s

    def _copies(self) -> None:
        per_bucket = buckets.BUCKET_BYTES // (4 * WIDTH * WIDTH)
        gradients = [p.grad for p in self.alone.parameters() if p.grad is not None]
        for i in range(0, len(gradients), per_bucket):
            some = gradients[i : i + per_bucket]
            flat = torch.cat([gradient.reshape(-1) for gradient in some])
            parts = torch.split(flat, [gradient.numel() for gradient in some])
            torch._foreach_copy_(some, [p.view_as(g) for p, g in zip(parts, some, strict=True)])

    def _update(self) -> None:
        _finish(self.alone, self.alone_optimizer, BLOCK * ROWS)

    def _by_overlap(self, rows: Tensor) -> None:
        before, buckets.BUCKET_BYTES = buckets.BUCKET_BYTES, DDP_BUCKET_MIB * 2**20
        try:
            self.overlapped.step(rows)
        finally:
            buckets.BUCKET_BYTES = before

    def _by_ddp(self, rows: Tensor, *, every: bool) -> None:
        parts = rows.split(ROWS)
        for index, part in enumerate(parts):
            with nullcontext() if every or index == len(parts) - 1 else self.ddp.no_sync():
                loss, _ = _loss(self.ddp, part)
                loss.backward()
        _finish(self.ddp, self.ddp_optimizer, len(rows))


def _finish(model: nn.Module, optimizer: torch.optim.Optimizer, items: int) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    torch._foreach_div_(gradients, items)
    assert math.isfinite(torch.nn.utils.get_total_norm(gradients).item())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _rank(rank: int, store: str, rounds: int, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    lab = _Lab()
    lab.round()
    taken = [lab.round() for _ in range(rounds)]
    dist.barrier()
    queue.put(taken)
    dist.destroy_process_group()


def measure(rounds: int) -> dict[str, list[float]]:
    """Return the seconds of the slower of two ranks, by name, for each round."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        queue: Any = context.Queue()
        store = str(Path(folder) / "store")
        ranks = [context.Process(target=_rank, args=(rank, store, rounds, queue), daemon=True) for rank in range(2)]
        for process in ranks:
            process.start()
        first, second = queue.get(timeout=300), queue.get(timeout=300)
        for process in ranks:
            process.join()
    names = list(first[0])
    return {name: [max(a[name], b[name]) for a, b in zip(first, second, strict=True)] for name in names}


def fit(sizes: list[float], seconds: list[float]) -> tuple[float, float]:
    """Fit seconds = latency + size · slope by least squares of the relative errors; a latency below 0 becomes 0."""
    weights = torch.tensor([1 / s for s in seconds], dtype=torch.float64)
    rows = torch.stack([weights, weights * torch.tensor(sizes, dtype=torch.float64)], dim=1)
    latency, slope = (
        torch.linalg.lstsq(rows, torch.ones(len(sizes), 1, dtype=torch.float64)).solution.flatten().tolist()
    )
    return max(latency, 0.0), slope


def machine_of(times: dict[str, float]) -> Machine:
    """Return the parameters of the time model from measurements; with two ranks, a ring sends each byte once."""
    latency_s, slope = fit([float(size) for size in SIZES], [times[f"all-reduce {size}"] for size in SIZES])
    network = Network(1 / slope, latency_s)
    return Machine(
        name="this CPU, gloo",
        network=network,
        inner=network,
        num_parameters=DEPTH * WIDTH * WIDTH,
        forward_s=times["micro-batch"] * times[SHARE],
        backward_s=times["micro-batch"] * (1 - times[SHARE]),
        update_s=times["update"],
        copy_s=times["copies"],
        vote_s=times["vote"],
        layers=DEPTH,
        ddp_bucket_bytes=DDP_BUCKET_MIB * 2**20,
    )


# output ----------------------------------------------------------------------------------------------------------


def _print_measured(middle: dict[str, float], least: dict[str, float]) -> None:
    print(f"\n{'measured, ms of the slower rank':<32}{'median':>10}{'minimum':>10}")
    for name in middle:
        if not name.startswith(tuple(WAYS)):
            label, unit = name + (" bytes" if name.startswith("all-reduce") else ""), 1 if name == SHARE else 1e3
            print(f"{label:<32}{unit * middle[name]:>10.2f}{unit * least[name]:>10.2f}")


def _print_machine(machine: Machine) -> None:
    network = machine.network
    print(
        f"micro-batch {1e3 * machine.microbatch_s:.1f} ms (forward {1e3 * machine.forward_s:.1f}), update "
        f"{1e3 * machine.update_s:.1f}, copies {1e3 * machine.copy_s:.1f}, vote {1e3 * machine.vote_s:.2f}; gradients "
        f"{machine.gradient_bytes / 1e6:,.1f} MB; {network.bandwidth / 1e9:.3g} GB/s, {1e6 * network.latency_s:.0f} µs "
        "a collective"
    )


def _print_times(machine: Machine) -> None:
    print("milliseconds of an update")
    print(f"{'':<16}{'ranks':>6}" + "".join(f"{count:>10}" for count in COUNTS) + "  micro-batches per rank")
    for way, seconds in WAYS.items():
        for ranks in RANKS:
            cells = "".join(f"{1e3 * seconds(machine, ranks, count):>10,.1f}" for count in COUNTS)
            print(f"{way:<16}{ranks:>6}{cells}")


def _print_enough(machines: list[Machine]) -> None:
    print(
        f"\ncommunication of bigbatch below {SMALL:.0%} of an update, and what overlap with the last backward would win"
    )
    print(
        f"{'network':<20}{'ranks':>6}{'crossing ms':>13}{'from':>6}"
        + "".join(f"{'at ' + str(count):>8}" for count in COUNTS)
        + f"{'there':>8}"
    )
    for machine in machines:
        for ranks in (2, 8, 64):
            wins = "".join(f"{to_win(machine, ranks, count):>8.1%}" for count in COUNTS)
            least = enough(machine, ranks)
            print(
                f"{machine.name:<20}{ranks:>6}{1e3 * crossing_s(machine, ranks):>13,.1f}{least:>6}{wins}"
                f"{to_win(machine, ranks, least):>8.1%}"
            )


def _print_check(machine: Machine, found: dict[str, float], label: str) -> None:
    print(f"\nsimulated and measured, 2 ranks, {label}: milliseconds of an update")
    print(f"{'':<16}{'micro-batches':>14}{'simulated':>11}{'measured':>10}{'error':>8}")
    for way in ("bigbatch", "DDP, no_sync", "DDP, every"):
        for count in CHECKED:
            simulated, measured = WAYS[way](machine, 2, count), found[f"{way} {count}"]
            print(
                f"{way:<16}{count:>14}{1e3 * simulated:>11.1f}{1e3 * measured:>10.1f}{simulated / measured - 1:>+8.0%}"
            )


def _print_overlap(middle: dict[str, float]) -> None:
    print(f"\noverlap with the last backward, buckets of {DDP_BUCKET_MIB} MiB, measured: medians of an update in ms")
    print(f"{'micro-batches':>14}{'without':>10}{'with':>10}{'ratio':>8}{'DDP, no_sync':>14}")
    for count in CHECKED:
        without, found = middle[f"bigbatch {count}"], middle[f"{OVERLAP} {count}"]
        ddp = middle[f"DDP, no_sync {count}"]
        print(f"{count:>14}{1e3 * without:>10.1f}{1e3 * found:>10.1f}{found / without:>8.3f}{1e3 * ddp:>14.1f}")


STYLE = """
  .paper { fill: #ffffff } text { fill: #24292f; font: 12px system-ui, sans-serif } .axis { stroke: #8c959f }
  .title { font-weight: 600; font-size: 13px } .small { font-size: 11px }
  polyline { fill: none; stroke-linejoin: round; stroke-width: 1.8 }
  .w0 { stroke: #0a58ca; stroke-width: 3.2 } .w1 { stroke: #bc6c00; stroke-dasharray: 6 4 } .w2 { stroke: #d1242f }
  .w3 { stroke: #1a7f37; stroke-dasharray: 6 4 } .w4 { stroke: #1a7f37 } .w5 { stroke: #8250df; stroke-dasharray: 2 3 }
  .found { fill: #0a58ca }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } text { fill: #e6edf3 } .w0 { stroke: #79b8ff } .w1 { stroke: #e3b341 }
    .w2 { stroke: #ff7b72 } .w3, .w4 { stroke: #56d364 } .w5 { stroke: #d2a8ff } .found { fill: #79b8ff }
  }
"""
PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP = 420, 250, 44, 30


def figure(panels: list[tuple[str, Machine, int]], found: dict[str, float]) -> str:
    """Draw the share of an update that is compute, by micro-batches; dots are measured updates of the first panel."""
    width, height = 2 * PANEL_WIDTH, math.ceil(len(panels) / 2) * PANEL_HEIGHT + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>Share of an update that is compute, by micro-batches per rank</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
    ]
    for index, (title, machine, ranks) in enumerate(panels):
        place = f"{index % 2 * PANEL_WIDTH} {index // 2 * PANEL_HEIGHT}"
        parts += [f'<g transform="translate({place})">', *_panel(title, machine, ranks, {} if index else found), "</g>"]
    for index, way in enumerate(WAYS):
        x, y = LEFT + index * 132, height - 14
        parts.append(f'<polyline class="w{index}" points="{x},{y - 4} {x + 26},{y - 4}"/>')
        parts.append(f'<text class="small" x="{x + 32}" y="{y}">{way}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(title: str, machine: Machine, ranks: int, found: dict[str, float]) -> list[str]:
    right, bottom = PANEL_WIDTH - 18, PANEL_HEIGHT - 36

    def point(count: int, seconds: float) -> tuple[float, float]:
        share = bigbatch_s(machine, 1, count) / seconds
        x = LEFT + math.log2(count) / math.log2(COUNTS[-1]) * (right - LEFT)
        return round(x, 1), round(bottom - min(share, 1.1) / 1.1 * (bottom - TOP), 1)

    parts = [f'<text class="title" x="{LEFT}" y="18">{title}</text>']
    parts.append(f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    for percent in (0, 50, 100):
        y = bottom - percent / 110 * (bottom - TOP)
        parts.append(f'<text class="small" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>')
    for count in COUNTS:
        x, _ = point(count, 1.0)
        parts.append(f'<text class="small" x="{x}" y="{bottom + 15}" text-anchor="middle">{count}</text>')
    parts.append(f'<text class="small" x="{right}" y="{bottom + 29}" text-anchor="end">micro-batches a rank</text>')
    for index, (way, seconds) in reversed(list(enumerate(WAYS.items()))):
        if way == "HSDP" and ranks <= HOST:
            continue
        points = " ".join("{},{}".format(*point(count, seconds(machine, ranks, count))) for count in COUNTS)
        parts.append(f'<polyline class="w{index}" points="{points}"/>')
    for count in CHECKED if found else ():
        x, y = point(count, found[f"bigbatch {count}"])
        parts.append(f'<circle class="found" cx="{x}" cy="{y}" r="4"/>')
    return parts


def main() -> None:
    """Print the tables and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6, help="rounds of all measurements")
    parser.add_argument("--overlap", action="store_true", help="print only the updates with and without overlap")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    times = measure(options.rounds)
    middle = {name: statistics.median(values) for name, values in times.items()}
    least = {name: min(values) for name, values in times.items()}
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{versions}, {platform.machine()} CPU, {os.cpu_count()} cores")
    others = f"load {before:.1f} before: above 0, others use the cores too"
    print(f"2 gloo processes of 1 thread, {options.rounds} rounds; {others}")
    _print_overlap(middle)
    if options.overlap:
        return
    _print_measured(middle, least)
    cpu = replace(machine_of(middle), name="this CPU, medians")
    _print_check(cpu, middle, "medians")
    _print_check(machine_of(least), least, "minima")
    print("\nthis CPU: measured with 2 ranks, beyond them extrapolated as if each rank had such a link and such cores")
    _print_machine(cpu)
    _print_times(cpu)
    for machine in NOMINAL:
        print(f"\n{machine.name}: NOMINAL, not measured; micro-batch of W as measured on one NVIDIA H200")
        _print_machine(machine)
        _print_times(machine)
    _print_enough([cpu, *NOMINAL])
    panels = [("This CPU, 2 ranks; dots are measured", cpu, 2)]
    panels += [(f"{machine.name} (nominal), 64 ranks", machine, 64) for machine in NOMINAL]
    FIGURE.write_text(figure(panels, middle), encoding="utf-8")


if __name__ == "__main__":
    main()
