"""What starting the command may load: ``--help`` and complaints come before any heavy library."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "transformers", "tokenizers", "datasets", "safetensors", "peft", "rich")


def loaded_after(code: str, watched: tuple[str, ...]) -> set[str]:
    """Run ``code`` in a fresh interpreter; return which of ``watched`` it left in ``sys.modules``."""
    script = f"import sys\n{code}\nprint('loaded', *[name for name in {watched!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    last = done.stdout.splitlines()[-1].split()
    assert last[0] == "loaded"
    return set(last[1:])


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["--version"], ["trian"]])
def test_overview_loads_no_pydantic(words: list[str]):
    code = f"from bigbatch.cli import main; main({words!r})"
    assert loaded_after(code, (*HEAVY, "pydantic", "argparse")) == set()


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--help"],
        ["verify", "--help"],
        ["generate", "--help"],
        ["report", "--help"],
        ["report"],
        ["bench", "--help"],
        ["bench", "--only", "trianer"],
        ["train", "--global-batch", "0"],
        ["train", "--config", "/nonexistent.toml"],
        ["generate"],
    ],
)
def test_help_and_errors_load_no_heavy_library(words: list[str]):
    assert loaded_after(f"from bigbatch.cli import main; main({words!r})", HEAVY) == set()


def test_unwritable_file_is_reported_before_torch_loads():
    code = "from bigbatch.cli import main; main(['bench', '--save', '/nonexistent/folder/file'])"
    assert loaded_after(code, ("torch", "transformers")) == set()


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--model", "/nonexistent/model"],
        ["train", "--model", "no/such/folder"],
        ["train", "--data", "/nonexistent/data.jsonl"],
        ["plan", "--data", "./missing.txt"],
        ["verify", "--model", "./missing"],
        ["resume", "/nonexistent/run"],
        ["resume", ".", "--data", "/nonexistent/data.jsonl", "--allow-data-change"],
        ["resume", ".", "--validation-data", "/nonexistent/data.jsonl", "--allow-data-change"],
        ["train", "--data", "python-stdlib", "./missing.txt"],
        ["train", "--validation-data", "./missing.txt"],
        ["generate", "/nonexistent/run"],
        ["advise", "/nonexistent/run"],
        ["checkpoints", "/nonexistent/run"],
        ["report", "/nonexistent/run"],
    ],
)
def test_missing_path_is_reported_before_torch_loads(words: list[str]):
    code = f"from bigbatch.cli import main; assert main({words!r}) == 2"
    assert loaded_after(code, ("torch", "transformers", "tokenizers", "datasets", "numpy", "pyarrow")) == set()


def test_importing_package_loads_no_optional_library():
    watched = ("transformers", "rich", "pydantic", "datasets", "tokenizers", "peft")
    assert loaded_after("import bigbatch", watched) == set()


@pytest.mark.parametrize("words", [["train", "--help"], ["train"], ["verify"], ["generate", "RUN"], ["bench"]])
def test_missing_extra_is_one_sentence(words: list[str]):
    script = f"import sys; sys.modules['pydantic'] = None; from bigbatch.cli import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f'bigbatch {words[0]}: pydantic is not installed: pip install "bigbatch[train]".\n'
    assert done.stdout == ""


def test_importing_trainer_package_loads_no_library():
    assert loaded_after("import bigbatch.lm; dir(bigbatch.lm)", (*HEAVY, "pydantic")) == set()


def test_configuration_loads_no_heavy_library():
    assert loaded_after("import bigbatch.lm; bigbatch.lm.TrainConfig(steps=3)", HEAVY) == set()
