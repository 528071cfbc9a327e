"""Events of MkDocs: add the pages of `site_pages`, rewrite links, and mark the language of Chinese pages."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))
import site_pages

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

FLAG = re.compile(r"(?<![\w/&-])(--[a-z][\w-]*)")
INLINE_CODE = re.compile(r"(?<=<code>)[^<]+(?=</code>)")
LESS_IN_SEARCH = ("changelog.md", "explanation/decisions.md", "benchmarks.md", "contributing.md", "reference/")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add notebooks, and Markdown files in the root of the repository, to the navigation; titles are their headings."""
    sections = {title: entries for section in config.nav or [] for title, entries in section.items()}
    listed = {path for entry in sections["Project"] for path in entry.values()} | {"index.md", "index.zh.md"}
    notebooks = [page for page in site_pages.generated_pages() if page.startswith("notebooks/")]
    sections["How-to"].append({"Notebooks": notebooks})
    sections["Project"] += sorted(set(site_pages.root_pages().values()) - listed)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and copies of the files that any page links to."""
    from mkdocs.structure.files import File

    for path, text in site_pages.generated_pages().items():
        files.append(File.generated(config, path, content=text()))
    copies: dict[str, Path] = {}
    for file in files.documentation_pages():
        copies |= site_pages.linked_files(file.src_uri, file.content_string)
    for path, source in copies.items():
        files.append(File.generated(config, path, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page; pages that list everything come after the others in search."""
    if page.file.src_uri.startswith(LESS_IN_SEARCH):
        page.meta.setdefault("search", {"boost": 0.2})
    if ".zh." in page.file.src_uri:
        markdown = site_pages.join_chinese_lines(markdown)
    return site_pages.rewrite_links(page.file.src_uri, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keep each flag in inline code on one line; browsers break lines after a dash."""
    return INLINE_CODE.sub(lambda code: FLAG.sub(r'<span class="flag">\1</span>', code.group()), html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Mark Chinese pages as such, for fonts, hyphenation and screen readers."""
    return output.replace('<html lang="en"', '<html lang="zh-Hans"', 1) if ".zh." in page.file.src_uri else output
