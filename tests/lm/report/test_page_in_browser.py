"""The page in a real browser: nothing is asked for, nothing complains, and there is something to see in every chart."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bigbatch.lm.report.page import page
from bigbatch.lm.report.run_reader import read_run
from support.headless_chromium import Browser, Page, find_chromium, find_wide_font
from support.run_directories import make_rich_run, make_run, rows

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on the path: install chromium to see the page in it"
)

CHARTS = """
[...document.querySelectorAll("figure.chart")].map((figure) => {
  const shown = [...figure.querySelectorAll("svg.plot")].filter((svg) => svg.getBoundingClientRect().width > 0);
  const paint = (mark) => {
    const style = getComputedStyle(mark), box = mark.getBoundingClientRect();
    return {
      colours: [style.fill, style.stroke], width: box.width, height: box.height,
      inside: box.left >= -1 && box.right <= innerWidth + 1,
    };
  };
  const labels = [...shown[0].querySelectorAll("text")].map((text) => {
    const box = text.getBoundingClientRect();
    const {left, right, top, bottom, height} = box;
    return {left, right, top, bottom, size: height, words: text.textContent};
  });
  return {
    id: figure.id, drawings: shown.length, labels,
    left: figure.getBoundingClientRect().left, right: figure.getBoundingClientRect().right,
    marks: [...shown[0].querySelectorAll("path.line, circle.dot, rect.even, path.band")].map(paint),
    ground: getComputedStyle(figure).backgroundColor, ink: getComputedStyle(figure).color,
  };
})
"""


OUTSIDE = """
[...document.querySelectorAll("body *")].filter((element) => {
  const box = element.getBoundingClientRect();
  return box.width > 0 && box.right > innerWidth + 0.5;
}).map((element) => element.tagName + " " + element.textContent.slice(0, 40))
"""

PAPER = {"print_media": True, "width": 700}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM) as browser:
        yield browser


@pytest.fixture(scope="module")
def wide_browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    if (font := find_wide_font()) is None:
        pytest.skip("no bold monospaced font: install one, such as fonts-dejavu-core, to see the page in a wide font")
    with Browser(CHROMIUM, font=font) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    rich = make_rich_run(folder / "rich")
    long = make_rich_run(folder / "long", 5_000)
    other = make_run(folder / "other", rows(200, seed=4, validation_every=20), settings={"lr": 0.001})
    made = {"rich": [rich], "long": [long], "compared": [rich, other, long]}
    for name, runs in made.items():
        (folder / f"{name}.html").write_text(page([read_run(run) for run in runs]), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


def overlap(one: dict[str, float], other: dict[str, float]) -> bool:
    return (
        one["left"] < other["right"] - 0.5
        and other["left"] < one["right"] - 0.5
        and one["top"] < other["bottom"] - 3  # boxes of text are higher than its letters
        and other["top"] < one["bottom"] - 3
    )


def brightness(colour: str) -> float:
    red, green, blue = (float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def check_layout(seen: Page, *, is_paper: bool = False) -> list[Any]:
    """Check that everything is inside of the page, visible and not on top of something else; return the charts."""
    assert seen.value("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"
    if is_paper:
        assert seen.value(OUTSIDE) == []
    charts: list[Any] = seen.value(CHARTS)
    assert len(charts) >= 7
    for chart in charts:
        assert chart["drawings"] == 1, chart["id"]
        marks = [mark for mark in chart["marks"] if mark["width"] > 0.4 or mark["height"] > 0.4]
        assert marks, chart["id"]
        assert all(mark["inside"] for mark in marks), chart["id"]
        for mark in marks:
            painted = [colour for colour in mark["colours"] if colour.startswith("rgb")]
            assert any(abs(brightness(c) - brightness(chart["ground"])) > 25 for c in painted), (chart["id"], mark)
        assert all(label["size"] >= 10 for label in chart["labels"]), chart["id"]
        for place, one in enumerate(chart["labels"]):
            assert chart["left"] <= one["left"] <= one["right"] <= chart["right"], (chart["id"], one["words"])
            for other in chart["labels"][:place]:
                assert not overlap(one, other), (chart["id"], one["words"], other["words"])
    return charts


@pytest.mark.parametrize("name", ["rich", "long", "compared"])
@pytest.mark.parametrize(
    "options",
    [{}, {"dark": True}, {"width": 375}, {"width": 375, "dark": True}, {"width": 700}, PAPER],
    ids=["light", "dark", "phone", "dark phone", "tablet", "paper"],
)
def test_every_chart_has_readable_marks_and_labels(
    browser: Browser, pages: dict[str, Path], name: str, options: dict[str, Any]
) -> None:
    with browser.page(pages[name], **options) as seen:
        assert seen.console_errors == []
        assert seen.requests == [pages[name].as_uri()]
        charts = check_layout(seen, is_paper=options == PAPER)
        is_dark = bool(options.get("dark"))
        assert (brightness(charts[0]["ground"]) < 128) == is_dark
        assert (brightness(charts[0]["ink"]) > 128) == is_dark
        assert seen.console_errors == []


@pytest.mark.parametrize("name", ["rich", "compared"])
@pytest.mark.parametrize("options", [{}, {"width": 375}, PAPER], ids=["light", "phone", "paper"])
def test_layout_fits_in_wide_font(
    wide_browser: Browser, browser: Browser, pages: dict[str, Path], name: str, options: dict[str, Any]
) -> None:
    with wide_browser.page(pages[name], **options) as seen, browser.page(pages[name], **options) as usual:
        width = "(() => { const range = document.createRange(); range.selectNodeContents(document.querySelector('h1'));"
        width += "return range.getBoundingClientRect().width; })()"
        assert seen.value(width) > usual.value(width), "the other font is not in use"
        check_layout(seen, is_paper=options == PAPER)


def test_tables_fit_on_paper_with_any_font(browser: Browser, pages: dict[str, Path]) -> None:
    with browser.page(pages["compared"], **PAPER) as seen:
        seen.value("document.head.insertAdjacentHTML('beforeend', '<style>td, th { letter-spacing: 0.6em }</style>')")
        assert seen.value(OUTSIDE) == []


def test_pointer_readout_matches_line(browser: Browser, pages: dict[str, Path]) -> None:
    with browser.page(pages["rich"]) as seen:
        box = seen.value(
            "(() => { const box = document.querySelector('#loss svg.wide').getBoundingClientRect();"
            "return {left: box.left, top: box.top, width: box.width, height: box.height}; })()"
        )
        seen.move_to(box["left"] + box["width"] / 2, box["top"] + box["height"] / 2)
        told = seen.value("document.querySelector('#loss .readout').innerText")
        assert told.startswith("update 1")
        assert "training 2." in told
        assert seen.value("getComputedStyle(document.querySelector('#lr .readout')).display") == "none"
        assert seen.console_errors == []
        assert seen.requests == [pages["rich"].as_uri()]


def test_page_is_complete_without_script(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    bare = tmp_path / "bare.html"
    head, script, tail = pages["rich"].read_text(encoding="utf-8").rpartition("<script>")
    assert script
    bare.write_text(head + tail.partition("</script>")[2], encoding="utf-8")
    with browser.page(bare) as seen, browser.page(pages["rich"]) as whole:
        assert seen.value("document.body.innerText") == whole.value("document.body.innerText")
