"""Pages of the site that are not Markdown files of docs/, and links between files of the repository.

    path in the repository → path in the site
    README.md → index.md, benchmarks/results/NAME.txt → benchmarks.md#NAME, tests/x.py → repository/tests/x.py.txt

Links in every Markdown file are those of the repository, so that they work on a forge. `rewrite_links` turns them into
links of the site.
"""

import ast
import html
import importlib
import json
import posixpath
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = {"README.md": "index.md", "README.zh.md": "index.zh.md"}
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
FENCED = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)
CHINESE_BREAK = re.compile(r"(?<=[\u3000-\u9fff\uff00-\uffef])\n(?=[\u3000-\u9fff\uff00-\uffef])")
MODULES = {
    "bigbatch": ("reference/bigbatch.md", ["bigbatch"]),
    "bigbatch.lm": ("reference/lm.md", ["bigbatch.lm"]),
    "bigbatch.integrations": (
        "reference/integrations.md",
        [
            f"bigbatch.integrations.{name}"
            for name in ("transformers", "sentence_transformers", "accelerate", "lightning")
        ],
    ),
}
RAW = "benchmarks/results/"


def root_pages() -> dict[str, str]:
    """Return the Markdown files in the root of the repository and their paths in the site."""
    return {path.name: ROOT_PAGES.get(path.name, path.name.lower()) for path in ROOT.glob("*.md")}


