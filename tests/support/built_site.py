"""The documentation site, built once for all tests and processes of a test run.

built_site(tmp_path_factory) → folder of HTML pages
read_page(file) → where its links lead, what it loads, its anchors
"""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
MISSING = 'mkdocs is not installed: pip install "bigbatch[docs]" to build the site'


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the site into a folder as ``make docs`` does; every warning is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def built_site(factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the site; the first process that asks for it builds it."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, log = shared / "site", shared / "site.log"
    with FileLock(shared / "site.lock"):
        if not log.exists():
            built = build(folder)
            log.write_text(built.stdout + built.stderr if built.returncode else "", encoding="utf-8")
    assert not log.read_text(encoding="utf-8"), log.read_text(encoding="utf-8")
    return folder


class SitePage(HTMLParser):
    """What an HTML page links to, loads and defines."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.language = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "html":
            self.language = values["lang"]
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and values.get("rel") not in ("prev", "next", "canonical"):
            self.loaded.append(values["href"])
        self.loaded += [values[name] for name in ("src", "srcset", "data", "poster") if name in values]
