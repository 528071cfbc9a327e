"""The reference is up to date with the docstrings."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_reference_matches_the_docstrings() -> None:
    make = runpy.run_path(str(DOCS / "make_reference.py"))
    written = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    assert written == make["reference"](), "run: python docs/make_reference.py"
