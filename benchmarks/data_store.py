"""Tokenize once, map many times: speed against `tokenizers` alone, start times, memory, and metrics of long runs.

    python benchmarks/data_store.py [--parts speed start memory metrics] [--documents 1000000] | tee FILE

Text is words drawn from Python's standard library, in documents of 79 characters, as JSON lines. `tokenizers` alone
encodes the same texts, in memory already, 1,000 at a time with `encode_batch` (and `encode_batch_fast`) on all cores;
the store reads, parses, hashes, encodes and writes them. Both run in turn, in rounds. Times of other processes on the
machine affect all of them, so CPU seconds are printed too. Starts are `bigbatch train` and `bigbatch resume` on the
same documents, in new processes, up to the first update. Anonymous memory is that of /proc/self/smaps_rollup, sampled
every 50 ms, above its value after the imports. Files are written to a temporary folder and removed.
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

LETTERS = 79
PARTS = ["speed", "start", "memory", "metrics"]


def words() -> str:
    """Return the text of a part of the standard library, white space joined."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return " ".join(" ".join(path.read_text(encoding="utf-8", errors="ignore") for path in files).split())


def write_documents(path: Path, number: int, source: str) -> None:
    """Write JSON lines of documents of 79 characters."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(number):
            place = draw.randrange(len(source) - LETTERS)
            file.write(json.dumps({"text": source[place : place + LETTERS]}) + "\n")


def write_text(path: Path, megabytes: int, source: str) -> None:
    """Write one file of text with lines of 79 characters."""
    draw = random.Random(1)
    with path.open("w") as file:
        for _ in range(megabytes * 1_000_000 // (LETTERS + 1)):
            place = draw.randrange(len(source) - LETTERS)
            file.write(source[place : place + LETTERS] + "\n")


@contextmanager
def timed(found: dict[str, float]) -> Iterator[None]:
    """Measure wall and CPU seconds, those of ended child processes included."""
    begin_s, begin = time.perf_counter(), os.times()
    yield
    end = os.times()
    found["wall_s"] = time.perf_counter() - begin_s
    found["cpu_s"] = sum(end[:4]) - sum(begin[:4])


def anonymous_mib() -> float:
    """Return the anonymous memory of this process; mapped files do not count."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no line Anonymous")


@contextmanager
def peak_anonymous(found: dict[str, float]) -> Iterator[None]:
    """Sample the anonymous memory of this process."""
    before, done = anonymous_mib(), threading.Event()
    found["above_mib"] = 0.0

    def sample() -> None:
        while not done.wait(0.05):
            found["above_mib"] = max(found["above_mib"], anonymous_mib() - before)

    thread = threading.Thread(target=sample)
    thread.start()
    yield
    done.set()
    thread.join()
    found["above_mib"] = max(found["above_mib"], anonymous_mib() - before)


# children: each is a process of its own ---------------------------------------------------------------------------


def encode_alone(data: str, tokenizer: str, method: str) -> dict[str, float]:
    """Encode the texts of a file with `tokenizers` alone."""
    from tokenizers import Tokenizer

    encode = getattr(Tokenizer.from_file(f"{tokenizer}/tokenizer.json"), method)
    texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]
    found: dict[str, float] = {}
    with timed(found):
        for start in range(0, len(texts), 1000):
            [row.ids for row in encode(texts[start : start + 1000], add_special_tokens=False)]
    return found | {"documents": len(texts)}


