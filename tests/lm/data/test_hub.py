"""Names of models and data are checked on this machine before any library is loaded or any request is sent."""

import os
from pathlib import Path

import pytest

from bigbatch.errors import InputError
from bigbatch.lm.data.hub import check_model_path, looks_local


def refusal(model: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        check_model_path(str(model))
    return str(caught.value)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "small").mkdir(parents=True)
    (tmp_path / "models" / "small" / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2.5-0.5B", "some-one/some.model_1"])
def test_hub_names_pass(name: str) -> None:
    check_model_path(name)
    assert not looks_local(name)


@pytest.mark.parametrize("name", ["models/small", "./models/small", "models"])
def test_folders_pass(name: str) -> None:
    check_model_path(name)


def test_missing_folder_is_rejected_with_nearest() -> None:
    assert refusal("models/smal") == "there is no model folder 'models/smal'. Did you mean models/small?"
    assert refusal("./modles/small") == "there is no model folder './modles/small'. Did you mean models?"
    rest = "Pass the folder of a model or its hub name."
    assert refusal("models/other") == f"there is no model folder 'models/other'. {rest}"
    assert refusal("a/b/c") == f"there is no model folder 'a/b/c'. {rest}"
    assert refusal("/nowhere/at/all") == f"there is no model folder '/nowhere/at/all'. {rest}"
    assert refusal("my model") == f"there is no model folder 'my model'. {rest}"


def test_file_is_no_model(folder: Path) -> None:
    assert refusal("models/small/config.json") == (
        "--model models/small/config.json is a regular file. Pass the folder of the model."
    )
    os.mkfifo(folder / "models" / "pipe")
    assert refusal("models/pipe") == "--model models/pipe is a pipe. Pass the folder of the model."


def test_special_file_in_model_folder_is_rejected(folder: Path) -> None:
    os.mkfifo(folder / "models" / "small" / "tokenizer.json")
    assert refusal("models/small") == "the model folder models/small contains tokenizer.json, a pipe. Remove it."
