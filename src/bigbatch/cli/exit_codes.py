"""Exit codes of the commands, and which error ends in which."""

from bigbatch.errors import BigbatchError, InputError, RestartError

DONE = 0


FAILED = 1


BAD_INPUT = 2


START_AGAIN = 76  # of a sharded run out of memory: started again, it goes on with smaller micro-batches


INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


TRAIN_EXTRA = frozenset(
    ["transformers", "tokenizers", "datasets", "safetensors", "peft", "pydantic", "pydantic_core", "rich", "filelock"]
)
"""Modules that the extra ``train`` installs; one that is missing is a sentence, not a traceback."""


def exit_for(error: BigbatchError | ModuleNotFoundError) -> tuple[str, int] | None:
    """Give the sentence and the exit code that a command ends with; None for what deserves a traceback."""
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        return (
            (f'{module} is not installed: pip install "bigbatch[train]".', BAD_INPUT) if module in TRAIN_EXTRA else None
        )
    code = BAD_INPUT if isinstance(error, InputError) else START_AGAIN if isinstance(error, RestartError) else FAILED
    return str(error), code