def load_data(data: str, tokenizer: str, cache: str, measures: str) -> dict[str, float]:
    """Make or open the data of a run, as every start and resume does, and take a window of the middle."""
    from bigbatch.lm.config.train_config import TrainConfig
    from bigbatch.lm.data.tokenizer import load_tokenizer
    from bigbatch.lm.training.data import DataLoader
    from bigbatch.lm.training.schedule import TrainingSchedule

    loaded = load_tokenizer(tokenizer)
    config = TrainConfig(data=data, model=tokenizer, cache=Path(cache), max_length=128).resolved()
    found: dict[str, float] = {}
    with peak_anonymous(found) if measures == "memory" else timed(found):
        with DataLoader(config, lambda *_: None) as loader:
            run = loader.load(loaded, 128)
        schedule = TrainingSchedule(config, run.training.lengths, order=run.order)
        window = next(schedule.windows(schedule.total_steps // 2, len(run.training) // 2))
        [run.training[i] for i in window]
    return found | {"documents": len(run.training), "tokens": run.training.num_tokens}


def begin(*words: str) -> dict[str, float]:
    """Run a command of `bigbatch` up to its first update; return when that begins and the CPU seconds until then."""
    from bigbatch.cli import main
    from bigbatch.lm.training import trainer

    def stop(*_: object, **__: object) -> None:
        found = {"at_s": time.time(), "cpu_s": sum(os.times()[:2])}
        print(json.dumps(found), file=answer, flush=True)
        os._exit(0)

    trainer.run_update = stop
    answer, sys.stdout = sys.stdout, sys.stderr
    main(list(words))
    raise AssertionError("no update")


def child(*arguments: str) -> dict[str, float]:
    """Run one of the functions above in a new process."""
    command = [sys.executable, __file__, "--child", *arguments]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


# parts ------------------------------------------------------------------------------------------------------------


def speed(folder: Path, documents: int, rounds: int) -> None:
    """Print the speed of the store and of `tokenizers` alone, in turn."""
    data, tokenizer = str(folder / "documents.jsonl"), str(folder / "tokenizer")
    print(f"\nfirst start, {documents:,} documents of {LETTERS} bytes (JSON lines), {rounds} rounds in turn")
    print(f"{'':<34}{'wall s':>8}{'MB/s':>8}{'CPU s':>8}")
    totals: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds):
        for name, arguments in (
            ("tokenizers, encode_batch", ("encode_alone", data, tokenizer, "encode_batch")),
            ("tokenizers, encode_batch_fast", ("encode_alone", data, tokenizer, "encode_batch_fast")),
            ("bigbatch: read, encode, store", ("load_data", data, tokenizer, str(folder / f"cache{number}"), "time")),
        ):
            found = child(*arguments)
            totals.setdefault(name, []).append(found)
            megabytes = documents * LETTERS / 1e6
            print(
                f"{name:<34}{found['wall_s']:>8.1f}{megabytes / found['wall_s']:>8.2f}{found['cpu_s']:>8.1f}",
                flush=True,
            )
    *alone, (_, ours) = totals.items()
    for name, found in alone:
        for unit in ("wall_s", "cpu_s"):
            ratio = sum(one[unit] for one in found) / sum(one[unit] for one in ours)
            print(f"speed relative to {name}, by {unit}: {ratio:.2f}")
    again = child("load_data", data, tokenizer, str(folder / "cache0"), "time")
    print(f"second start or resume, data only: {again['wall_s']:.2f} s wall, {again['cpu_s']:.2f} s CPU")


def starts(folder: Path, rounds: int) -> None:
    """Print the time of whole commands until the first update, with the tokens in the cache."""
    common = ["--data", str(folder / "documents.jsonl"), "--max-length", "128", "--cache", str(folder / "cache-start")]
    common += ["--microbatch", "8", "--global-batch", "8", "--steps", "4", "--checkpoint-every", "2"]
    first = ["train", *common, "--out", str(folder / "started")]
    subprocess.run([sys.executable, "-m", "bigbatch", *first], check=True, capture_output=True)
    shutil.rmtree(folder / "started" / "model")
    shutil.rmtree(max((folder / "started" / "checkpoints").iterdir()))  # the last one, of a run that is complete
    print(f"\n{'whole command until the first update':<40}{'wall s':>8}{'CPU s':>8}{'load':>6}")
    for number in range(rounds):
        for name, words in (
            ("bigbatch train, second start", ["train", *common, "--out", str(folder / f"again{number}")]),
            ("bigbatch resume", ["resume", str(folder / "started")]),
            ("import torch, transformers' model class", []),
        ):
            begin_s = time.time()
            if words:
                found = child("begin", *words)
            else:
                code = "import json, os, time, torch; from transformers import LlamaForCausalLM; import torch._dynamo; "
                code += "print(json.dumps({'at_s': time.time(), 'cpu_s': sum(os.times()[:2])}))"
                command = [sys.executable, "-c", code]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"{name:<40}{found['at_s'] - begin_s:>8.1f}{found['cpu_s']:>8.1f}{os.getloadavg()[0]:>6.1f}", flush=True
            )


