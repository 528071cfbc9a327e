"""Draw the loss of one training run by how its batches are cut: the usual accumulation compared with bigbatch.

    make demo                                                   # or: python examples/demo.py [--output demo.svg]

A small transformer learns the docstrings of Python's standard library, whose lengths differ widely. The same run, with
the same batches of 32 docstrings in the same order, is repeated with each batch cut in 1, 2, 4, 8 and 16 micro-batches:

- usual: the mean loss of each micro-batch, divided by their number, as most training loops accumulate it
- bigbatch: the sum of the losses and the number of tokens, divided once

Every run is judged by the same figure: the mean loss over all tokens of the batch, before its update.
"""

import argparse
import ast
import collections
import importlib.util
import re
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch

CUTS = (1, 2, 4, 8, 16)
BATCH_SIZE = 32
MAX_WORDS = 128
VOCABULARY_SIZE = 300
NUM_TEXTS = 2500
HELD_OUT = 64
EVALUATE_EVERY = 5
UNKNOWN, IGNORED = 0, -100

Batch = tuple[Tensor, Tensor]
"""Tokens and labels, ``[samples, longest of the batch]`` each; a label that is `IGNORED` has no loss."""


def docstrings(count: int) -> list[str]:
    """Return the first docstrings of functions and classes of the standard library, by file name."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found += [text] if (text := ast.get_docstring(node)) else []
        if len(found) >= count:
            return found[:count]
    return found


def numbered(texts: Sequence[str]) -> list[Tensor]:
    """Cut texts into words and marks, and number them by frequency; rare ones are `UNKNOWN`."""
    words = [re.findall(r"\w+|[^\w\s]|\n", text)[: MAX_WORDS + 1] for text in texts]
    common = collections.Counter(word for sample in words for word in sample).most_common(VOCABULARY_SIZE - 1)
    number = {word: index for index, (word, _) in enumerate(common, start=1)}
    return [torch.tensor([number.get(word, UNKNOWN) for word in sample]) for sample in words if len(sample) > 1]


def collate(samples: Sequence[Tensor]) -> Batch:
    """Pad samples to the longest."""
    tokens = nn.utils.rnn.pad_sequence([sample[:-1] for sample in samples], batch_first=True)
    labels = nn.utils.rnn.pad_sequence([sample[1:] for sample in samples], batch_first=True, padding_value=IGNORED)
    return tokens, labels


def make_data(updates: int) -> tuple[Batch, list[Batch]]:
    """Return the held-out texts, and the batches of all updates."""
    samples = numbered(docstrings(NUM_TEXTS))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(samples), generator=generator).tolist()
    held_out, rest = order[:HELD_OUT], order[HELD_OUT:]
    picks = torch.randint(len(rest), (updates, BATCH_SIZE), generator=generator).tolist()
    return collate([samples[index] for index in held_out]), [
        collate([samples[rest[pick]] for pick in row]) for row in picks
    ]


class WordModel(nn.Module):
    """Predicts the next word from the last four (Bengio et al., "A Neural Probabilistic Language Model", 2003)."""

    def __init__(self, width: int = 32, context: int = 4) -> None:
        super().__init__()
        self.context = context
        self.words = nn.Embedding(VOCABULARY_SIZE, width)
        self.hidden = nn.Linear(context * width, 2 * width)
        self.head = nn.Linear(2 * width, VOCABULARY_SIZE)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next word, ``[samples, words, vocabulary]``."""
        embedded = self.words(tokens)
        earlier = [F.pad(embedded, (0, 0, back, 0))[:, : tokens.shape[1]] for back in range(self.context)]
        logits: Tensor = self.head(torch.tanh(self.hidden(torch.cat(earlier, -1))))
        return logits


def loss_of(model: nn.Module, batch: Batch, reduction: str) -> Tensor:
    """Return the mean or the sum of the losses of a micro-batch, padded no longer than it needs."""
    tokens, labels = batch
    longest = int((labels != IGNORED).sum(1).max())
    logits = model(tokens[:, :longest])
    return F.cross_entropy(
        logits.flatten(0, 1), labels[:, :longest].flatten(), ignore_index=IGNORED, reduction=reduction
    )


