"""`bigbatch train` within memory limits: what it chooses, its speed and peak, and when its first update has ended.

    python benchmarks/limited_runs.py --model 1.5 --memory none,12GiB,8GiB --windows 1,4 --out FILE     # one H200
    python benchmarks/limited_runs.py --model w --memory 24GiB,24GiB --updates 12       # a first start, and a second
    python benchmarks/limited_runs.py --dry                                    # a tiny model on the CPU, to try it

``--model w`` is the model of workload W of `bigbatch bench`; the others are Llamas of so many billion parameters, those
of `offload.py`, with ``--offload auto`` where memory is limited. All weights are trained by AdamW. A window has 92,493
tokens, or so many times that, of documents cut from the files of Python's standard library, with lengths as in W.

Each run is a process of its own and ends, without saving anything, after ``--updates`` updates or ``--limit`` seconds.
The runs share caches that are empty at first: the first run is a first start, but for the files that the operating
system has read. Two equal runs also share the micro-batch that the first one chose. Seconds and tokens/s are medians
from the third update on; *planned* are the seconds that the level of offload was chosen by, before anything is run, and
*predicted* those after micro-batches were timed; *peak* is the highest memory of torch's allocator since the size of
micro-batches was chosen; *failed* are attempts that ran out of memory and were repeated.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigbatch.lm.bench.workload import W
from launched_ranks import updates
from offload import GIB, LARGE, SMALL

WINDOW, DRY_WINDOW = 92_493, 2_000  # tokens
BYTES_OF_TOKEN = 4.0  # roughly, for the tokenizer that is trained here
LENGTHS = 5.55, 0.8  # mean and deviation of the logarithm of the tokens of a document, as in W


@dataclass(frozen=True)
class Run:
    """One run and what it printed and measured; None where it did not get so far.

    ``phases`` has, for each line about what the run does next, the seconds from its start.
    """

    memory: str
    windows: int
    level: str
    recomputed: str
    size: int | None
    planned_s: float | None
    predicted_s: float | None
    predicted_gib: float | None
    first_s: float | None
    phases: Mapping[str, float]
    rows: list[dict[str, Any]]

    @property
    def seconds(self) -> float | None:
        """Seconds of an update."""
        return statistics.median(row["elapsed_s"] for row in self.rows[2:]) if len(self.rows) > 2 else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second of an update."""
        return statistics.median(row["tokens"] / row["elapsed_s"] for row in self.rows[2:]) if self.rows[2:] else None


