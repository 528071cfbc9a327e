"""HTML elements whose text is escaped, so that no setting, path or message can become markup."""

import json
import re
from collections.abc import Iterable, Mapping
from html import escape, unescape

MANY_COLUMNS = 5  # of a table whose columns have a set width on paper
LONGEST_WORD = 16  # characters of a word that the width of a column on paper allows for; longer words are broken


def text(value: object) -> str:
    """Escape a value for an element or a quoted attribute; unprintable characters are replaced."""
    shown = str(value).encode("utf-8", "replace").decode("utf-8")
    return escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in shown), quote=True)


def tag(name: str, inside: str = "", **attributes: object) -> str:
    """Return an element; ``class_`` becomes class, underscores become dashes, an attribute of None is omitted."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{words}>{inside}</{name}>"


def table(
    head: Iterable[str], rows: Iterable[Iterable[str]], *, caption: str, numeric: Iterable[int] = (), wide: bool = True
) -> str:
    """Return a table of cells that are already markup; the first cell of a row is its header."""
    right = set(numeric)
    names, lines = list(head), [list(row) for row in rows]

    def kind(column: int) -> str | None:
        return "number" if column in right else None

    top = "".join(tag("th", cell, scope="col", class_=kind(i)) for i, cell in enumerate(names))
    body = "".join(
        "<tr>"
        + "".join(
            tag("th", cell, scope="row", class_=kind(i)) if i == 0 else tag("td", cell, class_=kind(i))
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in lines
    )
    parts = f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    is_many = len(names) >= MANY_COLUMNS
    columns = _columns([names, *lines]) if is_many else ""
    whole = tag("table", tag("caption", text(caption)) + columns + parts, class_="many" if is_many else None)
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption) if wide else whole


def _columns(rows: list[list[str]]) -> str:
    """Return the columns with their widths on paper, in proportion to their longest words, so that any font fits."""
    texts = [[unescape(re.sub("<[^>]*>", "", cell)) for cell in row] for row in rows]
    longest = [
        min(LONGEST_WORD, max(map(len, " ".join(column).split()), default=0)) + 1 for column in zip(*texts, strict=True)
    ]
    return tag("colgroup", "".join(f'<col style="--share: {width / sum(longest):.2%}">' for width in longest))


def data(value: Mapping[str, object]) -> str:
    """Return JSON that is safe in a script element: no character can end the element or start a comment."""
    written = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
