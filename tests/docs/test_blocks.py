"""Every code block of every page runs in a test, or is checked here: no block of any language is left out.

python → test_examples.py runs every page but those in OWN_TEST      bash, console → test_commands.py
json, toml, yaml → parsed      diff → both sides are Python, calls fit their functions      text → is not code
"""

import ast
import importlib
import inspect
import json
import re
import textwrap
import tomllib
from pathlib import Path

import pytest
import yaml

import bigbatch
from support.doc_pages import FENCE, OWN_TEST, ROOT, Block, blocks, is_command, pages, text_of

LANGUAGES = {"", "bash", "diff", "json", "python", "text", "toml", "yaml"}
DIFFS = [block for page in pages() if not page.endswith(".zh.md") for block in blocks(page, "diff")]
MODULES = {  # names that the lines of a diff use without their import
    "Accelerator": "accelerate",
    "Trainer": "transformers",
    "DPOTrainer": "trl",
    "ExactAccelerator": "bigbatch.integrations.accelerate",
    "ExactAccumulation": "bigbatch.integrations.lightning",
    "SentenceTransformerTrainer": "sentence_transformers",
    "SentenceTransformerTrainingArguments": "sentence_transformers",
}


@pytest.mark.parametrize("page", pages())
def test_every_block_has_a_language_with_a_check(page: str) -> None:
    fences = FENCE.findall(text_of(page))
    assert {(indent, mark) for indent, mark, _ in fences} <= {("", "```")}
    assert len(fences) == 2 * len(blocks(page))
    assert {block.language for block in blocks(page)} <= LANGUAGES


@pytest.mark.parametrize("page", pages())
def test_blocks_of_output_hold_no_code(page: str) -> None:
    for block in blocks(page):
        if block.language in ("", "text") and not block.is_console and page != "docs/reference/api.md":
            lines = block.text.splitlines()
            typed = [line for line in lines if is_command(line) and not line.startswith("$ ")]
            assert typed == [], "commands belong into a block that begins with one"
            assert [line for line in lines if line.startswith(("import ", "from ", ">>> "))] == []


@pytest.mark.parametrize("page", pages())
def test_blocks_of_data_are_read(page: str) -> None:
    for block in blocks(page):
        if block.language == "json":
            json.loads(f"[{block.text}]") if block.text.startswith("{\n") else list(
                map(json.loads, block.text.splitlines())
            )
        if block.language == "toml":
            assert tomllib.loads(block.text)
        if block.language == "yaml":
            assert yaml.safe_load(block.text)


@pytest.mark.parametrize(("page", "test"), OWN_TEST.items())
def test_tests_of_pages_name_their_page(page: str, test: str) -> None:
    assert blocks(page, "python")
    source = (ROOT / test).read_text(encoding="utf-8")
    name = Path(page).stem
    assert re.search(rf'\b{name}(\.md)?"', source)
    assert "exec(" in source


def sides(diff: Block) -> tuple[str, str]:
    """Return the code before and after a diff; a line ``...`` above deeper lines opens a block."""
    before, after = (
        "\n".join(line[1:] for line in diff.text.splitlines() if not line.startswith(mark)) for mark in ("+", "-")
    )
    opened = [re.sub(r"^\.\.\.\n(?=    )", "if True:\n", side, flags=re.MULTILINE) for side in (before, after)]
    return textwrap.dedent(opened[0]), textwrap.dedent(opened[1])


def named(name: str, imports: dict[str, object]) -> object:
    """Return the function or class of a call in a diff, or None if only the page knows it."""
    if name.startswith("bigbatch."):
        return getattr(bigbatch, name.partition(".")[2])
    if name in MODULES:
        return getattr(importlib.import_module(MODULES[name]), name)
    return imports.get(name)


@pytest.mark.filterwarnings("ignore")  # of the frameworks, when they are imported
@pytest.mark.parametrize("diff", DIFFS, ids=[diff.page for diff in DIFFS])
def test_calls_in_a_diff_fit_their_functions(diff: Block) -> None:
    before, after = map(ast.parse, sides(diff))
    assert ast.dump(before) != ast.dump(after)
    imports: dict[str, object] = {}
    checked = []
    for node in ast.walk(after):
        if isinstance(node, ast.ImportFrom):
            exec(ast.unparse(node), imports)
    for node in ast.walk(after):
        if isinstance(node, ast.Call) and (function := named(ast.unparse(node.func), imports)) is not None:
            values = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            positional = [None for argument in node.args if not isinstance(argument, ast.Constant)]
            inspect.signature(function).bind(*positional, **values)  # type: ignore[arg-type]
            checked.append(function)
    assert checked
