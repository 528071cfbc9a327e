"""How long a run on several ranks needs from the loss of one to its next update, and whether its losses stay the same.

    python benchmarks/recovery.py --parallel ddp,fsdp [--ranks 2]          # CUDA cards of one host, over four minutes
    python benchmarks/recovery.py --device cpu --parallel ddp --small          # gloo, to try the script

A Llama of 0.5 billion parameters trains 12 updates of 64 sequences under ``--deterministic`` by `bigbatch train` and
torchrun, with a checkpoint every fourth. It runs once undisturbed, which also fills the caches of compiled code and
tokens. Then it runs again in another folder, rank 1 is killed (SIGKILL) once six updates are recorded, and torchrun
starts all ranks anew, which resume. *Lost* are the seconds from the kill to the next recorded update that the run had
not made before. Losses of all updates are compared with those of the undisturbed run. With ``--together``, the ways of
``--parallel`` run at the same time on cards of their own.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from launched_ranks import kill_rank, launch, updates, wait_for, wait_for_end

LARGE = {"hidden_size": 1280, "intermediate_size": 3456, "num_hidden_layers": 22, "num_attention_heads": 20}
SMALL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
KILLED_AFTER = 6
STEPS = 12


def train(parallel: str, options: argparse.Namespace, folder: Path, visible: str | None) -> str:
    """Run one way undisturbed and killed; return its line."""
    words = [
        "train", "--model-config", str(folder / "config.json"), "--tokenizer", "train:8000", "--device", options.device,
        "--max-length", "256" if options.small else "2048", "--global-batch", "16" if options.small else "64",
        "--steps", str(STEPS), "--checkpoint-every", "4", "--validation-fraction", "0", "--parallel", parallel,
        "--deterministic", *options.more.split(),
    ]  # fmt: skip
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    plain, killed = (folder / f"{parallel}-{name}" for name in ("plain", "killed"))
    log = folder / f"{parallel}.log"
    started_s = time.monotonic()
    process = launch(options.ranks, [*words, "--out", str(plain)], log, environment=environment)
    wait_for(lambda: updates(plain) > 0, process)
    first_s = time.monotonic() - started_s
    _say(f"{parallel}: first update after {first_s:.1f} s")
    if fault := wait_for_end(process, log):
        return f"{parallel:<6} undisturbed: {fault}"
    _say(f"{parallel}: undisturbed run ended after {time.monotonic() - started_s:.1f} s")
    started_s = time.monotonic()
    process = launch(options.ranks, [*words, "--out", str(killed)], log, restarts=1, environment=environment)
    wait_for(lambda: updates(killed) > 0, process)
    second_s = time.monotonic() - started_s
    if not wait_for(lambda: updates(killed) >= KILLED_AFTER, process):
        return f"{parallel:<6} ended before it was killed: {wait_for_end(process, log)}"
    _say(f"{parallel}: second run, {KILLED_AFTER} updates after {time.monotonic() - started_s:.1f} s; rank 1 is killed")
    kill_rank(process, 1)
    killed_s, done = time.monotonic(), updates(killed)
    wait_for(lambda: updates(killed) < done, process)  # a resumed run drops the updates after its checkpoint
    resumed_s = time.monotonic() - killed_s
    wait_for(lambda: updates(killed) > done, process)
    lost_s = time.monotonic() - killed_s
    _say(f"{parallel}: next update after {lost_s:.1f} s")
    if fault := wait_for_end(process, log):
        return f"{parallel:<6} killed: {fault}"
    one, other = (
        [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (plain, killed)
    )
    same = sum(a == b for a, b in zip(one, other, strict=True))
    return (
        f"{parallel:<6}{first_s:>16.1f} s{second_s:>17.1f} s{resumed_s:>12.1f} s{lost_s:>10.1f} s"
        f"{f'{same} of {len(one)} equal':>18}"
    )


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def main() -> int:
    """Print one line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parallel", default="ddp,fsdp")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--more", default="", help="more flags of bigbatch train, in one word")
    parser.add_argument("--logs", type=Path, help="copy the output of the runs to this folder")
    options = parser.parse_args()
    kinds = options.parallel.split(",")
    shape = {**(SMALL if options.small else LARGE), "model_type": "llama", "vocab_size": 8_000}
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {options.ranks} ranks, rank 1 killed after {KILLED_AFTER} updates")
    print(f"{'':<6}{'first update':>18}{'again':>19}{'resumed':>14}{'lost':>12}{'losses':>18}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "config.json").write_text(json.dumps({**shape, "max_position_embeddings": 2_048}))
        os.environ.setdefault("XDG_CACHE_HOME", str(folder / "cache"))
        size = options.ranks if options.together else 0
        cards = [",".join(map(str, range(n * size, n * size + size))) or None for n in range(len(kinds))]
        with ThreadPoolExecutor(len(kinds) if options.together else 1) as pool:
            lines = pool.map(lambda kind, cards: train(kind, options, folder, cards), kinds, cards)
            for line in lines:
                print(line, flush=True)
        if options.logs is not None:
            options.logs.mkdir(parents=True, exist_ok=True)
            for log in folder.glob("*.log"):
                (options.logs / f"recovery-{log.name}").write_bytes(log.read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
