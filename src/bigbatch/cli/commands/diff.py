"""``bigbatch diff``: the first update, and the parameter, at which two reproducible runs differ."""

from collections.abc import Iterator

from bigbatch.cli.console import make_console
from bigbatch.cli.options import DiffOptions
from bigbatch.cli.run_lookup import check_run
from bigbatch.errors import InputError
from bigbatch.lm.runs.fingerprints import Difference, Fingerprints, first_difference, read_fingerprints
from bigbatch.lm.text import plural

EQUAL = 0
DIFFERENT = 1
MOST_NAMES = 5


def run(options: DiffOptions) -> int:
    """Print the first difference; return 0 only if all updates that both runs have are equal."""
    if len(options.runs) != 2:
        raise InputError(f"diff compares two runs, not {len(options.runs)}: pass two run directories.")
    for folder in options.runs:
        check_run(folder)
    one, other = map(read_fingerprints, options.runs)
    difference = first_difference(one, other)
    console = make_console()
    for line in _describe(one, other, difference):
        console.print_unbroken(line)
    return EQUAL if difference is None else DIFFERENT


def _describe(one: Fingerprints, other: Fingerprints, difference: Difference | None) -> Iterator[str]:
    common = len(one.parameters.keys() & other.parameters.keys())
    if difference is None:
        more = abs(len(one.parameters) - len(other.parameters))
        remark = f"; {plural(more, 'update')} of one run only" if more else ""
        yield f"equal in {plural(common, 'update')} and {plural(len(one.names), 'parameter')}{remark}"
        return
    what = "gradients" if difference.is_gradient else "parameters, after equal gradients,"
    yield (
        f"update {difference.step} is the first that differs: the {what} of {len(difference.names)} of "
        f"{plural(len(one.names), 'parameter')}"
    )
    yield from (f"  {name}" for name in difference.names[:MOST_NAMES])
    if len(difference.names) > MOST_NAMES:
        yield f"  and {len(difference.names) - MOST_NAMES} more"
    for name in sorted(one.setting.keys() | other.setting.keys()):
        a, b = one.setting.get(name), other.setting.get(name)
        if a != b:
            yield f"the runs have another {name}: {a} and {b}"
