"""Text helpers: plurals."""


def plural(number: int, noun: str) -> str:
    """Return ``1,234 files`` or ``1 file``: a number with its noun, for notes."""
    ending = "" if number == 1 else "es" if noun.endswith(("ch", "s")) else "s"
    return f"{number:,} {noun}{ending}"
