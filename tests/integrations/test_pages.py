"""The pages of the integrations run, and print what they show."""

import re
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.forked_processes import LIMIT_S, ForkedProcess
from support.tiers import slow

ROOT = Path(__file__).parents[2]
NUMBER = re.compile(r"\d(\.\d+)?e[+-]\d\d|\d+(\.\d+)?")


def run(blocks: list[str], name: str) -> None:
    """Run blocks of Python one after the other; warnings are errors, as in the tests."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{name}, block {number + 1}", "exec"), names)


def printed_by(page: str, text: str) -> str:
    """Return what the Python of a page prints in a process of its own: on the CPU, memory="2GiB" limits the process."""
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    with ForkedProcess(run, blocks, page) as process:
        printed, complained = process.communicate(LIMIT_S)
    assert process.returncode == 0, complained
    return printed


def without_numbers(text: str) -> list[str]:
    """Return the lines without their numbers, which depend on the machine, and without the white space between."""
    return ["".join(NUMBER.sub("", line).split()) for line in text.strip().splitlines()]


def shows(printed: str, expected: str) -> bool:
    """Return whether lines were printed in one piece, whatever their numbers."""
    lines, wanted = without_numbers(printed), without_numbers(expected)
    return any(lines[at : at + len(wanted)] == wanted for at in range(len(lines)))


@pytest.mark.parametrize("page", ["transformers.md", slow("trl.md")])
def test_python_of_page_prints_its_proof(page: str) -> None:
    text = (ROOT / "docs/how-to" / page).read_text(encoding="utf-8")
    (proof,) = re.findall(r"^```\n(gradient of .*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert shows(printed_by(page, text), proof)


@pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed")
def test_python_of_sentence_transformers_page_runs() -> None:
    text = (ROOT / "docs/how-to/sentence-transformers.md").read_text(encoding="utf-8")
    (refusal,) = re.findall(r"^```\n(gradient_accumulation_steps .*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    printed = printed_by("sentence-transformers.md", text)
    assert "the last batch: 88 pairs in 11 micro-batches" in printed
    assert refusal in printed


def test_other_lines_are_noticed() -> None:
    assert shows("one 1.0e-16\ntwo 3\n", "one 2.2e-17\ntwo  4")
    assert not shows("one 1.0e-16\ntwo 3\n", "one 1.0e-16\nthree 3")
