"""Every command and the Python of the page about LoRA run, on a tiny model."""

import re
import shlex
from pathlib import Path

import pytest

from bigbatch.cli import main
from support.language_models import conversations, save_model_folder, write_jsonl

PAGE = Path(__file__).parents[2] / "docs/how-to/lora.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed:FutureWarning")  # raised by peft
def test_commands_and_python_of_lora_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model_folder(tmp_path / "base")
    write_jsonl(tmp_path / "chats.jsonl", conversations(40))
    page = PAGE.read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "bigbatch"
        assert main([*words[1:], *(["--device", "cpu"] if words[1] in ("train", "generate") else [])]) == 0, line
    printed = capfd.readouterr().out
    assert re.search(r"^trained parameters: [\d,]+ of [\d,]+ \([\d.]+ %\)$", printed, re.MULTILINE)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "chats.jsonl", "merged", "merged-again", "runs"}
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    assert type(names["model"]).__name__ == "PeftModelForCausalLM"


def test_every_lora_flag_is_on_the_page() -> None:
    from bigbatch.lm.config.lora_fields import LoraFields

    page = PAGE.read_text(encoding="utf-8")
    assert all(f"`--{name.replace('_', '-')}" in page for name in LoraFields.model_fields)