def public_names(module: str) -> list[str]:
    """Return the dotted public names of a module, errors last. Modules of integrations are read, not imported."""
    if module.startswith("bigbatch.integrations."):
        path = ROOT / "src" / module.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        (text,) = re.findall(r"^__all__ = (\[.*?\])$", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        names: list[str] = ast.literal_eval(text)
    else:
        names = [name for name in importlib.import_module(module).__all__ if not name.startswith("_")]
    return [f"{module}.{name}" for name in sorted(names, key=lambda name: (name.endswith("Error"), name))]


def generated_pages() -> dict[str, Callable[[], str]]:
    """Return the pages that have no Markdown file of their own, by path in the site."""
    pages: dict[str, Callable[[], str]] = {
        "benchmarks.md": benchmarks,
        "examples.md": examples,
        "reference/bigbatch.md": core_reference,
        "reference/lm.md": trainer_reference,
        "reference/integrations.md": integrations_reference,
    }
    for name, target in root_pages().items():
        pages[target] = lambda path=ROOT / name: path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        pages[f"notebooks/{path.stem}.md"] = lambda path=path: notebook(path)
    return pages


def repository_path(page: str) -> str:
    """Return the file of the repository that a page of the site shows; its links are relative to it."""
    for name, target in root_pages().items():
        if page == target:
            return name
    return {"benchmarks.md": "benchmarks/README.md", "examples.md": "examples/all.md"}.get(page, f"docs/{page}")


# links -----------------------------------------------------------------------------------------------------------


def links(markdown: str) -> Iterator[str]:
    """Yield the targets of the links outside of code blocks."""
    for part in FENCED.split(markdown)[::2]:
        yield from LINK.findall(part)


def site_target(page: str, link: str) -> str | None:
    """Return where a link of a page leads in the site, relative to its root; None for a link to elsewhere."""
    target, _, anchor = link.partition("#")
    if not target or "://" in target or target.startswith("mailto:"):
        return None
    file = posixpath.normpath(posixpath.join(posixpath.dirname(repository_path(page)), target))
    anchor = f"#{anchor}" if anchor else ""
    if file in root_pages():
        return root_pages()[file] + anchor
    if file == "docs/reference/api.md":
        return _reference_target(anchor)
    if file == "benchmarks/README.md":
        return f"benchmarks.md{anchor}"
    if file == "examples" or file.startswith("examples/"):
        return "examples.md" + (f"#{_anchor(file)}" if "/" in file else "")
    if file.startswith(RAW):
        return f"benchmarks.md#{Path(file).stem}"
    if file.endswith(".ipynb"):
        return file.removeprefix("docs/").replace(".ipynb", ".md")
    if file.startswith("docs/"):
        return file.removeprefix("docs/") + anchor
    return f"repository/{file}.txt" if (ROOT / file).is_file() else None


def rewrite_links(page: str, markdown: str) -> str:
    """Return the text of a page with links of the site."""

    def rewrite(match: re.Match[str]) -> str:
        target = site_target(page, match.group())
        if target is None:
            return match.group()
        file, _, anchor = target.partition("#")
        if file == page and anchor:
            return f"#{anchor}"
        relative = posixpath.relpath(file, posixpath.dirname(page) or ".")
        return relative + (f"#{anchor}" if anchor else "")

    parts = FENCED.split(markdown)
    parts[::2] = [LINK.sub(rewrite, part) for part in parts[::2]]
    return "".join(parts)


def join_chinese_lines(markdown: str) -> str:
    """Remove line breaks between Chinese characters, which browsers show as spaces."""
    parts = FENCED.split(markdown)
    parts[::2] = [CHINESE_BREAK.sub("", part) for part in parts[::2]]
    return "".join(parts)


def linked_files(page: str, markdown: str) -> dict[str, Path]:
    """Return the files of the repository that a page links to and that are no page: path in the site, and path."""
    targets = {site_target(page, link) for link in links(markdown)}
    copied = {target.partition("#")[0] for target in targets if target and target.startswith("repository/")}
    return {target: ROOT / target.removeprefix("repository/").removesuffix(".txt") for target in copied}


def _reference_target(anchor: str) -> str:
    """Return the place in the site of an anchor in docs/reference/api.md, such as ``#bigbatchlmtrain``."""
    for page, modules in MODULES.values():
        for module in modules[:1] if page != "reference/integrations.md" else ():
            for name in public_names(module):
                if anchor == f"#{name.replace('.', '').lower()}":
                    return f"{page}#{name}"
    return "reference/bigbatch.md" + anchor  # an unknown anchor is an error of the build


def _anchor(file: str) -> str:
    return Path(file).name.lower().replace(".", "")


# pages -----------------------------------------------------------------------------------------------------------


def benchmarks() -> str:
    """Return the page of benchmarks: the table of figures and commands, then every raw output."""
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    parts = [text, "\n## Raw outputs\n\nWhat each command printed, as it is in the repository.\n"]
    for path in sorted((ROOT / RAW).glob("*.txt")):
        raw = html.escape(path.read_text(encoding="utf-8"))
        parts.append(
            f'<details class="raw" id="{path.stem}" data-search-exclude>\n<summary>{path.name}</summary>\n'
            f"<pre><code>{raw}</code></pre>\n</details>\n"
        )
    return "\n".join(parts)


def examples() -> str:
    """Return the page of the files of settings in examples/."""
    parts = [
        "# Examples of settings\n\nEach file is used as `bigbatch train --config FILE --data DATA`; "
        "[Files of settings](../docs/how-to/config-files.md) has the rules.\n"
    ]
    for path in sorted((ROOT / "examples").rglob("*")):
        if path.is_file() and path.suffix in (".toml", ".yaml") and path.parent.name == "examples":
            language = path.suffix[1:]
            parts.append(f"## {path.name}\n\n```{language}\n{path.read_text(encoding='utf-8')}```\n")
    return "\n".join(parts)


def core_reference() -> str:
    """Return the page about the names of ``bigbatch``, for mkdocstrings."""
    parts = ["# bigbatch\n", *(f"::: {name}\n" for name in public_names("bigbatch"))]
    return "\n".join([*parts, "::: bigbatch.losses\n"])


def trainer_reference() -> str:
    """Return the page about ``bigbatch.lm``, for mkdocstrings, with the settings of a run."""
    make = runpy.run_path(str(ROOT / "docs/make_reference.py"))
    parts = ["# bigbatch.lm\n"]
    for name in public_names("bigbatch.lm"):
        parts.append(f"::: {name}\n")
        if name.endswith(".TrainConfig"):
            parts[-1] += "    options:\n      members: false\n"
            parts.append(make["settings_table"]())
    return "\n".join(parts)


def integrations_reference() -> str:
    """Return the page about the integrations, for mkdocstrings. A function may be named as the module that has it."""
    parts = ["# bigbatch.integrations\n"]
    for module in MODULES["bigbatch.integrations"][1]:
        parts.append(f"## {module}\n")
        for name in public_names(module):
            own = (ROOT / "src" / f"{name.replace('.', '/')}.py").is_file()
            path = f"{name}.{name.rpartition('.')[2]}" if own else name
            anchor = f'<a id="{name}"></a>\n\n' if own else ""
            parts.append(f"{anchor}::: {path}\n    options:\n      heading_level: 3\n      heading: {name}\n")
    return "\n".join(parts)


def notebook(path: Path) -> str:
    """Return a notebook as Markdown: text, code and what the code printed or drew."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            parts.append(_output(output))
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, object]) -> str:
    """Return an output of a cell as Markdown: a picture if there is one, else its text."""
    data = output.get("data", {})
    assert isinstance(data, dict)
    if "image/png" in data:
        return f'<img alt="plot" src="data:image/png;base64,{"".join(data["image/png"]).replace(chr(10), "")}">'
    text = "".join(output.get("text", data.get("text/plain", "")))  # type: ignore[arg-type]
    return f"```text\n{text.rstrip()}\n```"
