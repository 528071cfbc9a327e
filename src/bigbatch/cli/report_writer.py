"""Write the page of ``bigbatch report``, once or whenever its runs make progress."""

import time
from pathlib import Path

from bigbatch.cli.console import OutputConsole, make_console
from bigbatch.cli.exit_codes import DONE
from bigbatch.cli.next_steps import guidance
from bigbatch.cli.options import ReportOptions
from bigbatch.lm.report.output_file import check_place, write_page
from bigbatch.lm.report.page import page
from bigbatch.lm.report.run_reader import Run, is_running, read_run, size_of_metrics
from bigbatch.lm.report.sections import STATES
from bigbatch.lm.runs.file_names import COMPARISON, REPORT
from bigbatch.memory.limit import describe_bytes

POLL_INTERVAL_S = 1.0
WAIT_PER_WRITE = 10  # --watch waits at least this many times as long as it took to write the page


def write_report(options: ReportOptions) -> int:
    """Write the page; with ``--watch``, rewrite it until all runs have ended or on Ctrl-C."""
    folders = options.runs
    target = options.out or folders[0] / (REPORT if len(folders) == 1 else COMPARISON)
    runs = [read_run(folder) for folder in folders]
    check_place(target)
    console = make_console()
    watched = options.watch and _any_running(runs)
    num_bytes = write_page(target, _page(runs, refresh=watched))
    console.print(f"{target}: {describe_bytes(num_bytes)}, {_states(runs)}")
    if watched:
        runs = _watch(folders, target, console)
        console.print(f"{target}: {_states(runs)}")
    return DONE


def _watch(folders: tuple[Path, ...], target: Path, console: OutputConsole) -> list[Run]:
    """Rewrite the page whenever the metrics grow, and at the end once more without automatic reload."""
    try:
        console.print("rewriting the page after every update; press Ctrl-C to stop")
        shown = [-1 for _ in folders]
        pause_s = POLL_INTERVAL_S
        while any(is_running(folder) for folder in folders):
            time.sleep(pause_s)
            now = [size_of_metrics(folder) for folder in folders]
            if now == shown:
                continue
            shown = now
            started_s = time.perf_counter()
            runs = [read_run(folder) for folder in folders]
            write_page(target, _page(runs, refresh=_any_running(runs)))
            pause_s = max(POLL_INTERVAL_S, WAIT_PER_WRITE * (time.perf_counter() - started_s))
    except KeyboardInterrupt:
        print()  # the terminal has just written ^C
    runs = [read_run(folder) for folder in folders]
    write_page(target, _page(runs))
    return runs


def _page(runs: list[Run], *, refresh: bool = False) -> str:
    return page(runs, guidance=[guidance(run) for run in runs], refresh=refresh)


def _any_running(runs: list[Run]) -> bool:
    return any(run.state == "running" for run in runs)


def _states(runs: list[Run]) -> str:
    if len(runs) == 1:
        return f"{STATES[runs[0].state]} after {runs[0].steps:,} updates"
    return ", ".join(f"{run.name} {STATES[run.state]}" for run in runs)
