"""The pages of the documentation as files of the repository: their code blocks and command lines.

pages() → paths; blocks(page) → code blocks; commands(page) → lines that a reader types
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$", re.MULTILINE)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PROGRAMS = ("bigbatch", "torchrun", "pip", "make", "python", ".venv/bin/python")
"""Programs whose command lines are checked."""
STARTS = re.compile(rf"({'|'.join(map(re.escape, PROGRAMS))}) \S")
FOREIGN = ("llama.cpp/", "python llama.cpp/")
"""Command lines of other projects, which nothing here can check."""


OWN_TEST = {
    "docs/how-to/embedding.md": "tests/docs/test_objective_pages.py",
    "docs/how-to/export.md": "tests/docs/test_export_page.py",
    "docs/how-to/lora.md": "tests/docs/test_lora_page.py",
    "docs/how-to/python-api.md": "tests/docs/test_python_api_page.py",
    "docs/how-to/reward.md": "tests/docs/test_objective_pages.py",
    "docs/how-to/sentence-transformers.md": "tests/integrations/test_pages.py",
    "docs/how-to/transformers.md": "tests/integrations/test_pages.py",
    "docs/how-to/trl.md": "tests/integrations/test_pages.py",
}
"""Pages whose Python needs files, or prints what the page shows, and the test that runs it."""


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str

    @property
    def is_console(self) -> bool:
        """Return whether a reader types its lines: bash, or a block without language that begins with a command."""
        return self.language == "bash" or (not self.language and is_command(self.text.partition("\n")[0]))


def pages() -> list[str]:
    """Return every page of the site that is a file of the repository, and those that the site generates from a file."""
    found = [*ROOT.glob("*.md"), ROOT / "benchmarks/README.md", *(ROOT / "docs").rglob("*.md")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def text_of(page: str) -> str:
    """Return the text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str | None = None) -> list[Block]:
    """Return the code blocks of a page, or those in one language."""
    found = [Block(page, *block) for block in BLOCK.findall(text_of(page))]
    return [block for block in found if language is None or block.language == language]


def spans(page: str) -> list[str]:
    """Return the code spans of the prose of a page."""
    return CODE_SPAN.findall(BLOCK.sub("", text_of(page)).replace("\\|", "|"))


def words_of(line: str) -> list[str]:
    """Return the words of a command line: without prompt, variables, comment, redirection and what follows a pipe."""
    lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|>&;")
    lexer.wordchars += "{}[]…:,=@%"
    lexer.whitespace_split = True
    words = list(lexer)
    ends = [at for at, word in enumerate(words) if word in ("|", ">", "&", ";", "&&", ">>", "||")]
    words = words[: ends[0]] if ends else words
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def is_command(line: str) -> bool:
    """Return whether a line is a command line of a program that is checked, or of another project."""
    line = re.sub(r"^(\$ )?([A-Z_]+=\S+ )*", "", line)
    return line.startswith(FOREIGN) or line in PROGRAMS or re.match(STARTS, line) is not None


def commands(page: str) -> list[str]:
    """Return the command lines in the blocks of a page, those of checked programs only."""
    found = []
    for block in blocks(page):
        if block.is_console:
            found += [line for line in block.text.splitlines() if is_command(line) and not line.startswith(FOREIGN)]
    return found


def pages_that_run_alone() -> list[str]:
    """Return the pages with Python that needs nothing; translations have the code of the English pages."""
    return [page for page in pages() if blocks(page, "python") and page not in OWN_TEST and not page.endswith(".zh.md")]
