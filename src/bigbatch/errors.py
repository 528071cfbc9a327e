"""Errors: one base class and few leaves, each of which a caller would handle differently.

Input that is wrong in an ordinary way is a plain ``ValueError``, and a wrapper or object of a kind that cannot
work is a plain ``TypeError``. The leaves below are for what those two cannot say.
"""


class BigbatchError(Exception):
    """Base of every error that this package defines."""


class CheckpointError(BigbatchError, RuntimeError):
    """A checkpoint that cannot be written, read or trusted.

    The message is one sentence that names the checkpoint, the file where it is one, the reason, and after a failed
    write what stays valid.
    """


class InputError(BigbatchError, ValueError):
    """Bad input to a product command: flags, configuration, data or folders.

    The message is one sentence for the person at the keyboard. Raised before anything is written; the command
    line prints it without a traceback and exits with code 2.
    """


class MemoryLimitError(BigbatchError, RuntimeError):
    """Memory does not suffice and no smaller micro-batch can help; the message says what may.

    It was too little for a single sample, for the optimizer's state, or within the optimizer's step.
    """


class NonFiniteError(BigbatchError, ArithmeticError):
    """A window whose loss or gradient is not finite, where that is to be an error. Nothing was changed by it."""


class RankFailedError(BigbatchError, RuntimeError):
    """Another rank ended the window by an error of its own. Nothing was changed by the window."""


class RestartError(BigbatchError, RuntimeError):
    """A run that has to be started again, and then goes on otherwise: torchrun does it with ``--max-restarts``."""


class ShardedMemoryError(MemoryLimitError):
    """Memory ran out on one rank of a sharded model, where the others cannot wait for a smaller micro-batch."""


class WindowAbandonedError(BigbatchError, RuntimeError):
    """A window that was to be given up in the middle. Nothing was changed by it."""


class WindowStateError(BigbatchError, RuntimeError):
    """An operation that the window's state does not allow; the message names the state and the legal calls."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error message without its final full stop, to quote it within a sentence.

    The name of the error's class if it has no message.
    """
    return str(error).strip().partition("\n")[0].strip().rstrip(".:") or type(error).__name__
