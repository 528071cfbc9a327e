"""Every command and the Python of the pages about objectives run, on a tiny model."""

import json
import re
import shlex
from pathlib import Path

import pytest

from bigbatch.cli import main
from support.language_models import examples, pairs, save_model_folder, write_jsonl
from support.tiers import slow_except

PAGES = Path(__file__).parents[2] / "docs/how-to"
OBJECTIVES = ("dpo", "reward", "embedding")


def text_of(objective: str) -> str:
    return (PAGES / f"{objective}.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed:FutureWarning")  # raised by peft
@pytest.mark.parametrize("objective", slow_except(OBJECTIVES, "dpo"))
def test_commands_and_python_of_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], objective: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model_folder(tmp_path / "base")
    page = text_of(objective)
    (record,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    write_jsonl(tmp_path / "pairs.jsonl", [*pairs(40), *([] if objective == "embedding" else [json.loads(record)])])
    write_jsonl(
        tmp_path / "queries.jsonl", [*examples(40), *([json.loads(record)] if objective == "embedding" else [])]
    )
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(lines) >= 3
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "bigbatch"
        assert main([*words[1:], *(["--device", "cpu"] if words[1] in ("train", "verify", "generate") else [])]) == 0, (
            line
        )
    assert "exact: every cut gives the full-batch gradient" in capfd.readouterr().out
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, objective, "exec"), names)
    if objective == "reward":
        assert list(names["scores"].shape) == [2]  # type: ignore[attr-defined]
    if objective == "embedding":
        assert -1 <= float(names["similarity"]) <= 1  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_page_is_short_and_names_every_flag_of_its_objective(objective: str) -> None:
    from bigbatch.lm.config.objective_fields import OF_OBJECTIVE

    page = text_of(objective)
    assert len(page.splitlines()) <= 80
    flags = [f"--{name.replace('_', '-')}" for name, owner in OF_OBJECTIVE.items() if owner == objective]
    assert flags
    assert all(flag in page for flag in flags)
