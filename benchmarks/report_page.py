"""Cost of the page of a long run: bytes, and CPU seconds, by the number of updates.

    python benchmarks/report_page.py [--updates 100000]

The run directories are synthetic: every chart has data, with skipped updates, a retry, spikes and resumes. Seconds
are CPU time of this process, reading and writing included; the peak is its resident set, interpreter included. The
last column is the number of updates per point of a chart.
"""

import argparse
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from bigbatch.lm.report.downsampling import MOST_POINTS  # noqa: E402
from bigbatch.lm.report.output_file import write_page  # noqa: E402
from bigbatch.lm.report.page import page  # noqa: E402
from bigbatch.lm.report.run_reader import read_run  # noqa: E402
from support.run_directories import make_rich_run  # noqa: E402


def measure(run: Path) -> tuple[int, float]:
    """Return the bytes of a run's page, and the seconds to read, draw and write it."""
    started_s = time.process_time()
    num_bytes = write_page(run / "report.html", page([read_run(run)]))
    return num_bytes, time.process_time() - started_s


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=100_000, help="of the longest run (default: %(default)s)")
    longest = parser.parse_args().updates
    print(f"Python {platform.python_version()}, {platform.machine()}, one core\n")
    print(f"{'updates':>9} {'metrics':>10} {'page':>9} {'CPU':>8} {'peak':>9} {'updates a point':>16}")
    with tempfile.TemporaryDirectory() as folder:
        number = 100
        while number <= longest:
            run = make_rich_run(Path(folder) / str(number), number)
            megabytes = (run / "metrics.jsonl").stat().st_size / 1e6
            num_bytes, seconds = measure(run)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            each = max(1, -(-number // MOST_POINTS))
            print(
                f"{number:9,} {megabytes:7.1f} MB {num_bytes / 1e6:6.2f} MB {seconds:6.2f} s {peak:5.0f} MiB {each:16,}"
            )
            number *= 10


if __name__ == "__main__":
    main()
