"""Exit codes of the commands, and the mapping from errors to them."""

from bigbatch.errors import BigbatchError, InputError, RestartError

DONE = 0
FAILED = 1
BAD_INPUT = 2
STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving
START_AGAIN = 76  # sharded run out of memory: restarted, it continues with smaller micro-batches
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


TRAIN_EXTRA = frozenset(
    (
        *("transformers", "tokenizers", "datasets", "safetensors", "peft", "pydantic", "pydantic_core", "rich"),
        *("filelock", "huggingface_hub", "numpy", "pyarrow", "fsspec", "jinja2", "yaml"),
    )
)
"""Modules installed by the extra ``train``; a missing one is reported as one sentence, without a traceback."""


def exit_for(error: BigbatchError | ModuleNotFoundError) -> tuple[str, int] | None:
    """Return the message and the exit code for an error; None if the traceback should be shown."""
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        return (
            (f'{module} is not installed: pip install "bigbatch[train]".', BAD_INPUT) if module in TRAIN_EXTRA else None
        )
    code = BAD_INPUT if isinstance(error, InputError) else START_AGAIN if isinstance(error, RestartError) else FAILED
    return str(error), code
