"""The frameworks' own tests that touch accumulation, without and with the integration switched on.

    python benchmarks/framework_tests.py --transformers DIR --accelerate DIR --lightning DIR

DIR is a source tree of the framework, of about the installed version; its tests run with the installed package. Each
test runs twice in the same environment, the second time with the plugin `switch_integrations.py`, and is counted as

- same: it has the same result, passed or failed; "with a window" is how many of them used the integration,
- expected: it asserts a gradient that is not that of the whole batch; listed in EXPECTED with the reason,
- refused: `exact` refuses its Trainer, and the test trains as it is,
- differs: anything else, with the first line of the error.

Needs pytest, parameterized, pytest-rerunfailures and sentencepiece. The script exits with 1 if a test differs, or
a file of tests cannot be imported.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "src"
LIMIT_S = 1800
SYNC_FILES = ("test_grad_sync.py", "test_sync_parts.py", "test_scheduler.py", "test_optimizer.py")

# accelerate's gradient-sync script runs its checks in one function; these are its parts, each as one test.
SYNC_TESTS = """
import pytest
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.test_utils.scripts import test_sync as sync

def noop(): sync.test_noop_sync(Accelerator())
def distributed(): sync.test_distributed_sync(Accelerator())
def several_forwards(): sync.test_distributed_sync_multiple_fwd(Accelerator())

def run(function, processes):
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    debug_launcher(function, num_processes=processes)

def test_dataloader_break_1_rank(): run(sync.test_dataloader_break, 1)
def test_dataloader_break_2_ranks(): run(sync.test_dataloader_break, 2)
def test_noop_sync_1_rank(): run(noop, 1)
def test_distributed_sync_2_ranks(): run(distributed, 2)
def test_distributed_sync_multiple_fwd_2_ranks(): run(several_forwards, 2)

@pytest.mark.parametrize("sync_each_batch", [False, True])
@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradient_accumulation(ranks, split_batches, sync_each_batch):
    run(lambda: sync.test_gradient_accumulation(split_batches, False, sync_each_batch), ranks)

@pytest.mark.parametrize("sync_each_batch", [False, True])
@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradient_accumulation_with_opt_and_scheduler(ranks, split_batches, sync_each_batch):
    run(lambda: sync.test_gradient_accumulation_with_opt_and_scheduler(split_batches, False, sync_each_batch), ranks)
