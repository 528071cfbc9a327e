"""Runs with products in float8, emulated on the CPU: what they print and record, resumed and merged runs, and plans."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bigbatch import lm
from bigbatch.cli import main
from bigbatch.cli.commands.verify import fp8_tolerance
from bigbatch.lm.model.fp8_gradient import Fp8Gradient
from support.command_line import files_below
from support.emulated_fp8 import emulated_fp8, needs_torchao, quiet_torchao
from support.language_models import metrics, records, save_model_folder, write_jsonl
from support.run_comparison import differences

__all__ = ["emulated_fp8"]
pytestmark = [needs_torchao, quiet_torchao, pytest.mark.usefixtures("emulated_fp8")]
NOT_BF16 = "not the update of bf16: the gradient is that of products in fp8, whose rounding depends on the micro-batch"
COSINE = "fp8: cosine of the gradient with that of bf16 products "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "data.jsonl", records(40))
    save_model_folder(tmp_path / "base")
    return tmp_path


def words(folder: Path, **more: Any) -> list[str]:
    settings = {"data": folder / "data.jsonl", "model": folder / "base", "max-length": 32, "precision": "fp8"}
    return [f"--{name}={value}" for name, value in (settings | more).items()]


def train_words(folder: Path, out: str, **more: Any) -> list[str]:
    settings = {
        "device": "cpu", "steps": 6, "lr": 0.01, "global-batch": 8, "microbatch": 4, "checkpoint-every": 2,
        "out": folder / out,
    }  # fmt: skip
    return ["train", *words(folder, **(settings | more))]


def recorded(run: Path) -> dict[str, Any]:
    """What the first event of a run records about its products in fp8."""
    found: dict[str, Any] = json.loads((run / "events.jsonl").read_text(encoding="utf-8").splitlines()[0])["fp8"]
    return found


def test_run_says_that_its_update_is_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(train_words(folder, "run")) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("fp8")]
    assert len(lines) == 2
    assert lines[0].startswith("fp8: 14 of 15 linear layers (tensorwise, torchao ")
    assert lines[0].endswith(f"); {NOT_BF16}")
    assert lines[1].startswith(COSINE)
    assert lines[1].endswith(" (first 4 samples)")
    assert 0.99 < float(lines[1].removeprefix(COSINE)[:6]) <= 1
    assert "on cpu, fp8 (affects memory, and the rounding of products in fp8)" in shown
    assert "not the result" not in shown
    assert shown.splitlines()[-1].endswith("measures how far splitting the batch moves the gradient")
    rows = metrics(folder / "run")
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_run_records_cosine_and_report_shows_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(train_words(folder, "run", steps=2)) == 0
    begin = recorded(folder / "run")
    assert begin["layers"].startswith("14 of 15 linear layers")
    assert begin["num_samples"] == 4
    assert 0.99 < begin["cosine"] < 1
    assert begin["note"] in capsys.readouterr().out
    assert json.loads((folder / "run" / "config.json").read_text(encoding="utf-8"))["precision"] == "fp8"
    assert main(["verify", *words(folder), "--device=cpu", "--json"]) == 0
    (folder / "run" / "verify.json").write_text(capsys.readouterr().out, encoding="utf-8")
    assert main(["report", str(folder / "run"), "--out", str(folder / "page.html")]) == 0
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert f"{begin['layers']}; not the update of bf16, and its rounding depends on the micro-batch" in page
    assert begin["note"].removeprefix("fp8: ") in page
    assert "Not exact: the rounding of products in fp8 depends on the cut; every cut is within the tolerance." in page
    assert "Exact: every cut" not in page


def test_verification_is_never_called_exact(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *words(folder), "--device=cpu", "--samples=9", "--cuts=1,4"]) == 0
    shown = capsys.readouterr().out
    assert NOT_BF16 in shown
    assert (
        "\nnot exact: the rounding of products in fp8 depends on the cut; every cut is within the tolerance\n" in shown
    )
    assert COSINE in shown
    assert "(first 9 samples)" in shown
    assert "exact: every cut" not in shown
    assert main(["verify", *words(folder), "--device=cpu", "--samples=9", "--cuts=1,4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exact"] is False
    assert found["fp8"]["is_within_tolerance"] is True
    assert found["tolerance"] == pytest.approx(max(0.03, 2**0.5 * found["fp8"]["relative_difference"]))
    assert all(1e-6 < cut["relative_error"] < found["tolerance"] for cut in found["cuts"])


def test_tolerance_of_cuts_is_that_of_two_roundings() -> None:
    assert fp8_tolerance(Fp8Gradient(0.92, 0.4, 4)) == pytest.approx(0.4 * 2**0.5)
    assert fp8_tolerance(Fp8Gradient(0.9999, 0.01, 4)) == 0.03  # that of bfloat16
    assert fp8_tolerance(Fp8Gradient(math.nan, math.nan, 4)) == 0.03


def test_saved_files_are_those_of_any_run(folder: Path) -> None:
    for out, precision in (("wide", "float32"), ("run", "fp8")):
        assert main(train_words(folder, out, precision=precision, steps=2)) == 0
    names = {out: files_below(folder / out) for out in ("wide", "run")}
    assert names["run"] == names["wide"]
    tensors = [name for name in names["run"] if name.endswith(".safetensors")]
    assert len(tensors) > 1
    for name in tensors:
        one, other = (load_file(folder / out / name) for out in ("run", "wide"))
        assert {key: t.dtype for key, t in one.items()} == {key: t.dtype for key, t in other.items()}
    ours, theirs = (json.loads((folder / out / "model" / "config.json").read_text()) for out in ("run", "wide"))
    assert ours == theirs


class StopAt(lm.Callback):
    def on_update(self, row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise lm.StopTraining("enough")


def settings(folder: Path, out: str) -> dict[str, Any]:
    given = {"data": str(folder / "data.jsonl"), "model": str(folder / "base"), "precision": "fp8", "device": "cpu"}
    sizes = {"steps": 6, "global_batch": 8, "microbatch": 4, "checkpoint_every": 2, "max_length": 32, "lr": 0.01}
    return given | sizes | {"out": folder / out}


def test_resumed_run_equals_uninterrupted_one(folder: Path) -> None:
    lm.train(settings(folder, "whole"))
    stopped = lm.train(settings(folder, "run"), callbacks=[StopAt()])
    assert (stopped.step, stopped.finished) == (3, False)
    resumed = lm.train(resume=folder / "run")
    assert resumed.finished
    assert any(note.startswith("fp8: 14 of 15") for note in resumed.notes)
    assert differences(folder / "run", folder / "whole") == []


def test_resume_refuses_another_precision(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm.train(settings(folder, "run"), callbacks=[StopAt()])
    lm.train(settings(folder, "wide") | {"precision": "bf16"}, callbacks=[StopAt()])
    for out, before, now in (("run", "fp8", "bf16"), ("wide", "bf16", "fp8")):
        assert main(["resume", str(folder / out), "--precision", now]) == 2
        assert capsys.readouterr().err == (
            f"bigbatch resume: {folder / out} was started with --precision {before} and cannot be resumed with "
            f"--precision {now}. Leave the flag out, or start a new run.\n"
        )


def own_loss(model: Any, microbatch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Half of the squared logits, whose gradient is not that of the cross entropy."""
    logits = model(input_ids=microbatch["input_ids"], attention_mask=microbatch["attention_mask"]).logits
    return 0.5 * logits.float().square().sum(), logits.shape[0]


