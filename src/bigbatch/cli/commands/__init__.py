"""One module for each command, with ``run(...) -> int``."""
