"""Every command line on every page is read by the program that it names, flags and values included.

Pages with tests of their own also run theirs; here nothing runs, so that a page without such a test is checked too.
"""

import ast
import functools
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from torch.distributed.run import get_args_parser

from bigbatch.cli import COMMANDS, arguments
from bigbatch.cli.command_specs import COMMAND_SPECS
from bigbatch.errors import InputError
from support.doc_pages import FOREIGN, PROGRAMS, ROOT, blocks, commands, is_command, pages, spans, words_of

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGETS = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
HISTORY = ("CHANGELOG.md", "docs/explanation/decisions.md")  # may name flags of earlier versions
OTHER_TOOLS = {"--cpus": "docker"}
INCOMPLETE = ("needs a value", " is missing: pass ", "needs --", "needs a ")  # of a part of a command line, in prose
CONTEXTS = [  # other flags that a flag in prose may need
    line.split()
    for line in (
        "",
        "--objective dpo",
        "--objective reward",
        "--objective embedding",
        "--lora-rank 8",
        "--optimizer sgd --lr 1",
        "--optimizer muon",
        "--scale-from 64",
        "--validation-data web=w code=c",
    )
]
PAGES_WITH_COMMANDS = [page for page in pages() if commands(page)]


def check_bigbatch(words: list[str]) -> None:
    """Raise if ``bigbatch WORDS`` is not a valid command line. A file of settings that no block shows is empty."""
    if "--config" in words:
        at = words.index("--config") + 1
        words[at] = f"{words[at]}.toml" if words[at] == "FILE" else words[at]
        Path(words[at]).touch()
    if words in (["--help"], ["--version"], ["COMMAND", "--help"]):
        return
    command, *rest = words
    assert command in COMMANDS, f"there is no command {command}"
    if rest == ["--help"]:
        return
    arguments.parse(command, rest)


def check_python(words: list[str]) -> None:
    """Raise if a script does not exist, or does not have one of the flags."""
    if words[:2] == ["-m", "bigbatch"]:
        return check_bigbatch(words[2:])
    if words[:2] == ["-m", "pytest"]:
        paths = [word for word in words[2:] if word.startswith("tests/")]
        assert paths, "no path of a test"
        assert all((ROOT / path).exists() for path in paths), paths
        return None
    script, *rest = words
    (path,) = [ROOT / script] if "/" in script else (ROOT / "examples").rglob(script)
    assert path.is_file(), f"{script} does not exist"
    flags = [word.partition("=")[0] for word in rest[: rest.index("--") if "--" in rest else None] if word[:2] == "--"]
    texts = {text for other in path.parent.glob("*.py") for text in texts_of(other)}
    assert [flag for flag in flags if not {flag, flag[2:]} & texts] == []
    return None


def check_torchrun(words: list[str]) -> None:
    """Raise if torchrun, or what it starts, does not accept the words."""
    parsed = get_args_parser().parse_args([word for word in words if word != "…"])
    started = ["-m"] * parsed.module + [parsed.training_script, *parsed.training_script_args]
    check_python(started)


def check_pip(words: list[str]) -> None:
    """Raise if an extra of bigbatch does not exist, or a requirement is malformed."""
    assert words[0] == "install"
    rest = words[1:]
    if "-c" in rest:
        at = rest.index("-c")
        assert (ROOT / rest[at + 1]).is_file()
        del rest[at : at + 2]
    for word in rest:
        if word == "-e":
            continue
        requirement = Requirement(word.replace(".", "bigbatch", 1) if word.startswith(".[") else word)
        if requirement.name == "bigbatch":
            assert requirement.extras <= PROJECT["optional-dependencies"].keys(), word


def check_make(words: list[str]) -> None:
    """Raise if the Makefile does not have the target."""
    assert words[0] in TARGETS, f"the Makefile has no target {words[0]}"
    assert all(word.startswith("ARGS=") for word in words[1:]), words


CHECKS = {
    "bigbatch": check_bigbatch,
    "torchrun": check_torchrun,
    "pip": check_pip,
    "make": check_make,
    "python": check_python,
    ".venv/bin/python": check_python,
}


def check(line: str) -> None:
    """Raise if the program of a command line would not accept it."""
    program, *words = words_of(line)
    try:
        CHECKS[program](words)
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{line}\n{error}") from error


