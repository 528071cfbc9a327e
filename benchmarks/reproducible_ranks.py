"""Fingerprints of `bigbatch train --reproducible` on one and on several cards, killed, and resumed on fewer.

    python benchmarks/reproducible_ranks.py --ranks 2,4          # 4 CUDA cards of one host, some minutes
    python benchmarks/reproducible_ranks.py --ranks 2 --one-card --at-once 6       # both on one card, over gloo
    python benchmarks/reproducible_ranks.py --device cpu --ranks 2 --steps 8          # gloo, to try the script

Small Llama and GPT-2 models with dropout 0.1, and a Qwen2 without, whose rows are packed on CUDA in bfloat16 and whose
vocabulary is large enough for a loss in chunks, in float32 and under bfloat16 autocast, train 50 updates: on one card
with micro-batches of one quantum and with token budgets of 4,096 and 16,384, on each number of ranks over NCCL, and on
the most ranks until one is killed, then on half as many. On CUDA all runs go on at the same time, or as many as
``--at-once`` says; with ``--compile layers`` layers are compiled. Each run is compared with the first: the
fingerprints of the gradient and of the parameters of every update, and the bytes of the saved model. The table says
whether layers were compiled, and how many of their calls ran eagerly nevertheless. The exit code is 1 if a run differs.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Semaphore

import torch

from bigbatch.lm.runs.file_names import IDENTITY
from bigbatch.lm.runs.fingerprints import first_difference, read_fingerprints
from bigbatch.lm.runs.identity import read_identity
from bigbatch.lm.training.resume import COMPILED
from launched_ranks import kill_rank, last_line, launch, updates, wait_for, wait_for_end

MODELS = {
    "llama": {
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.1,
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": 128, "n_layer": 3, "n_head": 4, "attn_pdrop": 0.1, "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
    },
    "qwen2": {
        "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 20_000,
    },
}  # fmt: skip
PRECISIONS = {"cuda": ("float32", "bf16"), "cpu": ("float32",)}
QUANTUM = 2


@dataclass(frozen=True)
class Way:
    """One run: its ranks, its flags, and the ranks that resume it after it was killed."""

    name: str
    ranks: int
    flags: tuple[str, ...] = ()
    then: int = 0


@dataclass
class Report:
    """Lines of the table, and how many runs differ."""

    lines: list[str] = field(default_factory=list)
    different: int = 0


def ways(ranks: list[int]) -> Iterator[Way]:
    """Yield the runs; all others are compared with the first."""
    yield Way("1, one quantum at a time", 1, ("--microbatch", str(QUANTUM)))
    for budget in (4_096, 16_384):
        yield Way(f"1, budget {budget:,}", 1, ("--token-budget", str(budget)))
    for size in ranks:
        yield Way(f"{size}, budget 4,096", size, ("--token-budget", "4096"))
    most = max(ranks)
    yield Way(f"{most}, killed, then {most // 2}", most, ("--token-budget", "4096"), then=most // 2)


def run(way: Way, words: list[str], out: Path, steps: int, command: Sequence[str]) -> str | None:
    """Run to the end; return what went wrong."""
    log = out.with_suffix(".log")
    process = launch(way.ranks, [*words, *way.flags, "--out", str(out)], log, command=command)
    if way.then:
        wait_for(lambda: updates(out) > steps // 2, process)
        kill_rank(process, 1)
        process.wait()
        done = updates(out)
        if not steps // 2 < done < steps:
            return f"was to be killed in mid-run, but had {done} updates: {last_line(log)}"
        process = launch(way.then, ["resume", str(out)], log, command=command)
        problem = wait_for_end(process, log)
        resumed = re.search(r"^resuming .* after update \d+$", log.read_text(errors="replace"), re.MULTILINE)
        return problem or (None if resumed else "was resumed without a checkpoint")
    return wait_for_end(process, log)


def compare(out: Path, first: Path, steps: int) -> str | None:
    """Return how a run differs from the first one."""
    one, other = read_fingerprints(first), read_fingerprints(out)
    if sorted(other.parameters) != list(range(1, steps + 1)):
        return f"has {len(other.parameters)} updates"
    if difference := first_difference(one, other):
        what = "gradients" if difference.is_gradient else "parameters"
        return f"DIFFERENT from update {difference.step} on: {what} of {len(difference.names)} parameters"
    bits = [(folder / "model" / "model.safetensors").read_bytes() for folder in (first, out)]
    return None if bits[0] == bits[1] else "DIFFERENT saved model"


def compilation_of(out: Path) -> str:
    """Return whether the layers of a run were compiled, and how many calls ran eagerly."""
    if not (out / IDENTITY).is_file() or not (read_identity(out).facts or {}).get(COMPILED):
        return "eager"
    found = re.search(r"([0-9,]+) of ([0-9,]+) calls of compiled layers", out.with_suffix(".log").read_text())
    return f"compiled ({found[1]} of {found[2]} calls eager)" if found else "compiled"


def run_model(
    kind: str, precision: str, options: argparse.Namespace, folder: Path, report: Report, free: Semaphore
) -> None:
    """Run one model in every way, as many at the same time as are free, and add a line for each."""
    config = folder / f"{kind}-{precision}.json"
    config.write_text(json.dumps({"vocab_size": 500, "max_position_embeddings": 256, **MODELS[kind]}))
    words = [
        "train", "--model-config", str(config), "--tokenizer", "train:500", "--data", str(folder / "texts.jsonl"),
        "--device", options.device, "--precision", precision, "--max-length", "256", "--global-batch", "60",
        "--lr", "0.01", "--steps", str(options.steps), "--checkpoint-every", str(max(1, options.steps // 5)),
        "--reproducible", "--quantum", str(QUANTUM), "--validation-fraction", "0", "--no-cache",
        "--compile", options.compile,
    ]  # fmt: skip
    command = [str(Path(__file__).with_name("one_card.py"))] if options.one_card else ["-m", "bigbatch"]
    found = list(ways(options.ranks))
    outs = [folder / f"{kind}-{precision}-{number}" for number in range(len(found))]

    def run_one(way: Way, out: Path) -> str | None:
        with free:
            return run(way, words, out, options.steps, command)

    with ThreadPoolExecutor(len(found)) as pool:
        ended = [pool.submit(run_one, way, out) for way, out in zip(found, outs, strict=True)]
        for way, out, future in zip(found, outs, ended, strict=True):
            result = future.result() or (ended[0].result() and "nothing to compare with")
            result = result or compare(out, outs[0], options.steps)
            report.different += result is not None
            report.lines.append(
                f"{kind:<6} {precision:<7} {way.name:<28} {result or 'equal':<8} {compilation_of(out)}".rstrip()
            )
            print(report.lines[-1], flush=True)


def main() -> int:
    """Print one line for each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=lambda text: [int(size) for size in text.split(",")], default=[2, 4])
    parser.add_argument("--models", choices=[*MODELS], nargs="+", default=[*MODELS])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--compile", choices=("auto", "layers", "none"), default="auto")
    parser.add_argument("--one-card", action="store_true", help="all ranks on the first card, over gloo")
    parser.add_argument("--at-once", type=int, default=100, help="runs at the same time")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    report = Report([f"{name}, torch {torch.__version__}; quantum {QUANTUM}, {options.steps} updates"])
    print(report.lines[0], flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        texts = [" ".join(f"item {n} is {n * n % 97}" for n in range(k, k + 9 + k % 31)) for k in range(600)]
        (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        found = [(kind, precision) for kind in options.models for precision in PRECISIONS[options.device]]
        free = Semaphore(options.at_once)
        with ThreadPoolExecutor(len(found) if options.device == "cuda" else 1) as pool:
            for ended in [pool.submit(run_model, *each, options, folder, report, free) for each in found]:
                ended.result()
    report.lines.append("all equal" if not report.different else f"{report.different} are not")
    print(report.lines[-1])
    if options.out is not None:
        options.out.write_text("\n".join(report.lines) + "\n", encoding="utf-8")
    return int(report.different > 0)


if __name__ == "__main__":
    sys.exit(main())
