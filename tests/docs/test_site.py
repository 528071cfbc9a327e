"""The site builds without a warning, holds every page, and its links, anchors and parts are files of the site."""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest

from support.built_site import MISSING, SitePage, built_site
from support.doc_pages import ROOT

pytestmark = pytest.mark.skipif(find_spec("mkdocs") is None, reason=MISSING)
OUTSIDE = re.compile(r"^(https?:)?//|^mailto:")
read_page = cache(SitePage)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_site(tmp_path_factory)


def html_pages(site: Path) -> list[Path]:
    return sorted(path for path in site.rglob("*.html") if path.name != "404.html")


def test_make_docs_builds_as_strictly() -> None:
    (recipe,) = re.findall(r"^docs:.*\n\t(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert recipe.endswith("mkdocs build --strict")  # with --quiet, MkDocs counts no warning


@pytest.mark.slow
def test_every_page_of_the_repository_is_in_the_site(site: Path) -> None:
    made = {path.relative_to(site).as_posix() for path in html_pages(site)}
    docs = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".ipynb")}
    expected = {path.with_suffix(".html").as_posix() for path in docs} - {"reference/api.html"}
    expected |= {f"reference/{name}.html" for name in ("bigbatch", "lm", "integrations")}
    expected |= {"benchmarks.html", "examples.html"}
    expected |= {path.name.lower().replace("readme", "index").replace(".md", ".html") for path in ROOT.glob("*.md")}
    assert made == expected


@pytest.mark.slow
def test_every_page_is_in_the_navigation(site: Path) -> None:
    front = read_page(site / "index.html")
    linked = {link.partition("#")[0] for link in front.links}
    assert {path.relative_to(site).as_posix() for path in html_pages(site)} - linked == set()


@pytest.mark.slow
def test_links_and_anchors_of_the_site_exist(site: Path) -> None:
    broken = []
    for file in html_pages(site):
        page = read_page(file)
        for link in page.links:
            if OUTSIDE.match(link):
                continue
            target, _, anchor = unquote(link).partition("#")
            path = (file.parent / target).resolve() if target else file
            known = read_page(path).anchors if path.suffix == ".html" and path.is_file() else set()
            if not path.is_file() or (anchor and anchor not in known):
                broken.append(f"{file.relative_to(site)}: {link}")
    assert broken == []


@pytest.mark.slow
def test_pages_load_only_files_of_the_site(site: Path) -> None:
    for file in html_pages(site):
        for part in read_page(file).loaded:
            assert part.startswith("data:") or (file.parent / part.partition("?")[0]).is_file(), f"{file}: {part}"
    for sheet in site.rglob("*.css"):
        urls = re.findall(r"url\(([^)]*)\)|@import ([^;]+);", sheet.read_text(encoding="utf-8"))
        assert all(url.strip("\"'").startswith("data:") for url, _ in urls), sheet
        assert not any(imported for _, imported in urls), sheet


@pytest.mark.slow
def test_chinese_pages_are_marked(site: Path) -> None:
    languages = {path.relative_to(site).as_posix(): read_page(path).language for path in html_pages(site)}
    assert {name for name, language in languages.items() if language != "en"} == {
        name for name in languages if ".zh." in name
    }
    assert languages["tutorial.zh.html"] == "zh-Hans"


@pytest.mark.slow
def test_benchmarks_page_has_every_raw_output(site: Path) -> None:
    page = read_page(site / "benchmarks.html")
    names = {path.stem for path in (ROOT / "benchmarks/results").glob("*.txt")}
    assert names <= page.anchors
    table = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    assert {f"#{name}" for name in names} - set(page.links) == set(), "no row of benchmarks/README.md"
    scripts = re.findall(r"benchmarks/(\w+)\.py", table)
    assert all((ROOT / f"benchmarks/{script}.py").is_file() for script in scripts)


@pytest.mark.slow
def test_reference_has_every_public_name_and_command(site: Path) -> None:
    import bigbatch
    import bigbatch.lm
    from bigbatch.cli import COMMANDS

    anchors = {name: read_page(site / f"reference/{name}.html").anchors for name in ("bigbatch", "lm", "cli")}
    assert {f"bigbatch.{name}" for name in bigbatch.__all__ if name != "__version__"} <= anchors["bigbatch"]
    assert {f"bigbatch.lm.{name}" for name in bigbatch.lm.__all__} <= anchors["lm"]
    assert {f"bigbatch-{name}" for name in COMMANDS} <= anchors["cli"]
    text = (site / "reference/integrations.html").read_text(encoding="utf-8")
    integrations = read_page(site / "reference/integrations.html").anchors
    for name in (
        "transformers.exact",
        "transformers.verify",
        "transformers.weights",
        "sentence_transformers.exact",
        "lightning.ExactAccumulation",
        "accelerate.ExactAccelerator",
    ):
        assert f"bigbatch.integrations.{name}" in integrations
    assert "doc-symbol-module" not in text, "a module is shown instead of the function of that name"
