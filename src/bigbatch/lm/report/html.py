"""HTML elements whose text is escaped, so that no setting, path or message can become markup."""

import json
from collections.abc import Iterable, Mapping
from html import escape


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

    def kind(column: int) -> str | None:
        return "number" if column in right else None

    top = "".join(tag("th", cell, scope="col", class_=kind(i)) for i, cell in enumerate(head))
    body = "".join(
        "<tr>"
        + "".join(
            tag("th", cell, scope="row", class_=kind(i)) if i == 0 else tag("td", cell, class_=kind(i))
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    whole = f"<table><caption>{text(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption) if wide else whole


def data(value: Mapping[str, object]) -> str:
    """Return JSON that is safe in a script element: no character can end the element or start a comment."""
    written = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
