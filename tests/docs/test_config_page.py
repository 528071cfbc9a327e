"""The page about files of settings: its two files mean the same, and its commands are read."""

import re
import shlex
from pathlib import Path

import pytest

from bigbatch.cli.arguments import parse
from bigbatch.lm.config.train_config import TrainConfig

PAGE = Path(__file__).parents[2] / "docs/how-to/config-files.md"


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for language in ("toml", "yaml"):
        Path(f"run.{language}").write_text(block(language), encoding="utf-8")


def test_both_files_have_the_same_settings() -> None:
    (toml,) = parse("train", ["--config", "run.toml"])
    (yaml,) = parse("train", ["--config", "run.yaml"])
    assert toml == yaml
    assert isinstance(toml, TrainConfig)
    assert (toml.gradient_checkpointing, toml.max_grad_norm, toml.lora_targets) == ("full", None, "q_proj,v_proj")


def test_commands_of_config_page_are_read() -> None:
    commands = [shlex.split(line) for line in block("bash").splitlines()]
    assert len(commands) == 3
    configs = [parse(words[1], words[2:])[0] for words in commands]
    assert [config.lr for config in configs if isinstance(config, TrainConfig)] == [2e-4, 1e-4, 2e-4]


def test_flags_replace_excluded_settings_and_lists() -> None:
    Path("run.toml").write_text('steps = 3\nmicrobatch = 2\ndata = ["a", "b"]\n', encoding="utf-8")
    words = ["--config", "run.toml", "--epochs", "2", "--token-budget", "99", "--data", "c"]
    (config,) = parse("train", words)
    assert isinstance(config, TrainConfig)
    assert (config.steps, config.epochs, config.microbatch, config.token_budget) == (None, 2, None, 99)
    assert config.data == ("c",)