def memory(folder: Path, sizes: list[int], text_mb: int, source: str) -> None:
    """Print anonymous memory above the imports of first and second starts."""
    print(f"\n{'anonymous memory above imports':<34}{'first MiB':>10}{'second MiB':>11}{'tokens':>13}")
    tokenizer = str(folder / "tokenizer")
    for number in sizes:
        path = folder / f"memory{number}.jsonl"
        write_documents(path, number, source)
        _memory_row(f"{number:,} documents of {LETTERS} bytes", path, tokenizer, folder / f"cache-memory{number}")
    for part in (text_mb // 4, text_mb):
        path = folder / f"text{part}.txt"
        write_text(path, part, source)
        _memory_row(f"one text of {part} MB", path, tokenizer, folder / f"cache-text{part}")


def _memory_row(name: str, path: Path, tokenizer: str, cache: Path) -> None:
    first, second = (child("load_data", str(path), tokenizer, str(cache), "memory") for _ in range(2))
    print(
        f"{name:<34}{first['above_mib']:>10.0f}{second['above_mib']:>11.0f}{first['tokens']:>13,}",
        flush=True,
    )
    path.unlink()


def metrics(folder: Path, lines: int) -> None:
    """Print time and memory of `bigbatch report` and `bigbatch advise` on a long metrics.jsonl."""
    run = folder / "run"
    command = [sys.executable, "-m", "bigbatch", "train", "--data", str(folder / "few.jsonl"), "--steps", "1"]
    subprocess.run([*command, "--microbatch", "4", "--out", str(run)], check=True, capture_output=True)
    draw = random.Random(2)
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, lines + 1):
            row |= {"step": step, "loss": 5 / (1 + step / 1e5) + draw.random() / 10, "grad_norm": draw.random()}
            row |= {"noise_scale_items": 1000 * draw.random(), "elapsed_s": 0.1, "tokens_per_s": 1e4 * draw.random()}
            file.write(json.dumps(row) + "\n")
    size = (run / "metrics.jsonl").stat().st_size
    print(f"\n{lines:,} lines of metrics.jsonl, {size / 1e6:.0f} MB")
    for name in ("report", "advise"):
        found: dict[str, float] = {}
        program = (
            "import sys; from bigbatch.cli import main; main(sys.argv[1:]); print(open('/proc/self/status').read())"
        )
        with timed(found):
            out = subprocess.run(
                [sys.executable, "-c", program, name, str(run)], check=True, capture_output=True, text=True
            ).stdout
        peak = int(out.partition("VmHWM:")[2].split()[0]) / 1024
        print(f"{name:<10}{found['wall_s']:>6.1f} s wall{found['cpu_s']:>6.1f} s CPU{peak:>7.0f} MiB peak resident")


def main() -> None:
    """Print every part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--memory-documents", nargs="+", type=int, default=[100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--text-mb", type=int, default=1000)
    parser.add_argument("--lines", type=int, default=1_000_000)
    asked = parser.parse_args()
    from bigbatch.lm.data.tokenizer import train_tokenizer

    names = ("bigbatch", "tokenizers", "transformers", "pyarrow", "torch")
    print(
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start"
    )
    print(", ".join(f"{name} {version(name)}" for name in names if name != "bigbatch"))
    with tempfile.TemporaryDirectory(prefix="bigbatch-data-store-") as name:
        folder, source = Path(name), words()
        train_tokenizer([source], vocabulary_size=32_000).save_pretrained(folder / "tokenizer")
        write_documents(folder / "documents.jsonl", asked.documents, source)
        write_documents(folder / "few.jsonl", 200, source)
        if "speed" in asked.parts:
            speed(folder, asked.documents, asked.rounds)
        if "start" in asked.parts:
            starts(folder, asked.rounds)
        if "memory" in asked.parts:
            memory(folder, asked.memory_documents, asked.text_mb, source)
        if "metrics" in asked.parts:
            metrics(folder, asked.lines)
    print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(globals()[sys.argv[2]](*sys.argv[3:])))
    else:
        main()
