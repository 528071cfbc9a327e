"""Raise KeyboardInterrupt at every line of an update, and count what is left of the state.

    python benchmarks/interrupts.py [--every 1]

A tracer interrupts `Engine.step` and `Window.step` at every line that Python runs in them, those of torch included, for
SGD with momentum and AdamW (foreach, fused, loop), with a scheduler and clipping. "before" and "after" count the calls
after which parameters, optimizer state, learning rate and schedule are exactly those before or after the update, and
the next update is right; "torn" those that raised TornUpdateError, as every later update then does; "silent" the
others. Exits with 1 if there is one. `tests/accumulation/test_interrupts.py` tries some of the lines. A few minutes.
"""

import argparse
import platform
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch

from bigbatch.errors import TornUpdateError
from support.interrupted_updates import CALLS, OPTIMIZERS, interrupt, num_lines


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="interrupt one line of so many")
    every = parser.parse_args().every
    torch.set_num_threads(1)
    print(f"$ python benchmarks/interrupts.py {' '.join(sys.argv[1:])}".rstrip())
    print(f"torch {torch.__version__}, Python {platform.python_version()}, CPU, 1 thread")
    print(f"{'call':<13}{'optimizer':<15}{'lines':>7}{'tried':>7}{'before':>8}{'after':>7}{'torn':>6}{'silent':>8}")
    silent = []
    for call in CALLS:
        for optimizer in OPTIMIZERS:
            lines = num_lines(call, optimizer)
            counts: Counter[str] = Counter()
            for line in range(1, lines + 1, every):
                outcome = interrupt(call, optimizer, line)
                torn = isinstance(outcome.error, TornUpdateError)
                counts["silent" if outcome.is_silent else "torn" if torn else outcome.state] += 1
                if outcome.is_silent:
                    silent.append(f"{call}, {optimizer}, line {line}: {outcome}")
            columns = f"{counts['before']:>8}{counts['after']:>7}{counts['torn']:>6}{counts['silent']:>8}"
            print(f"{call + '.step':<13}{optimizer:<15}{lines:>7}{counts.total():>7}{columns}", flush=True)
    for sentence in silent:
        print(f"SILENT: {sentence}")
    return 1 if silent else 0


if __name__ == "__main__":
    sys.exit(main())