"""

# With items, by pattern of the name: why a result changes.
_HALVED = "its last window has one of two micro-batches, and it asserts half of the gradient"
_UNDIVIDED = "it compares .grad in mid-window, where the sum is not divided yet"
_NOT_ZEROED = "it adds up windows without zero_grad(), which backward(items=) refuses"
_SUM_OF_MEANS = "it asserts the sum of the means of two micro-batches, and the gradient of their window is the mean"
EXPECTED = {
    r"test_gradient_accumulation_with_opt_and_scheduler\[2-.*-False\]": _HALVED,
    r"test_gradient_accumulation.*-True\]|test_noop_sync.*": _UNDIVIDED,
    r"test_gradient_accumulation\[.*-False\]|test_distributed_sync_multiple_fwd.*": _NOT_ZEROED,
    r"test_distributed_sync_2_ranks": _SUM_OF_MEANS,
    r"test_gradient_sync_cpu_(noop|multi)": "it runs all of those",
}
NOT_COLLECTED = "not collected"


@dataclass(frozen=True)
class Suite:
    """The tests of one framework.

    Args:
        framework: Name of its package.
        integration: Name of the switch in the plugin.
        folder: Below the source tree; pytest runs in it.
        paths: Files and folders below it that exist in some version.
        keywords: Expression of ``pytest -k``.
        flags: Further arguments.
    """

    framework: str
    integration: str
    folder: str
    paths: tuple[str, ...]
    keywords: str = ""
    flags: tuple[str, ...] = ()


SUITES = (
    Suite(
        "transformers",
        "transformers",
        ".",
        tuple(
            f"tests/trainer/test_trainer{name}.py"
            for name in ("", "_seq2seq", "_callback", "_checkpointing", "_optimizers", "_data", "_accelerator")
        ),
        "not Hub and not hub",
        ("--older-tests",),
    ),
    Suite("accelerate", "accelerate", "tests", SYNC_FILES),
    Suite("accelerate", "accelerate-items", "tests", SYNC_FILES),
    Suite(
        "lightning",
        "lightning",
        "tests",
        tuple(
            f"tests_pytorch/{name}"
            for name in (
                "callbacks/test_gradient_accumulation_scheduler.py",
                "loops/optimization",
                "loops/test_loops.py",
                "loops/test_training_epoch_loop.py",
                "trainer/optimization",
                "trainer/properties/test_estimated_stepping_batches.py",
                "trainer/flags/test_val_check_interval.py",
                "trainer/test_trainer.py",
                "core/test_lightning_optimizer.py",
            )
        ),
        "accum or optim or step or grad or loop",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """How one test ended.

    Args:
        result: "passed", "failed" or "skipped"; or "not collected" for a file of tests that could not be imported.
        error: First line of the error.
    """

    result: str
    error: str = ""


def run_tests(suite: Suite, tree: Path, *, log: Path | None) -> dict[str, Outcome]:
    """Run a suite and return the outcome of every test by name; with a log, the integration is on."""
    folder = tree / suite.folder
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        parts = Path(scratch) / "test_sync_parts.py"
        parts.write_text(SYNC_TESTS, encoding="utf-8")
        paths = [str(parts) if path == parts.name else path for path in suite.paths]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "switch_integrations"]
        command += [
            "--continue-on-collection-errors",
            *suite.flags,
            f"--junitxml={report}",
            "-o",
            "junit_family=xunit1",
        ]
        command += ["-k", suite.keywords] if suite.keywords else []
        command += [] if log is None else ["--integration", suite.integration, "--integration-log", str(log)]
        command += [path for path in paths if (folder / path).exists()]
        places = [str(HERE), str(SOURCE), str(folder), os.environ.get("PYTHONPATH", "")]
        settings = {
            "PYTHONPATH": os.pathsep.join(places),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | settings,
            timeout=LIMIT_S,
            check=False,
            capture_output=True,
            text=True,
        )
        if not report.exists():
            sys.exit(f"pytest of {suite.framework} exited with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr}")
        return read_report(report)


def read_report(report: Path) -> dict[str, Outcome]:
    """Return the outcomes in a JUnit file by the file, class and name of each test."""
    found = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '').rsplit('.', 2)[-1]}.{case.get('name')}"
        failure = next((child for child in case if child.tag in ("failure", "error")), None)
        if failure is not None:
            lines = failure.get("message", "").strip().splitlines()
            is_collected = lines[:1] != ["collection failure"]
            found[name] = Outcome("failed" if is_collected else NOT_COLLECTED, lines[0] if lines else "")
        else:
            found[name] = Outcome("skipped" if case.find("skipped") is not None else "passed")
    return found


def read_log(log: Path) -> tuple[set[str], dict[str, str]]:
    """Return the names of the tests with a window, and those with a refusal and its sentence."""
    used, refused = set(), {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        test, event, sentence = line.split("\t")
        name = test.rsplit("::", 1)[-1]
        if event == "on":
            used.add(name)
        elif event == "refused":
            refused[name] = sentence
    return used, refused


def compare(suite: Suite, tree: Path) -> int:
    """Run a suite twice, print the counts and every difference, and return the number of differences."""
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log.tsv"
        stock = run_tests(suite, tree, log=None)
        ours = run_tests(suite, tree, log=log)
        used, refused = read_log(log)
    counts: Counter[str] = Counter()
    differing: list[str] = []
    reasons: dict[str, list[str]] = {}
    for name in sorted({*stock, *ours}):
        before, after = stock.get(name, Outcome("missing")), ours.get(name, Outcome("missing"))
        short = name.rsplit(".", 1)[-1]
        if NOT_COLLECTED in (before.result, after.result):
            counts["differs"] += 1
            differing.append(f"differs: {name} could not be imported: use the tests of about the installed version")
            continue
        why = next((why for pattern, why in EXPECTED.items() if re.fullmatch(pattern, short)), None)
        if before.result == after.result:
            counts["same"] += 1
            counts[f"same {after.result}"] += 1
            counts["with a window"] += short in used and after.result == "passed"
            if short in refused:
                counts["refused"] += 1
                reasons.setdefault(f"refused: {refused[short]}", []).append(short)
        elif suite.integration == "accelerate-items" and why is not None:
            counts["expected"] += 1
            reasons.setdefault(f"expected: {why}", []).append(short)
        else:
            counts["differs"] += 1
            differing.append(
                f"differs: {name}: {before.result} → {after.result}: {after.error or refused.get(short, '')}"
            )
    print(f"\n{suite.integration} {version(suite.framework)}, {len(stock)} tests")
    print(f"  same {counts['same']} ({counts['same passed']} passed, {counts['same failed']} failed, ", end="")
    print(f"{counts['same skipped']} skipped on both sides), {counts['with a window']} of the passed with a window")
    print(f"  expected {counts['expected']}, refused {counts['refused']}, differs {counts['differs']}")
    for reason, names in sorted(reasons.items()):
        print(
            textwrap.fill(
                f"{reason} ({len(names)}: {', '.join(names)})", 118, initial_indent="    ", subsequent_indent="      "
            )
        )
    for line in differing:
        print(textwrap.indent(" ".join(line.split())[:600], "    "))
    print(flush=True, end="")
    return counts["differs"]


def main(words: Sequence[str] | None = None) -> None:
    """Compare the suites whose trees are given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for framework in dict.fromkeys(suite.framework for suite in SUITES):
        parser.add_argument(f"--{framework}", type=Path, metavar="DIR", help="source tree")
    trees = vars(parser.parse_args(words))
    given = [suite for suite in SUITES if trees[suite.framework] is not None]
    if not given:
        parser.error("give the source tree of a framework, such as --accelerate DIR")
    print(f"torch {version('torch')}, Python {sys.version.split()[0]}")
    differing = sum(compare(suite, trees[suite.framework].resolve()) for suite in given)
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
