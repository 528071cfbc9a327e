"""Every command of the page about QLoRA runs, on a tiny model, and its table is that of the code."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from bigbatch.cli import main
from bigbatch.lm.model.nf4 import Nf4Linear, load_kernels
from support.language_models import conversations, save_model_folder, write_jsonl

PAGE = Path(__file__).parents[2] / "docs/how-to/qlora.md"


@pytest.mark.slow
def test_commands_of_qlora_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model_folder(tmp_path / "base")
    write_jsonl(tmp_path / "chats.jsonl", conversations(40))
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = block.splitlines()
    assert [shlex.split(line)[1] for line in lines] == ["plan", "train", "generate", "merge"]
    for line in lines:
        words = shlex.split(line)
        assert main([*words[1:], *(["--device", "cpu"] if words[1] != "merge" else [])]) == 0, line
    assert re.search(r"^14 linear layers with 5,120 weights in 4 bits take", capfd.readouterr().out, re.MULTILINE)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "chats.jsonl", "merged", "runs"}


def test_bytes_in_the_table_are_those_of_layers() -> None:
    load_kernels()
    rows = dict(re.findall(r"^\| `(nf4(?:-double)?)` \|.*\| ([\d.]+) GiB \|$", PAGE.read_text("utf-8"), re.MULTILINE))
    weight = torch.empty(4096, 4096, device="meta")
    for name, gib in rows.items():
        layer = Nf4Linear(weight, double=name == "nf4-double")
        bits = sum(p.nbytes for p in layer.parameters()) / weight.numel()
        assert f"{7e9 * bits / 2**30:.1f}" == gib
    assert len(rows) == 2