def test_cosine_is_that_of_an_own_loss(folder: Path) -> None:
    given = settings(folder, "a") | {"steps": 1}
    runs = [
        lm.train(given | {"out": folder / "own"}, loss_fn=own_loss),
        lm.train(given | {"out": folder / "usual"}),
    ]
    assert all(len([note for note in run.notes if note.startswith(COSINE)]) == 1 for run in runs)
    own, usual = (recorded(run.path)["cosine"] for run in runs)
    assert abs(own - usual) > 1e-9


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed:FutureWarning")  # raised by peft
def test_adapters_are_merged_as_usual(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"lora-rank": 4, "optimizer": "adamw", "offload": "optimizer"}
    assert main(train_words(folder, "run", **more)) == 0
    assert "fp8: 14 of 15 linear layers" in capsys.readouterr().out
    assert main(["merge", str(folder / "run"), "--out", str(folder / "merged")]) == 0
    merged, base = (load_file(folder / name / "model.safetensors") for name in ("merged", "base"))
    assert {name: t.dtype for name, t in merged.items()} == {name: t.dtype for name, t in base.items()}
    assert not torch.equal(merged["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans for the GPU of this machine")
def test_plan_predicts_memory_on_cards_with_fp8(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words(folder, gpu="h100"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "h100, fp8"
    assert "fp8: not the update of bf16, and one whose rounding depends on the micro-batch" in found["notes"]
    assert main(["plan", *words(folder, gpu="h100", precision="bf16"), "--json"]) == 0
    wide = json.loads(capsys.readouterr().out)
    assert found["parts"]["gradients"] == wide["parts"]["gradients"]
    # windows hold bfloat16 copies of the weights of fused layers, which layers with products in fp8 are not
    assert found["parts"]["parameters"] < wide["parts"]["parameters"]
    assert main(["plan", *words(folder, **{"gpu": "h100", "lora-rank": 2}), "--json"]) == 0
    levers = [lever["flags"] for lever in json.loads(capsys.readouterr().out)["levers"]]
    assert levers
    assert not any("quantize" in flags for flags in levers)  # which excludes fp8
