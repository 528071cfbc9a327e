"""``bigbatch inspect``: counts, lengths, samples with what is trained on, and problems of data, before training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bigbatch.cli.console import make_console, progress_display, quiet_libraries
from bigbatch.cli.options import InspectOptions
from bigbatch.cli.output import visible
from bigbatch.cli.run_lookup import check_paths
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.text import plural

if TYPE_CHECKING:
    from rich.text import Text

    from bigbatch.lm.planning.inspection import InspectedSample, Inspection

NO_PROBLEM = 0
PROBLEMS = 1
BAR_COLUMNS = 30
LONGEST_SEGMENT = 800  # characters of a segment that are shown


def run(config: TrainConfig, options: InspectOptions) -> int:
    """Print what is in the data; return 1 if there are problems besides what --skip-broken leaves out."""
    check_paths(config)
    console = make_console()
    with progress_display(console) as progress:
        from bigbatch.lm.planning.inspection import inspect_data

        quiet_libraries()
        inspection = inspect_data(config.resolved(), num_samples=options.samples, progress=progress)
    for note in inspection.notes:
        console.print(note)
    for line in histogram(inspection):
        console.print(line)
    for number, sample in enumerate(inspection.samples, 1):
        for text in shown(sample, number):
            console.print(text)
    console.print("")
    sentences = [f"left out: {sentence}" for sentence in inspection.left_out]
    sentences += [f"problem: {sentence}" for sentence in inspection.problems]
    for line in "\n".join(sentences).splitlines():
        console.print(line)
    if not inspection.problems:
        console.print("no other problems found" if inspection.left_out else "no problems found")
    return PROBLEMS if inspection.problems else NO_PROBLEM


def histogram(inspection: Inspection) -> Iterator[str]:
    """Yield the lines of the length histogram, a power of two on each."""
    if not inspection.lengths:
        return
    yield ""
    yield f"{'tokens':>17}{'sequences':>12}"
    most = max(inspection.lengths.values())
    sizes = [
        1 << power for power in range(min(inspection.lengths).bit_length() - 1, max(inspection.lengths).bit_length())
    ]
    for size in sizes:
        number = inspection.lengths.get(size, 0)
        low = size // 2 + 1 if size > 1 else 1
        yield f"{low:>7,} – {size:>7,}{number:>12,}  {'█' * -(-number * BAR_COLUMNS // most)}".rstrip()


def shown(sample: InspectedSample, number: int) -> Iterator[Text]:
    """Yield the lines of a sample: in front of each, whether it is trained on; in colour where the console has it."""
    from rich.text import Text

    yield Text("")
    yield Text(
        f"sample {number}: {visible(sample.source)}, {plural(sample.num_tokens, 'token')}, "
        f"{sample.num_trained:,} trained on"
    )
    for segment in sample.segments:
        word = "masked" if not segment.weight else "trained" if segment.weight == 1 else f"× {segment.weight:g}"
        style = "green" if segment.weight else "dim"
        for line in _lines(segment.text):
            yield Text(f"  {word:>7} │ {line}", style=style)
            word = ""


def _lines(text: str) -> list[str]:
    """Return the lines of a segment, without control characters, and its line break at the end in words."""
    if len(text) > LONGEST_SEGMENT:
        half = LONGEST_SEGMENT // 2
        text = f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
    ending = "\\n" if text.endswith("\n") else ""
    return (visible(text.removesuffix("\n"), keep="\n\t") + ending).split("\n")