def write_documents(path: Path) -> list[str]:
    """Write documents with the lengths of W, and return their texts."""
    generator, texts = random.Random(0), []
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in file.parts:
            continue
        text, start = file.read_text(encoding="utf-8", errors="replace"), 0
        while start < len(text):
            tokens = min(2_000, max(16, int(math.exp(generator.gauss(*LENGTHS)))))
            end = start + int(tokens * BYTES_OF_TOKEN)
            texts += [text[start:end]] if text[start:end].strip() else []
            start = end
    generator.shuffle(texts)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return texts


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    """Train a tokenizer once for all runs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[:3_000], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def config_of(model: str) -> dict[str, Any]:
    """Return the configuration of a model."""
    if model == "w":
        return {"model_type": "qwen2", **W.model, "max_position_embeddings": W.longest}
    shape = SMALL if model == "tiny" else LARGE[model]
    return {
        "model_type": "llama",
        **shape,
        "num_key_value_heads": shape["num_attention_heads"],
        "vocab_size": 32_000,
        "max_position_embeddings": W.longest,
        "tie_word_embeddings": False,
    }


def train(options: argparse.Namespace, folder: Path, memory: str, windows: int, number: int) -> Run:
    """Run until there are enough updates, and end the run with all of its processes."""
    out, log = folder / "runs" / str(number), folder / f"{number}.log"
    window = DRY_WINDOW if options.dry else WINDOW
    words = [
        "train", "--model-config", str(folder / "model.json"), "--tokenizer", str(folder / "tokenizer"),
        "--data", str(folder / "documents.jsonl"), "--global-batch-tokens", str(windows * window),
        "--max-length", str(W.longest), "--steps", "1000", "--warmup-steps", "10", "--lr", "1e-5",
        "--validation-fraction", "0", "--checkpoint-every", "1000", "--out", str(out),
    ]  # fmt: skip
    words += [] if memory == "none" else ["--memory", memory]
    words += [] if memory == "none" or options.model == "w" else ["--offload", options.offload]
    caches = {"XDG_CACHE_HOME": str(folder / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "bigbatch", *words],
            stdout=file,
            stderr=file,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **caches},
            start_new_session=True,
        )
    start_s, phases = time.monotonic(), dict[str, float]()
    while process.poll() is None and time.monotonic() < start_s + options.limit and updates(out) < options.updates:
        time.sleep(0.1)
        for line in re.findall(r"^.* …$", text_of(log), re.MULTILINE):
            phases.setdefault(line, time.monotonic() - start_s)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    found = read_run(text_of(log), phases, out, memory, windows)
    for large in ("model", "checkpoints"):
        shutil.rmtree(out / large, ignore_errors=True)
    return found


def text_of(log: Path) -> str:
    """Return what a run has printed so far."""
    return log.read_text(errors="replace").replace("\r", "\n")


def read_run(log: str, phases: Mapping[str, float], out: Path, memory: str, windows: int) -> Run:
    """Collect what a run printed and measured."""

    def number(pattern: str) -> float | None:
        found = re.search(pattern, log)
        return float(found[1].replace(",", "")) if found else None

    level = re.search(r"^offload (\w+), chosen", log, re.MULTILINE)
    recomputed = re.search(r"activation checkpointing in (all layers|every second layer)", log)
    first = re.search(r"^first update (?:(\d+):)?(\d+)(?: s)? after", log, re.MULTILINE)
    size = number(r"at most ([\d,]+) tokens per micro-batch")
    metrics = out / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    if not rows:
        print("".join(f"  {line}\n" for line in log.splitlines()[-5:]), end="", flush=True)
    return Run(
        memory,
        windows,
        level[1] if level else "none",
        {"all layers": "all", "every second layer": "half"}[recomputed[1]] if recomputed else "none",
        None if size is None else int(size),
        number(r"chosen by auto: .*about ([\d.]+) s an update"),
        number(r"(?m)^about ([\d.]+) s an update"),
        number(r"peak ([\d.]+) GiB of [\d.]+ GiB"),
        60.0 * int(first[1] or 0) + int(first[2]) if first else None,
        phases,
        rows,
    )


def line_of(run: Run, base: Run | None) -> str:
    """Return the line of the table."""

    def text(value: float | None, shape: str) -> str:
        return "–" if value is None else format(value, shape)

    speed = run.tokens_per_s
    share = speed / base.tokens_per_s if speed and base is not None and base.tokens_per_s else None
    peak = max((row["peak_bytes"] for row in run.rows), default=None)
    failed = sum(row.get("retries", 0) for row in run.rows)
    return (
        f"{run.windows:>6} {run.memory:>8} {run.level:>10} {run.recomputed:>10} {text(run.size, ','):>8} "
        f"{text(run.planned_s, '.2f'):>8} {text(run.predicted_s, '.2f'):>10} "
        f"{text(run.seconds, '.2f'):>9} {text(speed, ',.0f'):>9} "
        f"{text(share, '.3f'):>9} {text(run.predicted_gib, '.1f'):>10} "
        f"{text(peak and peak / GIB, '.2f'):>6} {failed:>7} {text(run.first_s, '.0f'):>7}"
    )


def main() -> None:
    """Print one line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("w", *LARGE, "tiny"), default="1.5")
    parser.add_argument("--memory", default="none,12GiB,8GiB", help="limits in their order, none for no limit")
    parser.add_argument("--offload", default="auto", help="with a limit")
    parser.add_argument("--windows", default="1", help="tokens of an update, in windows of W")
    parser.add_argument("--updates", type=int, default=6, help="of each run")
    parser.add_argument("--limit", type=float, default=120, help="seconds of each run")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    if options.dry:
        options.model, options.memory, options.updates = "tiny", "none,4GiB", 4
    name = "CPU" if options.dry else torch.cuda.get_device_name()
    lines = [
        f"{name}, torch {torch.__version__}, model {options.model}, offload {options.offload}",
        f"{'window':>6} {'memory':>8} {'offload':>10} {'recomputed':>10} {'tokens':>8} {'planned':>8} "
        f"{'predicted':>10} {'s':>9} {'tokens/s':>9} {'of none':>9} {'predicted':>10} {'peak':>6} "
        f"{'failed':>7} {'first s':>7}",
    ]
    print("\n".join(lines), flush=True)
    details: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_tokenizer(folder / "tokenizer", write_documents(folder / "documents.jsonl"))
        (folder / "model.json").write_text(json.dumps(config_of(options.model)))
        number = 0
        for windows in map(int, options.windows.split(",")):
            base: Run | None = None
            for memory in options.memory.split(","):
                found = train(options, folder, memory, windows, number)
                number += 1
                base = found if memory == "none" else base
                lines.append(line_of(found, base))
                print(lines[-1], flush=True)
                details += [f"{windows} × W, {memory}: {second:.0f} s {line}" for line, second in found.phases.items()]
                details += [f"{windows} × W, {memory}: {json.dumps(row)}" for row in found.rows]
    if options.out is not None:
        options.out.write_text("\n".join([*lines, "", *details]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
