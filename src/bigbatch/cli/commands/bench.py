"""``bigbatch bench``: the same update with every tool, as a table or one JSON object."""

import os
import platform
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbatch import __version__
from bigbatch.cli.console import make_console, progress_display, quiet_libraries
from bigbatch.cli.exit_codes import DONE, FAILED
from bigbatch.cli.options import BenchOptions
from bigbatch.cli.output import wrap
from bigbatch.errors import InputError
from bigbatch.lm.bench.entries import Entry, default_entries, read_entry, versions
from bigbatch.lm.files import file_kind

if TYPE_CHECKING:
    from bigbatch.lm.bench.benchmark import BenchmarkResult, ContestantResult
    from bigbatch.lm.bench.workload import Workload

WIDTH = 100
TABLE_COLUMNS = 82
SHARE_COLUMNS = 8


def run(options: BenchOptions) -> int:
    """Print the comparison; return 1 only if bigbatch was run and has no timing."""
    path = None if options.save is None else _writable(options.save)
    console = make_console()
    with progress_display(make_console(stderr=True)) as progress:
        progress("loading torch and transformers")
        from bigbatch.lm.bench.benchmark import run_benchmark

        quiet_libraries()
        workload = find_workload(options.workload)
        memory = options.memory or workload.memory
        result = run_benchmark(workload, entries_of(options), memory=memory, rounds=options.rounds, progress=progress)
    if options.as_json:
        import json

        console.print_unbroken(json.dumps(as_json(result, options)))
    else:
        for line in describe(result, width=console.width if console.is_terminal else WIDTH):
            console.print(line)
    if path is not None:
        path.write_text("\n".join([f"$ {command(options)}", *describe(result), ""]), encoding="utf-8")
    return FAILED if result.ours is not None and result.ours.tokens_per_s is None else DONE


def find_workload(name: str) -> "Workload":
    """Return the workload by name; ``auto`` is w if CUDA is available, else w-small."""
    import torch

    from bigbatch.lm.bench.workload import WORKLOADS

    cuda = torch.cuda.is_available()
    if name not in ("auto", "w-small") and not cuda:
        raise InputError(f"--workload {name} needs a CUDA device, but torch finds none: use --workload w-small.")
    return WORKLOADS[("w" if cuda else "w-small") if name == "auto" else name]


def entries_of(options: BenchOptions) -> tuple[Entry, ...]:
    """Return the tools to run, each once."""
    if options.only is None:
        return default_entries()
    return tuple(dict.fromkeys(read_entry(text) for text in options.only))


def command(options: BenchOptions) -> str:
    """Return the command line that reproduces the comparison, with its environment variable."""
    arguments = ["bigbatch", "bench"]
    for name in BenchOptions.model_fields:
        value = getattr(options, name)
        if name in options.model_fields_set and value is not None and name != "as_json":
            arguments += [f"--{name}", ",".join(value) if isinstance(value, tuple) else str(value)]
    allocator = os.environ.get("PYTORCH_ALLOC_CONF")
    return (f"PYTORCH_ALLOC_CONF={shlex.quote(allocator)} " if allocator else "") + shlex.join(arguments)


# table -----------------------------------------------------------------------------------------------------------


def describe(result: "BenchmarkResult", *, width: int = WIDTH) -> Iterator[str]:
    """Yield the lines of the table and the notes below it; in less than ``width`` columns, a line for each row."""
    yield _environment(result)
    yield _workload_line(result)
    yield ""
    with_peaks = any(row.peak_bytes is not None for row in result.rows)
    with_share = result.matrix_flops_per_s is not None
    columns = TABLE_COLUMNS - (0 if with_peaks else 8) + (SHARE_COLUMNS if with_share else 0)
    if width < columns:
        yield from (_sentence(row, result.ratio(row), result.share(row)) for row in result.rows)
    else:
        peak = f"{'GiB':>8}" if with_peaks else ""
        share = f"{'share':>{SHARE_COLUMNS}}" if with_share else ""
        yield f"{'':<24}{'samples':>8}{'tokens/s':>11}{'speedup':>13}{share}{peak}{'cosine':>10}{'norm':>8}"
        for row in result.rows:
            yield _line(row, result.ratio(row), result.share(row), with_peaks=with_peaks)
    yield ""
    for line in dict.fromkeys(f"{row.name}: {'; '.join([row.about, *row.notes, *_start(row)])}" for row in result.rows):
        yield from _paragraph(line, width)
    yield from _paragraph(
        "samples: per micro-batch. tokens/s: median of the rounds, timed from the first micro-batch until the device "
        "has finished the optimizer step. speedup: tokens/s of bigbatch divided by that of this row. cosine, norm: "
        "cosine similarity and norm ratio of the gradient passed to the optimizer and the full-batch gradient (mean "
        "over all labels, float32, one sequence at a time); 1 and 1 mean the same update."
        + _about_share(result.matrix_flops_per_s),
        width,
    )


def _start(row: "ContestantResult") -> list[str]:
    return [] if row.first_update_s is None else [f"first update after {row.first_update_s:.1f} s"]


