"""A folder with training runs on one rank and on several, and the assertion that two of them are equal."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.language_models import metrics, records, save_model_folder, write_jsonl
from support.rank_faults import note_windows
from support.run_comparison import wrong_learning_rates
from support.torchrun_ranks import Launch, run

TIGHT = 1e-10  # in float64, after twenty updates
DROPPING = ("--model", "dropping", "--steps", "8", "--checkpoint-every", "3")
"""Arguments of shorter runs with dropout, where the random state of each rank matters."""


@dataclass(frozen=True)
class RunFolder:
    """A folder with data, models and runs."""

    folder: Path

    def words(self, out: str, *more: str) -> list[str]:
        """Return the arguments of a run of 20 updates in float64: 5 updates per epoch, a checkpoint every 6."""
        settings = {
            "data": "data.jsonl", "model": "plain", "max-length": "32", "steps": "20", "global-batch": "8",
            "precision": "float64", "token-budget": "64", "lr": "0.01", "checkpoint-every": "6",
            "validation-every": "7", "validation-fraction": "0.15", "device": "cpu",
        }  # fmt: skip
        if "--microbatch" in more:
            del settings["token-budget"]
        given = [word for name, value in settings.items() if f"--{name}" not in more for word in (f"--{name}", value)]
        to = [] if "--out" in more else ["--out", out]
        return ["train", *given, "--deterministic", *to, *more]

    def train(self, out: str, size: int, *more: str, **how: Any) -> Launch:
        """Train on ``size`` ranks; one process runs without torchrun."""
        return run(self.words(out, *more), size, folder=self.folder, alone=size == 1, **how)

    def launch(self, out: str, size: int, *more: str, **how: Any) -> Launch:
        """Start training on several ranks."""
        return Launch(self.words(out, *more), size, folder=self.folder, **how)

    def resume(self, out: str, size: int, *more: str, **how: Any) -> Launch:
        """Resume on ``size`` ranks."""
        return run(["resume", out, *more], size, folder=self.folder, alone=size == 1, **how)

    def model(self, out: str) -> dict[str, torch.Tensor]:
        """Return the saved parameters: those of the model, or of its adapters."""
        model = self.folder / out / "model" / "model.safetensors"
        return load_file(model if model.exists() else self.folder / out / "adapter" / "adapter_model.safetensors")

    def windows(self, out: str) -> dict[int, list[int]]:
        """Return the samples of each update, checked against the shares of its ranks."""
        shares: dict[int, dict[str, list[int]]] = {}
        whole: dict[int, list[int]] = {}
        for path in (self.folder / f"windows-{out}").glob("*.jsonl"):
            for step, window, share, _ in map(json.loads, path.read_text().splitlines()):
                shares.setdefault(step, {})[path.stem] = share  # the last attempt counts if a rank was lost
                assert whole.setdefault(step, window) == window, "ranks have different windows"
        for step, window in whole.items():
            assert sorted(i for share in shares[step].values() for i in share) == sorted(window)
        return dict(sorted(whole.items()))

    def budgets(self, out: str, rank: int) -> list[int]:
        """Return the token budget of a rank in each update, in execution order."""
        lines = (self.folder / f"windows-{out}" / f"{rank}.jsonl").read_text().splitlines()
        return [json.loads(line)[3] for line in lines]

    def noting(self, out: str) -> Any:
        folder = self.folder / f"windows-{out}"
        folder.mkdir(exist_ok=True)
        return note_windows(folder)


def make_run_folder(folder: Path) -> RunFolder:
    """Write the data and the models."""
    write_jsonl(folder / "data.jsonl", records(40))
    save_model_folder(folder / "plain")
    save_model_folder(folder / "dropping", kind="gpt2", dropout=0.1)
    return RunFolder(folder)


def max_relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max() / one[name].abs().max()) for name in one)


def assert_same_run(run_folder: RunFolder, out: str, alone: str) -> None:
    """Assert the same model, windows and metrics as on one rank."""
    rows, expected = metrics(run_folder.folder / out), metrics(run_folder.folder / alone)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert wrong_learning_rates(run_folder.folder / out) == []
    for row, other in zip(rows, expected, strict=True):
        for name in ("step", "items", "tokens", "lr", "skipped"):
            assert row[name] == other[name]
        for name in ("loss", "grad_norm", "validation_loss"):
            assert row.get(name) == (other.get(name) and pytest.approx(other[name], rel=TIGHT)), (row["step"], name)
    assert max_relative_difference(run_folder.model(out), run_folder.model(alone)) < TIGHT
    assert run_folder.windows(out) == run_folder.windows(alone)
