"""The pages in Chinese have the sections, the code, the tables and the links of the pages in English."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.zh.md")]
PAGES += [path.name for path in ROOT.glob("*.zh.md")]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def texts(page: str) -> tuple[str, str]:
    return tuple((ROOT / name).read_text(encoding="utf-8") for name in (page, page.replace(".zh.md", ".md")))


def without_code(text: str) -> str:
    return FENCED.sub("", text)


def without_comments(language: str, code: str) -> str:
    """Return the code; comments may be translated."""
    if language == "diff":
        return re.sub(r" +#.*$", "", code, flags=re.MULTILINE)
    return code if language == "python" else re.sub(r"( +|^)#.*$", "", code, flags=re.MULTILINE)


def targets(text: str) -> list[str]:
    """Return where links lead; a Chinese page may lead to a Chinese one."""
    return sorted(target.replace(".zh.md", ".md") for target in re.findall(r"\]\(([^)]+)\)", without_code(text)))


def test_there_are_chinese_pages() -> None:
    assert {"README.zh.md", "docs/tutorial.zh.md", "docs/how-to/transformers.zh.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_code_equals_that_of_the_english_page(page: str) -> None:
    chinese, english = (
        [(language, without_comments(language, code)) for language, code in FENCED.findall(text)]
        for text in texts(page)
    )
    assert len(chinese) >= 4
    assert chinese == english


@pytest.mark.parametrize("page", PAGES)
def test_sections_equal_those_of_the_english_page(page: str) -> None:
    chinese, english = (
        [len(marks) for marks in re.findall(r"^(#+) ", without_code(text), re.MULTILINE)] for text in texts(page)
    )
    assert chinese == english


@pytest.mark.parametrize("page", PAGES)
def test_tables_and_links_equal_those_of_the_english_page(page: str) -> None:
    chinese, english = texts(page)
    rows = [len(re.findall(r"^\|", without_code(text), re.MULTILINE)) for text in (chinese, english)]
    assert rows[0] == rows[1]
    own = page.rpartition("/")[2].replace(".zh.md", ".md")  # the two pages lead to each other
    assert [target for target in targets(chinese) if target != own] == [
        target for target in targets(english) if target != own
    ]


@pytest.mark.parametrize("page", PAGES)
def test_pages_lead_to_each_other(page: str) -> None:
    chinese, english = texts(page)
    name = page.rpartition("/")[2]
    assert f"[English]({name.replace('.zh.md', '.md')})" in chinese
    assert f"[简体中文]({name})" in english


@pytest.mark.parametrize("page", PAGES)
def test_numbers_in_code_spans_and_text_equal_those_of_the_english_page(page: str) -> None:
    chinese, english = (set(re.findall(r"`[^`\n]+`", without_code(text))) for text in texts(page))
    assert english - chinese == set()
