"""The site in a real browser, opened from disk: light, dark, phone; no request, no complaint; search finds pages."""

import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from support.built_site import MISSING, built_site
from support.headless_chromium import Browser, find_chromium

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.slow,  # builds the site, and starts a browser
    pytest.mark.skipif(find_spec("mkdocs") is None, reason=MISSING),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path: install chromium to see the site in it"),
]
PAGES = [
    "index",
    "index.zh",
    "how-to/train",
    "how-to/transformers",
    "explanation/speed",
    "reference/bigbatch",
    "benchmarks",
]
LIMIT_S = 60.0
"""Longest wait for results of a search; they come within a second on an idle machine."""

BRIGHTNESS = """
(element) => {
  const [red, green, blue] = getComputedStyle(element).%s.match(/[\\d.]+/g).map(Number);
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}
"""
SEARCH = """
(query) => {
  document.querySelector("[data-md-toggle=search]").click();
  const input = document.querySelector("[data-md-component=search-query]");
  input.focus();
  input.value = query;
  input.dispatchEvent(new KeyboardEvent("keyup", {bubbles: true}));
}
"""
RESULTS = """
[...document.querySelectorAll(".md-search-result__item > .md-search-result__link")]
  .map((link) => new URL(link.href).pathname)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_site(tmp_path_factory)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM) as browser:
        yield browser


def requests_elsewhere(seen: Any, site: Path) -> list[str]:
    return [url for url in seen.requests if not url.startswith((site.as_uri(), "data:"))]


@pytest.mark.parametrize(
    "options",
    [{"width": 1400}, {"width": 1400, "dark": True}, {"width": 375}, {"width": 375, "dark": True}],
    ids=["light", "dark", "phone", "dark phone"],
)
def test_pages_fit_the_screen_and_load_nothing_else(browser: Browser, site: Path, options: dict[str, Any]) -> None:
    for name in PAGES:
        with browser.page(site / f"{name}.html", **options) as seen:
            assert seen.value("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than the screen"
            ground, ink = (
                seen.value(f"({BRIGHTNESS % style})(document.body)") for style in ("backgroundColor", "color")
            )
            assert (ground < 128) == options.get("dark", False), name
            assert abs(ground - ink) > 100, name
            tabs = seen.value("document.querySelector('.md-tabs')?.offsetHeight ?? 0")
            assert (tabs > 0) == (options["width"] > 1220), name
            assert seen.console_errors == [], name
            assert requests_elsewhere(seen, site) == [], name


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("gradient accumulation Trainer", "how-to/transformers.html"),
        ("CLIP", "how-to/contrastive.html"),
        ("resume", "how-to/resume.html"),
        ("--lora-rank", "how-to/lora.html"),
        ("微批次", "tutorial.zh.html"),
    ],
)
def test_search_from_disk_finds_page(browser: Browser, site: Path, query: str, expected: str) -> None:
    with browser.page(site / "glossary.html", width=1400) as seen:
        seen.value(f"({SEARCH})({query!r})")
        found: list[str] = []
        deadline = time.monotonic() + LIMIT_S
        while not found and time.monotonic() < deadline:
            found = seen.value(RESULTS)
        pages = list(dict.fromkeys(path.removeprefix(f"{site.as_posix()}/") for path in found))
        assert expected in pages[:2], pages
        assert seen.console_errors == []
        assert requests_elsewhere(seen, site) == []
