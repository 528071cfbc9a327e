"""The commands of the page about offload run, and its table is that of the code."""

import re
import shlex
from pathlib import Path

import pytest

from bigbatch.cli import main
from bigbatch.offload.costs import ModelState, placement, transfers
from bigbatch.offload.levels import LEVELS
from support.language_models import records, save_model_folder, write_jsonl

PAGE = Path(__file__).parents[2] / "docs/how-to/offload.md"


@pytest.mark.slow
def test_commands_of_offload_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model_folder(tmp_path / "base")
    write_jsonl(tmp_path / "texts.jsonl", records(20))
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    printed = []
    for line in block.splitlines():
        words = shlex.split(line)
        assert words[0] == "bigbatch"
        quick = ["--gradient-checkpointing", "full"] if words[1] == "plan" else ["--device", "cpu", "--steps", "1"]
        assert main([*words[1:], "--max-length", "32", *quick]) == 0, line
        printed.append(capfd.readouterr().out)
    common, one, sharded, trained = printed
    assert re.findall(r"^\d+GB", common, re.MULTILINE) == ["12GB", "16GB", "24GB", "40GB", "80GB"]
    assert "64.0 GiB of host memory are available" in one
    assert "on each of 8 GPUs" in sharded
    assert "not in training" in sharded
    assert "\noffload none, chosen by auto: " in trained


def test_bytes_in_the_table_are_those_of_levels() -> None:
    n = 4096
    state = ModelState(4 * n, 0, 4 * n, 8 * n, narrowed=n, num_trained=n, largest=n, largest_state_bytes=8 * n)
    table, _, _ = PAGE.read_text(encoding="utf-8").partition("\n## Choose a level\n")
    rows = re.findall(r"^\| `(\w+)` \| (\d+).*\| (\d+).*\| (\d+), (\d+) \| (\d+) \|$", table, re.MULTILINE)
    assert tuple(level for level, *_ in rows) == LEVELS
    for level, card, host, to_card, to_host, per_microbatch in rows:
        held, moved = placement(state, level), transfers(state, level)
        assert (held.card_bytes, held.host_bytes) == (int(card) * n, int(host) * n)
        assert (moved.to_card, moved.to_host) == (int(to_card) * n, int(to_host) * n)
        assert moved.per_microbatch == int(per_microbatch) * n
