"""Errors: one base class and few leaves, each of which a caller would handle differently.

Input that is wrong in an ordinary way is a plain ``ValueError``, and a wrapper or object of a kind that cannot
work is a plain ``TypeError``. The leaves below are for what those two cannot say.
"""


class BigbatchError(Exception):
    """Base of every error that this package defines."""


class InputError(BigbatchError, ValueError):
    """Bad input to a product command: flags, configuration, data or folders.

    The message is one sentence for the person at the keyboard. Raised before anything is written; the command
    line prints it without a traceback and exits with code 2.
    """


class MemoryLimitError(BigbatchError, RuntimeError):
    """Memory does not suffice and no smaller micro-batch can help; the message says what may.

    It was too little for a single sample, for the optimizer's state, or within the optimizer's step.
    """


class WindowStateError(BigbatchError, RuntimeError):
    """An operation that the window's state does not allow; the message names the state and the legal calls."""
