"""Fit the model of benchmarks/scaling.py to updates measured on 1 and 4 H200, compare it with them, and extrapolate.

    python benchmarks/scaling_h200.py            # reads benchmarks/results; nothing is measured, a few seconds

From the updates of one card in small-windows-h200.txt without a captured graph, after the first ten: the time of a
token is fitted, beside 6 ms for division, norm and optimizer, and what is left of it is the noise of a rank. The
all-reduce of all gradients took 10.5 ms on 4 cards (docs/explanation/decisions.md, small windows). All other rows are
predicted from these, and printed with what was measured. Rows of FSDP2 run without recorded launches: their time per
token is fitted to the one that gathers and reduces once a window, and the other two are predicted.

Beyond 4 cards: 8 cards of a host with the measured bandwidth, and between hosts a NOMINAL 400 Gbit/s a card. Gradients
are reduced within a host, between hosts (an eighth each), and gathered within it. Each rank of replicas draws normal
noise as wide as the residuals of the fit, and the slowest counts: medians of 200 updates.
"""

import random
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from scaling import HOST, NOMINAL, W_PARAMETERS, W_UPDATE_S, Network, overlapped

RESULTS = Path(__file__).parent / "results"
ALL_REDUCE_S = 10.5e-3  # of 494 M float32 gradients on 4 H200, in an update
WARM = 10  # updates before those that are used
RANKS = (1, 2, 4, 8, 64, 512, 4096)
GRADIENT_BYTES = 4 * W_PARAMETERS
LAYERS = NOMINAL[0].layers
COPY_S, VOTE_S = NOMINAL[0].copy_s, NOMINAL[0].vote_s
LATENCY_S = NOMINAL[0].network.latency_s
BETWEEN_HOSTS = next(machine.network for machine in NOMINAL if machine.name.startswith("400"))
DRAWS = 200


@dataclass(frozen=True)
class Update:
    """One measured update: milliseconds, micro-batches, tokens of rank 0, graphs that it captured."""

    ms: float
    microbatches: int
    tokens: int
    captured: int


def tables(name: str) -> list[tuple[str, list[Update]]]:
    """Return the tables of a raw output with their headings: the way, and the number of the command."""
    found: list[tuple[str, list[Update]]] = []
    command = 0
    for line in (RESULTS / name).read_text(encoding="utf-8").splitlines():
        command += line.startswith("$")
        if line.startswith(("rank 0 alone", "alone", "4 ranks")) and "times one card" not in line:
            way = line.partition(", ")[2] or ("alone" if "alone" in line else "ddp")
            found.append((f"{way} {command}", []))
        elif numbers := re.fullmatch(r" *(\d+) +([\d.]+) +(\d+) +([\d,]+) +(\d+)", line):
            _, ms, count, tokens, captured = numbers.groups()
            found[-1][1].append(Update(float(ms), int(count), int(tokens.replace(",", "")), int(captured)))
    return found


@dataclass(frozen=True)
class Fit:
    """Seconds of a token on one card, and the spread of what the fit leaves, as a share of an update."""

    token_s: float
    spread: float

    def alone_s(self, tokens: float) -> float:
        """Return the seconds of an update of so many tokens on one card."""
        return W_UPDATE_S + self.token_s * tokens


def fit(updates: list[Update]) -> Fit:
    """Fit seconds = update + slope · tokens by the median; all windows have about as many tokens."""
    token_s = statistics.median((u.ms / 1e3 - W_UPDATE_S) / u.tokens for u in updates)
    return Fit(token_s, statistics.pstdev(u.ms / 1e3 / (W_UPDATE_S + token_s * u.tokens) for u in updates))


def inner_network() -> Network:
    """Return the network of a host that explains the measured all-reduce."""
    buckets = GRADIENT_BYTES / (25 * 2**20)
    sending_s = ALL_REDUCE_S - buckets * LATENCY_S * 2 / 10  # buckets overlap: a tenth of their latencies is left
    return Network(2 * 3 / 4 * GRADIENT_BYTES / sending_s, LATENCY_S)


