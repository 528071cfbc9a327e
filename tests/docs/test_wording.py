"""The source, the README and the documentation use plain technical English and no retired name."""

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Phrases that readers stumbled over; a line may break within one.
PHRASES = (
    "anew",
    "alike",
    "for want of",
    "by now",
    "whoever",
    "whomever",
    "is not there",
    "are not there",
    "is there for",
    "gone on with",
    "goes on with",
    "told apart",
    "tell one another",
    "tells one another",
    "stand by",
    "as if it never",
    "no more than that",
)
LINE_BREAK = r"\s+(?:#\s*)?"
PHRASE = re.compile(rf"(?<!\w)(?:{'|'.join(PHRASES).replace(' ', LINE_BREAK)})(?!\w)", re.IGNORECASE)

# Classes that were renamed to the term of the field.
CLASSES = """
Arrangement Ballot Conference Course Desk Evidence Feed Gallery Journal Keeper Kept Ledger Lever Listener Listeners
NoiseMeter Opening Ours Prepared Race ReadDirectory Recorder Recovery Rehearsal Remembered Room Saved Say
ScalarListener Spread Stage Survey Tally Timed Transaction Tried UntrustedError Wishes
"""
RETIRED_CLASSES = frozenset(CLASSES.split())
# Modules that were moved or renamed, as paths below src/bigbatch.
MODULES = """
accumulate accumulator engine_settings feed graphs grouping launch limit noise objective opening optimizer_state
packing randomness recover report scaling_rules sharded split state sync transaction trial update vote window
memory/choice memory/prediction memory/probe memory/search memory/step memory/timing memory/tracker
cli/advise cli/bench cli/checkpoints cli/generate cli/pace cli/parse cli/plan cli/ranks cli/report cli/resume
cli/runs cli/sentences cli/train cli/verify
lm/arrangement lm/attention lm/batch_schedule lm/branching lm/chunked lm/continuation lm/course lm/dataset lm/desk
lm/documents lm/embedded lm/encoding lm/evaluation lm/fields lm/forecast lm/head lm/holdout lm/hub lm/keeper
lm/layers lm/limits lm/lock lm/loss lm/meeting lm/optimization lm/order lm/packed lm/padding lm/prepare lm/ranks
lm/records lm/remembered lm/rescaling lm/resumption lm/rundir lm/scalars lm/smaller lm/snapshot lm/sources
lm/stdlib lm/survey lm/target lm/telling lm/tokenizer lm/trainer lm/tuning
lm/bench/names lm/bench/ours lm/bench/peers lm/bench/race lm/bench/stage lm/bench/with_accelerate
lm/bench/with_lightning lm/bench/with_trainer
lm/checkpoint/conference lm/checkpoint/files lm/checkpoint/loading lm/checkpoint/pieces lm/checkpoint/reading
lm/checkpoint/sharded lm/checkpoint/shelf lm/checkpoint/tensors lm/checkpoint/trust lm/checkpoint/values
lm/checkpoint/writing
lm/report/blocks lm/report/charts lm/report/columns lm/report/drawing lm/report/figures lm/report/journal
lm/report/markup lm/report/proof lm/report/reading lm/report/reduction lm/report/scales lm/report/writing
"""
RETIRED_MODULES = MODULES.split()
CODE_SPAN = re.compile(r"`+([^`\n]+)`+")


def _module_pattern() -> re.Pattern[str]:
    """Match ``lm/desk``, ``lm.desk`` and ``bigbatch.lm.desk``; modules of the root only behind ``bigbatch``."""
    below = "|".join(name.replace("/", "[./]") for name in RETIRED_MODULES if "/" in name)
    root = "|".join(name for name in RETIRED_MODULES if "/" not in name)
    return re.compile(rf"(?<![\w./])(?:(?:src/)?bigbatch[./](?:{root}|{below})|{below})(?!\w)")


MODULE = _module_pattern()


def _files() -> list[Path]:
    pages = [path for path in (ROOT / "docs").rglob("*.md") if path.name != "decisions.md"]
    return [*sorted((ROOT / "src").rglob("*.py")), *sorted(pages), ROOT / "README.md"]


def _retired_classes(text: str, *, is_python: bool) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of each retired class: Python names, and code spans of prose and docstrings."""
    for number, line in enumerate(text.splitlines(), start=1):
        for span in CODE_SPAN.findall(line):
            yield from ((number, word) for word in re.findall(r"\w+", span) if word in RETIRED_CLASSES)
    if is_python:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME and token.string in RETIRED_CLASSES:
                yield token.start[0], token.string


def hits(path: Path) -> list[str]:
    """Return ``file:line: text`` of every banned phrase and retired name in a file."""
    text = path.read_text(encoding="utf-8")
    found = [
        (text.count("\n", 0, match.start()) + 1, " ".join(match.group().split()))
        for pattern in (PHRASE, MODULE)
        for match in pattern.finditer(text)
    ]
    found += _retired_classes(text, is_python=path.suffix == ".py")
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    return [f"{name}:{line}: {what}" for line, what in sorted(set(found))]


def test_source_and_docs_use_plain_words() -> None:
    found = [hit for path in _files() for hit in hits(path)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("page.md", "one\nstarted Anew\n", ["page.md:2: Anew"]),
        ("page.md", "a file that is not\nthere\n", ["page.md:1: is not there"]),
        ("module.py", "# as if it\n# never was\n", ["module.py:1: as if it # never"]),
        ("page.md", "`Keeper` saves\n", ["page.md:1: Keeper"]),
        ("module.py", "class Keeper:\n    pass\n", ["module.py:1: Keeper"]),
        ("page.md", "lm/desk and lm.keeper\n", ["page.md:1: lm.keeper", "page.md:1: lm/desk"]),
        ("page.md", "src/bigbatch/recover.py\n", ["page.md:1: src/bigbatch/recover"]),
        ("page.md", "Opening a window; lm/runs/lock.py; bigbatch.plan; `test_begins_anew`\n", []),
    ],
)
def test_wording_hits_name_file_and_line(tmp_path: Path, name: str, text: str, expected: list[str]) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert hits(path) == expected
