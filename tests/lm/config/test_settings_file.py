"""Settings in YAML have the values that the same words have on the command line."""

from pathlib import Path

import pytest

from bigbatch.cli.arguments import parse
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_of(text: str, *words: str) -> object:
    Path("run.yaml").write_text(text, encoding="utf-8")
    (config,) = parse("train", ["--config", "run.yaml", *words])
    return config


def test_yaml_values_are_those_of_flags() -> None:
    text = """\
# settings
data:
  - a.jsonl
  - "b:c.jsonl"
lr: 1e-3
steps: 012
skip_broken: true
sample_prompt: 1:30
max_grad_norm: none
out: null
memory: 80%
"""
    assert config_of(text) == TrainConfig(
        data=("a.jsonl", "b:c.jsonl"),
        lr=1e-3,
        steps=12,
        skip_broken=True,
        sample_prompt="1:30",
        max_grad_norm=None,
        memory="80%",
    )
    assert config_of(text, "--data", "c", "--steps", "3").data == ("c",)  # type: ignore[attr-defined]
    assert config_of("") == TrainConfig()


@pytest.mark.parametrize("suffix", ["yaml", "yml", "toml"])
def test_data_may_be_one_text_or_list(suffix: str, folder: Path) -> None:
    equals = " = " if suffix == "toml" else ": "
    for value, expected in (("'a'", ("a",)), ("['a', 'b']", ("a", "b"))):
        (folder / f"run.{suffix}").write_text(f"data{equals}{value}\n")
        (config,) = parse("train", ["--config", f"run.{suffix}"])
        assert isinstance(config, TrainConfig)
        assert config.data == expected
        stored = config.model_dump(mode="json")["data"]
        assert stored == (expected[0] if len(expected) == 1 else list(expected))
        assert TrainConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nsteps: 2", "run.yaml has the key 'steps' twice: give it once."),
        ("- steps", "run.yaml has no settings: write each as name: value, on a line of its own."),
        ("steps: [", "run.yaml is not valid YAML: expected the node content, but found '<stream end>' at line 1, "
         "column 9."),
        ("batch: {steps: 1}", "run.yaml has settings in batch: write the settings at the top level, without tables."),
        ("stepz: 1", "run.yaml has the unknown key 'stepz': did you mean 'steps'?"),
        ("steps: true", "steps in run.yaml is true: it must be a number."),
        ("steps: one", "steps in run.yaml is 'one': it must be a whole number."),
        ("data: []", "data in run.yaml is a list: it must not be an empty list."),
        ("data: [a, {b: c}]", "data in run.yaml contains a table: it must be text."),
        ("steps: !!python/name:os.system x", "run.yaml is not valid YAML: could not determine a constructor for the "
         "tag 'tag:yaml.org,2002:python/name:os.system' at line 1, column 8."),
        ("\t", "run.yaml is not valid YAML: found character '\\t' that cannot start any token at line 1, column 1."),
    ],
)  # fmt: skip
def test_invalid_yaml_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        config_of(text)
    assert str(caught.value) == message