def crossing_s(inner: Network, ranks: int) -> float:
    """Return the seconds of vote, copies and all-reduce, between hosts as well if there are several."""
    if ranks == 1:
        return 0.0
    local, hosts = min(ranks, HOST), -(-ranks // HOST)
    vote_s = VOTE_S * max(1, (ranks - 1).bit_length())
    between_s = BETWEEN_HOSTS.all_reduce(hosts, GRADIENT_BYTES / HOST, 1)  # of an eighth on each card; 0 for one host
    return vote_s + COPY_S + inner.all_reduce(local, GRADIENT_BYTES, 1) + between_s


def slowest_s(alone_s: float, spread: float, ranks: int, draws: random.Random) -> float:
    """Return the median, over updates, of the time of the slowest rank."""
    return statistics.median(alone_s * (1 + max(draws.gauss(0.0, spread) for _ in range(ranks))) for _ in range(DRAWS))


def fsdp_s(way: str, token_s: float, tokens: float, count: int, inner: Network) -> float:
    """Return the seconds of an update of FSDP2 on 4 cards, with perfect overlap."""
    gathered = 4 if way == "fsdp-every" else 2  # bytes of a parameter
    gather_s = inner.all_gather(4, gathered * W_PARAMETERS, LAYERS)
    scatter_s = inner.all_gather(4, GRADIENT_BYTES, LAYERS)
    compute_s = token_s * tokens / count
    if way == "fsdp-last":
        return count * compute_s + gather_s / LAYERS + scatter_s / LAYERS
    gathers_s = 2 * gather_s if way == "fsdp-every" else 0.0
    return count * overlapped(compute_s, gathers_s + scatter_s, LAYERS)


def show_row(name: str, updates: list[Update], predicted: list[float]) -> None:
    """Print medians and the largest error of one table."""
    errors = [p * 1e3 / u.ms - 1 for p, u in zip(predicted, updates, strict=True)]
    medians = 1e3 * statistics.median(predicted), statistics.median(u.ms for u in updates)
    worst = max(errors, key=abs)
    print(
        f"{name:<34}{len(updates):>8}{medians[0]:>11.1f}{medians[1]:>10.1f}{medians[0] / medians[1] - 1:>+8.1%}"
        f"{worst:>+8.1%}"
    )


def main() -> None:
    """Print the fit, predicted and measured rows, and the extrapolation."""
    small, sharded = tables("small-windows-h200.txt"), tables("fsdp-h200.txt")
    alone = [u for way, rows in small if way.startswith("alone") for u in rows[WARM:] if not u.captured]
    found, inner, draws = fit(alone), inner_network(), random.Random(0)
    print(f"fit to {len(alone)} updates of one H200 without a captured graph:")
    print(
        f"{1e3 * W_UPDATE_S:.1f} ms an update + {1e6 * found.token_s:.3f} µs a token, residuals {found.spread:.1%}; "
        f"all-reduce {1e3 * ALL_REDUCE_S:.1f} ms on 4: {inner.bandwidth / 1e9:.0f} GB/s a card"
    )
    print(f"\n{'milliseconds of an update':<34}{'updates':>8}{'predicted':>11}{'measured':>10}{'error':>8}{'worst':>8}")
    for way, rows in small + [table for table in sharded if table[0].startswith("ddp")]:
        kept = [u for u in rows[WARM if len(rows) > WARM else len(rows) // 2 :] if not u.captured]
        ranks = 1 if way.startswith("alone") else 4
        crossing = crossing_s(inner, ranks)
        what = f"{way.split()[0]}, {ranks} card{'s'[: ranks > 1]}, {kept[0].microbatches} micro-batches"
        waited = [slowest_s(found.alone_s(u.tokens), found.spread, ranks, draws) for u in kept]
        show_row(what, kept, [seconds + crossing for seconds in waited])
    last = [u for way, rows in sharded if way.startswith("fsdp-last") for u in rows[len(rows) // 2 :]]
    token_s = statistics.median(u.ms / 1e3 / u.tokens for u in last)
    for way, rows in sharded:
        name = way.split()[0].replace("fsdp-kept", "fsdp")
        if name.startswith("fsdp"):
            kept = rows[len(rows) // 2 :]
            predicted = [fsdp_s(name, token_s, u.tokens, u.microbatches, inner) for u in kept]
            show_row(f"{name}, 4 cards{' (fitted)' if name == 'fsdp-last' else ''}", kept, predicted)
    print("\none batch of W (92,493 tokens) a rank; between hosts of 8 NOMINAL, 400 Gbit/s a card; not measured")
    print(
        f"{'ranks':>6}{'slowest rank ms':>17}{'crossing ms':>13}{'update ms':>11}{'of ranks · one':>16}{'slowest':>9}"
    )
    one_s = found.alone_s(92_493)
    for ranks in RANKS:
        waited_s = slowest_s(found.alone_s(92_493), found.spread, ranks, draws)
        crossing = crossing_s(inner, ranks)
        print(
            f"{ranks:>6}{1e3 * waited_s:>17.1f}{1e3 * crossing:>13.1f}{1e3 * (waited_s + crossing):>11.1f}"
            f"{one_s / (waited_s + crossing):>16.1%}{1 - one_s / waited_s:>9.1%}"
        )
    print("\none batch of W over all ranks of a host")
    for ranks in (1, 2, 4, 8):
        waited_s = slowest_s(found.alone_s(92_493 / ranks), found.spread, ranks, draws)
        update_s = waited_s + crossing_s(inner, ranks)
        print(f"{ranks:>6}{1e3 * update_s:>17.1f} ms{one_s / ranks / update_s:>10.1%} of ranks · one")


if __name__ == "__main__":
    main()
