"""Checks of counts that users pass in."""


def check_count(name: str, value: int, what: str) -> None:
    """Refuse what is no number of at least 1.

    Raises:
        TypeError: It is no int.
        ValueError: It is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}: it must be an int, {what}.")
    if value < 1:
        raise ValueError(f"{name} is {value}: it must be at least 1, {what}.")
