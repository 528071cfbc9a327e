"""Train the tiny model from random weights on preferences and queries made from docstrings of the standard library.

    python benchmarks/preferences.py

The pairs: the name of a function as prompt, the first paragraph of its docstring as the chosen answer, and its words in
another order as the rejected one. The queries: the words of the name of a function, its docstring as the positive
passage, and another docstring as the negative one. 5 % are held out. Prints what the first and the last validation of
each run says about them. Minutes on two cores.
"""

import ast
import json
import platform
import random
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bigbatch.cli import main

SHORTEST, LONGEST = 6, 30  # words
RUNS = {
    "reward": ("pairs.jsonl", ["--steps", "80", "--global-batch", "32", "--lr", "2e-3"]),
    "dpo": ("pairs.jsonl", ["--steps", "80", "--global-batch", "32", "--lr", "2e-3"]),
    "embedding": ("queries.jsonl", ["--steps", "120", "--global-batch", "64", "--lr", "1e-3", "--temperature", "0.1"]),
}


def docstrings() -> Iterator[tuple[str, list[str]]]:
    """Yield names and the words of docstrings, each once."""
    seen = set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore"))):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or not (text := ast.get_docstring(node)):
                continue
            words = text.split("\n\n")[0].split()
            if SHORTEST <= len(words) <= LONGEST and tuple(words) not in seen:
                seen.add(tuple(words))
                yield node.name, words


def write_data(folder: Path) -> int:
    """Write both files; return the number of pairs."""
    generator = random.Random(0)
    found = list(docstrings())
    generator.shuffle(found)
    with (folder / "pairs.jsonl").open("w") as pairs, (folder / "queries.jsonl").open("w") as queries:
        for name, words in found:
            while (other := generator.sample(words, len(words))) == words:
                pass
            pair = {
                "prompt": f"{name}: ",
                "chosen": " ".join(words),
                "rejected": " ".join(other),
            }
            query = {
                "query": name.replace("_", " "),
                "positive": " ".join(words),
                "negative": " ".join(generator.choice(found)[1]),
            }
            pairs.write(json.dumps(pair) + "\n")
            queries.write(json.dumps(query) + "\n")
    return len(found)


def run(folder: Path, objective: str) -> None:
    """Train one run, and note its results."""
    data, words = RUNS[objective]
    out = folder / objective
    common = [
        "--max-length",
        "96",
        "--out",
        str(out),
        "--data",
        str(folder / data),
        "--token-budget",
        "4096",
        "--validation-every",
        "20",
    ]
    assert main(["train", "--objective", objective, *common, *words]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if "validation_loss" in row]
    for row in (held_out[0], held_out[-1]):
        shown = "  ".join(f"{name} {row[f'validation_{name}']:.3f}" for name in ("loss", "accuracy"))
        margin = f"  margin {row['validation_margin']:.3f}" if "validation_margin" in row else ""
        RESULTS.append(f"{objective:<10} update {row['step']:>4}  {shown}{margin}")


RESULTS: list[str] = []

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        number = write_data(Path(name))
        for objective in sys.argv[1:] or RUNS:
            run(Path(name), objective)
    print(f"\nPython {platform.python_version()}: {number:,} docstrings; held out:")
    print("\n".join(RESULTS))
