"""The command lines of the pages about pretraining and validation run, one after the other, and do what they say."""

import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from bigbatch.cli import main
from support.language_models import metrics, records, write_jsonl

HOW_TO = Path(__file__).parents[2] / "docs/how-to"


def run_commands(page: str, capfd: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Run the command lines of a page; return what each printed."""
    text = (HOW_TO / page).read_text(encoding="utf-8")
    printed = {}
    for line in "".join(re.findall(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)).splitlines():
        words = shlex.split(line)
        assert words[0] == "bigbatch"
        quick = [] if words[1] in ("tokenize", "resume") or "--gpu" in words else ["--device", "cpu"]
        quick += ["--global-batch", "8"] if words[1] == "train" else []
        assert main([*words[1:], *quick]) == 0, line
        printed[line] = capfd.readouterr().out
    return printed


@pytest.mark.slow
def test_commands_of_pretraining_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    write_jsonl(tmp_path / "texts" / "a.jsonl", [{"text": row["completion"] * 3} for row in records(40)])
    (shape,) = re.findall(r"```json\n(.*?)```", (HOW_TO / "pretrain.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(shape)
    printed = run_commands("pretrain.md", capfd)
    assert len(printed) == 6
    first = next(iter(printed.values()))
    assert "the weights of the new model are random, from --seed 0\n" in first
    model = AutoModelForCausalLM.from_pretrained("runs/small/model")
    assert model.config.hidden_size == json.loads(shape)["hidden_size"]
    assert "exact: every cut gives the full-batch gradient" in "".join(printed.values())


@pytest.mark.slow
def test_commands_of_evaluation_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": row["completion"]} for row in records(100)]
    for i, name in enumerate(("texts", "web", "code", "held-out")):
        write_jsonl(tmp_path / f"{name}.jsonl", rows[20 * i : 20 * i + 20])
    printed = run_commands("evaluate.md", capfd)
    sets, best, early, resumed = printed.values()
    assert re.search(r"^update 20: validation loss of web \d\.\d{3} \(perplexity [\d.]+\), code ", sets, re.MULTILINE)
    keys = {key for row in metrics(tmp_path / "runs/sets") for key in row if key.startswith("validation")}
    kinds = ("validation_loss", "validation_perplexity")
    assert keys == {f"{kind}{ending}" for kind in kinds for ending in ("", "/web", "/code")}
    found = metrics(tmp_path / "runs/best")
    lowest = min((row for row in found if "validation_loss" in row), key=lambda row: row["validation_loss"])
    assert lowest["validation_loss"] == lowest["validation_loss/code"]
    assert f"weights after update {lowest['step']}, which has the lowest validation loss: " in best
    assert "weights after update " in early
    assert "already finished" in resumed or "resuming runs/early after update " in resumed