def test_every_program_has_a_check() -> None:
    assert CHECKS.keys() == set(PROGRAMS)


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS)
def test_command_lines_of_a_page_are_read(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for language in ("toml", "yaml"):  # the files of settings that the page shows, named in their first line
        for block in blocks(page, language):
            Path(block.text.splitlines()[0].removeprefix("# ")).write_text(block.text, encoding="utf-8")
    for name in ("runs/alone", "runs/mine"):
        Path(name).mkdir(parents=True)
    for line in commands(page):
        check(line)


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS)
def test_blocks_of_commands_hold_nothing_else(page: str) -> None:
    for block in blocks(page):
        if block.language == "bash":
            subprocess.run(["bash", "-nc", block.text], check=True)
        elif block.is_console:
            lines = block.text.splitlines()
            if lines[0].startswith("$ "):
                continue  # what it printed follows
            unknown = [
                line for line in lines if line and not is_command(line) and not line.startswith(("^C", *FOREIGN))
            ]
            assert unknown == [], page


@pytest.mark.parametrize("page", [page for page in pages() if page not in HISTORY])
def test_command_lines_in_prose_are_read(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for span in spans(page):
        words = span.split(" ")
        if words[0] in PROGRAMS and len(words) > 1 and not (words[0] == "bigbatch" and len(words) == 2):
            try:
                check(span)
            except AssertionError as error:
                if not any(part in str(error) for part in INCOMPLETE):
                    raise
        elif words[0] == "bigbatch" and len(words) == 2:
            assert words[1] in {*COMMANDS, "--help", "COMMAND"}, span


def is_accepted(span: str) -> bool:
    """Return whether a command accepts flags with these values, or torchrun or a script of the repository has them."""
    words = shlex.split(span)
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    for command, spec in COMMAND_SPECS.items():
        if not {flag[2:].replace("-", "_") for flag in flags} <= spec.fields().keys():
            continue
        if "$" in span or len(words) == 1:
            return True
        for context in CONTEXTS if command == "train" else CONTEXTS[:1]:
            try:
                arguments.parse(command, [*(["RUN"] if spec.positionals else []), *words, *context])
            except InputError as error:
                if any(part in str(error) for part in INCOMPLETE):
                    return True
            else:
                return True
    return all(flag in OTHER_TOOLS or flag in flags_of_scripts() for flag in flags)


@functools.cache
def flags_of_scripts() -> set[str]:
    """Return the flags of torchrun and the strings in the scripts of this repository."""
    scripts = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / ".ci").glob("*.py"), *(ROOT / "examples").rglob("*.py")]
    options = {option for action in get_args_parser()._actions for option in action.option_strings}
    return options.union(*map(texts_of, scripts))


@functools.cache
def texts_of(script: Path) -> frozenset[str]:
    """Return the strings in a script."""
    nodes = ast.walk(ast.parse(script.read_text(encoding="utf-8")))
    return frozenset(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


@pytest.mark.parametrize("page", [page for page in pages() if page not in (*HISTORY, "docs/reference/cli.md")])
def test_flags_in_prose_exist(page: str) -> None:
    found = [span.replace("=…", "").replace(" …", "") for span in spans(page) if re.match(r"--[a-z]", span)]
    ways = [f"{span.split(' ')[0]} {way}" for span in found if "|" in span for way in span.split(" ")[1].split("|")]
    assert [span for span in [*ways, *found] if "|" not in span and not is_accepted(span)] == []


@pytest.mark.parametrize(
    "line",
    [
        "bigbatch trian",
        "bigbatch train --no-such-flag 3",
        "bigbatch train --steps three",
        "bigbatch generate",
        "torchrun --no-such-flag 2 -m bigbatch train",
        "torchrun --nproc-per-node 2 -m bigbatch train --stesp 2",
        "pip install 'bigbatch[no-such-extra]'",
        "make no-such-target",
        "python benchmarks/no_such_script.py",
        "python benchmarks/peers.py --no-such-flag",
        "OMP_NUM_THREADS=1 bigbatch train --lr fast > out.txt",
    ],
)
def test_wrong_lines_are_noticed(line: str) -> None:
    with pytest.raises(AssertionError):
        check(line)
