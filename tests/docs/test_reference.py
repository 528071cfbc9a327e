"""The reference is up to date with the docstrings."""

import re
import runpy
from pathlib import Path

import bigbatch.lm
from bigbatch.lm.training.user_callbacks import METHODS

DOCS = Path(__file__).parents[2] / "docs"


def test_reference_matches_the_docstrings() -> None:
    make = runpy.run_path(str(DOCS / "make_reference.py"))
    written = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    assert written == make["reference"](), "run: python docs/make_reference.py"


def test_reference_has_every_name_and_setting_of_trainer() -> None:
    page = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    for name in bigbatch.lm.__all__:
        assert f"\n### `bigbatch.lm.{name}`\n" in page
    _, fields = page.split("### `bigbatch.lm.TrainConfig`")
    fields = fields.partition("\n###")[0]
    names = [info.alias or name for name, info in bigbatch.lm.TrainConfig.model_fields.items()]
    assert all(re.search(rf"^    {name} \(", fields, re.MULTILINE) for name in names)
    assert all(f"#### `Callback.{method}`" in page for method in METHODS)