def sum_and_items(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return what bigbatch needs of a micro-batch: the sum of its losses, and over how many tokens."""
    return loss_of(model, batch, "sum"), (batch[1] != IGNORED).sum()


def start() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the same new model and optimizer in each call."""
    torch.manual_seed(0)
    model = WordModel()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def usual_step(model: nn.Module, optimizer: torch.optim.Optimizer, cut: int) -> Callable[[Batch], object]:
    """Return the update of most tutorials: the mean of the micro-batches' mean losses."""

    def step(batch: Batch) -> None:
        for part in zip(*(tensor.chunk(cut) for tensor in batch), strict=True):
            (loss_of(model, part, "mean") / cut).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def exact_step(model: nn.Module, optimizer: torch.optim.Optimizer, cut: int) -> Callable[[Batch], object]:
    """Return the update of bigbatch: the sum of all losses, divided once by the number of all tokens."""
    return bigbatch.Engine(model, optimizer, sum_and_items, microbatch=BATCH_SIZE // cut, noise=False).step


WAYS = {"usual accumulation": usual_step, "bigbatch": exact_step}
Losses = dict[str, dict[int, list[float]]]
"""Held-out losses of each run, by the way of accumulation and the number of micro-batches."""


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: Batch) -> float:
    """Return the mean loss over all tokens of texts that are not trained on."""
    loss_sum, items = sum_and_items(model, held_out)
    return (loss_sum / items).item()


def train(way: str, cut: int, batches: Sequence[Batch], held_out: Batch) -> list[float]:
    """Train a new model on the batches; return its held-out losses, the first before any update."""
    model, optimizer = start()
    step = WAYS[way](model, optimizer, cut)
    losses = [held_out_loss(model, held_out)]
    for update, batch in enumerate(batches, start=1):
        step(batch)
        if update % EVALUATE_EVERY == 0:
            losses.append(held_out_loss(model, held_out))
    return losses


def largest_difference(losses: Losses, way: str, cut: int) -> float:
    """Return how far a run's losses ever are from those of the usual loop on uncut batches."""
    whole = losses["usual accumulation"][1]
    return max(abs(loss - reference) for loss, reference in zip(losses[way][cut], whole, strict=True))


def draw(losses: Losses, path: Path) -> None:
    """Draw one panel of loss curves for each way, and one of their distances from the uncut run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, way in zip(panels, WAYS, strict=False):
        for cut, curve in losses[way].items():
            updates = [EVALUATE_EVERY * index for index in range(len(curve))]
            axes.plot(updates, curve, label=str(cut), color=f"C{CUTS.index(cut)}", linewidth=4 / cut**0.5)
        last = [curve[-1] for curves in losses.values() for curve in curves.values()]
        axes.set(title=way, xlabel="update", ylabel="held-out loss per token")
        axes.set_ylim(min(last) - 0.05, max(last) + 0.8)
        axes.legend(title="micro-batches")
    distance = panels[2]
    for way, style in zip(WAYS, ("o-", "s--"), strict=True):
        differences = [largest_difference(losses, way, cut) for cut in CUTS[1:]]
        distance.semilogy(CUTS[1:], [max(value, 1e-8) for value in differences], style, label=way)
    distance.set_xscale("log", base=2)
    distance.set_xticks(CUTS[1:], [str(cut) for cut in CUTS[1:]])
    distance.set(title="difference from the uncut run", xlabel="micro-batches", ylabel="largest difference of the loss")
    distance.legend()
    figure.savefig(path, dpi=120)


def report(losses: Losses) -> str:
    """Return the table of the last losses, and the largest difference of each way."""
    lines = [f"{'micro-batches':>13}" + "".join(f"{way:>20}" for way in WAYS)]
    lines += [f"{cut:>13}" + "".join(f"{losses[way][cut][-1]:>20.6f}" for way in WAYS) for cut in CUTS]
    largest = {way: max(largest_difference(losses, way, cut) for cut in CUTS) for way in WAYS}
    lines += [f"largest difference from the uncut run, {way}: {value:.1e}" for way, value in largest.items()]
    return "\n".join(lines)


def run(updates: int, path: Path) -> Losses:
    """Train every cut in both ways, print what comes out, and draw it."""
    held_out, batches = make_data(updates)
    lengths = torch.cat([(labels != IGNORED).sum(1) for _, labels in batches])
    print(f"{updates} updates of {BATCH_SIZE} docstrings of {lengths.min()} to {lengths.max()} words, cut in", end=" ")
    print(f"{', '.join(map(str, CUTS))} micro-batches; held-out loss per word after the last:", flush=True)
    losses: Losses = {way: {cut: train(way, cut, batches, held_out) for cut in CUTS} for way in WAYS}
    print(report(losses))
    draw(losses, path)
    print(f"picture: {path.resolve()}")
    return losses


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=60, help="updates of each run (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="picture: .png or .svg (%(default)s)")
    options = parser.parse_args(words)
    if options.updates < EVALUATE_EVERY:
        parser.error(f"--updates {options.updates} is too few: the loss is measured every {EVALUATE_EVERY} updates")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error('the picture needs matplotlib: pip install "bigbatch[notebooks]"')
    run(options.updates, options.output)


if __name__ == "__main__":
    main()
