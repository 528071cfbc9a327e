"""``bigbatch bench``: the same update by everyone, as a table or one JSON object."""

import os
import platform
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbatch import __version__
from bigbatch.cli.console import make_console, progress_display, quiet_libraries
from bigbatch.cli.exit_codes import DONE, FAILED
from bigbatch.cli.options import BenchOptions
from bigbatch.errors import InputError
from bigbatch.lm.bench.entries import Entry, default_entries, read_entry, versions

if TYPE_CHECKING:
    from bigbatch.lm.bench.benchmark import BenchmarkResult, ContestantResult
    from bigbatch.lm.bench.workload import Workload

WIDTH = 100


def run(options: BenchOptions) -> int:
    """Print the comparison; return 1 only if this package took part and has no figures."""
    path = None if options.save is None else _writable(options.save)
    console = make_console()
    with progress_display(make_console(stderr=True)) as progress:
        progress("loading torch and transformers")
        from bigbatch.lm.bench.benchmark import run_benchmark

        quiet_libraries()
        workload = find_workload(options.workload)
        memory = options.memory or workload.memory
        found = run_benchmark(workload, entries_of(options), memory=memory, rounds=options.rounds, progress=progress)
    if options.as_json:
        import json

        console.print(json.dumps(as_json(found, options)))
    else:
        console.print("\n".join(describe(found)))
    if path is not None:
        path.write_text("\n".join([f"$ {command(options)}", *describe(found), ""]), encoding="utf-8")
    return FAILED if found.ours is not None and found.ours.tokens_per_s is None else DONE


def find_workload(name: str) -> "Workload":
    """Return the workload of that name; ``auto`` is w where there is CUDA."""
    import torch

    from bigbatch.lm.bench.workload import WORKLOADS

    cuda = torch.cuda.is_available()
    if name in ("w", "w-lora") and not cuda:
        raise InputError(f"--workload {name} needs a CUDA device, and torch finds none: use --workload w-small.")
    return WORKLOADS[("w" if cuda else "w-small") if name == "auto" else name]


def entries_of(options: BenchOptions) -> tuple[Entry, ...]:
    """Return who takes part, each once."""
    if options.only is None:
        return default_entries()
    return tuple(dict.fromkeys(read_entry(text) for text in options.only))


def command(options: BenchOptions) -> str:
    """Write the command that asks for the same, with what it takes from the environment."""
    words = ["bigbatch", "bench"]
    for name in BenchOptions.model_fields:
        value = getattr(options, name)
        if name in options.model_fields_set and value is not None and name != "as_json":
            words += [f"--{name}", ",".join(value) if isinstance(value, tuple) else str(value)]
    allocator = os.environ.get("PYTORCH_ALLOC_CONF")
    return (f"PYTORCH_ALLOC_CONF={shlex.quote(allocator)} " if allocator else "") + shlex.join(words)


# words -----------------------------------------------------------------------------------------------------------


def describe(found: "BenchmarkResult") -> Iterator[str]:
    """Yield the lines of the table and what is to be said about it."""
    yield _where(found)
    yield _what(found)
    yield ""
    with_peaks = any(row.peak_bytes is not None for row in found.rows)
    peak = f"{'GiB':>8}" if with_peaks else ""
    yield f"{'':<24}{'samples':>8}{'tokens/s':>11}{'bigbatch is':>13}{peak}{'cosine':>10}{'norm':>8}"
    for row in found.rows:
        yield _line(row, found.ratio(row), with_peaks=with_peaks)
    yield ""
    for line in dict.fromkeys(f"{row.name}: {'; '.join([row.about, *row.notes])}" for row in found.rows):
        yield from _paragraph(line)
    yield from _paragraph(
        "samples: in a micro-batch. tokens/s: median of the rounds, from before the first micro-batch until the device "
        "has made the step. cosine, norm: of the gradient that the optimizer was given, beside that of the mean over "
        "all labels of the batch, in float32, one sequence at a time; 1 and 1 are the same update."
    )


def _where(found: "BenchmarkResult") -> str:
    known = [f"{name} {version}" if version else f"no {name}" for name, version in versions().items()]
    return f"{device_name(found)}, {', '.join(known)}, bigbatch {__version__}, Python {platform.python_version()}"


def device_name(found: "BenchmarkResult") -> str:
    """Name the card, or the processor with the threads that were used of it."""
    import torch

    if found.device_spec.device.type == "cuda":
        return torch.cuda.get_device_name(found.device_spec.device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def _what(found: "BenchmarkResult") -> str:
    rounds = "1 round" if found.rounds == 1 else f"{found.rounds} rounds"
    limit = "no limit of memory" if found.memory is None else f"memory limited to {found.memory}"
    return (
        f"{found.workload.name}: Qwen2, {found.num_parameters / 1e6:,.1f}M parameters, {found.device_spec.precision}; "
        f"{found.num_sequences} sequences, {found.num_tokens:,} tokens an update; {limit}; {rounds}"
    )


def _line(row: "ContestantResult", ratio: float | None, *, with_peaks: bool) -> str:
    start = f"{row.name:<24}{row.samples or 'auto':>8}"
    if row.tokens_per_s is None:
        return f"{start}  {row.problem or 'no round was timed'}"
    peak = f"{row.peak_bytes / 2**30:>8.2f}" if row.peak_bytes is not None else f"{'–':>8}" if with_peaks else ""
    faster = f"{'–':>13}" if ratio is None else f"{f'× {ratio:.2f}':>13}"
    assert row.similarity is not None, "who was timed was checked before"
    cosine, norm = row.similarity
    return f"{start}{row.tokens_per_s:>11,.0f}{faster}{peak}{cosine:>10.5f}{norm:>8.3f}"


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")


# JSON ------------------------------------------------------------------------------------------------------------


def as_json(found: "BenchmarkResult", options: BenchOptions) -> dict[str, Any]:
    """Turn a comparison into what JSON can hold."""
    return {
        "command": command(options),
        "device": device_name(found),
        "versions": {**versions(), "bigbatch": __version__, "python": platform.python_version()},
        "workload": found.workload.name,
        "precision": found.device_spec.precision,
        "parameters": found.num_parameters,
        "sequences": found.num_sequences,
        "tokens": found.num_tokens,
        "memory": found.memory,
        "rounds": found.rounds,
        "rows": [_row_as_json(row, found.ratio(row)) for row in found.rows],
    }


def _row_as_json(row: "ContestantResult", ratio: float | None) -> dict[str, Any]:
    cosine, norm_ratio = row.similarity or (None, None)
    return {
        "name": row.name,
        "about": row.about,
        "samples": row.samples,
        "tokens_per_s": row.tokens_per_s,
        "speeds": list(row.speeds),
        "ratio": ratio,
        "peak_bytes": row.peak_bytes,
        "cosine": _finite(cosine),
        "norm_ratio": _finite(norm_ratio),
        "problem": row.problem,
        "notes": list(row.notes),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and value - value == 0 else None


def _writable(path: Path) -> Path:
    """Check before anything is spent that a file can be written there."""
    if path.is_dir():
        raise InputError(f"--save {path} is a folder: name a file in it, such as {path / 'bench.txt'}.")
    folder = path.parent
    if not folder.is_dir():
        raise InputError(
            f"--save {path} cannot be written: there is no folder {folder}. Make it, or name another file."
        )
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise InputError(f"--save {path} cannot be written: permission is denied. Name another file.")
    return path
