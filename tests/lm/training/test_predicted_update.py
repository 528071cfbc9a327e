"""The predicted time of an update with offload, by hand, and the line at the start of a run."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bigbatch.autotune.peak_prediction import PredictionError
from bigbatch.autotune.time_model import TimeModel
from bigbatch.cli import main
from bigbatch.lm.training import predicted_update
from bigbatch.lm.training.predicted_update import PredictedUpdate, predict_update
from bigbatch.offload.chunk_sizes import CHUNK_BYTES
from support.language_models import records, save_model_folder, write_jsonl


def engine_with(
    monkeypatch: pytest.MonkeyPatch, *, state: float = 0, sums: float = 0, link_rate: float | None = 10e9
) -> Any:
    """Return an engine that computes each micro-batch of 100 tokens in 0.1 s, with so many bytes on the host."""
    monkeypatch.setattr(predicted_update, "predicted_host_bytes", lambda _: (int(state), int(sums)))
    monkeypatch.setattr(predicted_update, "measure_link_rate", lambda _: link_rate)
    seconds = 0.1 if link_rate is None else max(0.1, sums / link_rate + 0.1 / 3)  # of a micro-batch
    choice = SimpleNamespace(per_s=100 / seconds, size=100, timing=TimeModel(((100, seconds),)))
    return SimpleNamespace(choice=choice, accumulator=SimpleNamespace(device=torch.device("cpu")))


def test_state_crosses_in_both_directions_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = predict_update(engine_with(monkeypatch, state=20e9), 950, "none")
    assert found is not None
    assert found.compute_s == 0.95
    assert found.copies_s == pytest.approx((20e9 + 2 * CHUNK_BYTES) / 10e9)
    assert found.total_s == found.compute_s + found.copies_s


@pytest.mark.parametrize(("mode", "share"), [("none", 2 / 3), ("selective", 5 / 7), ("full", 3 / 4)])
def test_sums_wait_for_what_backward_does_not_hide(monkeypatch: pytest.MonkeyPatch, mode: Any, share: float) -> None:
    """Ten micro-batches, each 0.1 s, and 0.2 s of copies; then the sums arrive twice, for their norm first."""
    found = predict_update(engine_with(monkeypatch, state=20e9, sums=2e9), 1000, mode)
    assert found is not None
    update_s = (20e9 + 2e9 + 2e9 + 2 * CHUNK_BYTES) / 10e9
    assert found.copies_s == pytest.approx(update_s + 10 * (0.2 - 0.1 * share))
    assert found.compute_s == pytest.approx(1.0)
    hidden = predict_update(engine_with(monkeypatch, state=20e9, sums=0.5e9), 1000, mode)
    assert hidden is not None
    assert hidden.copies_s == pytest.approx((20e9 + 0.5e9 + 0.5e9 + 2 * CHUNK_BYTES) / 10e9)


def test_nothing_is_predicted_without_bytes_or_link(monkeypatch: pytest.MonkeyPatch) -> None:
    assert predict_update(engine_with(monkeypatch), 1000, "none") is None
    assert predict_update(engine_with(monkeypatch, state=1e9, link_rate=None), 1000, "none") is None

    def fail(_: object) -> None:
        raise PredictionError("the step depends on the data")

    engine = engine_with(monkeypatch, state=1e9)
    monkeypatch.setattr(predicted_update, "predicted_host_bytes", fail)
    assert predict_update(engine, 1000, "none") is None


def test_prediction_names_its_parts() -> None:
    assert str(PredictedUpdate(4.1, 0.823, 27.6e9)) == (
        "about 4.92 s an update: 4.1 s of forward and backward, 0.823 s of copies at 27.6 GB/s in each direction, "
        "measured"
    )


def test_start_of_a_run_predicts_its_updates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also with the micro-batch of an earlier run, when the optimizer has no state yet."""
    model = save_model_folder(tmp_path / "base")
    data = write_jsonl(tmp_path / "data.jsonl", records(24))
    flags = ["--model", str(model), "--data", str(data), "--global-batch", "4", "--max-length", "32", "--steps", "2"]
    flags += ["--device", "cpu", "--microbatch", "auto", "--offload", "gradients"]
    shown = []
    for name in ("first", "second"):
        assert main(["train", *flags, "--out", str(tmp_path / name)]) == 0
        shown.append(capsys.readouterr().out)
    line = r"about \S+ s an update: \S+ s of forward and backward, \S+ s of copies at \S+ GB/s in each direction, "
    assert all(re.search(line + r"measured; about \S+ m?s for 2 updates\n", text) for text in shown), shown[0]
    assert "cached by" in shown[1]
