"""The ``bigbatch`` command: names the command, lets :mod:`~bigbatch.cli.arguments` read its words, and runs it.

    words → parse (pydantic) → the command's module, imported only now → its exit code

Help and complaints about input load no torch, no terminal library and no data library. This package is the only
one that prints or reads the environment.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import select
import shutil
import sys
import textwrap
from collections.abc import Sequence

from bigbatch import __version__
from bigbatch.cli.exit_codes import DONE, FAILED, INTERRUPTED, exit_for
from bigbatch.errors import BigbatchError, InputError

COMMANDS = {
    "train": "pretrain or fine-tune a causal language model with the batch you want",
    "resume": "go on with a run that was stopped or killed, as if it never had been",
    "plan": "memory, micro-batches and time, before spending anything",
    "verify": "prove on your model, loss and data that every cut gives the full-batch gradient",
    "generate": "let a trained run go on with a text",
    "checkpoints": "which checkpoints a run has, and which of them are whole",
    "advise": "how the batch of a run stands to its gradient noise, and what a smaller one would cost",
    "report": "one HTML page of a run, or of several side by side",
    "bench": "this package beside what you would pick instead, in one run",
}
"""The commands, each a module of this package with ``run(...) -> int``, and their line in ``--help``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 bad input, 75 stopped after saving, 76 start again.

    Args:
        argv: the words after the program's name; ``None`` takes those of this process.

    """
    words = list(sys.argv[1:] if argv is None else argv)
    speaker = f"bigbatch {words[0]}" if words and words[0] in COMMANDS else "bigbatch"
    try:
        code = _dispatch(words)
        sys.stdout.flush()
    except (BigbatchError, ModuleNotFoundError) as error:
        ending = exit_for(error)
        if ending is None:
            raise
        return _print_error(speaker, *ending)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the terminal has just written ^C
        return _print_error(speaker, "interrupted.", INTERRUPTED)
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        return FAILED
    return code


def _dispatch(words: Sequence[str]) -> int:
    first, *rest = words or ["--help"]
    if first in ("-h", "--help"):
        print(_overview())
        return DONE
    if first == "--version":
        print(f"bigbatch {__version__}")
        return DONE
    if first not in COMMANDS:
        raise InputError(_unknown_command(first))

    from bigbatch.cli.arguments import help_text, parse

    asked = rest[: rest.index("--")] if "--" in rest else rest
    if "-h" in asked or "--help" in asked:
        print(help_text(first), end="")
        return DONE
    from bigbatch.cli.torchrun import reject_together

    with reject_together(first):
        arguments = parse(first, rest)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    code: int = importlib.import_module(f"bigbatch.cli.commands.{first}").run(*arguments)
    return code


def _unknown_command(word: str) -> str:
    if word.startswith("-"):
        return f"{word.partition('=')[0]} comes before any command: bigbatch --help lists them."
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "bigbatch --help lists them."
    return f"unknown command {word!r}: {hint}"


def _overview() -> str:
    """Return ``bigbatch --help``, wrapped to the terminal; written by hand because it must load nothing."""
    width = min(100, shutil.get_terminal_size().columns) - 2
    indent = " " * 15
    return "\n".join(
        [
            "usage: bigbatch COMMAND [--flag value ...]",
            "",
            textwrap.fill(
                "Train with the batch you want on the memory you have, and get exactly the update the big batch "
                "would have given.",
                width,
            ),
            "",
            "commands:",
            *(
                textwrap.fill(about, width, initial_indent=f"  {name:<13}", subsequent_indent=indent)
                for name, about in COMMANDS.items()
            ),
            "",
            "where to begin:",
            "  bigbatch train            a small model on Python's own standard library",
            "  bigbatch train --help     every setting, with its default",
            "",
            "exit codes:",
            "  0 done    1 failed    2 bad input    75 stopped by a signal after saving",
            "  76 a sharded run is out of memory: started again, it goes on with smaller micro-batches",
        ]
    )


def _print_error(speaker: str, sentence: str, code: int) -> int:
    print(f"{speaker}: {sentence}", file=sys.stderr)
    return code


def _stdout_is_closed() -> bool:
    """Return whether nobody reads our output any more, as in ``bigbatch ... | head``, and if so discard the rest.

    The interpreter would otherwise try once more to flush it at exit, and complain.
    """
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no poll on Windows; a stdout without a descriptor
        descriptor = sys.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            return True
    return False