def _about_share(matrix_flops_per_s: float | None) -> str:
    if matrix_flops_per_s is None:
        return ""
    return (
        f" share: of {matrix_flops_per_s / 1e12:.0f} TFLOP/s, the rate of large bf16 matrix products on this card; per "
        "token 6 operations for each weight (4 for a frozen one), and those of attention within documents."
    )


def _environment(result: "BenchmarkResult") -> str:
    libraries = [f"{name} {version}" if version else f"no {name}" for name, version in versions().items()]
    return f"{device_name(result)}, {', '.join(libraries)}, bigbatch {__version__}, Python {platform.python_version()}"


def device_name(result: "BenchmarkResult") -> str:
    """Return the name of the GPU, or the CPU architecture with the number of threads."""
    import torch

    if result.device_spec.device.type == "cuda":
        return torch.cuda.get_device_name(result.device_spec.device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def _workload_line(result: "BenchmarkResult") -> str:
    rounds = "1 round" if result.rounds == 1 else f"{result.rounds} rounds"
    limit = "no memory limit" if result.memory is None else f"memory limited to {result.memory}"
    return (
        f"{result.workload.name}: Qwen2, {result.num_parameters / 1e6:,.1f}M parameters, "
        f"{result.device_spec.precision}; {result.num_sequences} sequences, {result.num_tokens:,} tokens per update; "
        f"{limit}; {rounds}"
    )


def _line(row: "ContestantResult", ratio: float | None, share: float | None, *, with_peaks: bool) -> str:
    start = f"{row.name:<24}{row.samples or 'auto':>8}"
    if row.tokens_per_s is None:
        return f"{start}  {row.problem or 'no timed round'}"
    peak = f"{row.peak_bytes / 2**30:>8.2f}" if row.peak_bytes is not None else f"{'–':>8}" if with_peaks else ""
    speedup = f"{'–':>13}" if ratio is None else f"{f'× {ratio:.2f}':>13}"
    assert row.similarity is not None, "a timed row has its gradient compared"
    cosine, norm = row.similarity
    of_rate = "" if share is None else f"{share:>{SHARE_COLUMNS}.3f}"
    return f"{start}{row.tokens_per_s:>11,.0f}{speedup}{of_rate}{peak}{cosine:>10.5f}{norm:>8.3f}"


def _sentence(row: "ContestantResult", ratio: float | None, share: float | None) -> str:
    """Format a row for a terminal that is narrower than the table."""
    start = f"{row.name}: samples {row.samples or 'auto'}, "
    if row.tokens_per_s is None:
        return start + (row.problem or "no timed round")
    assert row.similarity is not None, "a timed row has its gradient compared"
    speedup = "" if ratio is None else f", speedup × {ratio:.2f}"
    peak = "" if row.peak_bytes is None else f", {row.peak_bytes / 2**30:.2f} GiB"
    cosine, norm = row.similarity
    of_rate = "" if share is None else f", share {share:.3f}"
    return f"{start}tokens/s {row.tokens_per_s:,.0f}{speedup}{of_rate}{peak}, cosine {cosine:.5f}, norm {norm:.3f}"


def _paragraph(text: str, width: int) -> list[str]:
    return wrap(text, min(WIDTH, width)).splitlines()


# JSON ------------------------------------------------------------------------------------------------------------


def as_json(result: "BenchmarkResult", options: BenchOptions) -> dict[str, Any]:
    """Convert a comparison to JSON values."""
    return {
        "command": command(options),
        "device": device_name(result),
        "versions": {**versions(), "bigbatch": __version__, "python": platform.python_version()},
        "workload": result.workload.name,
        "precision": result.device_spec.precision,
        "parameters": result.num_parameters,
        "sequences": result.num_sequences,
        "tokens": result.num_tokens,
        "memory": result.memory,
        "rounds": result.rounds,
        "flops": result.flops,
        "matrix_flops_per_s": result.matrix_flops_per_s,
        "rows": [_row_as_json(row, result.ratio(row), result.share(row)) for row in result.rows],
    }


def _row_as_json(row: "ContestantResult", ratio: float | None, share: float | None) -> dict[str, Any]:
    cosine, norm_ratio = row.similarity or (None, None)
    return {
        "name": row.name,
        "about": row.about,
        "samples": row.samples,
        "tokens_per_s": row.tokens_per_s,
        "speeds": list(row.speeds),
        "ratio": ratio,
        "share": share,
        "first_update_s": row.first_update_s,
        "peak_bytes": row.peak_bytes,
        "cosine": _finite(cosine),
        "norm_ratio": _finite(norm_ratio),
        "problem": row.problem,
        "notes": list(row.notes),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and value - value == 0 else None


def _writable(path: Path) -> Path:
    """Check that a file can be written at ``path``, before the benchmark starts."""
    if path.is_dir():
        raise InputError(f"--save {path} is a folder: pass a file, such as {path / 'bench.txt'}.")
    if path.exists() and not path.is_file():
        raise InputError(f"--save {path} is {file_kind(path)}: pass a file, such as bench.txt.")
    folder = path.parent
    if not folder.is_dir():
        raise InputError(
            f"--save {path} cannot be written: the folder {folder} does not exist. Create it, or pass another file."
        )
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise InputError(f"--save {path} cannot be written: permission denied. Pass another file.")
    return path
