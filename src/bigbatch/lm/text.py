"""Small pieces of text: plurals, first lines."""


def plural(number: int, noun: str) -> str:
    """Return ``1,234 files`` or ``1 file``: a number with its noun, for notes."""
    ending = "" if number == 1 else "es" if noun.endswith(("ch", "s")) else "s"
    return f"{number:,} {noun}{ending}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error of another library, without its final full stop, for one sentence of ours."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".:") if lines else type(error).__name__
