"""Exceptions: one base class and one subclass per case that a caller handles differently.

Invalid arguments raise a plain ``ValueError``, unsupported types and wrappers a plain ``TypeError``.
"""


class BigbatchError(Exception):
    """Base class of all exceptions that bigbatch defines."""


class CheckpointError(BigbatchError, RuntimeError):
    """A checkpoint cannot be written or read, or fails its integrity check.

    The message names the checkpoint, the file if a single one is affected, and the reason; after a failed write also
    the checkpoint that remains valid.
    """


class InputError(BigbatchError, ValueError):
    """Invalid input to a command: flags, configuration, data or directories.

    Raised before anything is written. The command line prints the message, one sentence, without a traceback and exits
    with code 2.
    """


class MemoryLimitError(BigbatchError, RuntimeError):
    """Out of memory where a smaller micro-batch cannot help.

    Memory is insufficient for a single sample, for the optimizer state, or during the optimizer step. The message names
    the settings that reduce it.
    """


class NonFiniteError(BigbatchError, ArithmeticError):
    """The loss or gradient of a window is not finite, under ``nonfinite="raise"``. The window changed no state."""


class RankFailedError(BigbatchError, RuntimeError):
    """Another rank raised an error in the window. The window changed no state on any rank."""


class RestartError(BigbatchError, RuntimeError):
    """The run must be restarted and then resumes with other settings; torchrun does so with ``--max-restarts``."""


class ShardedMemoryError(MemoryLimitError):
    """A rank of a sharded model, or in lockstep, ran out of memory; the others cannot wait while it retries pieces."""


class TornUpdateError(BigbatchError, RuntimeError):
    """An update failed after it had begun: parameters, optimizer state and schedule may not belong together.

    Raised instead of the error, or the KeyboardInterrupt, that ended the update, and by every later window until a
    state is loaded. The message says which part finished and which did not.
    """


class WindowAbandonedError(BigbatchError, RuntimeError):
    """The window was abandoned before its update. The window changed no state."""


class WindowStateError(BigbatchError, RuntimeError):
    """An operation that the state of the window forbids; the message names the state and the legal calls."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error message without its final full stop, to quote it within a sentence.

    The name of the error's class if it has no message.
    """
    return str(error).strip().partition("\n")[0].strip().rstrip(".:") or type(error).__name__


def os_reason(error: Exception) -> str:
    """Return the reason of an `OSError` as the end of a sentence: ``no space left on device``.

    The first line of the message if the error has no reason from the operating system.
    """
    reason: str = getattr(error, "strerror", None) or first_line(error)
    return reason if reason == type(error).__name__ else reason[0].lower() + reason[1:]
