"""Entry point of the ``bigbatch`` command: selects the command, parses its arguments and runs it.

    argv → parse (pydantic) → module of the command, imported only now → exit code

Help and errors about arguments load no torch, no terminal library and no data library. This package is the only
one that prints or reads the environment.
"""

from __future__ import annotations

import difflib
import importlib
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

from bigbatch import __version__
from bigbatch.cli import command_clock
from bigbatch.cli.exit_codes import DONE, INTERRUPTED, exit_for
from bigbatch.cli.output import guarded_output, print_error, wrap
from bigbatch.errors import BigbatchError, InputError

COMMANDS = {
    "train": "pretrain or fine-tune a causal language model with any global batch size",
    "resume": "resume an interrupted run from its last good checkpoint; results are bit-identical on CPU",
    "plan": "predict memory, micro-batches and time of a run before training",
    "inspect": "show what is in the data, and what of it a run trains on",
    "tokenize": "tokenize data ahead of training, in one process or in parts by several",
    "verify": "verify on your model, loss and data that splitting the batch does not change the gradient",
    "generate": "generate text with a trained model",
    "merge": "write a whole model from the LoRA adapters of a run",
    "checkpoints": "list the checkpoints of a run and verify them",
    "advise": "compare the batch of a run with its gradient noise scale",
    "diff": "name the first update at which two reproducible runs differ",
    "report": "write an HTML page about a run, or a comparison of several runs",
    "cache": "list the tokens that earlier runs have cached, and remove them",
    "bench": "compare speed, memory and gradient with other training libraries",
}
"""The commands and their line in ``--help``. Each one is a module of ``commands`` with ``run(...) -> int``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see :mod:`~bigbatch.cli.exit_codes`; 75: stopped after saving).

    Args:
        argv: Arguments after the program's name; ``None`` for those of this process.

    """
    command_clock.start()
    argv = list(sys.argv[1:] if argv is None else argv)
    prefix = f"bigbatch {argv[0]}" if argv and argv[0] in COMMANDS else "bigbatch"
    with guarded_output():
        try:
            code = _dispatch(argv)
            sys.stdout.flush()
        except (BigbatchError, ModuleNotFoundError) as error:
            message_and_code = exit_for(error)
            if message_and_code is None:
                raise
            message, code = message_and_code
            if message:
                print_error(prefix, message)
        except KeyboardInterrupt:
            print(file=sys.stderr)  # the terminal has just written ^C
            print_error(prefix, "interrupted.")
            return INTERRUPTED
        return code


def _dispatch(argv: Sequence[str]) -> int:
    first, *rest = argv or ["--help"]
    if first in ("-h", "--help"):
        print(_overview())
        return DONE
    if first == "--version":
        print(f"bigbatch {__version__}")
        return DONE
    if first not in COMMANDS:
        raise InputError(_unknown_command(first))

    from bigbatch.cli.arguments import help_text, parse

    before_dashes = rest[: rest.index("--")] if "--" in rest else rest
    if "-h" in before_dashes or "--help" in before_dashes:
        print(help_text(first), end="")
        return DONE
    from bigbatch.cli.torchrun import reject_together

    with reject_together(first):
        arguments = parse(first, rest)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    code: int = importlib.import_module(f"bigbatch.cli.commands.{first}").run(*arguments)
    return code


def _unknown_command(name: str) -> str:
    if name.startswith("-"):
        return f"{name.partition('=')[0]} must follow a command, as in bigbatch train --steps 3: see bigbatch --help."
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "see bigbatch --help."
    return f"unknown command {name!r}: {hint}"


def _overview() -> str:
    """Return the text of ``bigbatch --help``, wrapped to the terminal; no argparse, so that it loads nothing."""
    width = min(100, shutil.get_terminal_size().columns) - 2
    indent = " " * 15
    return "\n".join(
        [
            "usage: bigbatch COMMAND [--flag value ...]",
            "",
            textwrap.fill(
                "Train with any global batch size on the memory you have: the batch is split into micro-batches, and "
                "every update is exactly that of the full batch.",
                width,
            ),
            "",
            "commands:",
            *(
                textwrap.fill(
                    about, width, initial_indent=f"  {name:<13}", subsequent_indent=indent, break_on_hyphens=False
                )
                for name, about in COMMANDS.items()
            ),
            "",
            "getting started:",
            wrap("  bigbatch train            train a small model on Python's standard library", width),
            wrap("  bigbatch train --help     list every setting with its default", width),
            "",
            "exit codes:",
            wrap("  0 success    1 failure    2 invalid input    130 interrupted", width),
            wrap("  75 stopped by a signal after saving: continue with bigbatch resume", width),
            wrap("  76 a sharded run is out of memory: restart it to continue with smaller micro-batches", width),
        ]
    )
