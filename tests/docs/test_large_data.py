"""The page about large data: its command lines run one after the other in an empty folder."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from bigbatch.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "large-data.md"
QUICK = ("--device", "cpu", "--microbatch", "2", "--global-batch", "4", "--max-length", "16")


@pytest.mark.slow
def test_commands_of_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    printed = {}
    for line in "".join(blocks).splitlines():
        if not line.startswith("bigbatch"):
            subprocess.run(["bash", "-euc", line], check=True)
            continue
        words = shlex.split(line.removesuffix(" &"))[1:]
        assert main([*words, *(QUICK if words[0] == "train" else ())]) == 0
        printed[line] = capfd.readouterr().out
    first, second, cache, *_ = printed.values()
    assert "tokenizing corpus.jsonl" in first
    assert "tokenizing" not in second
    assert "tokens of corpus.jsonl for tiny" in cache
    assert "3 entries" in cache or "4 entries" in cache
    assert "0 entries" in printed["bigbatch cache --unused-for 30"]
    assert " removed " in printed["bigbatch cache --remove"]
    (tokenized,) = [out for line, out in printed.items() if line.endswith("--out tokens")]
    assert "next: bigbatch train --data tokens --model tiny" in tokenized
    (of_songs,) = [out for line, out in printed.items() if line.endswith("--out song-tokens")]
    assert (
        "the split validation of songs is not used\nbigbatch train --data song-tokens holds documents out of these "
        "tokens to validate on; to validate on the split validation instead, pass --validation-data songs\n" in of_songs
    )
    (validated,) = [out for line, out in printed.items() if line.endswith("--out validated")]
    assert "training data: 90 documents " in validated
    assert "validation data: 9 documents " in validated
    for name in ("third", "fourth"):
        (out,) = [out for line, out in printed.items() if line.endswith(f"--out {name}")]
        assert "tokenizing" not in out
        assert "3,000 records in 1 file from corpus.jsonl" in out
    (mixed,) = [out for line, out in printed.items() if line.endswith("--out mixed")]
    assert "mixture: 70.0% of the tokens from corpus.jsonl, 1 pass; 30.0% of the tokens from other.jsonl, " in mixed
    assert "an epoch is one pass over corpus.jsonl, " in mixed
