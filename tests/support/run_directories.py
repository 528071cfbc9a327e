"""Run directories written without training: every file of a run with any number of updates, in milliseconds."""

import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bigbatch.lm.runs.samples import Sample, write_sample

WINDOW = {
    "layout": "padded",
    "token_budget": 408,
    "num_samples": 8,
    "tokens": 900,
    "laid_out_tokens": 960,
    "num_microbatches": 3,
    "first": [[128, 128, 120], [110, 100, 94], [90, 130]],
    "last": [],
}
VERSIONS = {"bigbatch": "0.1.0", "Python": "3.11.7", "torch": "2.13.0"}
BEGIN = {
    "at": "2025-05-01T10:00:00+00:00",
    "event": "begin",
    "step": 0,
    "machine": "cpu, float32",
    "device": "cpu",
    "parameters": 4_200_000,
    "trained": 4_200_000,
    "recomputed": "none",
    "process_bytes": 840_000_000,
    "versions": VERSIONS,
    "window": WINDOW,
}
PROOF = {
    "model": "tiny",
    "data": "python-stdlib",
    "machine": "cpu, float32",
    "exact": True,
    "relative_error": 2.9e-7,
    "tolerance": 2e-5,
    "dtype": "float32",
    "num_samples": 16,
    "reference_microbatch": 16,
    "cuts": [
        {"microbatch": 1, "num_microbatches": 16, "relative_error": 2.9e-7, "mean_of_means_error": 9.4e-2},
        {"microbatch": 3, "num_microbatches": 6, "relative_error": 2.3e-7, "mean_of_means_error": None},
    ],
    "worst": [],
    "causes": [],
}
CHOICE = {"key": "k", "level": "none", "size": 408, "unit": "tokens", "peak_bytes": 84_281_536, "limit_bytes": 2**34}
SETTINGS: dict[str, Any] = {
    "data": "python-stdlib", "model": "tiny", "global_batch": 32, "microbatch": "auto", "lr": 0.005,
    "max_grad_norm": 1.0, "steps": None, "epochs": None, "device": "cpu", "out": "runs/made",
}  # fmt: skip


def rows(
    number: int, *, seed: int = 0, scale: float = 1.0, validation_every: int | None = None
) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl of a run with ``number`` updates."""
    source = random.Random(seed)
    found = []
    for step in range(1, number + 1):
        at = step / number
        loss = scale * (2.2 + 6.3 * math.exp(-9 * at)) + source.gauss(0, 0.12)
        seconds = abs(source.gauss(0.6, 0.03))
        items = 4096 + source.randrange(-200, 200)
        row = {
            "step": step,
            "loss": loss,
            "items": items,
            "grad_norm": 0.7 * math.exp(source.gauss(0, 0.25)) * (1 + 3 * math.exp(-20 * at)),
            "lr": 5e-3 * min(1.0, at / 0.1) * 0.5 * (1 + math.cos(math.pi * at)),
            "num_microbatches": 11 + source.randrange(2),
            "tokens": items,
            "tokens_per_s": items / seconds,
            "peak_bytes": int(9.2e8 + 8e7 * min(1.0, at * 5)),
            "elapsed_s": seconds,
            "skipped": None,
            "sequences": 32,
        }
        if validation_every and step % validation_every == 0:
            row["validation_loss"] = scale * (2.4 + 6.3 * math.exp(-9 * at))
            row["validation_perplexity"] = math.exp(row["validation_loss"])
        found.append(row)
    return found


def make_run(
    folder: Path,
    lines: Iterable[dict[str, Any]],
    *,
    events: Iterable[dict[str, Any]] | None = None,
    settings: dict[str, Any] | None = None,
    choice: dict[str, Any] | None = None,
    proof: dict[str, Any] | None = None,
) -> Path:
    """Write a run directory with these rows, events, settings, micro-batch choice and verification."""
    folder.mkdir(parents=True)
    lines = list(lines)
    total = {"total_steps": max((row["step"] for row in lines), default=10)}
    if events is None:
        at = "2025-05-01T11:00:00+00:00"
        events = [BEGIN | total, {"at": at, "event": "finished", "step": total["total_steps"], "why": None}]
    (folder / "config.json").write_text(json.dumps(SETTINGS | (settings or {}), indent=2), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    if choice:
        (folder / "microbatch.json").write_text(json.dumps(choice), encoding="utf-8")
    if proof:
        (folder / "verify.json").write_text(json.dumps(proof), encoding="utf-8")
    return folder


def make_rich_run(folder: Path, number: int = 300, **options: Any) -> Path:
    """Write a run with an entry for every section of the report page: resumes, skips, outliers and a proof."""
    lines = rows(number, validation_every=max(1, number // 10), **options)
    for row in lines:
        at = row["step"] / number
        row |= {
            "noise_scale_items": 900 * math.exp(4 * at) if at > 0.05 else None,
            "noise_scale_sequences": 7 * math.exp(4 * at) if at > 0.05 else None,
            "ranks": 4,
            "slowest_rank": row["step"] % 3,
            "slowest_share": 0.26 + 0.02 * math.sin(row["step"] / 9),
        }
    for step in (number // 4, number // 4 + 1, number // 2):
        lines[step - 1] |= {"loss": None, "grad_norm": None, "skipped": "non-finite gradient"}
    lines[number // 3]["retries"] = 2
    lines[number // 5]["loss"] = 11.5
    lines[number // 6]["grad_norm"] = 40.0
    total = {"total_steps": number}
    events = [
        BEGIN | total,
        BEGIN
        | total
        | {
            "event": "resume", "at": "2025-05-01T10:31:00+00:00", "step": number // 3,
            "checkpoint": f"step-{number // 3}",
            "passed_over": [[f"step-{number // 2}", "model.safetensors has 1 bytes, and the manifest says 2,048"]],
            "settings": {"memory": "16GiB"}, "window": None,
        },
        {"at": "2025-05-01T10:50:00+00:00", "event": "stopped", "step": number * 2 // 3, "why": "SIGTERM"},
        BEGIN | total | {"event": "resume", "at": "2025-05-01T10:55:00+00:00", "step": number * 2 // 3,
                         "checkpoint": f"step-{number * 2 // 3}", "passed_over": [], "settings": {}},
        {"at": "2025-05-01T11:20:00+00:00", "event": "finished", "step": number, "why": None},
    ]  # fmt: skip
    run = make_run(folder, lines, events=events, choice=CHOICE, proof=PROOF, settings={"memory": None})
    for step in (number // 2, number):
        write_sample(run, Sample(step, "def ", f"def f_{step}(x):\n    return x < 1 & x"))
    return run
