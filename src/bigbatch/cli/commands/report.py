"""``bigbatch report``: one self-contained HTML page about a run, or about several runs side by side."""

from bigbatch.cli.options import ReportOptions
from bigbatch.cli.run_lookup import check_run


def run(options: ReportOptions) -> int:
    """Write the page; with ``--watch``, rewrite it until all runs have ended or on Ctrl-C."""
    for folder in options.runs:
        check_run(folder)
    from bigbatch.cli.report_writer import write_report  # numpy and pyarrow, which a misspelled name need not wait for

    return write_report(options)
