"""The reference is up to date with the docstrings."""

import inspect
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

import bigbatch.lm
from bigbatch.cli import COMMANDS
from bigbatch.cli.command_specs import COMMAND_SPECS
from bigbatch.lm.training.user_callbacks import METHODS

DOCS = Path(__file__).parents[2] / "docs"


def test_reference_matches_the_docstrings() -> None:
    make = runpy.run_path(str(DOCS / "make_reference.py"))
    for page, text in (("api.md", make["reference"]()), ("cli.md", make["command_line"]())):
        written = (DOCS / "reference" / page).read_text(encoding="utf-8")
        assert written == text, "run: python docs/make_reference.py"


def test_reference_has_every_name_and_setting_of_trainer() -> None:
    page = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    for name in bigbatch.lm.__all__:
        assert f"\n### `bigbatch.lm.{name}`\n" in page
    _, fields = page.split("### `bigbatch.lm.TrainConfig`")
    fields = fields.partition("\n###")[0]
    names = [info.alias or name for name, info in bigbatch.lm.TrainConfig.model_fields.items()]
    assert all(re.search(rf"^    {name} \(", fields, re.MULTILINE) for name in names)
    assert all(f"#### `Callback.{method}`" in page for method in METHODS)


def test_reference_has_every_command_and_flag() -> None:
    page = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    assert re.findall(r"^## bigbatch (\w+)$", page, re.MULTILINE) == list(COMMAND_SPECS)
    assert COMMANDS.keys() == COMMAND_SPECS.keys()
    shown = set(re.findall(r"`--([\w-]+)", page))
    for spec in COMMAND_SPECS.values():
        assert {key.replace("_", "-") for key in spec.fields() if key not in spec.positionals} <= shown


def public_objects() -> Iterator[tuple[str, object]]:
    """Yield the public functions, classes and methods with arguments of their own."""
    for module in (bigbatch, bigbatch.lm, bigbatch.losses):
        for name in getattr(module, "__all__", vars(module)):
            thing = getattr(module, name)
            if (
                not (inspect.isfunction(thing) or inspect.isclass(thing))
                or thing.__module__.partition(".")[0] != "bigbatch"
            ):
                continue
            yield name, thing
            for key, method in vars(thing).items() if inspect.isclass(thing) else ():
                if inspect.isfunction(method) and not key.startswith("_"):
                    yield f"{name}.{key}", method


@pytest.mark.parametrize(
    ("name", "thing"), list(public_objects()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_documented_arguments_exist(name: str, thing: object) -> None:
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(thing) or "", re.MULTILINE | re.DOTALL)
    if section is None:
        return
    documented = re.findall(r"^    ([*\w]+(?:, [*\w]+)*): ", section.group(1), re.MULTILINE)
    assert documented
    names = {name.lstrip("*") for names in documented for name in names.split(", ")}
    assert names <= inspect.signature(thing).parameters.keys()  # type: ignore[arg-type]
