"""Gradients of the frameworks' own accumulation and of bigbatch's integrations, against the whole batch in one piece.

    python benchmarks/frameworks.py                     # the table
    python benchmarks/frameworks.py --speed             # time of a Trainer's step, tokens/s and peak memory
    python benchmarks/frameworks.py --speed --device cuda
    python benchmarks/frameworks.py --overhead --device cuda        # only the time of a step
    python benchmarks/frameworks.py --capped --device cuda --memory 12GiB

The table: small random models in float64, micro-batches of 4 samples, 4 of them in a window, ragged lengths; relative
error ‖gradient − whole‖ / ‖whole‖ at the optimizer's step, of the first window, one in the middle and the last, which
is shorter. The whole batch in one piece is the framework's own loss on all samples of the window, in one process. A
row of a Trainer has one changed line: ``exact(trainer)``. Some models compute logits or norms in float32 (marked *), so
that errors up to 1e-6 are rounding. Rows with 2 ranks run on two gloo processes with DDP. `framework_speed.py` has the
other modes.
"""

import argparse
import contextlib
import io
import logging
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.distributed as dist

from bigbatch import InputError
from framework_rows import FLOAT32, FLOAT64, Gradient, Row, as_if, make_rows

MODELS_ROUND = "*"


def relative_error(gradient: Gradient, whole: Gradient) -> float:
    """Return ‖gradient − whole‖ / ‖whole‖ over all parameters."""
    norm = torch.stack([w.double().norm() for w in whole]).norm()
    differences = torch.stack([(g.double() - w.double()).norm() for g, w in zip(gradient, whole, strict=True)])
    return float(differences.norm() / norm)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what the frameworks print."""
    logging.disable(logging.WARNING)
    silent = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@dataclass(frozen=True)
class Result:
    """Gradients of one row; those of bigbatch, or the sentence of its refusal."""

    stock: list[Gradient]
    ours: list[Gradient] | None
    note: str


def measure(row: Row) -> Result:
    """Run a row as stock and with the integration. Collective."""
    with quiet():
        stock = row.stock()
        try:
            gradients, unit = row.ours()
        except InputError as error:
            return Result(stock, None, " ".join(str(error).split()))
    return Result(stock, gradients, unit)


def measure_on_rank(rank: int, port: int, names: list[str], file: str) -> None:
    """Run rows on one of two ranks; the first saves their results."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    rows = {row.name: row for row in make_rows()}
    results = {name: measure(rows[name]) for name in names}
    if rank == 0:
        torch.save({name: vars(result) for name, result in results.items()}, file)
    dist.barrier()
    dist.destroy_process_group()


def measure_on_two(rows: Sequence[Row]) -> dict[str, Result]:
    """Run rows on two gloo processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "results.pt"
        torch.multiprocessing.spawn(measure_on_rank, (port, [row.name for row in rows], str(file)), nprocs=2)
        return {name: Result(**values) for name, values in torch.load(file).items()}


def is_installed(names: Sequence[str]) -> bool:
    """Return whether all packages are installed."""
    try:
        return all(bool(version(name)) for name in names)
    except PackageNotFoundError:
        return False


def print_row(row: Row, ranks: int, result: Result, whole: list[Gradient]) -> bool:
    """Print a line, and return whether bigbatch is exact, or refuses."""
    picked = [0, len(whole) // 2, len(whole) - 1]
    complete = [gradients for gradients in (result.stock, result.ours) if gradients is not None]
    if any(len(gradients) != len(whole) for gradients in complete):
        print(f"{row.name:<46}{ranks:>2}  {[len(g) for g in complete]} windows instead of {len(whole)}")
        return False
    stock = [relative_error(result.stock[index], whole[index]) for index in picked]
    line = f"{row.name + (MODELS_ROUND if row.bound > FLOAT64 else ''):<46}{ranks:>2}"
    line += "".join(f"{100 * error:>9.1f} %" if error >= 1e-4 else f"{error:>11.0e}" for error in stock)
    if result.ours is None:
        print(f"{line}  refused: {result.note}", flush=True)
        return True
    ours = [relative_error(result.ours[index], whole[index]) for index in picked]
    good = max(ours) <= row.bound
    line += "".join(f"{error:>11.0e}" for error in ours)
    print(f"{line}  {result.note}{'' if good else '  NOT EXACT'}", flush=True)
    return good


def print_table(only: str) -> bool:
    """Print the table of the rows whose name contains a text, and return whether all are exact or refused."""
    rows = [row for row in make_rows() if only.lower() in row.name.lower()]
    names = ("torch", "transformers", "accelerate", "trl", "lightning")
    versions = [f"{name} {version(name)}" for name in names if is_installed([name])]
    print(", ".join([*versions, f"Python {sys.version.split()[0]}"]))
    print(f"{'':<48}{'stock, window':>24}{'':>9}{'bigbatch, window':>26}")
    head = "".join(f"{name:>11}" for name in ("first", "middle", "last") * 2)
    print(f"{'framework, loss':<43}ranks{head}  averaged over")
    missing = [row for row in rows if not is_installed(row.needs)]
    rows = [row for row in rows if row not in missing]
    good = []
    for row in rows:
        if 1 in row.ranks:
            with quiet():
                whole = row.whole(1)
            good.append(print_row(row, 1, measure(row), whole))
    on_two = [row for row in rows if 2 in row.ranks]
    results = measure_on_two(on_two) if on_two else {}
    for row in on_two:
        with quiet(), as_if(2):
            whole = row.whole(2)
        good.append(print_row(row, 2, results[row.name], whole))
    for row in missing:
        print(f"{row.name:<46}    not installed: {', '.join(row.needs)}")
    print(f"{MODELS_ROUND} float32 logits or norms in the model: up to {FLOAT32:.0e} is rounding, else {FLOAT64:.0e}")
    return all(good)


def main() -> None:
    """Print the table, or run one of the other modes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name contains this text")
    parser.add_argument("--speed", action="store_true", help="time and peak memory instead of the table")
    parser.add_argument("--capped", action="store_true", help="a card with a memory cap, where stock settings die")
    parser.add_argument("--overhead", action="store_true", help="only the time of a step, stock and exact")
    known, others = parser.parse_known_args()
    if known.speed or known.overhead or known.capped:
        import framework_speed

        modes = [f"--{mode}" for mode in ("capped", "overhead") if getattr(known, mode)]
        framework_speed.main([*modes, *others])
        return
    parser.parse_args()
    torch.set_num_threads(1)
    sys.exit(0 if print_table(known.only) else 1)


if __name__ == "__main__":
    main()
