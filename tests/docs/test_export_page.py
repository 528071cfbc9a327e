"""The commands and the Python of the page about trained models run, on a tiny model."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from bigbatch.cli import main
from support.language_models import conversations, save_model_folder, write_jsonl

PAGE = Path(__file__).parents[2] / "docs/how-to/export.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed:FutureWarning")  # raised by peft
def test_commands_and_python_of_export_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model_folder(tmp_path / "base")
    write_jsonl(tmp_path / "chats.jsonl", conversations(40))
    page = PAGE.read_text(encoding="utf-8")
    (commands,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for line in commands.splitlines():
        words = shlex.split(line)
        assert main([*words[1:], *(["--device", "cpu"] if words[1] in ("train", "generate") else [])]) == 0, line
    printed = capfd.readouterr().out
    for suggestion in (
        'next: bigbatch generate runs/chat --chat "Hello"\n',
        "      bigbatch merge runs/chat --out runs/chat-merged   writes the model with its adapters\n",
        "      python convert_hf_to_gguf.py runs/chat-merged   of llama.cpp, writes a GGUF file\n",
    ):
        assert suggestion in printed
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        merged, adapted = (names[name](tokens).logits for name in ("model", "adapted"))  # type: ignore[operator]
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5)
    assert names["tokenizer"].chat_template  # type: ignore[attr-defined]
